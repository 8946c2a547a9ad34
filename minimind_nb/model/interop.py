"""Weights from outside: run folders, checkpoints, MiniMind's `.pth`, saved folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file

from ..config import SHAPE_FIELDS
from ..data.tokenizer import TokenizerSpec, load_tokenizer, read_tokenizer
from ..storage import verified
from ..storage.runs import STATE, WEIGHTS, RunFolder
from .architecture import MiniMindConfig, MiniMindForCausalLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SHOWN_KEYS = 5
_HEADS = 8
Tensors = Mapping[str, torch.Tensor]


def load(
    source: str | os.PathLike[str],
    which: str = "last",
    tokenizer: Any = None,
    **shape: Any,
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerFast]:
    """A model in float32, ready to generate, and its tokenizer.

    `source` is a run or its folder (`which` picks the "last" checkpoint or the "best"
    on validation), a checkpoint folder, a MiniMind `.pth`, or a folder that
    `save_pretrained` wrote. A `.pth` says nothing of heads, top-k or theta: they are
    MiniMind's defaults unless given in `shape` (by `MiniMindConfig`'s names).
    `tokenizer` replaces the one that lies with the weights (for a `.pth` the shipped
    one). Nothing is downloaded and no code from the source is run.

    Raises `FileNotFoundError` where there are no weights, `ValueError` where they do
    not fit, hold a value that is not finite, or come with another tokenizer's size.
    """
    path = Path(source)
    if which not in ("last", "best"):
        raise ValueError(f'which={which!r}: "last" or "best" is expected')
    if path.is_file():
        tensors = read_pth(path)
        config = MiniMindConfig(**{**infer_shape(tensors), **shape})
        spec = read_tokenizer(tokenizer)
    elif (path / STATE).is_file():
        tensors, config, spec = _from_checkpoint(path, path.parent.parent)
    elif RunFolder(path).exists() and "settings" in RunFolder(path).read_config():
        tensors, config, spec = _from_checkpoint(_newest(path, which), path)
    elif (path / "config.json").is_file() and (path / WEIGHTS).is_file():
        tensors, config, spec = _from_saved(path, tokenizer)
    else:
        raise FileNotFoundError(
            f"{path} holds no weights: a run folder, a checkpoint folder, a .pth file or "
            "a folder written by save_pretrained is expected"
        )
    if tokenizer is not None:
        spec = read_tokenizer(tokenizer)
    if spec.vocab_size > config.vocab_size:
        raise ValueError(
            f"the tokenizer has {spec.vocab_size} entries and the weights in {path} "
            f"{config.vocab_size}: they do not belong together; name the right one with "
            "tokenizer=…"
        )
    model = MiniMindForCausalLM(config)
    put_weights(model, tensors, str(path))
    return model.eval(), load_tokenizer(spec)


def model_config(
    settings: Mapping[str, Any], tokenizer: TokenizerSpec
) -> MiniMindConfig:
    """The model's configuration from `TrainConfig`'s resolved settings."""
    given = {name: settings[name] for name in SHAPE_FIELDS}
    known: dict[str, Any] = {k: v for k, v in given.items() if v is not None}
    return MiniMindConfig(
        **known,
        pad_token_id=tokenizer.pad_id,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
    )


def put_weights(model: MiniMindForCausalLM, tensors: Tensors, source: str) -> None:
    """Load tensors by name; `lm_head.weight` may be left out, being tied.

    Raises `ValueError` naming what is missing, too much, of another shape or not
    finite; the model is not changed then.
    """
    found = dict(tensors)
    expected = dict(model.named_parameters())
    tied = found.pop("lm_head.weight", None)
    embedding = found.get("model.embed_tokens.weight")
    if tied is not None and embedding is not None and not torch.equal(tied, embedding):
        raise ValueError(
            f"lm_head and embed_tokens differ in {source}: MiniMind ties them"
        )
    differences = [
        f"{name}: {_shape(found, name)} there, {_shape(expected, name)} in this model"
        for name in sorted(found.keys() | expected.keys())
        if _shape(found, name) != _shape(expected, name)
    ]
    if differences:
        more = len(differences) - _SHOWN_KEYS
        shown = differences[:_SHOWN_KEYS] + ([f"and {more} more"] if more > 0 else [])
        raise ValueError(
            f"the weights in {source} are of another shape:\n  "
            + "\n  ".join(shown)
            + "\nSet the shape they have, or train under another run_name."
        )
    broken = [name for name, tensor in found.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f"{source} holds values that are not finite, in {broken[0]}")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(found[name])


def read_pth(path: Path) -> dict[str, torch.Tensor]:
    """A bare state dict, without DDP's `module.` prefix. Raises `ValueError`.

    Read with `weights_only=True`: a pickle that would run code is refused.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a different type for each damage
        raise ValueError(f"{path} is no file of weights: {error}") from error
    if not isinstance(state, dict) or not all(
        isinstance(value, torch.Tensor) for value in state.values()
    ):
        raise ValueError(
            f"{path} is no bare state dict: names with tensors are expected"
        )
    return {name.removeprefix("module."): value for name, value in state.items()}


