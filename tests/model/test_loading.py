"""Weights from elsewhere: what is read, what is inferred, and what is refused."""

import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor as Weights
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from minimind_nb.config import (
    MIXTURE_FIELDS,
    PRESETS,
    SHAPE_FIELDS,
    TrainConfig,
    resolve,
)
from minimind_nb.data.tokenizer import TokenizerSpec, read_tokenizer, write_tokenizer
from minimind_nb.model.architecture import (
    YARN_DEFAULTS,
    MiniMindConfig,
    MiniMindForCausalLM,
    rotary_frequencies,
)
from minimind_nb.model.loading import find_weights, load, model_config
from minimind_nb.model.state_dict import read_tensors
from minimind_nb.storage import verified
from minimind_nb.storage.run_folder import STATE, WEIGHTS, NoGoodCheckpoint, RunFolder

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
}
THIRD: dict[str, Any] = {"qk_norm": True, "rms_norm_eps": 1e-6}
LOSSES = {4: 2.0, 8: 1.0, 12: 1.5}
EMBEDDING = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def spec() -> TokenizerSpec:
    return read_tokenizer()


def model_of(**fields: Any) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(**{**SHAPE, **fields})).eval()


@pytest.fixture
def model() -> MiniMindForCausalLM:
    return model_of()


@pytest.fixture
def run(tmp_path, model, spec) -> RunFolder:
    """A run of three checkpoints; the embedding tells them apart."""
    folder = RunFolder(tmp_path / "out" / "pretrain_32")
    cfg = resolve(TrainConfig(**SHAPE))
    hashes = {"tokenizer": spec.fingerprint}
    config = {"settings": dataclasses.asdict(cfg), "hashes": hashes}
    folder.write_config(config)
    write_tokenizer(spec, folder.tokenizer)
    for step, loss in LOSSES.items():
        facts = {"step": step, "val_loss": loss}
        with verified.writing(folder.checkpoint_folder(step), facts) as aside:
            weights = {n: p.detach().clone() for n, p in model.named_parameters()}
            weights[EMBEDDING][0, 0] = step
            save_file(weights, aside / WEIGHTS)
            (aside / STATE).write_text(json.dumps({"config": config}))
    return folder


def save(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


def same(model: MiniMindForCausalLM, state: dict[str, Weights]) -> bool:
    found = model.state_dict()
    return found.keys() == state.keys() and all(
        torch.equal(found[name], state[name].float()) for name in found
    )


def step_of(model: MiniMindForCausalLM) -> float:
    return model.state_dict()[EMBEDDING][0, 0].item()


@pytest.mark.parametrize(("which", "step"), [("last", 12), ("best", 8)])
def test_a_run_folder_gives_its_last_or_best_checkpoint(which, step, run, spec):
    with warnings.catch_warnings(action="error"):  # nothing is assumed
        model, tokenizer = load(run.root, which)
    assert step_of(model) == step
    assert not model.training and model.stage == "pretrain"
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert (tokenizer.bos_token_id, len(tokenizer)) == (spec.bos_id, 6400)
    assert model.config.eos_token_id == spec.eos_id
    found = find_weights(run.root, which)
    with pytest.raises(ValueError, match=r'which=\'first\': "last" or "best" is exp'):
        load(run.root, "first")
    assert found.file == run.checkpoint_folder(step) / WEIGHTS
    assert (found.tokenizer, found.stage) == (spec, "pretrain")


def test_a_checkpoint_folder_finds_its_runs_tokenizer(run, monkeypatch):
    model, tokenizer = load(run.checkpoint_folder(4))
    assert step_of(model) == 4 and len(tokenizer) == 6400
    monkeypatch.chdir(run.checkpoint_folder(8))
    assert step_of(load(".")[0]) == 8


def test_a_checkpoint_alone_opens_with_a_tokenizer_named(run, tmp_path, spec):
    alone = run.checkpoint_folder(4).rename(tmp_path / "step_00000004")
    with pytest.raises(FileNotFoundError, match="no tokenizer at "):
        load(alone)
    assert step_of(load(alone, tokenizer=spec)[0]) == 4


def test_a_damaged_checkpoint_is_refused_by_name_and_a_run_goes_one_back(run):
    last = run.checkpoint_folder(12)
    (last / STATE).write_text("{}")
    with pytest.raises(ValueError, match=r"step_00000012 is damaged: state\.json has"):
        load(last)
    assert step_of(load(run.root)[0]) == 8


@pytest.mark.parametrize("which", ["last", "best"])
def test_a_run_whose_checkpoints_are_all_damaged_or_missing_says_so(which, run):
    for step in LOSSES:
        (run.checkpoint_folder(step) / STATE).unlink()
    with pytest.raises(
        NoGoodCheckpoint, match=r"step_00000008: state\.json is missing"
    ):
        load(run.root, which)
    shutil.rmtree(run.checkpoints)
    with pytest.raises(FileNotFoundError, match="has no checkpoint yet; it writes one"):
        load(run.root, which)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("with_head", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_pth_opens_however_it_was_written(dtype, with_head, prefix, model, tmp_path):
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    kept = {f"{prefix}{name}": tensor for name, tensor in state.items()}
    if not with_head:
        del kept[f"{prefix}lm_head.weight"]
    loaded, tokenizer = load(save(kept, tmp_path / "pretrain_32.pth"))
    assert same(loaded, state)
    assert len(tokenizer) == 6400


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"use_moe": True},
        {"use_moe": True, "n_routed_experts": 3, "n_shared_experts": 2},
        {**THIRD, "num_key_value_heads": 4},
        {**THIRD, "num_attention_heads": 4, "head_dim": 16},
        PRESETS["minimind-3-moe"] | SHAPE | {"num_hidden_layers": 1},
    ],
)
def test_a_pth_of_either_generation_computes_what_it_did(fields, tmp_path):
    model = model_of(**fields)
    file = save(model.state_dict(), tmp_path / "weights.pth")
    loaded, _ = load(file)
    ids = torch.arange(5, 25).reshape(2, 10)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    mixture = ("seq_aux", "aux_loss_alpha") if model.config.use_moe else ()
    for name in ("rms_norm_eps", *mixture):
        assert getattr(loaded.config, name) == getattr(model.config, name)


