"""Resuming: find the run to resume, and reconcile settings and content with it."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
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
    resolve_batch,
    shorten_home,
)
from ..data.token_cache import names_before_version_3
from ..launch.outcome import ENDINGS, RankRecord
from ..launch.spawn import end_orphans
from ..model.loading import find_weights
from ..monitor.metrics import History
from ..storage import verified
from ..storage.run_folder import Checkpoint, NoGoodCheckpoint, RunFolder
from .checkpoint import read_state

logger = logging.getLogger(__name__)
BATCH = ("global_batch", "batch_size", "accumulation_steps")
"""Settings that make up the global batch."""
# Copied with a run, in addition to two checkpoints and the tokenizer.
_COPIED = (
    *("config.json", "metrics.jsonl", "rejected.jsonl", "wandb.json"),
    *("loss.png", "summary.md", "rank*.json", "rank*.log", "reference.*"),
)
_OF_THIS_CALL = ("out_dir", "resume", "allow_change", "max_session_hours")
_SETTING_OF_HASH = {
    "data": "data_path",
    "validation": "val_path",
    "tokenizer": "tokenizer",
    "initial": "init_from",
}


def source_run(cfg: TrainConfig) -> RunFolder | None:
    """Return the run whose path `resume` is, or None if it is not a path.

    Raises `ValueError` or `FileNotFoundError` if no run is there.
    """
    if not isinstance(cfg.resume, str) or cfg.resume == "auto":
        return None
    source = RunFolder(cfg.resume)
    if source.root.is_file():
        raise ValueError(
            f"resume={cfg.resume!r} is a file: rounded weights without optimizer state. "
            f"Name the run's folder, or start over with init_from={cfg.resume!r}"
        )
    if not source.exists():
        raise FileNotFoundError(
            f"resume={cfg.resume!r} is not a run folder ({source.config_file} is "
            'missing); name one, or use resume="auto"'
        )
    return source


def recover(folder: RunFolder) -> None:
    """End processes that a killed run left, and restore a missing config.json."""
    if ended := end_orphans(folder):
        logger.warning(f"ended processes that a killed run had left: {ended}")
    if not folder.exists() and (found := folder.newest_good_checkpoint()):
        folder.write_config(read_state(found.folder)["config"])
        logger.warning(
            f"{folder.config_file} was missing; restored from {found.folder.name}"
        )


def find_existing_run(folder: RunFolder, cfg: TrainConfig) -> RunFolder | None:
    """Return the run to resume: in its folder, or one that is to be copied there.

    Raises `FileExistsError` if another run is in the way.
    """
    source = source_run(cfg)
    if source and not folder.exists():
        return source
    if source and source.root.resolve() != folder.root.resolve():
        own, theirs = _last_step(folder), _last_step(source)
        if own < theirs:
            raise FileExistsError(
                f"{folder.root} exists already and is at step {own}, {source.root} at "
                f"step {theirs}; choose another run_name, or move that folder away"
            )
        logger.info(f"{folder.root} was copied before and is resumed")
    return folder if cfg.resume is not False and folder.exists() else None


def find_checkpoint(run: RunFolder, repair: bool = False) -> Checkpoint | None:
    """Return the newest good checkpoint, or None if none was ever written.

    `repair` is for the holder of the lock. Raises `NoGoodCheckpoint` if the run records
    one: a run must not silently start over.
    """
    if found := run.newest_good_checkpoint(repair):
        return found
    events = History(run.metrics_file).select("event")
    saved = [row["step"] for row in events if row.get("event") == "save"]
    record = RankRecord.read(run.record_file(0))  # if the metrics are lost too
    if not saved and record and record.status in ENDINGS and record.step:
        saved = [record.step]
    if not saved:
        return None
    raise NoGoodCheckpoint(
        f"{run.root} records a checkpoint at step {saved[-1]}, which is missing in "
        f"{run.checkpoints}. Restore it, or start over with resume=False, which keeps "
        "this folder under another name."
    )


def reconcile_with_existing_run(
    folder: RunFolder, cfg: TrainConfig, machine: Mapping[str, Any]
) -> ResolvedConfig:
    """Return the settings with which a run is resumed, or explain why they differ.

    A setting that is not explicit keeps the run's value; device, number of processes and
    precision are this machine's. Raises `RuntimeError` with every difference that
    neither CHANGEABLE_ON_RESUME nor `allow_change` admits, and the ways out.
    """
    run, config = read_settings(folder), folder.read_config()
    asked = _asked(cfg, run)
    values = run | {**machine}
    if "dtype" in config.get("explicit", ()) and values["device"] == run["device"]:
        values["dtype"] = run["dtype"]
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
        if "global_batch" not in run:  # earlier states did not record it
            steps = run["accumulation_steps"] * run["num_processes"]
            run["global_batch"] = run["batch_size"] * steps
        return {**vars(ResolvedConfig(**(STAGES[run["stage"]] | run)))}
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder.config_file} is incomplete or invalid ({error}); restore the file, "
            "or start over with resume=False"
        ) from None


def keep_identity(
    folder: RunFolder,
    config: dict[str, Any],
    cfg: TrainConfig,
    resolved: ResolvedConfig,
    resumed: bool,
) -> None:
    """Keep the identity of an existing run in its new `config`.

    `resumed` is False if it has no checkpoint and starts from initial weights again.
    Raises `RuntimeError` if data, tokenizer or named initial weights have other content.
    """
    before = folder.read_config()
    then, now = dict(before["hashes"]), dict(config["hashes"])
    began = (before["settings"].get("init_from"), before.get("began_from"))
    if shorten_home(cfg.init_from) not in (None, "auto", "none", *began):
        now["initial"] = verified.hash_file(find_weights(str(cfg.init_from)).file)
    elif not resumed:
        now["initial"] = None
    data = resolved.data_path
    files = {"data": data, "validation": resolved.val_path or data}
    for key, file in files.items():
        # Earlier states wrote the name of a token cache.
        if str(then.get(key)).startswith("tokens-") and Path(file).is_file():
            how = (cfg.stage, str(now["tokenizer"]), resolved.on_bad_line)
            if then[key] in names_before_version_3(file, *how):
                then[key] = now[key]
    changed = [k for k, v in now.items() if v is not None and then.get(k) != v]
    if "data" in changed and not resolved.val_path:
        changed = [key for key in changed if key != "validation"]  # a part of the data
    differences = {
        name: f"content of {name}: {_short(then.get(key))} in the run, "
        f"{_short(now[key])} now"
        for key, name in _SETTING_OF_HASH.items()
        if key in changed and name not in cfg.allow_change
    }
    if differences:
        raise _other_run(folder, differences)
    config["run"] = before.get("run", config["run"])
    config["asked_batch"] = asked_batch(before)
    if resumed:
        config["began_from"] = before.get("began_from")
        config["hashes"]["initial"] = before["hashes"].get("initial")


def asked_batch(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the settings of the batch that were explicit when a run was started."""
    if "asked_batch" in config:
        return config["asked_batch"]
    settings = config.get("settings", {})
    old = {**settings, "accumulation_steps": config.get("accumulation_asked")}
    return {name: old[name] for name in config.get("explicit", ()) if name in BATCH}


