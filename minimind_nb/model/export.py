"""Models for other programs: folders of transformers, GGUF, MiniMind's `.pth`."""

from __future__ import annotations

import importlib.resources
import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from transformers import __version__ as transformers_version

from ..config import WEIGHTS_NAMES
from ..data.tokenizer import (
    TokenizerSpec,
    load_tokenizer,
    read_tokenizer,
    write_tokenizer,
)
from ..storage.run_folder import WEIGHTS
from ..storage.verified import beside, rename_flushed
from .architecture import MiniMindConfig, MiniMindForCausalLM
from .hf_formats import FAMILIES, OWN_CODE, own_config_json
from .loading import FoundWeights, find_weights
from .state_dict import read_pth, write_pth

_FILES = ("pth", "gguf")
FORMATS = (*FAMILIES, "minimind", *_FILES)
_PRECISIONS = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}  # as GGUF's
_TOLERANCE = 1e-5  # of the greatest logit: fp32's rounding
_LENGTHS = (1, 16, 1024)  # tokens of the rows that are compared
_KEEP = 16  # logits of each row's end
_TEXT = "Hello, 世界!\n  3.14 <|im_end|> 🙂 don't"
_NEXT = {
    "pth": "python eval_llm.py --weight {weight} --hidden_size {width} "
    "--num_hidden_layers {layers} --use_moe {moe}",
    "gguf": "llama-cli -m {path}",
    "minimind": "AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)",
}
_NEXT_OF_A_FAMILY = "AutoModelForCausalLM.from_pretrained({path!r})"
_GGUF_MODULES = ("gguf", "convert_hf_to_gguf", "accelerate")  # the last to read it back
# The converter knows pre-tokenizers by a hash over the ids of one text, which differ for
# each vocabulary.
_CONVERTER = """
import convert_hf_to_gguf
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
convert_hf_to_gguf.main()
"""
_CONVERTER_SECONDS = 1800
_SHOWN = 2000  # characters of the converter's last words