def test_heads_that_are_given_go_before_minimind_s_eight(tmp_path):
    model = model_of(num_attention_heads=4)
    file = save(model.state_dict(), tmp_path / "weights.pth")
    ids = torch.arange(5, 15).reshape(1, 10)
    choices: list[dict[str, Any]] = [{"num_attention_heads": 4}, {"head_dim": 8}]
    for known in choices:
        loaded, _ = load(file, **known)
        assert loaded.config.num_key_value_heads == 2
        with torch.no_grad():
            assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert load(file, rope_theta=1e4)[0].config.rope_theta == 1e4


def test_a_shape_that_cannot_be_is_refused(run, model, tmp_path):
    file = save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(
        ValueError, match="unknown part of a shape .rope_teta.; did you mean rope_theta"
    ):
        load(file, rope_teta=1e4)
    with pytest.raises(ValueError, match="rope_theta cannot be set.*leave it out"):
        load(run.root, rope_theta=1e4)
    with pytest.raises(ValueError, match="cannot be set.*use rope_scaling=4"):
        load(run.root, inference_rope_scaling=True)


def test_a_folder_by_save_pretrained_opens(model, tmp_path, spec):
    folder = tmp_path / "saved"
    model.half().save_pretrained(folder)
    loaded, tokenizer = load(folder)
    assert same(loaded, model.state_dict())
    assert len(tokenizer) == 6400
    found = find_weights(folder)
    assert (found.file, found.stage) == (folder / WEIGHTS, None)
    write_tokenizer(spec, folder)
    assert load(folder)[1].eos_token == spec.eos_token
    assert step_of(load(folder / WEIGHTS)[0]) == step_of(loaded)


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 97,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}


def write_llama(folder: Path, **changes: Any) -> Path:
    """A folder as transformers writes it, with single fields changed (None: left out)."""
    fields = {n: v for n, v in {**LLAMA, **changes}.items() if v is not None}
    (folder / "config.json").write_text(json.dumps(fields))
    state = model_of(num_attention_heads=4, vocab_size=97).state_dict()
    del state["lm_head.weight"]
    save_file(state, folder / WEIGHTS)
    return folder


@pytest.mark.parametrize("kind", ["gpt2", None])
def test_a_folder_of_another_kind_of_model_is_refused(kind, tmp_path):
    with pytest.raises(
        ValueError, match=f"holds a '?{kind}'? model; minimind, llama, qwen3, qwen3_moe"
    ):
        load(write_llama(tmp_path, model_type=kind))


