"""The run folder: its paths, its lock, its records and its checkpoints."""

from __future__ import annotations

import contextlib
import fcntl
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
from typing import Any

from . import verified

WEIGHTS = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"
_STEP = re.compile(r"step_(\d{8})")


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
        self.lock_file = self.root / "lock"

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
        """`config.json`: {"settings": …, "explicit": […], "hashes": {…}}.

        Raises `FileNotFoundError` where there is none, `ValueError` where it is
        not JSON.
        """
        try:
            return json.loads(self.config_file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{self.config_file} is not JSON: {error}") from None

    def write_config(self, config: dict[str, Any]) -> None:
        """Replace `config.json`, making the folder if need be."""
        self.root.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2, ensure_ascii=False)
        verified.write_text(self.config_file, text + "\n")

    def status(self) -> str:
        """What became of the run.

        "finished", "time_budget", "interrupted" and "terminated" are endings that
        rank 0 recorded; "failed" is an error; "running" holds its lock; "killed" was
        ended from outside; "new" never began.
        """
        try:
            record = json.loads(self.record_file(0).read_text(encoding="utf-8"))
            status = record["status"]
        except (OSError, ValueError, KeyError, TypeError):
            return "new"
        if status != "running":
            return status
        return "running" if self.is_locked() else "killed"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for one writer. Raises `RunLocked` at once, never waits.

        The kernel frees the lock when its holder ends, however that happens.
        """
        self.root.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            # Whoever only asks `is_locked` holds a shared lock for some microseconds.
            if not _try_lock(descriptor, fcntl.LOCK_EX, seconds=0.2):
                holder = os.pread(descriptor, 4096, 0).decode("utf-8", "replace")
                raise RunLocked(
                    f"{self.root} is in use by {holder.strip() or 'another process'}. "
                    "Wait for that run, stop it, or take another run_name."
                )
            started = time.strftime("%Y-%m-%d %H:%M:%S")
            holder = f"pid {os.getpid()} on {socket.gethostname()} since {started}\n"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode("utf-8"), 0)
            yield
        finally:
            os.close(descriptor)

    def is_locked(self) -> bool:
        """Whether a living process holds the lock."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY)
        except OSError:
            return False
        try:
            return not _try_lock(descriptor, fcntl.LOCK_SH, seconds=0.0)
        finally:
            os.close(descriptor)

    def checkpoint_folder(self, step: int) -> Path:
        """Where the checkpoint after `step` optimizer steps lies."""
        return self.checkpoints / f"step_{step:08d}"

    def checkpoint_folders(self) -> list[Path]:
        """All checkpoint folders, newest first, not yet verified."""
        if not self.checkpoints.is_dir():
            return []
        found = [p for p in self.checkpoints.iterdir() if _STEP.fullmatch(p.name)]
        return sorted(found, key=lambda path: path.name, reverse=True)

    def newest_good_checkpoint(self, repair: bool = False) -> Checkpoint | None:
        """The newest checkpoint that verifies, or None where none was written.

        With `repair` (for the holder of the lock) damaged ones are set aside under
        another name. Raises `NoGoodCheckpoint` where there are candidates and none
        verifies: a run must not silently start again.
        """
        reasons = []
        for folder in self.checkpoint_folders():
            try:
                return Checkpoint(folder, verified.verify(folder))
            except verified.DamagedFolder as damage:
                reasons.append(f"{folder.name}: {damage}")
                print(f"Checkpoint {folder} is damaged and not used: {damage}")
                if repair:
                    verified.set_aside(folder, str(damage))
        if not reasons:
            return None
        listing = "\n  ".join(reasons)
        raise NoGoodCheckpoint(
            f"no checkpoint in {self.checkpoints} is intact:\n  {listing}\n"
            "Put a copy of one back, or start anew with resume=False, which keeps this "
            "folder under another name."
        )

    def best_checkpoint(self) -> Checkpoint | None:
        """The good checkpoint of lowest validation loss, or None."""
        for folder in sorted(self.checkpoint_folders(), key=_manifest_loss):
            with contextlib.suppress(verified.DamagedFolder):
                return Checkpoint(folder, verified.verify(folder))
        return None

    def prune_checkpoints(self, keep: int) -> None:
        """Remove all checkpoints but the `keep` newest and the best one.

        Reads the losses from the manifests without verifying the rest: what is
        removed needs no proof. A folder that cannot be removed is named and left.
        """
        folders = self.checkpoint_folders()
        best = min(folders, key=_manifest_loss, default=None)
        for folder in folders[keep:]:
            if folder == best and math.isfinite(_manifest_loss(folder)):
                continue
            try:
                shutil.rmtree(folder)
            except OSError as error:
                print(f"Checkpoint {folder} could not be removed: {error}")

    def move_aside(self) -> Path:
        """Rename the run folder to `{name}.old{n}`; nothing is deleted."""
        number = 1
        while (target := self.root.with_name(f"{self.root.name}.old{number}")).exists():
            number += 1
        self.root.rename(target)
        return target


def _try_lock(descriptor: int, kind: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= end:
                return False
            time.sleep(0.02)


def _manifest_loss(folder: Path) -> float:
    """The validation loss a checkpoint states, infinite where it states no number."""
    try:
        manifest = json.loads((folder / verified.MANIFEST).read_text(encoding="utf-8"))
        loss = float(manifest["facts"]["val_loss"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf
    return loss if math.isfinite(loss) else math.inf
