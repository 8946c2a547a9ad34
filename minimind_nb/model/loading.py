"""Weights from elsewhere: run folders, checkpoints, MiniMind's `.pth`, saved folders."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer

from ..config import (
    MIXTURE_FIELDS,
    SHAPE_FIELDS,
    WEIGHTS_NAMES,
    TrainConfig,
    describe_unknown,
)
from ..data.tokenizer import TokenizerSpec, load_tokenizer, read_tokenizer
from ..storage import verified
from ..storage.run_folder import STATE, WEIGHTS, RunFolder
from .architecture import MiniMindConfig, MiniMindForCausalLM
from .hf_formats import read_config
from .state_dict import (
    Tensors,
    check_fit,
    infer_shape,
    put_weights,
    read_pth,
    read_tensors,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_SOURCES = (
    "a run folder, a checkpoint folder, a .pth file or a folder written by "
    "save_pretrained (MiniMind, Llama, Qwen3 or Qwen3-MoE)"
)
# By generation, for the names and shapes of the tensors leave them open.
_GUESSED = ("rms_norm_eps", "num_experts_per_tok", "aux_loss_alpha", "seq_aux")
_WEIGHTS_FILES = (WEIGHTS, "pytorch_model.bin")
CONFIG = "config.json"
# Tokenizers of other kinds than tokenizer.json, which has to be made of them.
_OTHER_TOKENIZERS = ("tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


def load(
    source: str | os.PathLike[str],
    which: str = "last",
    tokenizer: Any = None,
    **shape: Any,
) -> tuple[MiniMindForCausalLM, PreTrainedTokenizerFast]:
    """A model in float32, ready to generate, and its tokenizer.

    `source` is a run or its folder (`which` picks the "last" checkpoint or the "best"
    on validation), a checkpoint folder, a MiniMind `.pth`, or a folder that
    `save_pretrained` wrote, of MiniMind's own kind or a Llama, Qwen3 or Qwen3-MoE. A
    `.pth` says nothing of heads, top-k or theta: they are those of the run beside it
    that wrote it, else MiniMind's defaults, and that is printed, unless given in `shape`
    (by `MiniMindConfig`'s names). `tokenizer` replaces the one that lies with the
    weights (for a `.pth` alone the shipped one); its entries must be the same. Nothing
    is downloaded and no code from the source is run.

    Raises `FileNotFoundError` where there are no weights, `ValueError` where they do
    not fit, hold a value that is not finite, come with another tokenizer's entries, or
    are of a network that MiniMind cannot express, `NoGoodCheckpoint` where every
    checkpoint of the run is damaged.
    """
    found = find_weights(source, which, tokenizer, **shape)
    spec = choose_tokenizer(found, tokenizer, source)
    if found.assumed:
        print(found.describe_assumed())
    tensors = found.read()
    model = MiniMindForCausalLM(found.config)
    put_weights(model, tensors, str(source))
    return model.eval(), load_tokenizer(spec)


@dataclass(frozen=True)
class FoundWeights:
    """Weights on disk: their file, the model they are of, what lies with them.

    `tokenizer` and `stage` are None where nothing says so (of a `.pth` its name does).
    `assumed` is what neither the weights nor anybody said of the network.
    """

    file: Path
    config: MiniMindConfig
    tokenizer: TokenizerSpec | None = None
    stage: str | None = None
    assumed: tuple[str, ...] = ()

    def describe_assumed(self) -> str:
        """What was assumed, and how to say otherwise; "" where nothing was."""
        if not self.assumed:
            return ""
        values = [f"{name}={getattr(self.config, name)!r}" for name in self.assumed]
        return (
            f"{self.file} does not say {', '.join(values)}: these are MiniMind's own. If "
            f"it was trained with others, name them, as in {self.assumed[0]}=…"
        )

    def read(self) -> dict[str, torch.Tensor]:
        """The tensors by name. Raises `ValueError` where they do not fit `config`."""
        tensors = read_tensors(self.file)
        check_fit(self.config, tensors, str(self.file))
        return tensors

    def shape(self) -> dict[str, Any]:
        """The configuration by `TrainConfig`'s names, of mixtures only where it is one."""
        names = set(SHAPE_FIELDS)
        if not self.config.use_moe:
            names -= set(MIXTURE_FIELDS)
        return {
            name: getattr(self.config, name) for name in SHAPE_FIELDS if name in names
        }


def find_weights(
    source: str | os.PathLike[str],
    which: str = "last",
    tokenizer: Any = None,
    **shape: Any,
) -> FoundWeights:
    """Where the weights are that `load` would read, without building a model.

    `tokenizer` stands in for the one of a checkpoint whose run folder is not there.
    """
    path = Path(source).expanduser()
    if which not in ("last", "best"):
        raise ValueError(f'which={which!r}: "last" or "best" is expected')
    shape = {name: value for name, value in shape.items() if value is not None}
    for name in shape.keys() - set(SHAPE_FIELDS):
        raise ValueError(describe_unknown(name, SHAPE_FIELDS, "part of a shape"))
    beside = [path.parent / name for name in (CONFIG, STATE)]
    if path.name in _WEIGHTS_FILES and any(map(Path.is_file, beside)):
        path = path.parent
    if path.is_file() and path.suffix == ".safetensors":
        raise ValueError(
            f"{path} has no {CONFIG} beside it to say what network it is of; put the "
            "one it was saved with there"
        )
    if path.is_file():
        tensors = read_pth(path)
        try:
            seen = infer_shape(tensors, **shape)
            # Says which values cannot be; no row of it is ever filled here.
            TrainConfig(**{**seen, "max_seq_len": 2, "sample_tokens": 0, **shape})
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        if found := _from_run_beside(path, tensors, shape):
            return found
        config = MiniMindConfig(**{**seen, **shape})
        stage = _run_of(path).partition("_")[0]
        return FoundWeights(
            path,
            config,
            stage=stage if stage in WEIGHTS_NAMES else None,
            assumed=_assumed(config, shape),
        )
    if not path.exists():
        near = get_close_matches(
            path.name, [p.name for p in path.parent.glob("*")], n=1
        )
        hint = f"; did you mean {path.with_name(near[0])}?" if near else ""
        raise FileNotFoundError(f"{path} does not exist: {_SOURCES} is expected{hint}")
    if shape:
        raise ValueError(
            f"{', '.join(shape)} cannot be set: only a .pth leaves its shape open, and "
            f"{path} is none"
        )
    return _from_folder(path, which, tokenizer)


def choose_tokenizer(
    found: FoundWeights, tokenizer: Any, source: str | os.PathLike[str]
) -> TokenizerSpec:
    """The tokenizer that is named, else the weights' own, else the shipped one.

    Raises `ValueError` where it is not the one that the weights were trained with.
    """
    if tokenizer is not None and found.tokenizer:
        check_same_entries(tokenizer, found.tokenizer, source)
    if tokenizer is None and not found.tokenizer:
        print(describe_shipped(source))
    spec = read_tokenizer(found.tokenizer if tokenizer is None else tokenizer)
    if spec.vocab_size > found.config.vocab_size:
        raise ValueError(
            f"the tokenizer has {spec.vocab_size} entries and the weights in {source} "
            f"{found.config.vocab_size}: they do not belong together; name the right "
            "one with tokenizer=…"
        )
    return spec


def describe_shipped(source: str | os.PathLike[str]) -> str:
    """What is taken for granted of weights that come without a tokenizer."""
    return (
        f"{source} comes without a tokenizer: the shipped one is taken. It is not that of "
        "MiniMind's own weights, which mean other tokens by the same ids: name theirs "
        'with tokenizer="minimind/model"'
    )


def check_same_entries(
    given: Any, own: TokenizerSpec, source: str | os.PathLike[str]
) -> None:
    """Raise `ValueError` where a token means another id than the weights learned."""
    vocabularies = [
        Tokenizer.from_str(spec.json).get_vocab(with_added_tokens=True)
        for spec in (read_tokenizer(given), own)
    ]
    if vocabularies[0] != vocabularies[1]:
        same = len(vocabularies[0].items() & vocabularies[1].items())
        name = given if isinstance(given, str | os.PathLike) else "the one given"
        raise ValueError(
            f"the weights in {source} were trained with another tokenizer than {name}: "
            f"only {same:,} of {len(vocabularies[1]):,} entries mean the same. Leave "
            "tokenizer out, for it comes with the weights"
        )


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


def _run_of(path: Path) -> str:
    """The name of the run that writes a weights file of this name."""
    for stage, begin in WEIGHTS_NAMES.items():
        if path.stem.startswith(f"{begin}_"):
            return stage + path.stem.removeprefix(begin)
    return path.stem


def _assumed(config: MiniMindConfig, given: Mapping[str, Any]) -> tuple[str, ...]:
    """What the tensors of a `.pth` leave open and nobody said."""
    names = ["rope_theta", "rms_norm_eps"]
    if not config.qk_norm and "head_dim" not in given:
        names.insert(0, "num_attention_heads")
    if config.use_moe:
        names += ["num_experts_per_tok", "norm_topk_prob"]
    return tuple(name for name in names if name not in given)


def _from_run_beside(
    path: Path, tensors: Tensors, shape: Mapping[str, Any]
) -> FoundWeights | None:
    """What the run that wrote a `.pth` tells of it, where it lies beside and fits."""
    run = RunFolder(path.parent / _run_of(path))
    if not (run.exists() and run.tokenizer.exists()):
        return None
    settings, spec = run.read_config().get("settings"), read_tokenizer(run.tokenizer)
    if not settings or not {"stage", *SHAPE_FIELDS} <= settings.keys():
        return None
    config = model_config(settings, spec)
    heads = {"num_attention_heads": config.num_attention_heads}
    seen = infer_shape(tensors, **heads, head_dim=config.head_dim)
    told = {name: seen[name] for name in seen if name not in _GUESSED} | dict(shape)
    if any(getattr(config, name) != value for name, value in told.items()):
        return None
    return FoundWeights(path, config, spec, settings["stage"])


def _from_folder(path: Path, which: str, tokenizer: Any) -> FoundWeights:
    run, fields = RunFolder(path), {}
    checkpoint = None
    if (path / STATE).is_file():
        checkpoint, run = path, RunFolder(path.absolute().parents[1])
        try:
            verified.verify(path.absolute())
        except verified.DamagedFolder as damage:
            raise ValueError(f"the checkpoint {path} is damaged: {damage}") from None
    elif run.exists() and "settings" in (fields := run.read_config()):
        best = run.best_checkpoint() if which == "best" else None
        found = best or run.newest_good_checkpoint()
        if found is None:
            raise FileNotFoundError(
                f"the run {path} has no checkpoint yet; it writes one every "
                "save_interval steps and at its end"
            )
        checkpoint = found.folder
    if checkpoint is not None:
        told = json.loads((checkpoint / STATE).read_bytes())["config"]
        settings = told["settings"]
        own = tokenizer is None or run.tokenizer.exists()
        spec = read_tokenizer(run.tokenizer if own else tokenizer)
        known = told.get("hashes", {}).get("tokenizer")
        if known not in (None, spec.fingerprint):
            named = isinstance(tokenizer, str | os.PathLike) and not own
            place = tokenizer if named else run.tokenizer if own else "memory"
            raise ValueError(
                f"the tokenizer in {place} is not the one that {checkpoint} was trained "
                "with: put that one back, or name it"
            )
        config = model_config(settings, spec)
        return FoundWeights(checkpoint / WEIGHTS, config, spec, settings["stage"])
    return _from_saved(path, fields)


def _from_saved(path: Path, fields: Mapping[str, Any]) -> FoundWeights:
    """Weights with a `config.json` of transformers, and the tokenizer beside them."""
    if not fields:
        what = "no config.json" if (path / WEIGHTS).exists() else "no weights"
        raise FileNotFoundError(f"{path} holds {what}: {_SOURCES} is expected")
    try:
        config = read_config(fields)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    if shards := [*path.glob("*.index.json")]:
        raise ValueError(
            f"the weights in {path} are in several files ({shards[0].name}): open it "
            "with transformers and save it in one, save_pretrained(FOLDER, "
            'max_shard_size="99GB")'
        )
    there = [path / name for name in _WEIGHTS_FILES if (path / name).is_file()]
    if not there:
        raise FileNotFoundError(f"{path} holds no weights: {_SOURCES} is expected")
    if (path / "tokenizer.json").is_file():
        return FoundWeights(there[0], config, read_tokenizer(path))
    if others := [name for name in _OTHER_TOKENIZERS if (path / name).exists()]:
        raise ValueError(
            f"{path} has a tokenizer ({others[0]}) and no tokenizer.json: make one with "
            f'AutoTokenizer.from_pretrained("{path}").save_pretrained("{path}")'
        )
    return FoundWeights(there[0], config)
