"""Routing, load balancing and the experts' shared path."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from minimind_nb.model.architecture import (
    MiniMindConfig,
    MoEFeedForward,
    balance_loss,
)


def mixture(**fields) -> MoEFeedForward:
    torch.manual_seed(0)
    shape = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2}
    layer = MoEFeedForward(MiniMindConfig(**{**shape, "use_moe": True, **fields}))
    for weight in layer.parameters():
        torch.nn.init.normal_(weight, std=0.5)
    return layer


def test_balance_loss_at_literal_values():
    scores = torch.tensor([[1.6, 0.4], [0.8, 1.2]])  # summed over two tokens a row
    count, tokens = torch.tensor([[2.0, 0.0], [1.0, 1.0]]), torch.tensor([2.0, 2.0])
    # First sequence: f = (2, 0), p = (0.8, 0.2); second: f = (1, 1), p = (0.4, 0.6).
    loss = balance_loss(scores, count, tokens, True).item()
    assert loss == pytest.approx((1.6 + 1) / 2)
    # Over the batch: f = (3, 1) · 2 / 4, p = (0.6, 0.4).
    loss = balance_loss(scores, count, tokens, False).item()
    assert loss == pytest.approx(1.5 * 0.6 + 0.2)
    # To 2 of 4 experts each.
    even = torch.ones(3, 4), torch.full((3, 4), 2.0), torch.full((3,), 4.0)
    assert [balance_loss(*even, seq_aux).item() for seq_aux in (True, False)] == [1, 2]


@pytest.mark.parametrize("seq_aux", [True, False])
def test_gate_weighs_the_loss_in_training_only(seq_aux):
    gate = mixture(aux_loss_alpha=0.1, seq_aux=seq_aux).gate
    x = torch.randn(3, 5, 8)
    expert, weight, choices, aux = gate(x)
    scores = (x @ gate.weight.T).softmax(-1).sum(1)
    count = torch.stack([row.flatten().bincount(minlength=4) for row in expert])
    loss = balance_loss(scores, count, torch.full((3,), 5.0), seq_aux)
    torch.testing.assert_close(aux, 0.1 * loss)
    assert choices.tolist() == [count.sum(0).tolist()] * 2
    torch.testing.assert_close(weight.sum(-1), torch.ones(3, 5))
    assert gate.eval()(x)[3].item() == 0


@pytest.mark.parametrize("seq_aux", [True, False])
@pytest.mark.parametrize("length", [43, 128, 1024])
def test_padding_changes_neither_loss_nor_load(seq_aux, length):
    layer = mixture(aux_loss_alpha=0.02, seq_aux=seq_aux)
    x = torch.randn(2, 1024, 8)
    alone, aux = layer(x[:, :43])
    load = layer.expert_load
    assert sum(load) == 2 * 43 * 2
    padded, padded_aux = layer(x[:, :length], (torch.arange(length) < 43).expand(2, -1))
    torch.testing.assert_close(padded_aux, aux, rtol=1e-6, atol=0)
    torch.testing.assert_close(padded[:, :43], alone)
    assert layer.expert_load == load


@pytest.mark.parametrize(
    ("fields", "total"),
    [
        ({"num_experts_per_tok": 1}, None),
        ({"num_experts_per_tok": 1, "qk_norm": True}, 1.0),
        ({"num_experts_per_tok": 1, "qk_norm": True, "norm_topk_prob": False}, None),
        ({"num_experts_per_tok": 2, "norm_topk_prob": False}, None),
    ],
)
def test_a_lone_expert_is_normalised_in_the_third_generation_only(fields, total):
    gate = mixture(**fields).gate
    x = torch.randn(1, 6, 8)
    _, weight, _, _ = gate(x)
    top = (x @ gate.weight.T).softmax(-1).topk(gate.top_k).values.sum(-1)
    expected = top if total is None else torch.full((1, 6), total)
    torch.testing.assert_close(weight.sum(-1), expected)


def test_expert_load_counts_the_tokens_of_each_expert():
    layer = mixture()
    x = torch.randn(2, 7, 8)
    layer(x)
    chosen = layer.gate(x)[0].flatten().tolist()
    assert layer.expert_load == [chosen.count(e) for e in range(4)]


def test_an_expert_without_tokens_gets_zero_gradients():
    layer = mixture(n_shared_experts=0)
    with torch.no_grad():
        layer.gate.weight[2:] = -layer.gate.weight[:2].abs() - 5
        layer.gate.weight[:2].abs_()
    y, aux = layer(torch.rand(2, 5, 8))
    (y.sum() + aux).backward()
    assert layer.expert_load == [10, 10, 0, 0]
    for expert, used in zip(layer.experts, (True, True, False, False), strict=True):
        for weight in expert.parameters():
            assert weight.grad is not None
            assert bool(weight.grad.any()) is used


def test_gradients_equal_those_of_the_plain_sum():
    layer = mixture()
    x = torch.randn(2, 6, 8, requires_grad=True)
    y, _ = layer(x)
    upstream = torch.randn_like(y)
    wanted = [x, *layer.parameters()]
    grads = torch.autograd.grad((y * upstream).sum(), wanted)

    scores = (x @ layer.gate.weight.T).softmax(-1)
    top = scores.topk(2).values.sum(-1, keepdim=True)
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(2).indices, 1.0)
    weight = scores * chosen / top
    plain = sum(weight[..., e, None] * layer.experts[e](x) for e in range(4))
    plain = plain + layer.shared_experts[0](x)
    torch.testing.assert_close(y, plain)
    expected = torch.autograd.grad((plain * upstream).sum(), wanted)
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_forward_and_backward_are_repeatable_bit_for_bit():
    layer = mixture()
    x = torch.randn(4, 64, 8)

    def gradients():
        y, aux = layer(x)
        return torch.autograd.grad(y.square().sum() + aux, list(layer.parameters()))

    first, second = gradients(), gradients()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_routing_uses_no_nonzero_and_no_index_put():
    layer = mixture()
    x = torch.randn(2, 16, 8)
    with profile(activities=[ProfilerActivity.CPU]) as trace:
        y, aux = layer(x)
        (y.sum() + aux).backward()
    calls = {event.key: event.count for event in trace.key_averages()}
    assert calls["aten::sort"] == 1
    slow = {"aten::nonzero", "aten::index_put_", "aten::_index_put_impl_"}
    assert not slow & calls.keys()
    assert calls.get("aten::_local_scalar_dense", 0) <= 1
