"""Models for other programs: folders of transformers, GGUF, MiniMind's `.pth`."""

from __future__ import annotations

import dataclasses
import importlib.resources
import inspect
import json
import math
import os
import shlex
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import __version__ as transformers_version

from ..config import WEIGHTS_NAMES
from ..data.tokenizer import TokenizerSpec, load_tokenizer, write_tokenizer
from ..storage.run_folder import WEIGHTS
from ..storage.verified import beside, rename_flushed
from . import reopening
from .architecture import MiniMindConfig, MiniMindForCausalLM
from .fresh_process import run_fresh
from .gguf import check_convertible, convert
from .hf_formats import FAMILIES, OWN_CODE, describe_own
from .loading import choose_tokenizer, find_weights
from .state_dict import Tensors, put_weights, read_pth, write_pth

_FILES = ("pth", "gguf")
FORMATS = (*FAMILIES, "minimind", *_FILES)
_TOLERANCE = 1e-5
_ROWS = (1, 16, 1024)  # tokens
_KEEP = 16
_TEXT = "Hello, 世界!\n  3.14 <|im_end|> 🙂 don't"

_NEXT = {
    "pth": (
        "# in a clone of MiniMind {clone}, this model's tokenizer in model/:",
        "cp {at} out/{weight}_{width}{suffix}.pth",
        "python eval_llm.py --weight {weight} --hidden_size {width} "
        "--num_hidden_layers {layers} --use_moe {moe}",
    ),
    "gguf": ("llama-cli -m {at}", "llama-server -m {at} --host 127.0.0.1"),
    "minimind": (
        "# AutoModelForCausalLM.from_pretrained({path!r}, trust_remote_code=True)",
        'pip install "lm_eval[hf]"',
        "lm_eval --model hf --model_args pretrained={at},trust_remote_code=True "
        "--tasks ceval-valid",
    ),
}
_NEXT_OF_A_FAMILY = (
    "transformers serve --host 127.0.0.1 --port 8000",
    "transformers chat {at} http://127.0.0.1:8000   # while that runs",
    "vllm serve {at} --host 127.0.0.1",
    'pip install "lm_eval[hf]"',
    "lm_eval --model hf --model_args pretrained={at} --tasks ceval-valid",
    '# for llama.cpp: the same export once more, with format="gguf"',
)


@dataclasses.dataclass(frozen=True)
class _Network:
    """What is exported: weights as they will be stored, and what belongs to them."""

    config: MiniMindConfig
    tensors: Tensors
    tokenizer: TokenizerSpec
    dtype: str
    stage: str | None


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
    """Write a model for other programs; what to type next is printed.

    `source`, `which`, `tokenizer` and `shape` are what `load` takes. `format`:

    - "llama" (second generation, dense), "qwen3" (third, dense), "qwen3_moe" (third, a
      mixture without shared experts): folders that transformers, vLLM and others open;
    - "minimind": a folder for any network, which carries the network's code;
    - "gguf": a file for llama.cpp, of what is a Llama or Qwen3 (an optional extra);
    - "pth": a file for MiniMind's scripts, in float16.

    None takes the file that the name ends in, or the first that holds the network. `dtype` ("float32", "float16",
    "bfloat16") is the precision to store in, as the weights are unless given.

    A folder and a GGUF file are opened by a fresh process before they get their name,
    and its logits, of a folder also its token ids, compared with the source's; a `.pth`
    is read back. Nothing
    is overwritten, and nothing is left behind by a failure.

    Raises what `load` raises; `FileExistsError` where something is in the way;
    `ValueError` for an unknown format or precision, one that cannot hold the network or
    its numbers, or GGUF without the extra; `RuntimeError` where what was
    written does not compute the same.
    """
    if format is not None and format not in FORMATS:
        raise ValueError(
            f"format={format!r} is unknown; there are {', '.join(FORMATS)}"
        )
    final = Path(folder).expanduser()
    if format is None and final.suffix[1:] in _FILES:
        format = final.suffix[1:]
    _check_free(final, format not in _FILES)
    if dtype is None and format == "pth":
        dtype = torch.float16
    network = _read(source, which, tokenizer, dtype, **shape)
    kind = _choose_format(network.config, format)
    if kind == "gguf":
        check_convertible(network.tokenizer)
    with beside(final) as aside:
        if kind == "pth":
            difference = _write_pth(network, aside / final.name)
        elif kind == "gguf":
            difference = _write_gguf(network, aside, final.name)
        else:
            _write_folder(network, aside, kind)
            difference = _compare(network, aside, kind)
        _check_free(final, kind not in _FILES)
        rename_flushed(aside / final.name if kind in _FILES else aside, final)
    print(_describe(final, kind, network, difference))
    return final


