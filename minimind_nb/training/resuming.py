"""Meeting a run that is there: go on with it, leave it be, or say what differs."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping, Set
from pathlib import Path
from typing import Any

from ..config import (
    CHANGEABLE_ON_RESUME,
    SHAPE_FIELDS,
    TRAINING_SHAPE_FIELDS,
    TrainConfig,
    shorten_home,
)
from ..data.token_cache import names_before_version_3
from ..launch.outcome import ENDINGS, RankRecord
from ..launch.spawn import end_orphans
from ..monitor.metrics import History
from ..storage import verified
from ..storage.run_folder import Checkpoint, NoGoodCheckpoint, RunFolder
from .checkpoint import read_config

_Note = Callable[[str], None]
# What of a run is copied, beside a checkpoint, tokenizer and reference.
_COPIED = (
    *("config.json", "metrics.jsonl", "rejected.jsonl", "wandb.json"),
    *("loss.png", "summary.md", "rank*.json", "rank*.log"),
)


def meet_run(folder: RunFolder, cfg: TrainConfig, on_note: _Note) -> TrainConfig:
    """Compare a resolved configuration with the run in its folder, which is locked.

    Where `resume` is a path, that run is copied there, once: where the folder is there
    already and stands at least as far, it goes on. Where a run goes on, the
    configuration comes back as `compare_settings` returns it. What a killed run left
    running is ended.

    Raises `FileNotFoundError` where the path is no run, `FileExistsError` where another
    run is in the way, `ValueError` where its configuration is none.
    """
    source = folder
    if ended := end_orphans(folder):
        on_note(f"ended processes that a killed run had left: {ended}")
    if not folder.exists() and (found := folder.newest_good_checkpoint()):
        folder.write_config(read_config(found.folder))
        on_note(f"{folder.config_file} was gone; it is as {found.folder.name} has it")
    if isinstance(cfg.resume, str) and cfg.resume != "auto":
        source = RunFolder(cfg.resume)
        if source.root.is_file():
            raise ValueError(
                f"resume={cfg.resume!r} is a file: weights alone, rounded, without "
                "moments, from which no run can go on. Name the run's folder, or begin "
                f"from the weights with init_from={cfg.resume!r}"
            )
        if not source.exists():
            raise FileNotFoundError(
                f"resume={cfg.resume!r} is no run folder (there is no "
                f'{source.config_file}); name one, or take resume="auto"'
            )
    if source.root.resolve() != folder.root.resolve() and folder.exists():
        if _steps(folder) < _steps(source):
            raise FileExistsError(
                f"{folder.root} is there already and stands at step {_steps(folder)}, "
                f"{source.root} at step {_steps(source)}; take another run_name, or "
                "move that folder away"
            )
        on_note(f"{folder.root} was copied before and goes on")
        source = folder
    if source.exists() and cfg.resume is not False:
        cfg = compare_settings(source, cfg, on_note)
    if source.exists() and not folder.exists():
        _copy_run(source, folder)
        on_note(f"copied {source.root} to {folder.root}")
    return cfg


def compare_settings(
    folder: RunFolder, cfg: TrainConfig, on_note: _Note
) -> TrainConfig:
    """Check that a resolved configuration goes on with the run in `folder`.

    Returns the configuration, with the accumulation that keeps the global batch where
    the number of processes is another one. Raises `RuntimeError` with every difference
    and three ways on.
    """
    config = folder.read_config()
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    before = _read_settings(folder, config, known)
    allowed = CHANGEABLE_ON_RESUME | set(cfg.allow_change)
    asked_anew = cfg.accumulation_steps != config.get("accumulation_asked")
    set_free = asked_anew and "accumulation_steps" in allowed
    if before.num_processes != cfg.num_processes and not set_free:
        steps = _accumulation_kept(before, cfg, on_note)
        before = dataclasses.replace(before, accumulation_steps=steps)
    if not asked_anew:
        steps = before.accumulation_steps
        cfg = dataclasses.replace(cfg, accumulation_steps=steps)
    for name in ("device", "dtype"):
        there, now = getattr(before, name), getattr(cfg, name)
        if there != now:
            on_note(
                f"{name}={now!r} instead of {there!r}: weights and loss are no longer "
                "equal to the last bit"
            )
    differences = [
        f"{name}: {getattr(before, name)!r} there, {getattr(cfg, name)!r} now"
        for name in sorted(known - allowed)
        if getattr(before, name) != getattr(cfg, name)
    ]
    if differences:
        names = [line.partition(":")[0] for line in differences]
        raise _other_run(folder, differences, names)
    return cfg


def _read_settings(
    folder: RunFolder, config: Mapping[str, Any], known: Set[str]
) -> TrainConfig:
    """The configuration of a run that is there, of which nothing is open."""
    settings = {k: v for k, v in config.get("settings", {}).items() if k in known}
    hashes = config.get("hashes")
    try:
        before = TrainConfig(**settings)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder.config_file}: {error}") from None
    batch = (before.batch_size, before.accumulation_steps, before.num_processes)
    if None in batch or not isinstance(hashes, dict):
        raise ValueError(
            f"{folder.config_file} lacks settings or hashes of the run; put the file "
            "back as it was, or start anew with resume=False"
        )
    return before


def compare_hashes(
    folder: RunFolder, config: Mapping[str, Any], cfg: TrainConfig, on_note: _Note
) -> None:
    """Check that data, tokenizer and initial weights have the content they had.

    A run goes on with its own weights: that others are there to begin from is only told
    where nobody named them. Raises `RuntimeError`.
    """
    settings = {
        "data": "data_path",
        "validation": "val_path",
        "tokenizer": "tokenizer",
        "initial": "init_from",
    }
    before = folder.read_config()
    before["hashes"] = _renew_hashes(before["hashes"], config["hashes"], cfg)
    changed = [
        settings[name]
        for name, value in config["hashes"].items()
        if value is not None and before["hashes"].get(name) != value
    ]
    if "data_path" in changed and not cfg.val_path and "val_path" in changed:
        changed.remove("val_path")  # which is a part of data_path
    same_name = before["settings"].get("init_from") == shorten_home(cfg.init_from)
    if "init_from" in changed and (same_name or cfg.init_from == "auto"):
        changed.remove("init_from")
        on_note(
            f"{folder.root} goes on, though the weights in {config['began_from']} are "
            "not those it began from; resume=False begins from them"
        )
    if changed := [name for name in changed if name not in cfg.allow_change]:
        there, now = before["hashes"], config["hashes"]
        differences = [
            f"the content of {name}: {_short(there.get(key))} there, {_short(now[key])} now"
            for key, name in settings.items()
            if name in changed
        ]
        raise _other_run(folder, differences, changed)


def _renew_hashes(
    before: Mapping[str, Any], now: Mapping[str, Any], cfg: TrainConfig
) -> dict[str, Any]:
    """Return the hashes of a run, replacing those that an earlier state wrote of data.

    They were names of token caches. Those of other data stay, and so differ.
    """
    renewed = {**before}
    files = {"data": cfg.data_path, "validation": cfg.val_path or cfg.data_path}
    for key, file in files.items():
        if str(before.get(key)).startswith("tokens-") and file and Path(file).is_file():
            how = (cfg.stage, now["tokenizer"], cfg.on_bad_line)
            if before[key] in names_before_version_3(file, *how):
                renewed[key] = now[key]
    return renewed


def find_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """The newest good checkpoint, or None where none was ever written.

    Raises `NoGoodCheckpoint`: a run must not silently start again.
    """
    if found := folder.newest_good_checkpoint(repair=True):
        return found
    events = History(folder.metrics_file).select("event")
    saved = [row["step"] for row in events if row.get("event") == "save"]
    told, record = folder.metrics_file, RankRecord.read(folder.record_file(0))
    if not saved and record and record.status in ENDINGS and record.step:
        told, saved = record.file, [record.step]
    if not saved:
        return None
    raise NoGoodCheckpoint(
        f"{told} tells of a checkpoint at step {saved[-1]}, and there is none in "
        f"{folder.checkpoints}. Put it back, or start anew with resume=False, "
        "which keeps this folder under another name."
    )


def keep_origin(config: dict[str, Any], before: Mapping[str, Any]) -> bool:
    """Where a run goes on, it is the run it was; whether from the weights at hand."""
    config["run"] = before.get("run", config["run"])
    config["settings"]["init_from"] = before["settings"].get("init_from")
    config["began_from"] = before.get("began_from")
    own = before["hashes"].get("initial")
    same = config["hashes"]["initial"] == own
    config["hashes"]["initial"] = own
    return same


def _short(digest: object) -> str:
    """The first digits of a hash, behind the name of what it is of."""
    kind, dash, digits = str(digest).rpartition("-")
    return f"{kind}{dash}{digits[:12]}"


def _accumulation_kept(before: TrainConfig, cfg: TrainConfig, on_note: _Note) -> int:
    """The accumulation that keeps the global batch with another number of processes."""
    assert cfg.batch_size and cfg.num_processes
    rows = cfg.batch_size * cfg.num_processes
    if before.global_batch % rows:
        raise RuntimeError(
            f"the run has a global batch of {before.global_batch} rows, made by "
            f"{before.num_processes}, which {cfg.num_processes} processes of "
            f"batch_size={cfg.batch_size} cannot keep; set a batch_size that divides "
            'it, with allow_change=["batch_size"]'
        )
    steps = before.global_batch // rows
    dropout = ", and dropout draws other numbers" if cfg.dropout else ""
    on_note(
        f"{cfg.num_processes} processes instead of {before.num_processes}: with "
        f"accumulation_steps={steps} the samples of every step stay the same; weights "
        f"and loss are no longer equal to the last bit{dropout}"
    )
    return steps


def _other_run(
    folder: RunFolder, differences: list[str], names: list[str]
) -> Exception:
    listing = "\n  ".join(differences)
    quoted = ", ".join(f'"{name}"' for name in names)
    shape = set(SHAPE_FIELDS) - set(TRAINING_SHAPE_FIELDS)
    ways = [
        'run_name="…"            a new run beside it',
        "resume=False            a new run in its place; the old folder is kept under "
        "another name",
    ]
    if shape.isdisjoint(names):
        ways += [f"allow_change=[{quoted}]  go on with the new values"]
    return RuntimeError(
        f"{folder.root} holds a run with other settings:\n  {listing}\n"
        f"{'Three' if ways[2:] else 'Two'} ways on:\n  " + "\n  ".join(ways)
    )


def _copy_run(source: RunFolder, folder: RunFolder) -> None:
    """Copy a run, whole or not at all; of its checkpoints the newest good one.

    The source may be read-only and is only read; of what else lies there nothing is
    taken, and no link is followed. Raises `NoGoodCheckpoint` where there is none, and
    `ValueError` for a folder that is a link.
    """
    own = (source.checkpoints, source.tokenizer, source.reference)
    if linked := [path for path in own if path.is_symlink()]:
        raise ValueError(
            f"{linked[0]} is a link, and links in a run that is copied are not followed; "
            "put the folder itself there"
        )
    checkpoint = source.newest_good_checkpoint()
    if checkpoint is None or checkpoint.folder.is_symlink():
        raise NoGoodCheckpoint(f"{source.root} has no checkpoint to go on from")
    folders = [
        (checkpoint.folder, f"checkpoints/{checkpoint.folder.name}"),
        *((part, part.name) for part in (source.tokenizer, source.reference)),
    ]
    files = [file for name in _COPIED for file in source.root.glob(name)]
    files += [file for part, _ in folders for file in part.glob("*")]
    files = [file for file in files if file.is_file() and not file.is_symlink()]
    needed = sum(file.stat().st_size for file in files)
    with verified.beside(folder.root, needed) as aside:
        for file in files:
            names = (name for part, name in folders if file.parent == part)
            target = aside / next(names, "") / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        verified.verify(RunFolder(aside).checkpoint_folder(checkpoint.step))
        aside.rename(folder.root)


def _steps(folder: RunFolder) -> int:
    newest = folder.newest_good_checkpoint()
    return newest.step if newest else 0
