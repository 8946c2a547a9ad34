"""GGUF: what is refused; the file computes and answers the same in llama.cpp."""

import dataclasses
import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.small_models import make_tokenizer

from minimind_nb.data.tokenizer import load_tokenizer, read_tokenizer
from minimind_nb.model import export as module
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.model.export import export
from minimind_nb.model.generation import continue_ids


@pytest.fixture
def small(tmp_path) -> Path:
    """A folder with a small Llama-like model and a tokenizer."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=1))
    model.save_pretrained(tmp_path / "small")
    return tmp_path / "small"


def test_a_tokenizer_that_llama_cpp_would_split_differently_is_refused(small):
    spec = read_tokenizer(make_tokenizer())
    fields = json.loads(spec.json)
    fields["pre_tokenizer"] = {"type": "Whitespace"}
    other = dataclasses.replace(spec, json=json.dumps(fields))
    with pytest.raises(ValueError, match="text by 'Whitespace', but llama.cpp's gpt-2"):
        export(small, small / "a.gguf", tokenizer=other)


def test_without_the_extra_one_line_says_what_to_install(small, monkeypatch):
    monkeypatch.setattr("minimind_nb.model.export.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"gguf, .* pip install \"minimind_nb\[gguf\]"):
        export(small, small / "a.gguf")


def test_a_converter_that_fails_is_quoted(small, monkeypatch):
    monkeypatch.setattr(module, "_CONVERTER", "raise RuntimeError('no such luck')")
    with pytest.raises(RuntimeError, match="(?s)converter failed:.*no such luck$"):
        export(small, small / "a.gguf")
    assert not [*small.glob("*.gguf*")]


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen3_moe"])
def test_llama_cpp_answers_as_the_model_does(family, tmp_path, capsys):
    xllamacpp: Any = importlib.import_module("xllamacpp")

    torch.manual_seed(0)
    known: dict[str, Any] = {"num_attention_heads": 2}
    third = {"qk_norm": True, "rms_norm_eps": 1e-6} if family != "llama" else {}
    if family == "qwen3_moe":
        third |= {"use_moe": True, "n_shared_experts": 0}
        known |= {"num_experts_per_tok": 2, "norm_topk_prob": True}
    shape = {"hidden_size": 128, "num_hidden_layers": 2, "num_key_value_heads": 1}
    config = MiniMindConfig(**shape, **third, **known, initializer_range=0.2)
    model = MiniMindForCausalLM(config).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    file = export(tmp_path / "a.pth", tmp_path / "a.gguf", "gguf", **known)
    compared = re.search(r"greatest difference (\S+)\.\n", capsys.readouterr().out)
    assert compared and float(compared[1]) <= 1e-5
    ids = [[5 + n, 300 + 7 * n, 999, 42 + n] for n in range(16)]
    ours = continue_ids(model, ids, ends={2}, max_new_tokens=12, temperature=0)
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.cpuparams.n_threads, params.warmup = 512, 1, False
    # Its cache holds float16 unless told otherwise, and near ties fall differently.
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = (
        xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    )
    server = xllamacpp.Server(params)
    tokenizer = load_tokenizer()
    for prompt, expected in zip(ids, ours, strict=True):
        asked = {"prompt": prompt, "n_predict": 12, "temperature": 0}
        answer: Any = server.handle_completions(asked)
        said, same = answer["choices"][0]["text"], str(tokenizer.decode(expected))
        assert said.strip("\ufffd") == same.strip("\ufffd")
