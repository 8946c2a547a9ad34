"""The run folder: its paths, its lock, its records and its checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from . import verified

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_STEPS = "step_" + "[0-9]" * 8


class RunLocked(RuntimeError):
    """Another process trains into this run folder."""


class NoGoodCheckpoint(RuntimeError):
    """There are checkpoints, and none of them verifies."""


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint folder and the facts in its manifest."""

    folder: Path
    facts: dict[str, Any]

    @property
    def step(self) -> int:
        """Optimizer steps made when it was written."""
        return self.facts["step"]


class RunFolder:
    """`{out_dir}/{run_name}/`: where everything of a run lies."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)
        self.config_file = self.root / "config.json"
        self.metrics_file = self.root / "metrics.jsonl"
        self.checkpoints = self.root / "checkpoints"
        self.tokenizer = self.root / "tokenizer"
        self.reference = self.root / "reference"

    @property
    def lock_file(self) -> Path:
        """Beside the folder, whose name it guards, there or not yet."""
        root = self.root.resolve()
        return root.with_name(f".{root.name}.lock")

    def log_file(self, rank: int) -> Path:
        """Where all output of a rank goes."""
        return self.root / f"rank{rank}.log"

    def record_file(self, rank: int) -> Path:
        """Where a rank writes what became of it."""
        return self.root / f"rank{rank}.json"

    def exists(self) -> bool:
        """Whether a run was started here."""
        return self.config_file.is_file()

    def read_config(self) -> dict[str, Any]:
        """`config.json`: {"settings": …, "explicit": […], "hashes": {…}, …}.

        Raises `FileNotFoundError` without one, `ValueError` where it is no object of
        JSON, or its settings are none.
        """
        try:
            config = json.loads(self.config_file.read_bytes())
        except ValueError as error:
            raise ValueError(f"{self.config_file} is not JSON: {error}") from None
        if not isinstance(config, dict) or not isinstance(
            config.get("settings", {}), dict
        ):
            raise ValueError(f"{self.config_file} is no configuration: {config!r:.60}")
        return config

    def write_config(self, config: dict[str, Any]) -> None:
        """Replace `config.json`, making the folder if need be."""
        self.root.mkdir(parents=True, exist_ok=True)
        text = f"{json.dumps(config, indent=2, ensure_ascii=False)}\n"
        verified.write_text(self.config_file, text)

    def status(self) -> str:
        """What became of the run, by rank 0's record.

        "finished", "time_budget", "interrupted", "terminated" or "failed"; "running"
        holds its lock; "killed" was ended from outside; "new" never began.
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
        """Hold the folder for one writer. Raises `RunLocked` at once, never waits.

        Yields the descriptor. The kernel frees the lock when its holder, and all that
        inherited the descriptor, have ended, however that happens. The folder need not
        be there, and may be moved and made anew.
        """
        self.lock_file.parent.mkdir(parents=True, exist_ok=True)
        file = self.lock_file
        if file.is_symlink():
            raise RunLocked(
                f"{file} is a link, not the lock that a run writes: remove it"
            )
        with file.open("a+", encoding="utf-8", errors="replace") as file:
            # Whoever only asks `is_locked` holds a shared lock for some microseconds.
            if not _try_lock(file, fcntl.LOCK_EX, attempts=10):
                file.seek(0)
                raise RunLocked(
                    f"{self.root} is in use by {file.read().strip() or 'another process'}"
                    ". Wait for that run, stop it, or take another run_name."
                )
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            file.truncate(0)
            file.write(f"pid {os.getpid()} on {socket.gethostname()} since {started}\n")
            file.flush()
            yield file.fileno()

    def is_locked(self) -> bool:
        """Whether a living process holds the lock."""
        try:
            with self.lock_file.open("rb") as file:
                return not _try_lock(file, fcntl.LOCK_SH, attempts=1)
        except OSError:
            return False

    def checkpoint_folder(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps lies."""
        return self.checkpoints / f"step_{step:08d}"

    def checkpoint_folders(self) -> list[Path]:
        """All checkpoint folders, newest first, not yet verified."""
        return sorted(self.checkpoints.glob(_STEPS), reverse=True)

    def newest_good_checkpoint(self, repair: bool = False) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None where none was written.

        With `repair` (for the holder of the lock) damaged ones newer than it are set
        aside under another name and half-written ones removed. Raises
        `NoGoodCheckpoint` where there are candidates and none verifies: a run must not
        silently start again, the next time neither.
        """
        damaged: dict[Path, str] = {}
        found = self._first_good(self.checkpoint_folders(), damaged)
        if found is None and damaged:
            lines = [f"\n  {folder.name}: {damaged[folder]}" for folder in damaged]
            raise NoGoodCheckpoint(
                f"no checkpoint in {self.checkpoints} is intact:{''.join(lines)}\n"
                "Put a copy of one back, or start anew with resume=False, which keeps "
                "this folder under another name."
            )
        if repair:
            verified.remove_leftovers(self.checkpoints)
            for folder, damage in damaged.items():
                verified.set_aside(folder, damage)
        return found

    def best_checkpoint(self) -> Checkpoint | None:
        """The good checkpoint of lowest validation loss, or None."""
        folders = sorted(self.checkpoint_folders(), key=_manifest_loss)
        return self._first_good(folders, {})

    def check(self, folder: Path) -> Checkpoint:
        """A checkpoint folder of this run that verifies.

        Raises `DamagedFolder` where it does not, or is of another step or run.
        """
        facts = verified.verify(folder)
        step = facts.get("step")
        if not isinstance(step, int) or self.checkpoint_folder(step) != folder:
            raise verified.DamagedFolder(
                f"it holds step {step!r}, not what it is named"
            )
        own = self._run_id()
        if own and facts.get("run", own) != own:
            raise verified.DamagedFolder("it is of another run")
        return Checkpoint(folder, facts)

    def _run_id(self) -> str | None:
        try:
            return self.read_config().get("run")
        except (OSError, ValueError):
            return None

    def _first_good(
        self, folders: list[Path], damaged: dict[Path, str]
    ) -> Checkpoint | None:
        """The first that is good; what is wrong with those before goes into `damaged`."""
        for folder in folders:
            try:
                return self.check(folder)
            except verified.DamagedFolder as damage:
                damaged[folder] = str(damage)
                _say(f"Checkpoint {folder} is not used: {damage}")
        return None

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all checkpoints but the `keep` newest and the best one.

        Reads the losses from the manifests without verifying the rest: what is
        removed needs no proof. A folder that cannot be removed is named and left.
        """
        folders = self.checkpoint_folders()
        best = min(folders, key=_manifest_loss, default=None)
        for folder in folders[keep:]:
            if folder == best and _manifest_loss(folder) < math.inf:
                continue
            try:
                shutil.rmtree(folder)
            except OSError as error:
                _say(f"Checkpoint {folder} could not be removed: {error}")

    def is_aside(self) -> bool:
        """Whether its name is one that `move_aside`, or an unfinished copy, gave it."""
        return re.search(r"\.old\d+$|^\.", self.root.name) is not None

    def move_aside(self) -> Path:
        """Rename the run folder to `{name}.old{n}`; nothing is deleted."""
        names = (f"{self.root.name}.old{n}" for n in itertools.count(1))
        return self.root.rename(verified.first_free(self.root, names))


def _say(text: str) -> None:
    """Print, where that is possible: output may be closed, or take ASCII only."""
    with contextlib.suppress(OSError, ValueError):
        print(text)


def _try_lock(file: IO[Any], kind: int, attempts: int) -> bool:
    for attempt in range(attempts):
        time.sleep(0.02 if attempt else 0)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
    return False


def _manifest_loss(folder: Path) -> float:
    """The validation loss a checkpoint states, infinite where it states no number."""
    try:
        manifest = json.loads((folder / verified.MANIFEST).read_bytes())
        loss = float(manifest["facts"]["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
    return loss if math.isfinite(loss) else math.inf
