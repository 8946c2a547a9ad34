"""What a run begins from: new weights, or those of a run, a file or a folder."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import (
    PRESETS,
    SHAPE_FIELDS,
    STAGE_BEFORE,
    TRAINING_SHAPE_FIELDS,
    WEIGHTS_NAMES,
    TrainConfig,
    shorten_home,
)
from ..config import STAGES as DEFAULTS
from ..model.loading import FoundWeights, find_weights
from ..storage.run_folder import RunFolder
from ..storage.verified import hash_file

_FIXED = [name for name in SHAPE_FIELDS if name not in TRAINING_SHAPE_FIELDS]
# What the names and shapes in a .pth leave open.
_OPEN = (
    "num_attention_heads head_dim num_experts_per_tok rope_theta rms_norm_eps "
    "norm_topk_prob"
).split()
_Note = Callable[[str], None]


@dataclass(frozen=True)
class Initial:
    """Weights to begin from: what was named, what was found, the sha256 of the file.

    Without a sha256 they are the newest of a run that is there and goes on.
    """

    source: str
    weights: FoundWeights
    digest: str | None


def find_initial(cfg: TrainConfig, on_note: _Note) -> Initial | None:
    """The weights that `init_from` names, checked; None where new ones are asked for.

    "auto" is the newest finished run of the stage before in out_dir; an unfinished one
    where none is finished, and that is said; else its weights file. Where there is none
    of these, a run of this very stage that is there goes on without.

    Raises `FileNotFoundError` where there are no weights, `ValueError` where there are
    several shapes to choose from, where a setting of the shape differs from the weights
    (both are shown), where the tokenizer is not the one they were trained with, or a
    value in them is not finite.
    """
    source = cfg.init_from or DEFAULTS[cfg.stage]["init_from"]
    if source == "none":
        return None
    preset = PRESETS.get(cfg.preset or "", {})
    asked = preset | {k: v for k, v in cfg.shape().items() if v is not None}
    asked = {name: asked[name] for name in _FIXED if name in asked}
    if source == "auto":
        found = _newest_before(cfg, asked, on_note)
        if found is None:
            return _going_on(cfg)
        source = str(found)
    is_file = Path(source).is_file()
    hints = {name: asked[name] for name in _OPEN if is_file and name in asked}
    try:
        weights = find_weights(source, "last", cfg.tokenizer, **hints)
    except FileNotFoundError:
        if own := _own_run(cfg, source):
            return own
        raise
    for note in weights.notes:
        on_note(note)
    has = weights.shape()
    if differences := [
        f"{name}: {has.get(name)!r} there, {value!r} now"
        for name, value in asked.items()
        if has.get(name) != value
    ]:
        raise ValueError(
            f"the weights in {source} have another shape than the settings say:\n  "
            + "\n  ".join(differences)
            + "\nLeave these out (and preset), for the shape comes with the weights; or "
            'set init_from to other weights, or to "none" for new ones.'
        )
    weights.read()
    return Initial(source, weights, hash_file(weights.file))


def _newest_before(
    cfg: TrainConfig, asked: dict[str, Any], on_note: _Note
) -> Path | None:
    """The run, or weights file, of the stage before that "auto" means; None if none."""
    before = STAGE_BEFORE[cfg.stage]
    folders = _runs(cfg.out_dir, before)
    there = {folder: folder.read_config()["settings"] for folder in folders}
    fits = {
        folder: shape
        for folder, shape in there.items()
        if all(shape.get(name) == value for name, value in asked.items())
    }
    finished = {f: shape for f, shape in fits.items() if f.status() == "finished"}
    if not fits:
        pattern = f"{WEIGHTS_NAMES[before]}_*.pth"
        files = sorted(Path(cfg.out_dir).glob(pattern))
        if len(files) == 1 and not there:
            return files[0]
        if there or files:
            raise ValueError(_choices(cfg, [*(f.root for f in there), *files]))
        return None
    pool = finished or fits
    shapes = {tuple(shape.get(name) for name in _FIXED) for shape in pool.values()}
    if len(shapes) > 1:
        raise ValueError(_choices(cfg, [folder.root for folder in pool]))
    newest = max(pool, key=lambda folder: folder.checkpoints.stat().st_mtime)
    if not finished:
        on_note(
            f"{newest.root} is not finished ({newest.status()}); its newest checkpoint "
            "is taken to begin from"
        )
    return newest.root


def _runs(out_dir: str, stage: str) -> list[RunFolder]:
    """The runs of a stage in out_dir that have a checkpoint, and say what they are."""
    found = []
    for file in sorted(Path(out_dir).glob("*/config.json")):
        folder = RunFolder(file.parent)
        with contextlib.suppress(ValueError):
            settings = folder.read_config().get("settings", {})
            fits = settings.get("stage") == stage and not folder.is_aside()
            if fits and folder.checkpoint_folders():
                found.append(folder)
    return found


def _choices(cfg: TrainConfig, places: list[Path]) -> str:
    listing = "\n  ".join(
        f'init_from="{place}"  ({_describe(place)})' for place in places
    )
    return (
        f"stage={cfg.stage!r} can begin from several weights, or none that fit the shape "
        f"that is set; choose:\n  {listing}"
    )


def _describe(place: Path) -> str:
    if place.is_file():
        return "weights file"
    run = RunFolder(place)
    s = run.read_config()["settings"]
    experts = f", {s['n_routed_experts']} experts" if s["use_moe"] else ""
    return f"{s['hidden_size']} × {s['num_hidden_layers']}{experts}, {run.status()}"


def _going_on(cfg: TrainConfig) -> Initial:
    """The run itself that is to go on, whose weights it began from are not needed."""
    folders = _runs(cfg.out_dir, cfg.stage)
    if isinstance(cfg.resume, str) and cfg.resume != "auto":
        folders = [RunFolder(cfg.resume)]
    elif cfg.run_name:
        folders = [folder for folder in folders if folder.root.name == cfg.run_name]
    if len(folders) == 1 and cfg.resume is not False and folders[0].exists():
        root = folders[0].root
        return Initial(str(root), find_weights(root), None)
    before = STAGE_BEFORE.get(cfg.stage, "")
    there = [file.parent.name for file in Path(cfg.out_dir).glob("*/config.json")]
    raise FileNotFoundError(
        f"stage={cfg.stage!r} begins from a model, and out_dir={cfg.out_dir!r} holds no "
        f"run of stage={before!r} and no {WEIGHTS_NAMES.get(before)}_*.pth (runs "
        f"there: {', '.join(sorted(there)) or 'none'}). Train one first, name the "
        'weights with init_from="…", or begin with new ones: init_from="none"'
    )


def _own_run(cfg: TrainConfig, source: str) -> Initial | None:
    """The run that is there and began from a source that is gone: it needs no more."""
    try:
        own = _going_on(cfg)
    except FileNotFoundError:
        return None
    before = RunFolder(own.source).read_config()["settings"]
    return own if before.get("init_from") == shorten_home(source) else None