def _read(
    source: str | os.PathLike[str],
    which: str,
    tokenizer: Any,
    dtype: str | torch.dtype | None,
    **shape: Any,
) -> _Network:
    found = find_weights(source, which, tokenizer, **shape)
    spec = choose_tokenizer(found, tokenizer, source)
    if found.assumed:
        print(found.describe_assumed())
    tensors = found.read()
    stored = tensors["model.embed_tokens.weight"].dtype
    name = str(stored if dtype is None else dtype).removeprefix("torch.")
    if name not in ("float32", "float16", "bfloat16"):
        raise ValueError(
            f'dtype={name!r} cannot be stored: "float32", "float16" or "bfloat16"'
        )
    cast = {
        name_: tensor.to(getattr(torch, name)).contiguous().clone()
        for name_, tensor in tensors.items()
        if name_ != "lm_head.weight"
    }
    if wrong := [n for n, tensor in cast.items() if not tensor.isfinite().all()]:
        raise ValueError(f"{wrong[0]} holds numbers too large for {name}: take another")
    config = found.config
    config.pad_token_id, config.bos_token_id = spec.pad_id, spec.bos_id
    config.eos_token_id = spec.eos_id
    return _Network(config, cast, spec, name, found.stage)


def _choose_format(config: MiniMindConfig, format: str | None) -> str:
    """The format asked for, or the most portable. Raises `ValueError` naming what
    differs where it cannot hold the network."""
    holds = {name: family.lacks(config) for name, family in FAMILIES.items()}
    fits = [name for name, lacking in holds.items() if not lacking]
    if format is None:
        return (*fits, "minimind")[0]
    if format == "gguf" and (not fits or not config.norm_topk_prob and config.use_moe):
        raise ValueError(
            "llama.cpp knows no network of this kind (it needs a Llama, a Qwen3, or a "
            'Qwen3-MoE with norm_topk_prob=True): export it with format="minimind"'
        )
    if lacking := holds.get(format, []):
        others = " or ".join(f'"{name}"' for name in (*fits, "minimind"))
        raise ValueError(
            f'format="{format}" has no {", ".join(lacking)}; format={others} holds it'
        )
    return format


def _write_folder(network: _Network, folder: Path, kind: str) -> None:
    config, family = network.config, FAMILIES.get(kind)
    if family:
        described = family.describe(config)
    else:
        described = describe_own(config)
        package = importlib.resources.files(__package__ or "")
        code = (package / "architecture.py").read_bytes()
        (folder / f"{OWN_CODE}.py").write_bytes(code)
    spec = network.tokenizer
    version = {"transformers_version": transformers_version}
    ids = {"bos_token_id": spec.bos_id, "eos_token_id": spec.eos_id}
    _write_json(
        folder / "config.json", {**described, "dtype": network.dtype, **version}
    )
    _write_json(
        folder / "generation_config.json",
        {**ids, "pad_token_id": spec.pad_id, **version},
    )
    write_tokenizer(spec, folder)
    save_file(dict(network.tensors), folder / WEIGHTS, {"format": "pt"})


def _write_json(file: Path, fields: dict[str, Any]) -> None:
    text = json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(f"{text}\n", encoding="utf-8")


def _write_pth(network: _Network, file: Path) -> float:
    head = {"lm_head.weight": network.tensors["model.embed_tokens.weight"]}
    write_pth({**network.tensors, **head}, file)
    back = read_pth(file)
    if any(not torch.equal(back[n], tensor) for n, tensor in network.tensors.items()):
        raise RuntimeError("the .pth does not read back as it was written; try again")
    return 0.0


def _write_gguf(network: _Network, aside: Path, name: str) -> float:
    family = _choose_format(network.config, None)
    folder = aside / "folder"
    folder.mkdir()
    _write_folder(network, folder, family)
    convert(folder, aside / name, network.dtype)
    return _compare(network, aside, family, gguf=name)