@pytest.mark.parametrize(
    "change",
    [
        {"attention_bias": True},
        {"mlp_bias": True},
        {"hidden_act": "gelu"},
        {"model_type": "qwen3", "sliding_window": 64},
        {"layer_types": ["sliding_attention"]},
        {"quantization_config": {"bits": 4}},
        {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}},
        {"rope_scaling": {"rope_type": "yarn", "factor": 8.0}},
    ],
)
def test_what_minimind_has_not_is_named(change, tmp_path):
    with pytest.raises(ValueError, match=f"MiniMind has no {list(change)[-1]}="):
        find_weights(write_llama(tmp_path, **change))


def test_a_field_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="config.json lacks hidden_size"):
        find_weights(write_llama(tmp_path, hidden_size=None))
    heads = {"num_key_value_heads": None, "head_dim": None}
    config = find_weights(write_llama(tmp_path, **heads), tokenizer=make_small()).config
    assert (config.num_key_value_heads, config.head_dim) == (4, 8)
    with pytest.raises(ValueError, match="holds num_key_value_heads=2 and .* says 4"):
        load(tmp_path, tokenizer=make_small())


def test_yarn_of_our_own_kind_is_read(tmp_path):
    rope = {"rope_type": "yarn", "rope_theta": 1e5, **YARN_DEFAULTS}
    longer = {"rope_parameters": rope, "max_position_embeddings": 32_768}
    config = find_weights(
        write_llama(tmp_path, **longer), tokenizer=make_small()
    ).config
    assert (config.inference_rope_scaling, config.rope_theta) == (True, 1e5)
    # transformers stretches also within the original length, MiniMind does not.
    write_llama(tmp_path, rope_parameters=rope, max_position_embeddings=2048)
    with pytest.raises(ValueError, match="MiniMind has no rope_scaling"):
        find_weights(tmp_path)


def test_rope_scaling_reads_a_multiple_of_the_length_trained_with(run):
    plain, stretched = load(run.root)[0], load(run.root, rope_scaling=2.5)[0]
    assert plain.config.rope_parameters is None
    assert stretched.config.max_position_embeddings == 1280
    rope = stretched.config.rope_parameters
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (2.5, 512)
    assert rope["attention_factor"] == pytest.approx(1.0916, abs=1e-4)
    slower = rotary_frequencies(plain.config) / rotary_frequencies(stretched.config)
    assert (slower[0], slower[-1]) == (1, pytest.approx(2.5))
    assert same(stretched, plain.state_dict())
    # A checkpoint, and the weights beside a run, know their run.
    file = save(plain.state_dict(), run.root.parent / "pretrain_32.pth")
    for source in (run.checkpoint_folder(12), file):
        assert find_weights(source, rope_scaling=2.5).config.rope_parameters == rope


def test_rope_scaling_of_weights_without_a_run_needs_their_length(model, tmp_path):
    file = save(model.state_dict(), tmp_path / "weights.pth")
    with pytest.raises(ValueError, match=r"does not record the length .*\"factor\": 4"):
        load(file, rope_scaling=4)
    given = {"factor": 4, "original_max_position_embeddings": 64}
    config = load(file, rope_scaling={**given, "attention_factor": 1.1})[0].config
    assert config.max_position_embeddings == 256
    assert (config.rope_parameters or {})["attention_factor"] == 1.1
    # A folder that is stretched records it; its factor is replaced.
    model_of(**config.to_diff_dict()).save_pretrained(tmp_path / "saved")
    again = find_weights(tmp_path / "saved", rope_scaling=2).config
    assert again.max_position_embeddings == 128
    rope = again.rope_parameters or {}
    assert (rope["factor"], rope["original_max_position_embeddings"]) == (2, 64)
    wrong: list[Any] = [1, "4", float("nan")]
    for factor in wrong:
        with pytest.raises(ValueError, match="use a factor above 1, such as 4"):
            load(file, rope_scaling=factor)
    with pytest.raises(ValueError, match="it may hold"):
        load(file, rope_scaling={**given, "beta": 1})