def export(
    source: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    format: str | None = None,
    *,
    which: str = "last",
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    **shape: Any,
) -> Path:
    """Write a model for other programs and print what to type next.

    `source`, `which`, `tokenizer` and `shape` are those of `load`. `format`:

    - "llama" (second generation, dense), "qwen3" (third, dense), "qwen3_moe" (third, a
      mixture without shared experts): folders that transformers, vLLM and others open;
    - "minimind": a folder for any network, which carries the network's code;
    - "gguf": a file for llama.cpp, from a Llama or Qwen3 (an optional extra);
    - "pth": a file for MiniMind's scripts, in float16 unless `dtype` is set.

    None takes the ending of the file's name, or the first format that holds the network.
    `dtype` ("float32", "float16", "bfloat16") is the precision to store in, by default
    that of the source. docs/exports.md shows what to do with each format.

    Before it gets its name, a folder or GGUF file is opened with transformers, and its
    logits (of a folder also its token ids) are compared with the source's; a `.pth` is
    read back. Nothing is overwritten, and a failure leaves nothing behind.

    Raises what `load` raises; `FileExistsError` if something is in the way;
    `ValueError` for an unknown format or precision, one that cannot hold the network or
    its numbers, or GGUF without the extra; `RuntimeError` if the written model does not
    compute the same.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(f"format={format!r} is unknown: use {', '.join(FORMATS)}")
    final = Path(folder).expanduser()
    if format is None and final.suffix[1:] in _FILES:
        format = final.suffix[1:]
    _check_free(final, format not in _FILES)
    found = find_weights(source, which, tokenizer, **shape)
    for note in found.notes:
        print(note)
    kind, spec = _choose_format(found.config, format), read_tokenizer(found.tokenizer)
    if kind == "gguf":
        _check_convertible(spec)
    model = found.read()
    if kind == "pth":
        dtype = dtype or torch.float16
    precision = _cast(model, dtype)
    with beside(final) as aside:
        written = aside / final.name if kind in _FILES else aside
        checked = _write(model, spec, kind, written)
        rename_flushed(written, final)
    print(f"{final} is written (format {kind!r}, {precision}): {checked}.")
    print(*_next_steps(final, kind, found), sep="\n")
    return final


def _check_free(final: Path, is_folder: bool) -> None:
    """Raise if anything but an empty folder for a folder is in the way."""
    empty = final.is_dir() and not final.is_symlink() and not any(final.iterdir())
    if os.path.lexists(final) and not (is_folder and empty):
        raise FileExistsError(
            f"{final} exists and is not overwritten: use another name"
        )
    parents = [parent for parent in final.absolute().parents if parent.exists()]
    if not parents[0].is_dir():
        raise NotADirectoryError(f"{parents[0]} is not a folder: cannot write {final}")


def _choose_format(config: MiniMindConfig, format: str | None) -> str:
    """Return the format asked for, or the most portable one.

    Raises `ValueError` naming what differs if it cannot hold the network.
    """
    missing = {name: family.unsupported(config) for name, family in FAMILIES.items()}
    fits = [name for name, differences in missing.items() if not differences]
    if format is None:
        return (*fits, "minimind")[0]
    if format == "gguf" and (not fits or not config.norm_topk_prob and config.use_moe):
        raise ValueError(
            "llama.cpp supports no network of this kind (it needs a Llama, a Qwen3, or a "
            'Qwen3-MoE with norm_topk_prob=True): export it with format="minimind"'
        )
    if differences := missing.get(format, []):
        others = " or ".join(f'"{name}"' for name in (*fits, "minimind"))
        raise ValueError(
            f'format="{format}" has no {", ".join(differences)}: use format={others}'
        )
    return format


def _cast(model: MiniMindForCausalLM, dtype: str | torch.dtype | None) -> str:
    """Convert a model in place to the precision to store, and return its name."""
    name = str(dtype or model.dtype).removeprefix("torch.")
    if name not in _PRECISIONS:
        raise ValueError(f"dtype={name!r} is invalid: use {', '.join(_PRECISIONS)}")
    nn.Module.to(model, getattr(torch, name))
    for weight, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise ValueError(
                f"{weight} holds numbers too large for {name}: use another dtype"
            )
    return name


def _write(
    model: MiniMindForCausalLM, spec: TokenizerSpec, kind: str, target: Path
) -> str:
    """Write one format and check it; return what was checked."""
    if kind == "pth":
        return _write_pth(model, target)
    if kind == "gguf":
        return _write_gguf(model, spec, target)
    _write_folder(model, spec, target, kind)
    return _check_folder(model, spec, target, kind)


def _write_folder(
    model: MiniMindForCausalLM, spec: TokenizerSpec, folder: Path, kind: str
) -> None:
    config: Any = model.config
    family = FAMILIES.get(kind)
    if family:
        fields = family.config_json(config)
    else:
        fields = own_config_json(config)
        package = importlib.resources.files(__package__ or "")
        code = (package / "architecture.py").read_bytes()
        (folder / f"{OWN_CODE}.py").write_bytes(code)
    version = {"transformers_version": transformers_version}
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    ids = {name: getattr(config, name) for name in names}
    for name, values in (
        ("config.json", {**fields, "dtype": str(model.dtype).removeprefix("torch.")}),
        ("generation_config.json", ids),
    ):
        text = json.dumps(values | version, indent=2, sort_keys=True)
        (folder / name).write_text(f"{text}\n", encoding="utf-8")
    write_tokenizer(spec, folder)
    named = model.named_parameters()  # without the tied head
    tensors = {name: p.detach().contiguous().clone() for name, p in named}
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})


def _write_pth(model: MiniMindForCausalLM, file: Path) -> str:
    tensors = model.state_dict()
    write_pth(tensors, file)
    back = read_pth(file)
    if any(not torch.equal(back[n], tensor) for n, tensor in tensors.items()):
        raise RuntimeError("the .pth does not read back as it was written; try again")
    return "read back and equal"


def _write_gguf(model: MiniMindForCausalLM, spec: TokenizerSpec, file: Path) -> str:
    config: Any = model.config
    folder = file.parent / "folder"
    folder.mkdir()
    _write_folder(model, spec, folder, _choose_format(config, None))
    _convert(folder, file, _PRECISIONS[str(model.dtype).removeprefix("torch.")])
    # transformers does not read these of such a file.
    fields = {"head_dim": config.head_dim}
    if config.use_moe:
        fields["moe_intermediate_size"] = config.intermediate_size
    theirs = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, **fields
    )
    return _compare_logits(model, theirs)


def _check_convertible(spec: TokenizerSpec) -> None:
    """Raise `ValueError` for a tokenizer that llama.cpp would split differently, and if
    the converter is not installed."""
    vocabulary = json.loads(spec.json)
    split = vocabulary.get("pre_tokenizer") or {}
    plain = split.get("type") == "ByteLevel" and split.get("use_regex", True)
    if not plain or split.get("add_prefix_space") or vocabulary.get("normalizer"):
        raise ValueError(
            f"the tokenizer splits text by {split.get('type')!r}, but llama.cpp's gpt-2 "
            "splits by ByteLevel without a normalizer or prefix space, so its tokens "
            'would differ: use another format than "gguf"'
        )
    missing = [name for name in _GGUF_MODULES if find_spec(name) is None]
    if missing:
        raise ValueError(
            f"GGUF needs {', '.join(missing)}, which is not installed: "
            'pip install "minimind_nb[gguf]"'
        )


def _convert(folder: Path, file: Path, kind: str) -> None:
    """Run llama.cpp's converter, in a process of its own because we patch it."""
    done = subprocess.run(
        [
            *(sys.executable, "-P", "-c", _CONVERTER, str(folder)),
            *("--outfile", str(file), "--outtype", kind),
        ],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=_CONVERTER_SECONDS,
        check=False,
    )
    if done.returncode:
        words = done.stderr.strip()[-_SHOWN:]
        raise RuntimeError(f"llama.cpp's converter failed:\n{words}")


