"""The parts of training that are functions of their arguments."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from minimind_nb.config import TrainConfig, resolve
from minimind_nb.data.batches import IGNORED, MicroBatch
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.training import trainer as trainer_module
from minimind_nb.training.optim import (
    FlatGradients,
    build_optimizer,
    learning_rate,
    orthogonalise,
)
from minimind_nb.training.stages import Losses, document_mask, next_token_loss
from minimind_nb.training.trainer import SessionClock
from minimind_nb.training.worker import is_out_of_memory

CFG = resolve(TrainConfig(data_path="demo"))


def backward(model: MiniMindForCausalLM, ids: torch.Tensor) -> None:
    batch = MicroBatch(ids[:, :-1], ids[:, 1:], None, len(ids))
    next_token_loss(model, batch, CFG).loss.backward()


def tiny_model(**more: bool) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    shape = MiniMindConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=50,
        **more,
    )
    return MiniMindForCausalLM(shape).train()


def rates(warmup: int, total: int, steps: int) -> list[float]:
    decay = {"learning_rate": 1.0, "min_learning_rate": 0.1, "warmup_iters": warmup}
    cfg = resolve(TrainConfig(**decay, schedule="cosine"))
    return [learning_rate(step, total, cfg, total) for step in range(steps)]


def test_the_rate_warms_up_and_falls_to_its_floor() -> None:
    found = rates(warmup=5, total=100, steps=201)
    picked = [found[step] for step in (0, 4, 5, 52, 99, 200)]
    assert picked == pytest.approx([0.2, 1.0, 1.0, 0.55, 0.1, 0.1], rel=1e-9)
    assert rates(warmup=0, total=1, steps=1) == [1.0]


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (9, 0), (12, 1), (39, 3)])
def test_a_warm_up_takes_a_tenth_of_a_short_run(total: int, warmup: int) -> None:
    found = rates(warmup=20, total=total, steps=total)
    assert found.index(max(found)) == max(0, warmup - 1)
    assert max(found) == 1.0
    assert found[:warmup] == [(step + 1) / warmup for step in range(warmup)]


def test_a_linear_schedule_is_constant_before_its_decay() -> None:
    cfg = resolve(TrainConfig(learning_rate=1.0, warmup_iters=4))
    found = [learning_rate(step, 20, cfg, 15) for step in range(20)]
    assert found[:4] == [0.25, 0.5, 0.75, 1.0]
    assert set(found[4:16]) == {1.0}
    assert found[16:] == pytest.approx([0.8, 0.6, 0.4, 0.2])


def test_a_warm_up_that_was_set_is_taken_as_set() -> None:
    cfg = resolve(TrainConfig(learning_rate=1.0, warmup_iters=10))
    found = [learning_rate(step, 12, cfg, 8) for step in range(12)]
    assert found == pytest.approx([n / 10 for n in range(1, 11)] + [0.5, 0.25])


@pytest.mark.parametrize("shape", [(3, 16, 64), (2, 64, 16), (4, 32, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_newton_schulz_brings_singular_values_near_one(
    shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    matrices = torch.randn(shape) * torch.logspace(-6, 3, shape[0])[:, None, None]
    found = orthogonalise(matrices, dtype).float()
    values = torch.linalg.svdvals(found)
    assert found.shape == shape
    assert 0.4 < values.min() and values.max() < 1.3
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = F.cosine_similarity((u @ v).flatten(1), found.flatten(1))
    assert cosine.min() > 0.95


def test_muon_is_for_the_matrices_of_the_layers() -> None:
    model = tiny_model(use_moe=True)
    optimizer = build_optimizer(model, CFG)
    muon, decayed, plain = (group["params"] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1, 0]
    names = {id(p): name for name, p in model.named_parameters()}
    kinds = [{names[id(p)].split(".")[-2] for p in group} for group in (muon, decayed)]
    attention = {f"{name}_proj" for name in "qkvo"}
    assert kinds[0] == attention | {"gate_proj", "up_proj", "down_proj"}
    assert kinds[1] == {"embed_tokens", "gate"}
    assert {p.ndim for p in plain} == {1}
    assert len(muon) + len(decayed) + len(plain) == len(names)


def test_muon_updates_as_written_down() -> None:
    """Two steps of each matrix by itself; the others as AdamW has them."""
    model, other = tiny_model(), tiny_model()
    optimizer = build_optimizer(model, CFG)
    adamw = build_optimizer(other, replace(CFG, optimizer="adamw"))
    muon = {id(p) for p in optimizer.param_groups[0]["params"]}
    rate, decay = CFG.learning_rate, CFG.weight_decay
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    momenta = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    for _ in range(2):
        for one, two in zip(model.parameters(), other.parameters(), strict=True):
            one.grad = torch.randn_like(one)
            two.grad = one.grad.clone()
        for name, p in model.named_parameters():
            if id(p) in muon:
                assert p.grad is not None
                momenta[name] = 0.95 * momenta[name] + 0.05 * p.grad
                update = orthogonalise((0.05 * p.grad + 0.95 * momenta[name])[None])[0]
                size = rate * 0.2 * max(p.shape) ** 0.5
                expected[name] = expected[name] * (1 - rate * decay) - size * update
        optimizer.step()
        adamw.step()
    for (name, one), two in zip(
        model.named_parameters(), other.parameters(), strict=True
    ):
        wanted = expected[name] if id(one) in muon else two
        torch.testing.assert_close(one, wanted, rtol=1e-5, atol=1e-7)


def test_muon_leaves_a_matrix_without_gradient_where_it_is() -> None:
    model = tiny_model(use_moe=True)
    optimizer = build_optimizer(model, replace(CFG, weight_decay=0.0))
    idle = model.get_parameter("model.layers.0.mlp.experts.3.up_proj.weight")
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    before = idle.detach().clone()
    idle.grad = torch.zeros_like(idle)
    optimizer.step()
    assert idle.equal(before)
    assert optimizer.state[idle]["momentum"].any()


def test_packed_with_a_document_mask_equals_separate_documents() -> None:
    model = tiny_model()
    documents = [torch.randint(3, 50, (n,)) for n in (7, 12, 9)]
    separate = 0.0
    for ids in documents:
        alone = MicroBatch(ids[None, :-1], ids[None, 1:], None, 1)
        separate += float(next_token_loss(model, alone, CFG).loss.detach())
    inputs = torch.cat([ids[:-1] for ids in documents])[None]
    targets = torch.cat([ids[1:] for ids in documents])[None]
    numbers = torch.repeat_interleave(
        torch.arange(3), torch.tensor([len(ids) - 1 for ids in documents])
    )[None]
    packed = next_token_loss(model, MicroBatch(inputs, targets, numbers, 1), CFG).loss
    assert float(packed.detach()) == pytest.approx(separate, abs=1e-5 * separate)
    unmasked = next_token_loss(model, MicroBatch(inputs, targets, None, 1), CFG).loss
    assert abs(float(unmasked.detach()) - separate) > 1e-3


@pytest.mark.parametrize("more", [{}, {"use_moe": True}])
@pytest.mark.parametrize("masked", [False, True])
def test_the_losses_are_independent_of_padding(
    masked: bool, more: dict[str, bool]
) -> None:
    model = tiny_model(**more)
    ids = torch.randint(3, 50, (1, 10))
    numbers = torch.zeros(1, 9, dtype=torch.int32) if masked else None
    alone = MicroBatch(ids[:, :-1], ids[:, 1:], numbers, 1)
    plain = next_token_loss(model, alone, CFG)
    load = model.expert_load()
    pad = torch.zeros(1, 6, dtype=torch.int64)
    padded = MicroBatch(
        torch.cat([ids[:, :-1], pad], 1),
        torch.cat([ids[:, 1:], pad + IGNORED], 1),
        torch.cat([numbers, pad.int() - 1], 1) if numbers is not None else None,
        samples=1,
    )
    losses = next_token_loss(model, padded, CFG)
    torch.testing.assert_close(losses, plain, rtol=1e-6, atol=0)
    assert model.expert_load() == load
    assert bool(load) == bool(losses.aux_loss) == bool(more)
    losses.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_the_document_mask_at_literal_positions() -> None:
    mask = document_mask(torch.tensor([[0, 0, 1, -1]]), torch.float16)
    assert mask.shape == (1, 1, 4, 4)
    assert mask.dtype == torch.float16
    assert mask[0, 0].exp().int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 0, 1],
    ]


def test_gradients_are_views_of_one_tensor_and_stay_so() -> None:
    model = tiny_model()
    gradients = FlatGradients(model, torch.device("cpu"), 3)
    ids = torch.randint(3, 50, (2, 10))
    for _ in range(2):
        backward(model, ids)
    begin = 0
    for parameter in model.parameters():
        view = gradients.flat[begin : begin + parameter.numel()]
        assert parameter.grad is not None
        assert parameter.grad.data_ptr() == view.data_ptr()
        begin += parameter.numel()
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    expected = float(torch.stack(norms).norm())
    for values in ([2.5, 0.5, 3.0], [1.0, 0.0, -4.0]):
        loss, aux_loss, metric = torch.tensor(values, requires_grad=True)
        gradients.add_losses(Losses(loss, aux_loss, metric[None]))
    assert not gradients.flat.requires_grad, "no graph grows from step to step"
    gradients.add_stop_flags([0.0, 1.0, 0.0])
    norm, sums, flags = gradients.grad_norm_and_sums()
    assert norm == pytest.approx(expected, rel=1e-5)
    assert (sums, flags) == ([3.5, 0.5, -1.0], [0.0, 1.0, 0.0])
    gradients.clip(norm, 1.0)
    assert float(gradients.gradients.norm()) == pytest.approx(1.0, rel=1e-5)
    gradients.clip(1.0, 0.0)
    assert float(gradients.gradients.norm()) == pytest.approx(1.0, rel=1e-5)
    gradients.flat.zero_()
    assert gradients.grad_norm_and_sums() == (0.0, [0.0] * 3, [0.0] * 3)


def test_only_matrices_decay() -> None:
    model = tiny_model()
    adamw = {"optimizer": "adamw", "weight_decay": 0.3, "learning_rate": 0.1}
    cfg = resolve(TrainConfig(**adamw))
    decaying, plain = build_optimizer(model, cfg).param_groups
    assert (decaying["weight_decay"], plain["weight_decay"]) == (0.3, 0.0)
    assert all(p.ndim == 2 for p in decaying["params"])
    assert all(p.ndim == 1 for p in plain["params"])
    total = len(decaying["params"]) + len(plain["params"])
    assert total == len(list(model.parameters()))


def test_the_margin_is_a_slow_step_a_validation_and_two_saves(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer_module.time, "monotonic", lambda: 100.0)
    clock = SessionClock(math.inf)

    def margin() -> float:
        """The seconds before a deadline in which a session is over."""
        deadlines = itertools.count(101.0)
        for clock.deadline in deadlines:
            if not clock.is_over():
                break
        return clock.deadline - 100.0

    assert margin() == 20.0, "ten seconds a save are assumed at first"
    for seconds in (30.0, 1.0):
        clock.add("step", seconds)
    clock.add("save", 5.0)
    clock.add("save", 4.0)
    assert margin() == 40.0, "the slowest step, and two saves"
    clock.add("validation", 20.0)
    clock.add("validation", 15.0)
    assert margin() == 60.0


def test_what_counts_as_out_of_memory() -> None:
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    text = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
    assert is_out_of_memory(RuntimeError(text))
    assert is_out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert is_out_of_memory(RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling"))
    assert is_out_of_memory(MemoryError("Unable to allocate 9 GiB for an array"))
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
