"""Read named tensors from a file, check them, and load them into a model."""

import hashlib
import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..storage.verified import write_bytes
from .architecture import MiniMindForCausalLM

_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EMBEDDING = "model.embed_tokens.weight"
DIGEST = "data_sha256"  # in the metadata of an exported safetensors file
Tensors = Mapping[str, torch.Tensor]


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a `.safetensors` file or a `.pth`.

    Raises `ValueError` for a damaged file, a tensor whose few bytes claim to be
    gigabytes, and values that are not finite in float32.
    """
    try:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                # A mapped file that is overwritten later would end this process.
                tensors = {n: opened.get_tensor(n).clone() for n in opened.keys()}
                recorded = (opened.metadata() or {}).get(DIGEST)
            if recorded and recorded != hash_data(tensors):
                raise SafetensorError("its data has another sha256 than was written")
        else:
            tensors = read_pth(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from None
    for name, tensor in tensors.items():
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        held = tensor.untyped_storage().nbytes() if plain else 0
        if not plain or tensor.dtype not in _PRECISIONS or held < tensor.nbytes:
            raise ValueError(
                f"{file} holds {name} as {tensor.dtype} in {held:,} bytes; expected are "
                "floating-point numbers, stored in full"
            )
        if not tensor.to(torch.float32).isfinite().all():
            raise ValueError(f"{file} holds values that are not finite, in {name}")
    return tensors


def read_pth(path: Path, *, shapes_only: bool = False) -> dict[str, torch.Tensor]:
    """Return a bare state dict, without DDP's and torch.compile's prefixes.

    With `shapes_only` the values stay on the disk, unchecked. Raises `ValueError`, also
    for a pickle that would run code.
    """
    try:
        state = torch.load(
            path, map_location="cpu", weights_only=True, mmap=shapes_only
        )
        if not shapes_only and zipfile.is_zipfile(path):  # torch ignores its checksums
            with zipfile.ZipFile(path) as archive:
                if damaged := archive.testzip():
                    raise zipfile.BadZipFile(damaged)
    except PermissionError:
        raise
    except Exception as error:  # torch raises a different type for each damage
        # Its own text is not passed on: it advises to load without weights_only.
        raise ValueError(
            f"{path} is damaged or not a weights file: copy it again, or give a .pth "
            "with a bare state dict"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in state.items()
    ):
        held = [*state] if isinstance(state, dict) else type(state)
        raise ValueError(
            f"{path} holds {held!s:.100}, where a bare state dict (names with tensors) "
            'is expected. A resume file has it under "model": save that alone. The state '
            "of an optimizer holds no weights: give the model's"
        )
    return {
        name.removeprefix("module.").removeprefix("_orig_mod."): value
        for name, value in state.items()
    }


def hash_data(tensors: Tensors) -> str:
    """Return the sha256 of a safetensors file's data section, of tensors of one type."""
    parts = [tensors[name].flatten().view(torch.uint8) for name in sorted(tensors)]
    return hashlib.sha256(torch.cat(parts).numpy().data).hexdigest()


def write_pth(tensors: Tensors, file: Path, dtype: torch.dtype = torch.float16) -> None:
    """Write a bare state dict at once, or raise `OSError`, also for a full disk."""
    buffer = io.BytesIO()  # torch turns a full disk into a plain RuntimeError
    torch.save({n: t.detach().to("cpu", dtype) for n, t in tensors.items()}, buffer)
    write_bytes(file, buffer.getvalue())


def put_weights(
    model: MiniMindForCausalLM, tensors: Tensors, source: str, *, assign: bool = False
) -> None:
    """Copy (or `assign`) tensors into a model by name; the tied head may be left out.

    Raises `ValueError` naming what is missing, unexpected or of another shape.
    """
    state = dict(tensors)
    if _EMBEDDING in state:
        head = state.setdefault("lm_head.weight", state[_EMBEDDING])
        if not torch.equal(head, state[_EMBEDDING]):
            raise ValueError(
                f"lm_head and embed_tokens differ in {source}: MiniMind ties them"
            )
    try:
        model.load_state_dict(state, strict=True, assign=assign)
    except RuntimeError as error:
        _, _, differences = str(error).partition("\n")
        raise ValueError(
            f"the weights in {source} do not fit the model:\n{differences:.1000}"
        ) from None


def infer_shape(tensors: Tensors, source: str, **known: Any) -> dict[str, Any]:
    """Return the configuration that names and shapes give.

    `known` is `head_dim` or `num_attention_heads`, by default 8; the rest is not used.
    """
    attention, mlp = "model.layers.0.self_attn", "model.layers.0.mlp"
    qk_norm = f"{attention}.q_norm.weight" in tensors
    use_moe = f"{mlp}.gate.weight" in tensors
    try:
        vocab_size, hidden_size = tensors[_EMBEDDING].shape
        queries = len(tensors[f"{attention}.q_proj.weight"])
        keys = len(tensors[f"{attention}.k_proj.weight"])
        expert = f"{mlp}.experts.0" if use_moe else mlp
        inner = len(tensors[f"{expert}.gate_proj.weight"])
        heads = known.get("num_attention_heads", 8)
        head_dim = known.get("head_dim") or (heads and queries // heads)
        if qk_norm:
            head_dim = len(tensors[f"{attention}.q_norm.weight"])
    except (KeyError, ValueError, TypeError) as error:
        what = f"no MiniMind state dict ({error!r}) but {[*tensors][:3]}"
        if any(".lora" in name for name in tensors):
            what = "LoRA weights only: merge them into their model and give that one's"
        raise ValueError(f"{source} holds {what}") from None
    if head_dim < 1 or queries % head_dim or keys % head_dim:
        raise ValueError(
            f"q_proj and k_proj in {source} have {queries} and {keys} rows, not a multiple "
            f"of the head width {head_dim}: set num_attention_heads or head_dim"
        )
    shape = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(tensors, "model.layers."),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "intermediate_size": inner,
        "qk_norm": qk_norm,
        "use_moe": use_moe,
    }
    if use_moe:
        shape["n_routed_experts"] = _count(tensors, f"{mlp}.experts.")
        shape["n_shared_experts"] = _count(tensors, f"{mlp}.shared_experts.")
    return shape


def _count(tensors: Tensors, prefix: str) -> int:
    return len(
        {n.removeprefix(prefix).split(".")[0] for n in tensors if n.startswith(prefix)}
    )
