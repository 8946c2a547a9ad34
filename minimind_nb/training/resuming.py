"""Resuming: find the run to resume, and reconcile settings and content with it."""

import contextlib
import logging
import math
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..config import (
    CHANGEABLE_ON_RESUME,
    PRESETS,
    RECIPES,
    STAGES,
    ResolvedConfig,
    TrainConfig,
    resolve_batch,
)
from ..data.token_cache import names_before_version_3
from ..hub import download_run
from ..model.loading import find_weights
from ..monitor.metrics import History
from ..session import current_session
from ..storage import verified
from ..storage.run_folder import NoGoodCheckpoint, RunFolder, run_of, step_of
from .checkpoint import read_state
from .initial_weights import FIXED_SHAPE

logger = logging.getLogger(__name__)
# What runs did whose config.json does not know the setting.
_BEFORE: dict[str, Any] = {"optimizer": "adamw", "schedule": "cosine", "compile": False}
_OTHER_BITS = "results are no longer equal to the last bit"
_OTHER_ROWS = (
    "documents are packed into other rows in another order, so that of this epoch some "
    "are repeated and others left out"
)
# What follows if a setting changes.
_EFFECTS = {
    **dict.fromkeys(("device", "dtype", "num_processes"), _OTHER_BITS),
    "max_seq_len": _OTHER_ROWS,
    "val_fraction": "other documents are held out; if it is raised, some of them were "
    f"trained on, and the validation loss is too low. Also, {_OTHER_ROWS}",
}
# Copied with a run, in addition to two checkpoints.
_COPIED = (
    "config.json metrics.jsonl rejected.jsonl wandb.json loss.png summary.md rank*.json "
    "rank*.log reference.* tokenizer/*"
).split()


def source_run(cfg: TrainConfig) -> RunFolder | None:
    """Return the run that `resume` names, downloaded if need be; None if it does not."""
    if not isinstance(cfg.resume, str) or cfg.resume == "auto":
        return None
    path = cfg.resume
    if path.startswith("hf:"):
        path = download_run(path, current_session().cache_folder(cfg.out_dir))
    source = RunFolder(path)
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
    """Restore a missing config.json."""
    if not folder.exists() and (found := folder.newest_good_checkpoint()):
        folder.write_config(read_state(found)["config"])
        logger.warning(f"{folder.config_file} was missing; restored from {found.name}")


def find_checkpoint(
    folder: RunFolder, cfg: TrainConfig, repair: bool = False
) -> Path | None:
    """Return the checkpoint to resume from: the run's, or that of a run to copy.

    `repair` is for the holder of the lock. A run that saved nothing starts over. Raises
    `FileExistsError` if another run is in the way, `NoGoodCheckpoint` if all are lost.
    """
    source = source_run(cfg)
    run = folder if folder.exists() else source
    if source and run is folder and source.root.resolve() != folder.root.resolve():
        own, theirs = folder.furthest(), source.furthest()
        if own < theirs:
            raise FileExistsError(
                f"{folder.root} exists already and is at {own}, {source.root} at {theirs}; "
                "choose another run_name, or move that folder away"
            )
        logger.info(f"{folder.root} was copied before and is resumed")
    if run is None or cfg.resume is False:
        return None
    if found := run.newest_good_checkpoint(repair and run is folder):
        return found
    events = History(run.metrics_file).select("event")
    if saved := [row["step"] for row in events if row.get("event") == "save"]:
        raise NoGoodCheckpoint(
            f"{run.root} records a checkpoint at step {saved[-1]}, which is missing in "
            f"{run.checkpoints}. Restore it, or start over with resume=False, which keeps "
            "this folder under another name."
        )
    if run is source:
        raise NoGoodCheckpoint(f"{run.root} has no checkpoint to resume from")
    return None


