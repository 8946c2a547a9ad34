"""Resuming: find the run to resume, and reconcile the settings with it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from typing import Any

from ..config import (
    CHANGEABLE_ON_RESUME,
    PRESETS,
    RECIPES,
    SHAPE_FIELDS,
    STAGES,
    TRAINING_SHAPE_FIELDS,
    ResolvedConfig,
    TrainConfig,
    fill_defaults,
    resolve_batch,
    shorten_home,
)
from ..launch.outcome import ENDINGS, RankRecord
from ..launch.spawn import end_orphans
from ..monitor.metrics import History
from ..storage import verified
from ..storage.run_folder import Checkpoint, NoGoodCheckpoint, RunFolder
from .checkpoint import read_state
from .initial_weights import asked_shape, runs_of_stage
from .run_plan import BATCH, asked_batch, renew_hashes

logger = logging.getLogger(__name__)
# Copied with a run, in addition to a checkpoint, the tokenizer and reference weights.
_COPIED = (
    *("config.json", "metrics.jsonl", "rejected.jsonl", "wandb.json"),
    *("loss.png", "summary.md", "rank*.json", "rank*.log", "reference.*"),
)
_OF_THIS_CALL = ("out_dir", "resume", "allow_change", "max_session_hours")
EARLIER: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "global_batch": lambda run: (
        run["batch_size"] * run["accumulation_steps"] * run["num_processes"]
    ),
}
"""Settings that earlier states did not know, and their behaviour at that time."""
_SETTING_OF_HASH = {
    "data": "data_path",
    "validation": "val_path",
    "tokenizer": "tokenizer",
    "initial": "init_from",
}


def find_run(cfg: TrainConfig) -> str | None:
    """Return the name of the run folder, or None if the initial weights decide it.

    If the shape comes with initial weights, the only run of the stage that fits the
    settings is meant. Raises `ValueError` if there are several.
    """
    if isinstance(cfg.resume, str) and cfg.resume != "auto":
        source = source_run(cfg.resume)
        return cfg.run_name or source.settings().get("run_name")
    init_from = cfg.init_from or STAGES[cfg.stage]["init_from"]
    if cfg.run_name or init_from == "none":
        return fill_defaults(cfg.explicit())["run_name"]
    runs = runs_of_stage(cfg.out_dir, cfg.stage) if cfg.resume else []
    wanted = asked_shape(cfg)
    if init_from != "auto":
        wanted["init_from"] = shorten_home(init_from)
    fits = [
        run.root.name
        for run in runs
        if run.has_default_name()
        and all(run.settings().get(name) == value for name, value in wanted.items())
    ]
    if len(fits) > 1:
        raise ValueError(
            f"out_dir={cfg.out_dir!r} has several runs of stage={cfg.stage!r}: "
            f"{', '.join(fits)}. Name one with run_name=…, or set hidden_size"
        )
    return fits[0] if fits else None


def source_run(path: str) -> RunFolder:
    """Return the run that `resume` names. Raises `ValueError` or `FileNotFoundError`."""
    source = RunFolder(path)
    if source.root.is_file():
        raise ValueError(
            f"resume={path!r} is a file: rounded weights without optimizer state, from "
            "which no run can resume. Name the run's folder, or start from the weights "
            f"with init_from={path!r}"
        )
    if not source.exists():
        raise FileNotFoundError(
            f"resume={path!r} is not a run folder ({source.config_file} is missing); name "
            'one, or use resume="auto"'
        )
    return source


def find_existing_run(folder: RunFolder, cfg: TrainConfig) -> RunFolder | None:
    """Return the run to resume: in the locked folder, or one to be copied there.

    Processes that a killed run left are ended, and a missing config.json is restored
    from the newest checkpoint. Raises `FileExistsError` if another run is in the way.
    """
    if ended := end_orphans(folder):
        logger.warning(f"ended processes that a killed run had left: {ended}")
    if not folder.exists() and (found := folder.newest_good_checkpoint()):
        folder.write_config(read_state(found.folder)["config"])
        logger.warning(
            f"{folder.config_file} was missing; restored from {found.folder.name}"
        )
    if isinstance(cfg.resume, str) and cfg.resume != "auto":
        source = source_run(cfg.resume)
        if not folder.exists():
            return source
        if source.root.resolve() != folder.root.resolve():
            own, theirs = _last_step(folder), _last_step(source)
            if own < theirs:
                raise FileExistsError(
                    f"{folder.root} exists already and is at step {own}, {source.root} at "
                    f"step {theirs}; choose another run_name, or move that folder away"
                )
            logger.info(f"{folder.root} was copied before and is resumed")
    return folder if cfg.resume is not False and folder.exists() else None


def reconcile_with_existing_run(
    folder: RunFolder, cfg: TrainConfig, machine: Mapping[str, Any]
) -> ResolvedConfig:
    """Return the settings with which a run is resumed, or explain why they differ.

    A setting that is not explicit keeps the run's value; device, number of processes and
    precision are this machine's. Raises `RuntimeError` with every difference that
    neither CHANGEABLE_ON_RESUME nor `allow_change` admits, and the ways out.
    """
    config = folder.read_config()
    run = read_settings(folder)
    asked = _asked(cfg, run)
    values = run | {**machine}
    values |= {k: v for k, v in asked.items() if k not in BATCH}
    values |= {name: getattr(cfg, name) for name in _OF_THIS_CALL}
    values |= {"init_from": run["init_from"], "run_name": folder.root.name}
    values |= _split_batch(asked_batch(config), run, values, asked)
    for name in ("device", "dtype"):
        if run[name] != values[name]:
            logger.info(
                f"{name} changes from {run[name]!r} to {values[name]!r}: results are no "
                "longer equal to the last bit"
            )
    allowed = CHANGEABLE_ON_RESUME | {*cfg.allow_change}
    if not {*BATCH}.isdisjoint(cfg.allow_change):
        allowed |= {"global_batch"}
    differences = {
        name: f"{name}: {run[name]!r} in the run, {values[name]!r} now"
        for name in sorted(values.keys() - allowed)
        if run[name] != values[name]
    }
    if differences:
        raise _other_run(folder, differences)
    return ResolvedConfig(**values)


def read_settings(folder: RunFolder) -> dict[str, Any]:
    """Return all settings of a run, those that its state did not know included.

    Raises `ValueError` if they are incomplete.
    """
    config = folder.read_config()
    known = ResolvedConfig.__dataclass_fields__
    run = {k: v for k, v in config.get("settings", {}).items() if k in known}
    try:
        if not isinstance(config.get("hashes"), dict):
            raise TypeError("hashes are missing")
        for name, behaviour in EARLIER.items():
            if name not in run:
                run[name] = behaviour(run)
        return {**vars(ResolvedConfig(**(STAGES[run["stage"]] | run)))}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.config_file} is incomplete or invalid ({error}); restore the file, "
            "or start over with resume=False"
        ) from None


def compare_hashes(
    folder: RunFolder, hashes: Mapping[str, str | None], cfg: TrainConfig
) -> None:
    """Check that data, tokenizer and initial weights have the content they had.

    Raises `RuntimeError`. A None in `hashes` is not compared.
    """
    before = renew_hashes(folder.read_config()["hashes"], hashes, cfg)
    changed = {
        _SETTING_OF_HASH[key]: (before.get(key), value)
        for key, value in hashes.items()
        if value is not None and before.get(key) != value
    }
    if "data_path" in changed and not cfg.val_path:
        changed.pop("val_path", None)  # which is a part of data_path
    differences = {
        name: f"content of {name}: {_short(old)} in the run, {_short(new)} now"
        for name, (old, new) in changed.items()
        if name not in cfg.allow_change
    }
    if differences:
        raise _other_run(folder, differences)


def find_checkpoint(folder: RunFolder) -> Checkpoint | None:
    """Return the newest good checkpoint, or None if none was ever written.

    Raises `NoGoodCheckpoint`: a run must not silently start over.
    """
    if found := folder.newest_good_checkpoint(repair=True):
        return found
    events = History(folder.metrics_file).select("event")
    saved = [row["step"] for row in events if row.get("event") == "save"]
    file, record = folder.metrics_file, RankRecord.read(folder.record_file(0))
    if not saved and record and record.status in ENDINGS and record.step:
        file, saved = record.file, [record.step]
    if not saved:
        return None
    raise NoGoodCheckpoint(
        f"{file} records a checkpoint at step {saved[-1]}, which is missing in "
        f"{folder.checkpoints}. Restore it, or start over with resume=False, which keeps "
        "this folder under another name."
    )


def _asked(cfg: TrainConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are asked for: explicit ones, and those of a preset or
    recipe that the run was not started with; of its own recipe what may change."""
    tables = {"preset": PRESETS, "recipe": RECIPES}
    asked: dict[str, Any] = {}
    for kind, table in tables.items():
        name = getattr(cfg, kind)
        asked |= {
            key: value
            for key, value in table.get(name or "", {}).items()
            if name != run.get(kind) or key in CHANGEABLE_ON_RESUME.difference(BATCH)
        }
    return asked | cfg.explicit()


