"""Find and load trained weights: runs, checkpoints, `.pth` files, saved folders."""

import json
import math
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer
from torch import nn

from ..config import MIXTURE_FIELDS, SHAPE_FIELDS, WEIGHTS_NAMES, describe_unknown
from ..data.tokenizer import TokenizerSpec, load_tokenizer, read_tokenizer
from ..storage import verified
from ..storage.run_folder import STATE, WEIGHTS, RunFolder, run_of
from .architecture import THIRD_GENERATION, MiniMindConfig, MiniMindForCausalLM
from .hf_formats import read_config
from .state_dict import infer_shape, put_weights, read_pth, read_tensors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NOT_IN_PTH = (  # not told by the names and shapes of tensors
    "num_attention_heads head_dim rope_theta rms_norm_eps num_experts_per_tok "
    "norm_topk_prob"
).split()
_WEIGHTS_FILES = (WEIGHTS, "pytorch_model.bin")  # the latter by MiniMind's converter


def load(
    source: str | os.PathLike[str],
    which: str = "last",
    tokenizer: Any = None,
    rope_scaling: float | Mapping[str, Any] | None = None,
    **shape: Any,
) -> "tuple[MiniMindForCausalLM, PreTrainedTokenizerFast]":
    """Load a model in float32, ready to generate, and its tokenizer.

    `source` is a run or its folder (`which` picks the "last" checkpoint or the "best"
    on validation), a checkpoint folder, a MiniMind `.pth`, or a folder that
    `save_pretrained` wrote, of MiniMind's own kind or a Llama, Qwen3 or Qwen3-MoE. What
    a `.pth` does not record (heads, top-k, theta) comes from `shape`, by
    `MiniMindConfig`'s names, from the run beside it that wrote it, or else from
    MiniMind's defaults, with a warning. `tokenizer` replaces the one saved with the
    weights; its entries must be the same. Without either, a warning says that it is the
    shipped one. Nothing is downloaded and no code from the source is run.

    `rope_scaling=4` stretches RoPE by YaRN to 4 times the `max_seq_len` of the run, the
    most that the model then reads. Weights without a run do not record it: pass
    {"factor": 4, "original_max_position_embeddings": 512}, which may also have
    "attention_factor", "beta_fast" and "beta_slow".

    Raises `FileNotFoundError` if there are no weights; `ValueError` if they do not fit,
    are not finite, were trained with another tokenizer, or are of a network that
    MiniMind cannot express; `NoGoodCheckpoint` if every checkpoint is damaged.
    """
    found = find_weights(source, which, tokenizer, rope_scaling, **shape)
    model = found.read().eval()
    model.stage = found.stage
    nn.Module.float(model)  # PreTrainedModel's own is not typed
    return model, load_tokenizer(found.tokenizer)


@dataclass
class FoundWeights:
    """Weights on disk; `stage` is None if neither a run nor a `.pth`'s name records it.

    `trained_length` is the `max_seq_len` of the run that wrote them, if there is one.
    """

    file: Path
    config: MiniMindConfig
    tokenizer: TokenizerSpec | None = None
    stage: str | None = None
    trained_length: int | None = None
    source: str = ""  # the place that was named

    def read(self) -> MiniMindForCausalLM:
        """Return the model in its stored precision, or raise `ValueError`."""
        tensors, source = read_tensors(self.file), str(self.file)
        shape = infer_shape(tensors, source, **self.config.to_dict())
        for name, held in shape.items():
            if (said := getattr(self.config, name)) != held:
                raise ValueError(
                    f"{source} holds {name}={held!r} and its configuration says {said!r}: "
                    "they do not belong together"
                )
        with torch.device("meta"):  # no larger than the tensors that are held
            model = MiniMindForCausalLM(self.config)
        put_weights(model, tensors, source, assign=True)
        model.lm_head.weight = model.model.embed_tokens.weight
        return model

    def shape(self) -> dict[str, Any]:
        """Return the configuration by `TrainConfig`'s names."""
        left_out = () if self.config.use_moe else MIXTURE_FIELDS
        return {n: getattr(self.config, n) for n in SHAPE_FIELDS if n not in left_out}