def reconcile_with_existing_run(
    folder: RunFolder, cfg: TrainConfig, machine: Mapping[str, Any]
) -> ResolvedConfig:
    """Return the settings with which a run is resumed.

    One that is not asked for keeps the run's value; device, number of processes and
    precision are this machine's. Raises `RuntimeError` for differences not allowed.
    """
    config = upgraded_config(folder)
    run, asked = config["settings"], _asked(cfg, config["settings"])
    values = run | {**machine, "compile": run["compile"]}
    if "dtype" in config["explicit"] and values["device"] == run["device"]:
        values["dtype"] = run["dtype"]
    values |= asked
    for name in ("out_dir", "resume", "allow_change", "max_session_hours", "publish"):
        values[name] = getattr(cfg, name)
    values["init_from"] = run["init_from"]
    own_name = run["run_name"] if folder.is_aside() else folder.root.name
    values["run_name"] = cfg.run_name or own_name
    split = _split_batch(values, asked.keys())
    too_large = config.get("too_large_batch_size") or math.inf
    if split["batch_size"] >= too_large and values["allow_smaller_batch"]:
        logger.warning(
            f"memory ran out with batch_size={too_large}; allow_smaller_batch=False tries "
            "it again"
        )
        split = _split_batch({**values, "batch_size": too_large // 2}, ())
    values |= split
    allowed = CHANGEABLE_ON_RESUME | {*cfg.allow_change}
    differences = {
        name: f"{name}: {run[name]!r} in the run, {values[name]!r} now"
        for name in sorted(values.keys() - allowed)
        if run[name] != values[name]
    }
    if differences:
        raise _other_run(folder, differences)
    for name, effect in _EFFECTS.items():
        if run[name] != values[name]:
            logger.info(
                f"{name} changes from {run[name]!r} to {values[name]!r}: {effect}"
            )
    return ResolvedConfig(**values)


def upgraded_config(folder: RunFolder) -> dict[str, Any]:
    """Return config.json with what earlier states did not record."""
    config = folder.read_config()
    known = ResolvedConfig.__dataclass_fields__
    try:
        recorded = {k: v for k, v in config["settings"].items() if k in known}
        run = STAGES[recorded["stage"]] | _BEFORE | recorded
        steps = run["accumulation_steps"] * run["num_processes"]
        run.setdefault("global_batch", run["batch_size"] * steps)
        return {
            "began_from": None,
            **config,
            "hashes": {"initial": None, **config["hashes"]},
            "settings": {**vars(ResolvedConfig(**run))},
        }
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
) -> None:
    """Keep the identity of a resumed run in its new `config`.

    Raises `RuntimeError` if data, tokenizer or named initial weights have other content.
    """
    before = upgraded_config(folder)
    then, now = before["hashes"], config["hashes"]
    now["initial"] = then["initial"]
    if cfg.init_from == "none":
        now["initial"] = None
    elif cfg.init_from not in (None, "auto", before["settings"]["init_from"]):
        now["initial"] = verified.hash_file(find_weights(cfg.init_from).file)
    files = {"data": resolved.data_path, "validation": resolved.val_path}
    for key, file in files.items():
        # Earlier states wrote the name of a token cache.
        one_file = isinstance(file, str) and Path(file).is_file()
        if one_file and then[key].startswith("tokens-"):
            how = (cfg.stage, str(now["tokenizer"]), resolved.on_bad_line)
            if then[key] in names_before_version_3(file, *how):
                then[key] = now[key]
    hashed = {"data": "data_path", "tokenizer": "tokenizer", "initial": "init_from"}
    if resolved.val_path:  # else a part of the data
        hashed["validation"] = "val_path"
    differences = {
        name: f"content of {name}: {then[key]!s:.12} in the run, {now[key]!s:.12} now"
        for key, name in hashed.items()
        if then[key] != now[key] and name not in cfg.allow_change
    }
    if differences:
        raise _other_run(folder, differences)
    now["initial"] = then["initial"]
    config["run"] = before.get("run", config["run"])
    config["explicit"] = sorted({*before["explicit"], *config["explicit"]})
    config["began_from"] = before["began_from"]
    config["too_large_batch_size"] = before.get("too_large_batch_size")


def _asked(cfg: TrainConfig, run: Mapping[str, Any]) -> dict[str, Any]:
    """Return the explicit settings, and those of a named preset or recipe: all of one
    that the run was not started with, and of its own what may change on a resume."""
    asked: dict[str, Any] = {}
    for kind, table in (("preset", PRESETS), ("recipe", RECIPES)):
        name = getattr(cfg, kind)
        for key, value in table.get(name or "", {}).items():
            if name != run[kind] or key in CHANGEABLE_ON_RESUME:
                asked[key] = value
    return asked | cfg.explicit()


def _split_batch(values: Mapping[str, Any], asked: Collection[str]) -> dict[str, int]:
    """Split the global batch among the processes of today, as asked if it divides."""
    total, processes = values["global_batch"], values["num_processes"]
    if total % processes:
        raise RuntimeError(
            f"global_batch={total} cannot be split among num_processes={processes}; "
            "choose a number of processes that divides it"
        )
    divides = total // processes % values["accumulation_steps"] == 0
    keep = asked if divides and "batch_size" not in asked else ()
    split = resolve_batch(values, keep)
    if any(split[name] != values[name] for name in split):
        # `plan` shows warnings only.
        logger.warning(
            f"batch_size={split['batch_size']} × accumulation_steps="
            f"{split['accumulation_steps']} on num_processes={processes} keeps the "
            f"global batch of {total}"
        )
    return split


def _other_run(folder: RunFolder, differences: Mapping[str, str]) -> RuntimeError:
    text = (
        f"{folder.root} holds a run with other settings:\n  "
        + "\n  ".join(differences.values())
        + '\nOptions:\n  run_name="…"            a new run beside it\n  resume=False            '
        "a new run in its place; the old folder is kept under another name"
    )
    if differences.keys().isdisjoint(FIXED_SHAPE):
        quoted = ", ".join(f'"{name}"' for name in differences)
        text += f"\n  allow_change=[{quoted}]  resume with the new values"
    return RuntimeError(text)


def undo_decay(total: int, cfg: ResolvedConfig, checkpoint: Path) -> Path:
    """Return the checkpoint to resume from if a run is to have so many steps.

    Before its decay nothing depends on the length of a run. One that is extended when
    it decays already resumes from the checkpoint at which that began, and so equals one
    planned that long. A cosine is never undone.
    """
    before = read_state(checkpoint)["config"]
    start = before.get("decay_start", math.inf)
    if step_of(checkpoint) <= start or not _is_extended(total, cfg, before):
        return checkpoint
    run = run_of(checkpoint)
    for folder in run.checkpoint_folders():
        if folder <= run.checkpoint_folder(start):
            with contextlib.suppress(verified.DamagedFolder):
                run.check(folder)
                return folder
    logger.warning(
        f"no checkpoint in {run.checkpoints} is from before the decay of the learning "
        "rate, so it rises again: this differs from a run planned that long"
    )
    return checkpoint


def plan_decay(total: int, cfg: ResolvedConfig, checkpoint: Path | None) -> int:
    """Return the step at which the decay begins; of a run that is shortened, at once."""
    if cfg.schedule == "cosine":
        return total
    start = total - round(total * cfg.decay_fraction)
    if checkpoint is None:
        return start
    before = read_state(checkpoint)["config"]
    decays = step_of(checkpoint) > before.get("decay_start", math.inf)
    if decays and not _is_extended(total, cfg, before):
        return before["decay_start"]
    return max(start, step_of(checkpoint))


def _is_extended(total: int, cfg: ResolvedConfig, before: dict[str, Any]) -> bool:
    """Return whether there are more steps, of the same global batch, than before."""
    same = before["settings"]["global_batch"] == cfg.global_batch
    return cfg.schedule == "linear" and same and total > before["total_steps"]


def copy_run(checkpoint: Path, newest: Path, folder: RunFolder) -> Path:
    """Copy the run of a checkpoint whole or not at all: with this checkpoint, the newest
    and the best one, and the one at which the decay began.

    Returns the copy of the checkpoint. Raises `ValueError` for a link out of the run.
    """
    source = run_of(checkpoint)
    best = source.best_checkpoint()
    decay = source.checkpoint_folder(source.read_config().get("decay_start", 0))
    names = {folder.name for folder in (checkpoint, newest, decay, best) if folder}
    steps = [f"checkpoints/{name}/*" for name in names]
    found = (file for name in (*_COPIED, *steps) for file in source.root.glob(name))
    files = [file for file in found if file.is_file()]
    for file in files:
        if not file.resolve().is_relative_to(source.root.resolve()):
            raise ValueError(
                f"{file} is behind a link that leads out of the run; put the file itself "
                "there"
            )
    with verified.beside(folder.root, sum(f.stat().st_size for f in files)) as aside:
        for file in files:
            target = aside / file.relative_to(source.root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
        copied = checkpoint.relative_to(source.root)
        verified.verify(aside / copied)
        aside.rename(folder.root)
    logger.info(f"copied {source.root} to {folder.root}")
    return folder.root / copied