def _asked(cfg: TrainConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that are asked for: explicit ones, and those of a preset or
    recipe that the run was not started with; of its own recipe what may change."""
    asked: dict[str, Any] = {}
    for kind, table in (("preset", PRESETS), ("recipe", RECIPES)):
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


def copy_run(source: RunFolder, folder: RunFolder) -> Checkpoint:
    """Copy a run, whole or not at all, with its newest and its best checkpoint.

    Returns the newest. The source is only read, and may be read-only. No link is
    followed. Raises `NoGoodCheckpoint` if there is none, `ValueError` for a folder that
    is a link.
    """
    for path in (source.checkpoints, source.tokenizer):
        if path.is_symlink():
            raise ValueError(
                f"{path} is a link, and links in a run that is copied are not followed; "
                "put the folder itself there"
            )
    newest, best = source.newest_good_checkpoint(), source.best_checkpoint()
    if not newest:
        raise NoGoodCheckpoint(f"{source.root} has no checkpoint to resume from")
    parts = {source.tokenizer, newest.folder, (best or newest).folder}
    files = [file for name in _COPIED for file in source.root.glob(name)]
    files += [f for part in parts if not part.is_symlink() for f in part.glob("*")]
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
    return Checkpoint(folder.checkpoint_folder(newest.step), newest.facts)


def _last_step(folder: RunFolder) -> int:
    newest = folder.newest_good_checkpoint()
    return newest.step if newest else 0