def find_weights(
    source: str | os.PathLike[str],
    which: str = "last",
    tokenizer: Any = None,
    rope_scaling: float | Mapping[str, Any] | None = None,
    **shape: Any,
) -> FoundWeights:
    """Find the weights that `load` would read. Raises as it does, values not yet read."""
    if which not in ("last", "best"):
        raise ValueError(f'which={which!r}: "last" or "best" is expected')
    shape = {name: value for name, value in shape.items() if value is not None}
    for name in shape.keys() - set(SHAPE_FIELDS):
        raise ValueError(describe_unknown(name, SHAPE_FIELDS, "part of a shape"))
    found = _find(Path(source).expanduser(), which, tokenizer, shape)
    own, config = found.tokenizer, found.config
    spec = read_tokenizer(own if tokenizer is None else tokenizer)
    if own and spec != own:
        theirs, ours = (Tokenizer.from_str(t.json).get_vocab() for t in (spec, own))
        if theirs != ours:
            raise ValueError(
                f"the weights in {source} were trained with another tokenizer: leave "
                "tokenizer out, theirs is saved with them"
            )
    assumed = not own and tokenizer is None
    unused = config.vocab_size - spec.vocab_size
    if unused < 0 or (assumed and unused):
        raise ValueError(
            f"the tokenizer has {spec.vocab_size} entries and the weights in {source} "
            f"{config.vocab_size}: name the one they were trained with, tokenizer=…"
        )
    if assumed:
        warnings.warn(
            f"{source} comes without a tokenizer: using the shipped one. MiniMind's own "
            'weights need theirs: tokenizer="minimind/model"',
            stacklevel=3,
        )
    config.pad_token_id, config.bos_token_id = spec.pad_id, spec.bos_id
    config.eos_token_id = spec.eos_id
    found.tokenizer, found.source = spec, os.fspath(source)
    if rope_scaling is not None:
        found.config = _stretch(found, rope_scaling)
    return found


def _stretch(
    found: FoundWeights, rope_scaling: float | Mapping[str, Any]
) -> MiniMindConfig:
    """Return the configuration with YaRN, for `factor` times the original length."""
    length = "original_max_position_embeddings"
    recorded = found.config.rope_parameters or {}
    values: dict[str, Any] = {length: recorded.get(length, found.trained_length)}
    plain = not isinstance(rope_scaling, Mapping)
    values |= {"factor": rope_scaling} if plain else rope_scaling
    factor = values.get("factor")
    if not isinstance(factor, int | float) or not 1 < factor < math.inf:
        raise ValueError(f"{rope_scaling=}: use a factor above 1, such as 4")
    if values[length] is None:
        raise ValueError(
            f"{found.source} does not record the length that it was trained with: pass it, "
            f'rope_scaling={{"factor": {factor}, "{length}": 512}}'
        )
    values.setdefault("attention_factor", 1 + 0.1 * math.log(factor))  # the paper's
    named = {"inference_rope_scaling": True, "rope_parameters": values}
    named["max_position_embeddings"] = int(factor * values[length])
    return MiniMindConfig.from_dict(found.config.to_dict() | named)


def model_config(
    settings: Mapping[str, Any], tokenizer: TokenizerSpec, **more: Any
) -> MiniMindConfig:
    """Return the model's configuration for `TrainConfig`'s resolved settings."""
    shape = {n: settings[n] for n in SHAPE_FIELDS if settings[n] is not None}
    ids = {"pad_token_id": tokenizer.pad_id, "bos_token_id": tokenizer.bos_id}
    return MiniMindConfig(**shape, **ids, eos_token_id=tokenizer.eos_id, **more)