def _compare(network: _Network, folder: Path, kind: str, gguf: str = "") -> float:
    """The greatest difference of logits between the source and what a fresh process
    opens. Raises `RuntimeError` above 1e-5 of the greatest logit, fp32's rounding."""
    config = network.config
    longest, size = config.max_position_embeddings, config.vocab_size
    rows = [[(7919 * n + 1) % size for n in range(min(k, longest))] for k in _ROWS]
    read: dict[str, Any] = {}
    if gguf:  # with what transformers does not read of such a file
        read = {"gguf_file": gguf, "head_dim": config.head_dim}
        if config.use_moe:
            read["moe_intermediate_size"] = config.intermediate_size
    question = {"rows": rows, "keep": _KEEP, "text": _TEXT, "gguf": read}
    code = OWN_CODE if kind == "minimind" else ""
    theirs = _ask_fresh_process(folder, {**question, "code": code})
    ids = load_tokenizer(network.tokenizer).encode(_TEXT, add_special_tokens=False)
    if not gguf and theirs["ids"].tolist() != ids:
        raise RuntimeError(
            f"transformers reads {_TEXT!r} as other tokens than this tokenizer: "
            f"{theirs['ids'].tolist()} instead of {ids}; nothing was written"
        )
    model = MiniMindForCausalLM(config).eval()
    put_weights(model, network.tensors, "the source")
    greatest, scale = 0.0, 0.0
    with torch.inference_mode():
        for number, row in enumerate(rows):
            ours = model(torch.tensor([row]), logits_to_keep=_KEEP).logits[0]
            difference = (ours - theirs[str(number)]).abs().max().item()
            greatest, scale = (
                max(greatest, difference),
                max(scale, ours.abs().max().item()),
            )
    if not greatest <= _TOLERANCE * scale:
        yarn = " (inference_rope_scaling)" if config.rope_parameters else ""
        raise RuntimeError(
            f"what was written computes something else{yarn}: logits differ by up to "
            f"{greatest:.2e} where they reach {scale:.2e}; nothing was written"
        )
    return greatest


def _ask_fresh_process(folder: Path, question: dict[str, Any]) -> dict[str, Any]:
    asked, answer = folder / ".question.json", folder / ".answer.safetensors"
    _write_json(asked, question)
    failed = "a fresh process cannot open what was written, and nothing is left of it"
    try:
        code = inspect.getsource(reopening)
        run_fresh(code, folder, asked, answer, failed=failed)
        return {name: tensor.clone() for name, tensor in load_file(answer).items()}
    finally:
        asked.unlink(missing_ok=True)
        answer.unlink(missing_ok=True)


def _check_free(final: Path, is_folder: bool) -> None:
    """Raise where anything lies but, for a folder, an empty one."""
    empty = final.is_dir() and not final.is_symlink() and not any(final.iterdir())
    if os.path.lexists(final) and not (is_folder and empty):
        raise FileExistsError(
            f"{final} is there already, and nothing is overwritten: name another place"
        )
    parents = [parent for parent in final.absolute().parents if parent.exists()]
    if not parents[0].is_dir():
        raise NotADirectoryError(f"{parents[0]} is no folder to write {final} into")


def _describe(final: Path, kind: str, network: _Network, difference: float) -> str:
    config = network.config
    path = str(final.absolute())
    known = {"path": path, "at": shlex.quote(path), "moe": int(config.use_moe)}
    known["suffix"] = "_moe" if config.use_moe else ""
    known["clone"] = (
        "as it is now" if config.qk_norm else "of its second generation, without q_norm"
    )
    known["weight"] = WEIGHTS_NAMES.get(network.stage or "", "full_sft")
    known |= {"width": config.hidden_size, "layers": config.num_hidden_layers}
    lines = [line.format(**known) for line in _NEXT.get(kind, _NEXT_OF_A_FAMILY)]
    checked = (
        f"logits compared in a fresh process, greatest difference {difference:.2g}"
    )
    if kind == "pth":
        checked = "read back and equal"
    head = f"{final} is written (format {kind!r}, {network.dtype}): {checked}."
    return "\n".join(
        [head, *_misfits(kind, config), "Next:", *(f"  {n}" for n in lines)]
    )


def _misfits(kind: str, config: MiniMindConfig) -> list[str]:
    """What MiniMind's scripts take for granted and these weights have otherwise."""
    if kind != "pth":
        return []
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
        f"MiniMind's scripts expect {name}={value}, and here it is "
        f"{getattr(config, name)}: change it there."
        for name, value in expected.items()
        if getattr(config, name) != value
    ]
