"""Named tensors against a configuration: what does not belong together is named."""

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.model.loading import FoundWeights, load
from minimind_nb.model.state_dict import (
    DIGEST,
    hash_data,
    infer_shape,
    put_weights,
    read_pth,
    read_tensors,
    write_pth,
)

SHAPE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
EMBEDDING = "model.embed_tokens.weight"
MIXTURE: dict[str, Any] = {"use_moe": True, "n_routed_experts": 3}


def make(**fields: Any) -> tuple[MiniMindConfig, dict[str, torch.Tensor]]:
    config = MiniMindConfig(**{**SHAPE, **fields})
    return config, MiniMindForCausalLM(config).state_dict()


@pytest.mark.parametrize(
    "fields", [{}, {"qk_norm": True, "rms_norm_eps": 1e-6}, MIXTURE]
)
def test_tensors_fit_the_configuration_they_were_made_with(fields, tmp_path):
    config, tensors = make(**fields)
    model = FoundWeights(save(tensors, tmp_path / "a.pth"), config).read()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(model.state_dict()[n], t) for n, t in tensors.items())
    inferred = infer_shape(tensors, "a.pth")
    assert {name: getattr(config, name) for name in inferred} == inferred


@pytest.mark.parametrize(
    ("name", "held"),
    [("num_hidden_layers", 2), ("n_routed_experts", 3), ("n_shared_experts", 1)],
)
def test_a_configuration_that_claims_more_is_refused_before_it_is_built(
    name, held, tmp_path
):
    file = save(make(**MIXTURE)[1], tmp_path / "a.pth")
    config = MiniMindConfig(**{**SHAPE, **MIXTURE, name: 10**9})
    with pytest.raises(ValueError, match=f"{name}={held} and .* says 1000000000"):
        FoundWeights(file, config).read()


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
@pytest.mark.parametrize("name", ["model.norm.weight", EMBEDDING])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e300])
def test_a_value_that_float32_does_not_hold_is_named(value, name, ending, tmp_path):
    state = {n: t.double() for n, t in make()[1].items() if n != "lm_head.weight"}
    state[name].view(-1)[3] = value
    file = tmp_path / f"a.{ending}"
    (save if ending == "pth" else save_file)(state, file)
    with pytest.raises(ValueError, match=f"a.{ending} .* not finite, in {name}"):
        read_tensors(file)


def test_missing_extra_and_misshapen_tensors_are_named():
    model = MiniMindForCausalLM(make()[0])
    _, state = make(num_hidden_layers=1, hidden_size=16)
    del state["model.norm.weight"]
    with pytest.raises(ValueError) as caught:
        put_weights(model, {**state, "extra": torch.ones(2, 3)}, "elsewhere")
    text = str(caught.value)
    assert text.startswith("the weights in elsewhere do not fit the model:\n")
    assert 'Missing key(s) in state_dict: "model.layers.1.' in text
    assert 'Unexpected key(s) in state_dict: "extra"' in text
    assert len(text) < 1200


@pytest.mark.parametrize(
    "state",
    [
        {"model": {}, "step": 1},
        {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]},
        [torch.ones(2)],
        {1: torch.ones(2)},
    ],
)
def test_a_pth_of_something_else_is_no_bare_state_dict(state, tmp_path):
    file = save(state, tmp_path / "resume.pth")
    with pytest.raises(ValueError, match="where a bare state dict .* is expected") as e:
        read_pth(file)
    assert "The state of an optimizer holds no weights: give the model's" in str(
        e.value
    )


def test_weights_of_lora_alone_are_named(tmp_path):
    layer = "model.layers.0.self_attn.q_proj.lora"
    lora = {
        f"{layer}.A.weight": torch.ones(8, 32),
        f"{layer}.B.weight": torch.ones(32, 8),
    }
    text = "holds LoRA weights only: merge them into their model and give that one's"
    with pytest.raises(ValueError, match=text):
        load(save(lora, tmp_path / "lora_medical_32.pth"))


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
        text = rf"odd\.pth holds {EMBEDDING} as torch\.\w+ in [\d,]+ bytes; expected are float"
        with pytest.raises(ValueError, match=text):
            read_tensors(file)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_no_flipped_bit_is_read_as_other_weights(ending, tmp_path):
    state = {n: t.half() for n, t in make()[1].items() if n != "lm_head.weight"}
    file = tmp_path / f"a.{ending}"
    if ending == "pth":
        write_pth(state, file)
    else:
        save_file(state, file, {DIGEST: hash_data(state)})
    whole, flips, refused = file.read_bytes(), random.Random(0), 0
    for _ in range(60):
        data = bytearray(whole)
        data[flips.randrange(len(data))] ^= 1 << flips.randrange(8)
        file.write_bytes(data)
        try:
            found = read_tensors(file)
        except ValueError as error:
            assert "damaged" in str(error)
            refused += 1
        else:  # a flag or a date of the archive
            assert all(torch.equal(found[n], t) for n, t in state.items())
    assert refused >= 55
    file.write_bytes(whole)
    assert read_tensors(file).keys() == state.keys()


def test_the_sha256_is_that_of_the_data_section(tmp_path):
    state = {n: t.half() for n, t in make()[1].items() if n != "lm_head.weight"}
    save_file(state, tmp_path / "a.safetensors", {DIGEST: hash_data(state)})
    data = (tmp_path / "a.safetensors").read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert json.loads(data[8:start])["__metadata__"] == {
        DIGEST: hashlib.sha256(data[start:]).hexdigest()
    }


def test_a_pth_of_torch_before_its_archives_opens(tmp_path):
    state, file = make()[1], tmp_path / "a.pth"
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert read_tensors(file).keys() == state.keys()


@pytest.mark.parametrize("gone", ["embed_tokens", "q_proj", "mlp", ""])
def test_a_state_dict_of_another_model_is_told_by_what_it_lacks(gone):
    state = {n: t for n, t in make()[1].items() if gone not in n}
    with pytest.raises(
        ValueError, match=f"a.pth holds no MiniMind state dict .*{gone}.* but "
    ):
        infer_shape(state, "a.pth")
    for shape in ((), (5,)):
        with pytest.raises(ValueError, match="holds no MiniMind state dict"):
            infer_shape({**make()[1], EMBEDDING: torch.ones(shape)}, "a.pth")


@pytest.mark.parametrize(
    "shape", [{"num_attention_heads": 0}, {"num_attention_heads": -4}, {"head_dim": -8}]
)
def test_heads_that_cannot_be_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"head width -?\d+: set num_attention_heads or"
    ):
        infer_shape(make()[1], "a.pth", **shape)
