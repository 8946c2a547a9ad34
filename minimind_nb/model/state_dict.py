"""Named tensors: read from a file, checked, put into a model; what they tell of it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ..storage.verified import write_bytes
from .architecture import MiniMindConfig, MiniMindForCausalLM

_SHOWN_KEYS = 5
_HEADS = 8
_FUSED = 3  # axes: experts, outputs, inputs
_PRECISIONS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_EMBEDDING = "model.embed_tokens.weight"
Tensors = Mapping[str, torch.Tensor]


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a `.safetensors` file or a `.pth`. Raises `ValueError`.

    Experts that lie in one tensor, as transformers holds them in memory, are told apart.
    """
    if file.suffix != ".safetensors":
        return _split_experts(read_pth(file))
    try:
        return _split_experts(_check_tensors(file, load_file(file)))
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({error}); copy it again") from None


def _split_experts(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    split = {}
    for name, tensor in tensors.items():
        at, _, kind = name.partition(".experts.")
        if kind == "gate_up_proj" and tensor.ndim == _FUSED:
            for number, both in enumerate(tensor):
                for part, half in zip(("gate", "up"), both.chunk(2), strict=True):
                    split[f"{at}.experts.{number}.{part}_proj.weight"] = half
        elif kind == "down_proj" and tensor.ndim == _FUSED:
            for number, expert in enumerate(tensor):
                split[f"{at}.experts.{number}.down_proj.weight"] = expert
        else:
            split[name] = tensor
    return split


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """A bare state dict, without DDP's `module.` prefix. Raises `ValueError`.

    Read with `weights_only=True`: a pickle that would run code is refused.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # torch raises a different type for each damage
        # Its own text is not passed on: it advises to load without weights_only.
        raise ValueError(
            f"{path} is no file of weights: a .pth with a bare state dict is expected"
        ) from error
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor)
        for name, value in state.items()
    ):
        held = ", ".join(map(str, state if isinstance(state, dict) else [type(state)]))
        raise ValueError(
            f"{path} is no bare state dict, which has names with tensors; it holds "
            f"{held:.100}. Of a file for resuming take the weights: "
            'torch.save(torch.load(FILE, weights_only=True)["model"], NEW_FILE)'
        )
    tensors = {_bare(name): value for name, value in state.items()}
    if len(tensors) < len(state):
        raise ValueError(f"{path} holds weights twice, with a prefix and without")
    return _check_tensors(path, tensors)


def _bare(name: str) -> str:
    """A name without what DDP and torch.compile put in front."""
    return name.removeprefix("module.").removeprefix("_orig_mod.")


def write_pth(tensors: Tensors, file: Path) -> None:
    """Write a bare state dict in fp16, as MiniMind's scripts read it, at once or not.

    Raises `OSError`, on a full disk too.
    """
    buffer = io.BytesIO()  # torch turns a full disk into a RuntimeError of no kind
    torch.save(
        {n: t.detach().to("cpu", torch.float16) for n, t in tensors.items()}, buffer
    )
    write_bytes(file, buffer.getvalue())


def _check_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Refuse what is no plain number for number: some bytes may claim to be gigabytes."""
    for name, tensor in tensors.items():
        if not tensor.numel():
            raise ValueError(f"{path} holds nothing in {name}: copy it again")
        plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
        held = tensor.untyped_storage().nbytes() if plain else 0
        if not plain or tensor.dtype not in _PRECISIONS or held < tensor.nbytes:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path} holds {name} as {kind} in {held:,} bytes; expected is one of "
                f"{', '.join(str(d)[6:] for d in _PRECISIONS)}, stored in full"
            )
    return tensors


def put_weights(model: MiniMindForCausalLM, tensors: Tensors, source: str) -> None:
    """Load tensors by name; `lm_head.weight` may be left out, being tied.

    Raises what `check_weights` raises; the model is not changed then.
    """
    check_weights(model, tensors, source)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[name])