@pytest.mark.fault("F46")
def test_a_tokenizer_that_was_exchanged_in_a_run_is_refused(run):
    """The same entries, two of which mean each other's ids."""
    file = run.tokenizer / "tokenizer.json"
    fields = json.loads(file.read_text())
    vocab = fields["model"]["vocab"]
    one, other = list(vocab)[-2:]
    vocab[one], vocab[other] = vocab[other], vocab[one]
    file.write_text(json.dumps(fields))
    text = f"the tokenizer {run.tokenizer} is not the one that .* was trained with"
    for source in (run.root, run.checkpoint_folder(4)):
        with pytest.raises(ValueError, match=text):
            load(source)


def test_an_output_layer_of_its_own_is_refused(tmp_path):
    file = write_llama(tmp_path) / WEIGHTS
    state = read_tensors(file)
    save_file({**state, "lm_head.weight": torch.ones(97, 32)}, file)
    with pytest.raises(ValueError, match="lm_head and embed_tokens differ"):
        load(tmp_path, tokenizer=make_small())


def test_a_mixture_of_transformers_is_read(tmp_path):
    torch.manual_seed(0)
    shape = {n: v for n, v in LLAMA.items() if n not in ("model_type", "rope_theta")}
    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    more: dict[str, Any] = {"head_dim": 8, "rope_theta": 1e4}
    config = Qwen3MoeConfig(**shape, **experts, **more)
    theirs = Qwen3MoeForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path)
    ours, _ = load(tmp_path, tokenizer=make_small())
    ids = torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert (ours(ids).logits - theirs(ids).logits).abs().max() <= 1e-6
    assert not ours.config.norm_topk_prob


def make_small() -> Tokenizer:
    """A tokenizer of fewer entries than 97."""
    inner = Tokenizer(WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    inner.add_special_tokens(["</s>"])
    return inner


@pytest.mark.parametrize(
    ("given", "assumed"),
    [
        ({}, ("num_attention_heads", "rope_theta", "rms_norm_eps")),
        ({"head_dim": 4, "rope_theta": 1e4}, ("rms_norm_eps",)),
    ],
)
def test_what_a_pth_leaves_open_is_a_warning(given, assumed, model, tmp_path):
    file = save(model.state_dict(), tmp_path / "a.pth")
    with pytest.warns() as caught:
        load(file, **given)
    said, tokenizer = (str(one.message) for one in caught)
    assert {one.filename for one in caught} == {__file__}
    assert "without a tokenizer: using the shipped one" in tokenizer
    values = said.removeprefix(f"{file} does not record ").partition(": assuming")[0]
    assert re.findall(r"(\w+)=", values) == list(assumed)


@pytest.mark.parametrize("name", ["nowhere", ".", "saved", "shards"])
def test_a_place_without_weights_is_named(name, tmp_path):
    for folder in (tmp_path / "saved", tmp_path / "shards"):
        folder.mkdir()
        (folder / "config.json").write_text('{"model_type": "minimind"}')
    (tmp_path / "shards" / "model-00001-of-00002.safetensors").touch()
    text = "(weights in one file|exist): a run folder, a ch.*max_shard_size"
    with pytest.raises(FileNotFoundError, match=text):
        load(tmp_path / name)


@pytest.mark.parametrize("size", [100, 8000])
def test_the_shipped_tokenizer_is_only_taken_for_as_many_entries(size, tmp_path):
    file = save(model_of(vocab_size=size).state_dict(), tmp_path / "other.pth")
    text = f"the tokenizer has 6400 entries and .* {size}: name the one they were"
    with pytest.raises(ValueError, match=text):
        load(file)


def test_a_tokenizer_too_large_for_the_weights_is_refused(tmp_path, spec):
    file = save(model_of(vocab_size=100).state_dict(), tmp_path / "small.pth")
    with pytest.raises(ValueError, match="the tokenizer has 6400 .* 100: name the one"):
        load(file, tokenizer=spec)


def test_a_models_configuration_comes_from_the_settings(spec):
    settings = dataclasses.asdict(resolve(TrainConfig(preset="minimind-3-moe")))
    config = model_config(settings, spec)
    assert (config.hidden_size, config.n_shared_experts) == (768, 0)
    assert (config.pad_token_id, config.eos_token_id) == (spec.pad_id, spec.eos_id)


def test_a_weights_file_beside_its_run_has_that_runs_shape(tmp_path, spec):
    shape = {**SHAPE, "num_attention_heads": 4, "rope_theta": 1e4}
    settings = dataclasses.asdict(resolve(TrainConfig(**shape, stage="sft")))
    written = RunFolder(tmp_path / "out" / "sft_32")
    written.write_config({"settings": settings})
    write_tokenizer(spec, written.tokenizer)
    state = model_of(**shape).state_dict()
    found = find_weights(save(state, written.root.parent / "full_sft_32.pth"))
    assert (found.config.num_attention_heads, found.config.rope_theta) == (4, 1e4)
    assert (found.tokenizer, found.stage) == (spec, "sft")
    guessed = find_weights(save(state, tmp_path / "full_sft_32.pth"))
    assert (guessed.config.num_attention_heads, guessed.config.rope_theta) == (8, 1e6)
    assert (guessed.tokenizer, guessed.stage) == (spec, "sft")
    asked = find_weights(found.file, rope_theta=1e6)
    assert (asked.config.num_attention_heads, asked.config.rope_theta) == (4, 1e6)
    other = save(model_of(num_hidden_layers=1).state_dict(), found.file)
    assert find_weights(other).config.num_hidden_layers == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("inference_rope_scaling", True),
        ("dropout", 0.1),
        ("max_position_embeddings", 512),
    ],
)
def test_a_setting_that_may_differ_leaves_the_rest_of_the_run(name, value, tmp_path):
    own = read_tokenizer(make_small())
    shape = {**SHAPE, "num_attention_heads": 4, "vocab_size": own.vocab_size}
    written = RunFolder(tmp_path / "pretrain_32")
    written.write_config(
        {"settings": dataclasses.asdict(resolve(TrainConfig(**shape)))}
    )
    write_tokenizer(own, written.tokenizer)
    file = save(model_of(**shape).state_dict(), tmp_path / "pretrain_32.pth")
    loaded, tokenizer = load(file, **{name: value})
    assert getattr(loaded.config, name) == value
    assert (loaded.config.num_attention_heads, len(tokenizer)) == (4, own.vocab_size)