def infer_shape(tensors: Tensors) -> dict[str, Any]:
    """What the names and shapes of a MiniMind state dict tell of its configuration."""
    try:
        vocab_size, hidden_size = tensors["model.embed_tokens.weight"].shape
        attention = "model.layers.0.self_attn"
        queries = tensors[f"{attention}.q_proj.weight"].shape[0]
        keys = tensors[f"{attention}.k_proj.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"this is no MiniMind state dict: it has no {error}, but "
            f"{', '.join(list(tensors)[:3]) or 'nothing'}"
        ) from None
    qk_norm = f"{attention}.q_norm.weight" in tensors
    head_dim = queries // _HEADS
    if qk_norm:
        head_dim = tensors[f"{attention}.q_norm.weight"].shape[0]
    use_moe = "model.layers.0.mlp.gate.weight" in tensors
    expert = "mlp.experts.0.gate_proj" if use_moe else "mlp.gate_proj"
    shared = _count(tensors, "model.layers.0.mlp.shared_experts.")
    mixture = {
        "n_routed_experts": _count(tensors, "model.layers.0.mlp.experts."),
        "n_shared_experts": shared,
        "num_experts_per_tok": 1 if qk_norm else 2,
        "seq_aux": not qk_norm,
    }
    return {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "num_hidden_layers": _count(tensors, "model.layers."),
        "num_attention_heads": queries // head_dim,
        "num_key_value_heads": keys // head_dim,
        "head_dim": head_dim,
        "intermediate_size": tensors[f"model.layers.0.{expert}.weight"].shape[0],
        "qk_norm": qk_norm,
        "use_moe": use_moe,
        **(mixture if use_moe else {}),
    }


def _newest(path: Path, which: str) -> Path:
    folder = RunFolder(path)
    best = which == "best"
    found = folder.best_checkpoint() if best else folder.newest_good_checkpoint()
    if found is None:
        raise FileNotFoundError(
            f"the run {path} has no checkpoint yet; it writes one every save_interval "
            "steps and at its end"
        )
    return found.folder


def _from_checkpoint(
    folder: Path, run: Path
) -> tuple[Tensors, MiniMindConfig, TokenizerSpec]:
    try:
        verified.verify(folder)
    except verified.DamagedFolder as damage:
        raise ValueError(f"the checkpoint {folder} is damaged: {damage}") from None
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    spec = read_tokenizer(RunFolder(run).tokenizer)
    config = model_config(state["config"]["settings"], spec)
    return load_file(folder / WEIGHTS), config, spec


def _from_saved(
    path: Path, tokenizer: Any
) -> tuple[Tensors, MiniMindConfig, TokenizerSpec]:
    fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if fields.get("model_type") != MiniMindConfig.model_type:
        raise ValueError(
            f"{path} holds a {fields.get('model_type')!r} model, "
            f"{MiniMindConfig.model_type!r} is expected"
        )
    config = MiniMindConfig.from_dict(fields)
    has_own = (path / "tokenizer.json").is_file()
    source = path if has_own and tokenizer is None else tokenizer
    return load_file(path / WEIGHTS), config, read_tokenizer(source)


def _count(tensors: Tensors, prefix: str) -> int:
    """How many numbers follow a prefix among the names."""
    return len(
        {n.removeprefix(prefix).split(".")[0] for n in tensors if n.startswith(prefix)}
    )


def _shape(tensors: Mapping[str, torch.Tensor], name: str) -> str:
    return "×".join(map(str, tensors[name].shape)) if name in tensors else "missing"