def check_fit(config: MiniMindConfig, tensors: Tensors, source: str) -> None:
    """Raise what `check_weights` raises, without the memory of a model.

    What a configuration from elsewhere counts is compared before anything is built.
    """
    mlp = "model.layers.0.mlp"
    experts = config.n_routed_experts if config.use_moe else 0
    shared = config.n_shared_experts if config.use_moe else 0
    for what, prefix, said in (
        ("layers", "model.layers.", config.num_hidden_layers),
        ("experts", f"{mlp}.experts.", experts),
        ("shared experts", f"{mlp}.shared_experts.", shared),
    ):
        if (there := _count(tensors, prefix)) != said:
            raise ValueError(
                f"{source} holds {there:,} {what} and its configuration says {said!r}: "
                "they do not belong together"
            )
    try:
        with torch.device("meta"):
            model = MiniMindForCausalLM(config)
    except (RuntimeError, ArithmeticError, TypeError, KeyError) as error:
        raise ValueError(
            f"the configuration of {source} describes no model: {error}"
        ) from None
    check_weights(model, tensors, source)


def check_weights(model: MiniMindForCausalLM, tensors: Tensors, source: str) -> None:
    """Raise `ValueError` naming what does not fit the model, or is not finite.

    The model may lie on the meta device: only names and shapes of it are looked at.
    """
    for name, tensor in tensors.items():
        if not tensor.to(torch.float32).isfinite().all():  # what a model holds
            raise ValueError(f"{source} holds values that are not finite, in {name}")
    found, expected = dict(tensors), dict(model.named_parameters())
    expected.pop("lm_head.weight", None)  # transformers 5.0.0 ties none on "meta"
    tied = found.pop("lm_head.weight", None)
    if tied is not None and _EMBEDDING in found:
        if not torch.equal(tied, found[_EMBEDDING]):
            raise ValueError(
                f"lm_head and embed_tokens differ in {source}: MiniMind ties them"
            )
    differences = [
        f"{name}: {_shape(found, name)} there, {_shape(expected, name)} in this model"
        for name in sorted(found.keys() | expected.keys())
        if _shape(found, name) != _shape(expected, name)
    ]
    if differences:
        if (more := len(differences) - _SHOWN_KEYS) > 0:
            differences[_SHOWN_KEYS:] = [f"and {more} more"]
        raise ValueError(
            f"the weights in {source} are of another shape:\n  "
            + "\n  ".join(differences)
            + "\nSet the shape that they have, or take other weights."
        )


def infer_shape(
    tensors: Tensors, *, num_attention_heads: int = 0, head_dim: int = 0, **_: Any
) -> dict[str, Any]:
    """What the names and shapes of a MiniMind state dict tell of its configuration.

    The number of heads or their width, where known, goes before MiniMind's 8 heads.
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
        if qk_norm:
            head_dim = len(tensors[f"{attention}.q_norm.weight"])
    except KeyError as error:
        held = ", ".join(list(tensors)[:3]) or "nothing"
        raise ValueError(
            f"this is no MiniMind state dict: {error} is missing, and it holds {held}"
        ) from None
    except (ValueError, TypeError):
        raise ValueError(
            f"this is no MiniMind state dict: {_EMBEDDING} has the shape "
            f"{list(tensors[_EMBEDDING].shape)}, and two axes are expected"
        ) from None
    head_dim = head_dim or max(1, queries // (num_attention_heads or _HEADS))
    if queries % head_dim or keys % head_dim or not keys:
        raise ValueError(
            f"{queries} and {keys} rows of q_proj and k_proj are no whole number of heads "
            f"{head_dim} wide: set num_attention_heads or head_dim as it was trained"
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
        "rms_norm_eps": 1e-6 if qk_norm else 1e-5,
        "use_moe": use_moe,
    }
    if not use_moe:
        return shape
    return shape | {
        "n_routed_experts": _count(tensors, f"{mlp}.experts."),
        "n_shared_experts": _count(tensors, f"{mlp}.shared_experts."),
        "num_experts_per_tok": 1 if qk_norm else 2,
        "aux_loss_alpha": 5e-4 if qk_norm else 0.01,
        "seq_aux": not qk_norm,
    }


def _count(tensors: Tensors, prefix: str) -> int:
    """How many numbers follow a prefix among the names."""
    return len(
        {n.removeprefix(prefix).split(".")[0] for n in tensors if n.startswith(prefix)}
    )


def _shape(tensors: Tensors, name: str) -> str:
    return "×".join(map(str, tensors[name].shape)) if name in tensors else "missing"
