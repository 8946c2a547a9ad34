"""Exports open in plain transformers and compute the same; what cannot be is refused."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.small_models import make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.model import export as module
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.model.export import export
from minimind_nb.model.generation import continue_ids
from minimind_nb.model.loading import load

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 48,
    "vocab_size": 280,
    "initializer_range": 0.2,
}
THIRD = {"qk_norm": True, "rms_norm_eps": 1e-6, "num_key_value_heads": 4}
MIXTURE = {**THIRD, "use_moe": True, "n_shared_experts": 0, "num_experts_per_tok": 1}
NETWORKS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": THIRD,
    "qwen3_moe": MIXTURE,
    "minimind": {"use_moe": True},
}
FILES = {
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
}


def write_pth(file: Path, **fields: Any) -> Path:
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(**{**SHAPE, **fields}))
    torch.save({n: t.half() for n, t in model.state_dict().items()}, file)
    return file


@pytest.fixture(scope="module")
def spec():
    return read_tokenizer(make_tokenizer())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, spec) -> dict[str, tuple[Path, Path]]:
    """By format: a `.pth` and the folder that came of it."""
    home = tmp_path_factory.mktemp("exported")
    made = {}
    for kind, fields in NETWORKS.items():
        file = write_pth(home / f"{kind}.pth", **fields)
        made[kind] = file, export(file, file.with_suffix(""), tokenizer=spec)
    return made


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe"])
def test_plain_transformers_computes_and_generates_the_same(kind, exported, spec):
    file, folder = exported[kind]
    ours, _ = load(file, tokenizer=spec)
    plain: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert plain.config.model_type == kind
    back, tokenizer = load(folder)
    rows = torch.randint(3, 280, (50, 8), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = ours(rows).logits
        assert (plain(rows).logits - expected).abs().max() <= 1e-5
        assert torch.equal(back(rows).logits, expected)
        theirs = plain.generate(rows, max_new_tokens=12, do_sample=False)[:, 8:]
    settings: dict[str, Any] = {"max_new_tokens": 12, "temperature": 0}
    answers = continue_ids(ours, rows.tolist(), ends={2}, **settings)
    for answer, other in zip(answers, theirs.tolist(), strict=True):
        until = other.index(2) if 2 in other else len(other)
        assert answer == other[:until]
    assert tokenizer.eos_token_id == spec.eos_id


@pytest.mark.parametrize("kind", list(NETWORKS))
def test_a_folder_holds_what_others_look_for(kind, exported, spec):
    file, folder = exported[kind]
    own = {"modeling_minimind.py"} if kind == "minimind" else set()
    assert {path.name for path in folder.iterdir()} == FILES | own
    settings = json.loads((folder / "generation_config.json").read_bytes())
    assert (settings["eos_token_id"], settings["pad_token_id"]) == (2, 0)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == spec.chat_template
    assert {p.name for p in folder.parent.iterdir()} == {
        *NETWORKS,
        *(f"{name}.pth" for name in NETWORKS),
    }
    ids = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(
            load(folder)[0](ids).logits, load(file, tokenizer=spec)[0](ids).logits
        )


def test_a_flipped_bit_in_a_folder_is_found(exported, tmp_path):
    folder = shutil.copytree(exported["llama"][1], tmp_path / "copy")
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-9] ^= 1
    weights.write_bytes(data)
    with pytest.raises(ValueError, match=r"damaged \(its data has another sha256 than"):
        load(folder)


def test_an_export_asks_nothing(tmp_path, spec, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asked"))
    export(write_pth(tmp_path / "a.pth"), tmp_path / "a", "minimind", tokenizer=spec)


def test_a_process_without_this_package_computes_the_same(exported, spec, tmp_path):
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM as A\n"
        "from safetensors.torch import save_file\n"
        "ids, found = torch.arange(20)[None], {}\n"
        "for name, folder in zip(sys.argv[2::2], sys.argv[3::2]):\n"
        "    own = name == 'minimind'\n"
        "    model = A.from_pretrained(folder, dtype='float32', trust_remote_code=own)\n"
        "    assert type(model).__module__.startswith('transformers_modules.') == own\n"
        "    with torch.no_grad(): found[name] = model(ids).logits\n"
        "assert 'minimind_nb' not in sys.modules\n"
        "save_file(found, sys.argv[1])"
    )
    answer = tmp_path / "answer.safetensors"
    folders = [str(x) for name, (_, folder) in exported.items() for x in (name, folder)]
    subprocess.run(
        [sys.executable, "-P", "-c", code, str(answer), *folders],
        env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        timeout=240,
        check=True,
    )
    for name, theirs in load_file(answer).items():
        with torch.no_grad():
            ours = load(exported[name][0], tokenizer=spec)[0](torch.arange(20)[None])
        assert (ours.logits - theirs).abs().max() <= 1e-5


def test_a_folder_that_computes_something_else_is_not_left(tmp_path, spec, monkeypatch):
    file = write_pth(tmp_path / "a.pth")
    family = module.FAMILIES["llama"]
    wrong = {**family.fixed, "rms_norm_eps": 1.0}
    other = dataclasses.replace(family, fixed=wrong)
    monkeypatch.setitem(module.FAMILIES, "llama", other)
    with pytest.raises(RuntimeError, match="something else: logits of up to .* differ"):
        export(file, tmp_path / "out", "llama", tokenizer=spec)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


@pytest.mark.parametrize(
    ("fields", "kind", "text"),
    [
        (THIRD, "llama", r'has no qk_norm=True: use format="qwen3" or "minimind"'),
        ({"use_moe": True}, "qwen3_moe", "has no qk_norm=False, n_shared_experts=1:"),
        (MIXTURE, "qwen3", 'has no use_moe=True: use format="qwen3_moe" or "minimind"'),
        ({"use_moe": True}, "gguf", "llama.cpp supports no network of this kind"),
        ({}, "lama", "format='lama' is unknown: use llama, qwen3, "),
    ],
)
def test_a_format_that_cannot_hold_the_network_is_named(
    fields, kind, text, tmp_path, spec
):
    file = write_pth(tmp_path / "a.pth", **fields)
    with pytest.raises(ValueError, match=text):
        export(file, tmp_path / "out", kind, tokenizer=spec)
    assert not (tmp_path / "out").exists()


def test_nothing_is_overwritten(tmp_path, spec):
    file = write_pth(tmp_path / "a.pth")
    before = file.read_bytes()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    for place in (file, tmp_path / "full"):
        with pytest.raises(FileExistsError, match="exists, and is not replaced: use"):
            export(file, place, tokenizer=spec)
    assert file.read_bytes() == before
    (tmp_path / "empty").mkdir()
    assert (export(file, tmp_path / "empty", tokenizer=spec) / "config.json").is_file()


@pytest.mark.parametrize("dtype", [None, "float32", torch.bfloat16])
def test_weights_are_stored_as_they_are_or_as_asked(dtype, tmp_path, spec):
    file = write_pth(tmp_path / "a.pth")
    folder = export(file, tmp_path / "out", tokenizer=spec, dtype=dtype)
    name = str(dtype or "float16").removeprefix("torch.")
    assert json.loads((folder / "config.json").read_bytes())["dtype"] == name
    stored = load_file(folder / "model.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {f"torch.{name}"}


def test_a_precision_that_does_not_hold_the_numbers_is_refused(tmp_path, spec):
    file = write_pth(tmp_path / "a.pth")
    with pytest.raises(ValueError, match="dtype='int8' is invalid: use float32, "):
        export(file, tmp_path / "out", tokenizer=spec, dtype="int8")
    state = {n: t.float() for n, t in torch.load(file, weights_only=True).items()}
    state["model.norm.weight"][0] = 1e6
    torch.save(state, file)
    with pytest.raises(ValueError, match="some weights are too large for float16"):
        export(file, tmp_path / "out", tokenizer=spec, dtype="float16")


def test_a_pth_for_minimind_has_both_tied_keys_in_float16(exported, tmp_path, capsys):
    file, folder = exported["llama"]
    written = export(folder, tmp_path / "full_sft_32.pth")
    state = torch.load(written, weights_only=True)
    first = torch.load(file, weights_only=True)
    assert state.keys() == first.keys() and "lm_head.weight" in state
    assert all(torch.equal(state[name], first[name]) for name in first)
    assert f"Next: copy {written} to out/ of a MiniMind" in capsys.readouterr().out


@pytest.mark.parametrize("fields", [{}, THIRD])
def test_a_stretched_network_stays_stretched(fields, tmp_path, spec):
    torch.manual_seed(0)
    stretched = {"inference_rope_scaling": True, "max_position_embeddings": 8192}
    model = MiniMindForCausalLM(MiniMindConfig(**{**SHAPE, **fields, **stretched}))
    model.save_pretrained(tmp_path / "ours")
    folder = export(tmp_path / "ours", tmp_path / "out", tokenizer=spec)
    read = json.loads((folder / "config.json").read_bytes())
    assert read["model_type"] == ("qwen3" if fields else "llama")
    assert read["rope_parameters"]["rope_type"] == "yarn"
    ids = torch.arange(100)[None]
    with torch.inference_mode():
        assert torch.equal(load(folder)[0](ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "qwen3_moe", "minimind"])
def test_rope_scaling_is_written_and_refused_where_nothing_records_it(
    kind, tmp_path, spec, recwarn
):
    file = write_pth(tmp_path / "a.pth", **NETWORKS[kind])
    asked = {"factor": 4, "original_max_position_embeddings": 64}
    named: dict[str, Any] = {"tokenizer": spec, "rope_scaling": asked}
    folder = export(file, tmp_path / "out", kind, **named)
    config = json.loads((folder / "config.json").read_bytes())
    assert config["max_position_embeddings"] == 256
    assert config["rope_parameters"].items() >= asked.items()
    assert not [one for one in recwarn if "yarn" in str(one.message).lower()]
    ids = torch.arange(200)[None]
    with torch.inference_mode():
        found = load(folder)[0](ids).logits
        assert torch.equal(found, load(file, **named)[0](ids).logits)
    assert not torch.equal(found, load(file, tokenizer=spec)[0](ids).logits)
    with pytest.raises(ValueError, match=r"\.pth file keeps no rope_scaling"):
        export(file, tmp_path / "b.pth", **named)


def test_a_pth_that_does_not_read_back_is_not_left(tmp_path, spec, monkeypatch):
    file, write = write_pth(tmp_path / "a.pth"), module.write_pth

    def damage(tensors, file, dtype):
        write(tensors, file, dtype)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.write_bytes(data)

    monkeypatch.setattr(module, "write_pth", damage)
    with pytest.raises(ValueError, match="b.pth is damaged or not a weights file"):
        export(file, tmp_path / "b.pth", "pth", tokenizer=spec)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]


def test_a_tokenizer_that_others_read_otherwise_is_refused(tmp_path, spec, monkeypatch):
    file = write_pth(tmp_path / "a.pth")
    write = module.write_tokenizer
    vocabulary = json.loads(spec.json)
    vocabulary["pre_tokenizer"]["add_prefix_space"] = True
    other = dataclasses.replace(spec, json=json.dumps(vocabulary))
    monkeypatch.setattr(
        module, "write_tokenizer", lambda _, folder: write(other, folder)
    )
    with pytest.raises(RuntimeError, match=r"as other tokens .*: \[.*\] instead of \["):
        export(file, tmp_path / "out", tokenizer=spec)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pth"]