def _check_folder(
    model: MiniMindForCausalLM, spec: TokenizerSpec, folder: Path, kind: str
) -> str:
    """Open a folder with transformers, and compare token ids and logits.

    The code in a folder of our own kind is this package's, byte for byte, so it is not
    run: transformers would ask for permission.
    """
    classes: Any = (AutoModelForCausalLM, AutoTokenizer)
    if kind == "minimind":
        classes = (MiniMindForCausalLM, PreTrainedTokenizerFast)
    reopened = classes[1].from_pretrained(folder)
    found = reopened.encode(_TEXT, add_special_tokens=False)
    expected = load_tokenizer(spec).encode(_TEXT, add_special_tokens=False)
    if found != expected:
        raise RuntimeError(
            f"transformers reads {_TEXT!r} as other tokens than this tokenizer: {found} "
            f"instead of {expected}; nothing was written"
        )
    theirs = classes[0].from_pretrained(folder, dtype=torch.float32)
    return _compare_logits(model, theirs)


def _compare_logits(ours: MiniMindForCausalLM, theirs: Any) -> str:
    """Compare two models' logits in float32. Raises `RuntimeError` if they differ."""
    nn.Module.float(ours).eval()
    theirs.eval()
    config, greatest, scale = ours.config, 0.0, 0.0
    with torch.inference_mode():
        for length in _LENGTHS:
            ids = torch.arange(min(length, config.max_position_embeddings))[None]
            ids = (7919 * ids + 1) % config.vocab_size
            expected = ours(ids, logits_to_keep=_KEEP).logits
            found = theirs(ids, logits_to_keep=_KEEP).logits
            greatest = max(greatest, (expected - found).abs().max().item())
            scale = max(scale, expected.abs().max().item())
    if not greatest <= _TOLERANCE * scale:
        yarn = " (inference_rope_scaling)" if config.rope_parameters else ""
        raise RuntimeError(
            f"the written model computes something else{yarn}: logits of up to "
            f"{scale:.2e} differ by up to {greatest:.2e}; nothing was written"
        )
    return f"logits compared, greatest difference {greatest:.2g}"


def _next_steps(final: Path, kind: str, found: FoundWeights) -> list[str]:
    """Return what to change in MiniMind's scripts, for a `.pth`, and what to type."""
    line = _NEXT.get(kind, _NEXT_OF_A_FAMILY).format(
        path=str(final.absolute()),
        weight=WEIGHTS_NAMES.get(found.stage or "", "full_sft"),
        width=found.config.hidden_size,
        layers=found.config.num_hidden_layers,
        moe=int(found.config.use_moe),
    )
    return [*(_misfits(found.config) if kind == "pth" else []), f"Next: {line}"]


def _misfits(config: MiniMindConfig) -> list[str]:
    """Name what MiniMind's scripts assume and these weights do not have."""
    width, third = config.hidden_size, config.qk_norm
    inner = math.ceil((width * math.pi if third else width * 8 // 3) / 64) * 64
    expected: dict[str, Any] = {
        "intermediate_size": inner,
        "num_attention_heads": 8,
        "num_key_value_heads": 4 if third else 2,
        "rope_theta": 1e6,
        "rms_norm_eps": 1e-6 if third else 1e-5,
        "inference_rope_scaling": False,
    }
    if config.use_moe:
        expected |= {"num_experts_per_tok": 1 if third else 2, "norm_topk_prob": True}
    return [
        f"MiniMind's scripts expect {name}={value}, but this model has "
        f"{getattr(config, name)}: change it there."
        for name, value in expected.items()
        if getattr(config, name) != value
    ]
