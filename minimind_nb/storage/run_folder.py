"""The run folder: its paths, lock, configuration, status and checkpoints."""

import contextlib
import json
import logging
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from fcntl import LOCK_EX, LOCK_NB, LOCK_SH, LOCK_UN
from pathlib import Path
from typing import Any

from . import file_system, verified

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
SHORTER = "shorter"  # suffix of what a run made that is extended
_STEPS = "step_" + "[0-9]" * 8
logger = logging.getLogger(__name__)


class RunLocked(RuntimeError):
    """Another process trains into this run folder."""


class NoGoodCheckpoint(RuntimeError):
    """There are checkpoints, but none of them verifies."""


class RunFolder:
    """`{out_dir}/{run_name}/`: all files of a run."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()  # the caller may change directory
        self.config_file = self.root / "config.json"
        self.metrics_file = self.root / "metrics.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.tokenizer = self.root / "tokenizer"
        self.plan_file = self.root / "plan.json"

    @property
    def lock_file(self) -> Path:
        """The lock, beside the folder, which may not exist yet."""
        root = self.root.resolve()
        return root.with_name(f".{root.name}.lock")

    def log_file(self, rank: int) -> Path:
        return self.root / f"rank{rank}.log"

    def record_file(self, rank: int) -> Path:
        """Return the file in which a rank keeps its state."""
        return self.root / f"rank{rank}.json"

    def exists(self) -> bool:
        """Return whether a run was started here."""
        return self.config_file.is_file()

    def read_config(self) -> dict[str, Any]:
        """Return `config.json`: {"settings": …, "explicit": […], "hashes": {…}, …}.

        Raises `FileNotFoundError`, or `ValueError` if it, or its settings, are no object.
        """
        try:
            config = json.loads(self.config_file.read_bytes())
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.config_file} is not JSON: {error}") from None
        settings = config.get("settings", {}) if isinstance(config, dict) else None
        if not isinstance(settings, dict):
            raise ValueError(f"{self.config_file} is no configuration: {config!r:.60}")
        return config

    def settings(self) -> dict[str, Any]:
        """Return the resolved settings in `config.json`."""
        return self.read_config().get("settings", {})

    def write_config(self, config: dict[str, Any]) -> None:
        """Write `config.json`, creating the folder if necessary."""
        self.root.mkdir(parents=True, exist_ok=True)
        text = f"{json.dumps(config, indent=2, ensure_ascii=False)}\n"
        verified.write_text(self.config_file, text)

    def status(self) -> str:
        """Return the status of the run, from rank 0's record.

        "finished", "time_budget", "interrupted", "terminated" or "failed"; "running" if
        its lock is held; "killed" if it was ended from outside; "new" if it never began.
        """
        try:
            status = json.loads(self.record_file(0).read_bytes())["status"]
        except (OSError, ValueError, KeyError, TypeError):
            return "new"
        if status != "running":
            return status
        return "running" if self.is_locked() else "killed"

    @contextlib.contextmanager
    def lock(self) -> Iterator[int]:
        """Hold the folder for one writer, and yield the lock's descriptor.

        It is freed when the block ends, by which time no rank may run. If the holder is
        killed, the kernel frees it when all that inherited the descriptor have ended,
        too. Raises `RunLocked`, or `OSError` for a link.
        """
        self.lock_file.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW
        descriptor = os.open(self.lock_file, flags, 0o666)
        with open(descriptor, "r+", encoding="utf-8", errors="replace") as file:
            if not file_system.lock(descriptor, LOCK_EX | LOCK_NB):
                holder = file.read().strip() or "another process"
                raise RunLocked(
                    f"{self.root} is in use by {holder}. Wait for that run, stop it, "
                    "or take another run_name."
                )
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()} since {started}\n")
            file.flush()
            try:
                yield descriptor
            finally:  # a process that was forked meanwhile may keep the descriptor
                file_system.lock(descriptor, LOCK_UN)

    def is_locked(self) -> bool:
        """Return whether a living process holds the lock."""
        with contextlib.suppress(OSError), self.lock_file.open("rb") as file:
            return not file_system.lock(file.fileno(), LOCK_SH | LOCK_NB)
        return False

    def checkpoint_folder(self, step: int) -> Path:
        return self.checkpoints / f"step_{step:08d}"

    def checkpoint_folders(self) -> list[Path]:
        """List all checkpoint folders, newest first, not yet verified."""
        return sorted(self.checkpoints.glob(_STEPS), reverse=True)

    def furthest(self) -> str:
        """Return the name of the last step of which there is, or was, a checkpoint."""
        found = self.checkpoints.glob(f"{_STEPS}*")
        return max((path.name[:13] for path in found), default="step 0")

    def newest_good_checkpoint(self, repair: bool = False) -> Path | None:
        """Return the newest checkpoint that verifies, or None if none was written.

        With `repair` (for the holder of the lock) damaged ones newer than it are renamed
        and half-written ones removed. Raises `NoGoodCheckpoint` if none verifies.
        """
        damaged: dict[Path, str] = {}
        found = self._first_good(self.checkpoint_folders(), damaged)
        if found is None and damaged:
            lines = [f"\n  {folder.name}: {why}" for folder, why in damaged.items()]
            raise NoGoodCheckpoint(
                f"no checkpoint in {self.checkpoints} is intact:{''.join(lines)}\n"
                "Put a copy of one back, or start over with resume=False, which keeps "
                "this folder under another name."
            )
        if repair:
            verified.remove_leftovers(self.checkpoints)
            for folder, damage in damaged.items():
                verified.set_aside(folder, damage)
        return found

    def best_checkpoint(self) -> Path | None:
        """Return the good checkpoint of lowest validation loss, or None."""
        folders = sorted(self.checkpoint_folders(), key=_manifest_loss)
        return self._first_good(folders, {})

    def check(self, folder: Path) -> None:
        """Verify a checkpoint. Raises `DamagedFolder`, also if it is of another run."""
        facts = verified.verify(folder)
        with contextlib.suppress(OSError, ValueError):
            own = self.read_config().get("run")
            if own and facts.get("run", own) != own:
                raise verified.DamagedFolder("it is of another run")

    def _first_good(self, folders: list[Path], damaged: dict[Path, str]) -> Path | None:
        """Return the first good one; `damaged` gets the others before it, and why."""
        for folder in folders:
            try:
                self.check(folder)
                return folder
            except verified.DamagedFolder as damage:
                damaged[folder] = str(damage)
                logger.warning("Checkpoint %s is not used: %s", folder, damage)
        return None

    def prune_checkpoints(self, keep: int, decay_start: int, complete: int = 0) -> None:
        """Remove all checkpoints but the `keep` newest, the best one, and the one at
        which the decay began; when a run is `complete` with so many steps, also those
        that a shorter one had made."""
        folders = self.checkpoint_folders()
        best = min(folders, key=_manifest_loss, default=None)  # the newest of equals
        shorter = self.checkpoints.glob(f"{_STEPS}.{SHORTER}*")
        shorter = [f for f in shorter if f < self.checkpoint_folder(complete)]
        for folder in (*folders[keep:], *shorter):
            if folder in (best, self.checkpoint_folder(decay_start)):
                continue
            shutil.rmtree(folder, ignore_errors=True)

    def is_aside(self) -> bool:
        """Return whether `rename_aside`, or an unfinished copy, gave it its name."""
        return re.search(r"\.old\d+$|^\.", self.root.name) is not None


def run_of(checkpoint: Path) -> RunFolder:
    """Return the run that a checkpoint belongs to."""
    return RunFolder(checkpoint.parents[1])


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps made when a checkpoint was written."""
    return int(checkpoint.name[5:13])


def _manifest_loss(folder: Path) -> float:
    """Return the validation loss of a checkpoint, infinite if it has none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        manifest = json.loads((folder / verified.MANIFEST).read_bytes())
        loss = float(manifest["facts"]["val_loss"])
        return loss if math.isfinite(loss) else math.inf
    return math.inf