def test_damaged_folders_are_refused_in_plain_words(model, tmp_path, spec):
    model.save_pretrained(tmp_path)
    write_tokenizer(spec, tmp_path)
    config, weights = tmp_path / "config.json", tmp_path / WEIGHTS
    whole, fields = weights.read_bytes(), json.loads(config.read_bytes())
    weights.write_bytes(whole[:-50])
    with pytest.raises(ValueError, match=r"model\.safetensors is damaged \("):
        load(tmp_path)
    weights.write_bytes(whole)
    config.write_text(json.dumps({**fields, "hidden_size": "x"}))
    with pytest.raises(ValueError, match="holds hidden_size=32 and .* says 'x': they"):
        load(tmp_path)
    config.write_text(json.dumps({**fields, "num_key_value_heads": [1]}))
    with pytest.raises(ValueError, match="it describes no model: unsupported operand"):
        load(tmp_path)
    config.write_text("[]")
    with pytest.raises(ValueError, match="is no configuration: "):
        load(tmp_path)


def test_only_a_tokenizer_with_the_same_entries_replaces_the_runs_own(
    run, tmp_path, spec
):
    other = dataclasses.replace(spec, eos_token="<|endoftext|>", eos_id=0)
    assert find_weights(run.root, tokenizer=other).tokenizer == other
    with pytest.raises(ValueError, match="trained with another tokenizer: leave "):
        load(run.root, tokenizer=make_small())
    alone = run.checkpoint_folder(4).rename(tmp_path / "step_00000004")
    assert find_weights(alone, tokenizer=spec).tokenizer == spec
    with pytest.raises(ValueError, match="tokenizer given is not the one that"):
        find_weights(alone, tokenizer=other)


def test_a_shape_by_the_settings_names_has_a_mixtures_only_for_one(tmp_path):
    dense, mixture = (
        find_weights(
            save(model_of(use_moe=moe).state_dict(), tmp_path / f"{moe}.pth")
        ).shape()
        for moe in (False, True)
    )
    assert (dense["hidden_size"], dense["use_moe"]) == (32, False)
    assert mixture.keys() == set(SHAPE_FIELDS)
    assert mixture.keys() - dense.keys() == set(MIXTURE_FIELDS)
    assert (mixture["n_routed_experts"], mixture["n_shared_experts"]) == (4, 1)