def _find(
    path: Path, which: str, tokenizer: Any, shape: dict[str, Any]
) -> FoundWeights:
    if path.name in _WEIGHTS_FILES:
        path = path.parent
    if path.is_file():
        return _find_pth(path, shape)
    if shape:
        longer = {"inference_rope_scaling", "max_position_embeddings"} & shape.keys()
        hint = "for longer texts use rope_scaling=4" if longer else "leave it out"
        raise ValueError(
            f"{', '.join(shape)} cannot be set, since {path} records its shape: {hint}"
        )
    if (path / STATE).is_file():
        path = path.absolute()
        try:
            verified.verify(path)
        except verified.DamagedFolder as damage:
            raise ValueError(f"the checkpoint {path} is damaged: {damage}") from None
        return _find_checkpoint(path, tokenizer)
    run = RunFolder(path)
    fields = run.read_config() if run.exists() else {}
    if "settings" not in fields:
        return _find_saved(path, fields)
    best = run.best_checkpoint() if which == "best" else None
    if found := best or run.newest_good_checkpoint():
        return _find_checkpoint(found, tokenizer)
    raise FileNotFoundError(
        f"the run {path} has no checkpoint yet; it writes one every save_interval "
        "steps and at its end"
    )


def _find_checkpoint(folder: Path, tokenizer: Any) -> FoundWeights:
    """Describe a checkpoint; `tokenizer` is used if its run's is missing."""
    recorded = json.loads((folder / STATE).read_bytes())["config"]
    own = run_of(folder).tokenizer
    given = tokenizer is not None and not own.exists()
    spec = read_tokenizer(tokenizer if given else own)
    trained_with = recorded.get("hashes", {}).get("tokenizer")
    if trained_with not in (None, spec.fingerprint):
        raise ValueError(
            f"the tokenizer {'given' if given else own} is not the one that {folder} was "
            "trained with: restore that one, or pass it explicitly"
        )
    settings = recorded["settings"]
    config = model_config(settings, spec)
    stage, length = settings["stage"], settings["max_seq_len"]
    return FoundWeights(folder / WEIGHTS, config, spec, stage, length)


def _find_pth(path: Path, shape: Mapping[str, Any]) -> FoundWeights:
    """Describe a `.pth` by the run beside it that wrote it, else by its tensors."""
    tensors = read_pth(path, shapes_only=True)
    stage, name = None, path.stem
    for known, prefix in WEIGHTS_NAMES.items():
        if path.stem.startswith(f"{prefix}_"):
            stage, name = known, known + path.stem.removeprefix(prefix)
    run = RunFolder(path.parent / name)
    settings = run.settings() if run.exists() and run.tokenizer.exists() else {}
    if {"stage", "max_seq_len", *SHAPE_FIELDS} <= settings.keys():
        spec = read_tokenizer(run.tokenizer)
        config = model_config({**settings, **shape}, spec)
        held = infer_shape(tensors, str(path), **config.to_dict())
        if all(getattr(config, n) == value for n, value in held.items()):
            stage, length = settings["stage"], settings["max_seq_len"]
            return FoundWeights(path, config, spec, stage, length)
    held = infer_shape(tensors, str(path), **shape)
    third = {**THIRD_GENERATION, "seq_aux": False, "aux_loss_alpha": 5e-4}
    guessed = third if held["qk_norm"] else {}
    config = read_config({"model_type": "minimind", **guessed, **held, **shape})
    known = {"head_dim", *shape, *(() if config.use_moe else MIXTURE_FIELDS)}
    if config.qk_norm or "head_dim" in shape:
        known.add("num_attention_heads")
    assumed = [f"{n}={getattr(config, n)!r}" for n in NOT_IN_PTH if n not in known]
    if assumed:
        warnings.warn(
            f"{path} does not record {', '.join(assumed)}: assuming MiniMind's defaults. "
            "Pass other values explicitly.",
            stacklevel=5,
        )
    return FoundWeights(path, config, stage=stage)


def _find_saved(path: Path, fields: Mapping[str, Any]) -> FoundWeights:
    """Describe weights with a `config.json` of transformers' kind."""
    files = [path / name for name in _WEIGHTS_FILES if (path / name).is_file()]
    if not fields or not files:
        lacking = f"holds no {'config.json' if files else 'weights in one file'}"
        raise FileNotFoundError(
            f"{path} {lacking if path.exists() else 'does not exist'}: a run folder, a "
            "checkpoint folder, a .pth file or a folder by save_pretrained(…, "
            'max_shard_size="99GB") of a MiniMind, Llama, Qwen3 or Qwen3-MoE is expected'
        )
    try:
        config = read_config(fields)
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'}: {error}") from None
    own = any(path.glob("tokenizer*.*"))
    return FoundWeights(files[0], config, read_tokenizer(path) if own else None)