def _split_batch(
    asked_then: Mapping[str, int],
    run: Mapping[str, Any],
    values: Mapping[str, Any],
    asked: Mapping[str, Any],
) -> dict[str, int]:
    """Split the run's global batch among the processes of today.

    What was asked for when the run was started means the same on any number of
    processes. A new `global_batch`, or new values of both others, make a new one.
    """
    batch = {name: asked[name] for name in BATCH if name in asked}
    total, processes = run["global_batch"], values["num_processes"]
    now = {name: batch.get(name, values[name]) for name in BATCH[1:]}
    if batch != asked_then and batch.keys() >= {*BATCH[1:]}:
        total = now["batch_size"] * now["accumulation_steps"] * processes
    total = batch.get("global_batch", total)
    if total % processes:
        raise RuntimeError(
            f"global_batch={total} cannot be split among num_processes={processes}; "
            "choose a number of processes that divides it"
        )
    only_steps = batch.keys() - {"global_batch"} == {"accumulation_steps"}
    split = resolve_batch(
        {**now, "num_processes": processes, "global_batch": total},
        ["accumulation_steps"] if only_steps and batch != asked_then else [],
    )
    if processes != run["num_processes"]:
        dropout = ", and dropout draws other numbers" if values["dropout"] else ""
        logger.info(
            f"num_processes changes from {run['num_processes']} to {processes}: "
            f"batch_size={split['batch_size']} × accumulation_steps="
            f"{split['accumulation_steps']} keeps the global batch of {total}; results "
            f"are no longer equal to the last bit{dropout}"
        )
    return split


