"""Named tensors against a configuration: what does not belong together is named."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.model.state_dict import check_fit, infer_shape, put_weights, read_pth

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
EMBEDDING = "model.embed_tokens.weight"
MIXTURE: dict[str, Any] = {"use_moe": True, "n_routed_experts": 3}


def make(**fields: Any) -> tuple[MiniMindConfig, dict[str, torch.Tensor]]:
    config = MiniMindConfig(**{**SHAPE, **fields})
    return config, MiniMindForCausalLM(config).state_dict()


@pytest.mark.parametrize(
    "fields", [{}, {"qk_norm": True, "rms_norm_eps": 1e-6}, MIXTURE]
)
def test_tensors_fit_the_configuration_they_were_made_with(fields):
    config, tensors = make(**fields)
    check_fit(config, tensors, "a.pth")
    inferred = infer_shape(tensors)
    assert {name: getattr(config, name) for name in inferred} == inferred


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_hidden_layers": 10**9}, "holds 2 layers and .* says 1000000000"),
        ({**MIXTURE, "n_routed_experts": 10**9}, "holds 3 experts and .* 1000000000"),
        ({**MIXTURE, "n_shared_experts": 10**9}, "1 shared experts and .* 1000000000"),
        ({"hidden_size": 1 << 20}, "embed_tokens.weight: 64×32 there, 64×1048576"),
        ({"hidden_size": 1 << 40}, "a.pth describes no model: .* overflowed"),
    ],
)
def test_a_configuration_that_claims_more_is_refused_before_it_is_built(fields, words):
    _, tensors = make(**(MIXTURE if "use_moe" in fields else {}))
    with pytest.raises(ValueError, match=words):
        check_fit(MiniMindConfig(**{**SHAPE, **fields}), tensors, "a.pth")


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("name", ["model.norm.weight", EMBEDDING])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(value, name):
    config, tensors = make()
    tensors[name].view(-1)[3] = value
    with pytest.raises(ValueError, match=f"not finite, in {name}"):
        check_fit(config, tensors, "a.pth")


def test_missing_extra_and_misshapen_tensors_are_named():
    config, before = make()
    model = MiniMindForCausalLM(config)
    model.load_state_dict(before)
    _, state = make(num_hidden_layers=1, hidden_size=16)
    del state["model.norm.weight"]
    state["extra"] = torch.ones(2, 3)
    with pytest.raises(ValueError) as caught:
        put_weights(model, state, "elsewhere")
    head, *lines, more, advice = str(caught.value).splitlines()
    assert head == "the weights in elsewhere are of another shape:"
    assert lines[0] == "  extra: 2×3 there, missing in this model"
    assert lines[1] == f"  {EMBEDDING}: 64×16 there, 64×32 in this model"
    assert len(lines) == 5 and more.startswith("  and ")
    assert advice == "Set the shape that they have, or take other weights."
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    small = {n: t for n, t in before.items() if n != "model.norm.weight"}
    with pytest.raises(
        ValueError, match="norm.weight: missing there, 32 in this model"
    ):
        put_weights(model, small, "elsewhere")


def test_a_head_of_its_own_is_refused():
    config, tensors = make()
    tensors["lm_head.weight"] = torch.zeros(64, 32)
    with pytest.raises(ValueError, match="lm_head and embed_tokens differ in a.pth"):
        check_fit(config, tensors, "a.pth")


def test_a_model_that_does_not_fit_is_not_changed():
    config, tensors = make()
    model = MiniMindForCausalLM(config)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors["model.norm.weight"] = torch.full((32,), float("nan"))
    with pytest.raises(ValueError, match="not finite, in model.norm.weight"):
        put_weights(model, tensors, "a.pth")
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())


def test_a_file_that_is_no_pickle_is_refused(tmp_path):
    (tmp_path / "a.pth").write_text("text")
    with pytest.raises(ValueError, match="a.pth is no file of weights: "):
        read_pth(tmp_path / "a.pth")


@pytest.mark.parametrize(
    "state", [{"model": {}, "step": 1}, [torch.ones(2)], {1: torch.ones(2)}]
)
def test_a_pth_of_something_else_is_no_bare_state_dict(state, tmp_path):
    with pytest.raises(
        ValueError, match="is no bare state dict, which has names with t"
    ):
        read_pth(save(state, tmp_path / "resume.pth"))


def test_weights_twice_under_two_names_are_refused(tmp_path):
    _, state = make()
    name = next(iter(state))
    file = save({**state, f"module.{name}": state[name] + 1}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="holds weights twice, with a prefix and wit"):
        read_pth(file)


def test_numbers_too_large_for_float32_are_not_finite(tmp_path):
    config, state = make()
    wide = {name: tensor.double() for name, tensor in state.items()}
    next(iter(wide.values())).view(-1)[0] = 1e300
    with pytest.raises(ValueError, match="values that are not finite"):
        put_weights(MiniMindForCausalLM(config), wide, "here")


@pytest.mark.fault("F64")
def test_tensors_that_are_not_plain_numbers_stored_in_full_are_refused(tmp_path):
    _, state = make()
    huge = torch.zeros(1).expand(64, 100_000)
    for odd in (
        huge,
        state[EMBEDDING].to(torch.float8_e4m3fn),
        state[EMBEDDING].long(),
        state[EMBEDDING].to(torch.complex64),
        state[EMBEDDING].to_sparse(),
        state[EMBEDDING].to("meta"),
    ):
        file = save({**state, EMBEDDING: odd}, tmp_path / "odd.pth")
        text = rf"odd\.pth holds {EMBEDDING} as \w+ in [\d,]+ bytes; expected is one of"
        with pytest.raises(ValueError, match=text):
            read_pth(file)


@pytest.mark.parametrize("gone", ["embed_tokens", "q_proj", "mlp", ""])
def test_a_state_dict_of_another_model_is_told_by_what_it_lacks(gone):
    state = {n: t for n, t in make()[1].items() if gone not in n}
    with pytest.raises(ValueError, match=f"no MiniMind state dict.*{gone}.* it holds "):
        infer_shape(state)


@pytest.mark.parametrize("shape", [(), (5,)])
def test_a_misshapen_embedding_is_no_minimind(shape):
    state = {**make()[1], EMBEDDING: torch.ones(shape)}
    with pytest.raises(ValueError, match="this is no MiniMind state dict"):
        infer_shape(state)