def _short(digest: object) -> str:
    """Return the first digits of a hash, after the name of its kind."""
    kind, dash, digits = str(digest).rpartition("-")
    return f"{kind}{dash}{digits[:12]}"


def _other_run(folder: RunFolder, differences: Mapping[str, str]) -> RuntimeError:
    shape = set(SHAPE_FIELDS) - set(TRAINING_SHAPE_FIELDS)
    options = [
        'run_name="…"            a new run beside it',
        "resume=False            a new run in its place; the old folder is kept under "
        "another name",
    ]
    if shape.isdisjoint(differences):
        quoted = ", ".join(f'"{name}"' for name in differences)
        options.append(f"allow_change=[{quoted}]  resume with the new values")
    return RuntimeError(
        f"{folder.root} holds a run with other settings:\n  "
        + "\n  ".join(differences.values())
        + "\nOptions:\n  "
        + "\n  ".join(options)
    )


def copy_run(source: RunFolder, folder: RunFolder) -> None:
    """Copy a run, whole or not at all, with its newest and its best checkpoint.

    The source is only read, and may be read-only. No link is followed. Raises
    `NoGoodCheckpoint` if there is none, `ValueError` for a folder that is a link.
    """
    for path in (source.checkpoints, source.tokenizer):
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link, and links in a run that is copied are not followed; "
                "put the folder itself there"
            )
    newest, best = source.newest_good_checkpoint(), source.best_checkpoint()
    checkpoints = {c.folder for c in (newest, best) if c and not c.folder.is_symlink()}
    if not newest or newest.folder not in checkpoints:
        raise NoGoodCheckpoint(f"{source.root} has no checkpoint to resume from")
    files = [file for name in _COPIED for file in source.root.glob(name)]
    files += [
        file for part in (*checkpoints, source.tokenizer) for file in part.glob("*")
    ]
    files = [file for file in files if file.is_file() and not file.is_symlink()]
    needed = sum(file.stat().st_size for file in files)
    with verified.beside(folder.root, needed) as aside:
        for file in files:
            target = aside / file.relative_to(source.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        verified.verify(RunFolder(aside).checkpoint_folder(newest.step))
        aside.rename(folder.root)
    logger.info(f"copied {source.root} to {folder.root}")


def _last_step(folder: RunFolder) -> int:
    newest = folder.newest_good_checkpoint()
    return newest.step if newest else 0
