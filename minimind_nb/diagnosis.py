"""A report on this machine, and a check that a run is intact."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .hardware import Hardware, choose_dtype, detect_hardware
from .monitor.tables import Facts, Table
from .session import current_session
from .storage import verified
from .storage.run_folder import RunFolder
from .training.runs import Run

_GIB = 2**30
_LITTLE_DISK_GIB = 5


def doctor(out_dir: str | os.PathLike[str] = "out") -> Facts:
    """Return a table of what a run would use on this machine, with advice.

    Starts no run and leaves no file.
    """
    try:
        hardware = detect_hardware()
        processors, used = hardware.describe(), _training(hardware)
    except RuntimeError as error:  # a GPU that does not answer
        processors, used = str(error), ""
    session = current_session()
    left = session.seconds_left(None)
    end = f"{left / 3600:.1f} hours left" if left else "nothing ends the session"
    several = sys.platform.startswith("linux")
    support = "several processes" if several else "one process only, several need Linux"
    disk, ready = _disk(Path(out_dir)), f"ready to train: {used}"
    if not used or ";" in disk:
        ready = f"not ready: {disk if used else processors}"
    facts = {
        "place": f"{session.kind}{' (batch run)' if session.batch else ''}, {end}",
        "system": f"{platform.system()}, {support}",
        "python": f"{platform.python_version()} in {sys.prefix}",
        "versions": _versions("torch", "transformers", "tokenizers", "ipykernel"),
        "processors": processors,
        "disk": disk,
        "in short": ready,
    }
    return Facts("This machine", facts)


def _versions(*names: str) -> str:
    found = []
    for name in names:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} is missing: pip install {name}")
    return ", ".join(found)


def _training(hardware: Hardware) -> str:
    if not hardware.gpus:
        dtype = choose_dtype(None, hardware.cpu_native_bf16)
        return f"the CPU in {dtype}; a GPU is some hundred times faster"
    dtype = choose_dtype(min(gpu.capability for gpu in hardware.gpus))
    count = len(hardware.gpus)
    processes = "1 process on 1 GPU" if count == 1 else f"{count} processes, one a GPU"
    return f"{processes}, in {dtype}"


def _disk(out_dir: Path) -> str:
    parent = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(parent).free / _GIB
    text = f"{free:.1f} GiB free for {out_dir}"
    if free < _LITTLE_DISK_GIB:
        text += "; little: a checkpoint of 100 M parameters takes 1.2 GiB"
    try:
        with tempfile.TemporaryFile(dir=parent):
            return text
    except OSError as error:
        return f"{text}; it cannot be written ({error.strerror}): set another out_dir"


class Verdict(Table):
    """The result of `verify`.

    `intact` is true if there is a checkpoint and nothing is damaged. A run whose newest
    checkpoint is damaged resumes from the one before it.
    """

    def __init__(self, title: str, rows: list[list[str]]) -> None:
        super().__init__(title, ["what", "name", "state"], rows)
        states = [state for _, _, state in rows]
        damaged = any(state.startswith("damaged: ") for state in states)
        self.intact = states[0] == "intact" and not damaged


def verify(run_dir: str | os.PathLike[str]) -> Verdict:
    """Check every byte that a run keeps against its manifests.

    There is a row for each checkpoint, the newest first, also those set aside, and for
    the token caches that the run used: "intact", or the damage. Changes nothing, and
    may run during a training. Raises `FileNotFoundError` for a folder that is not a
    run, listing the runs nearby, `NotADirectoryError` for a file.
    """
    if Path(run_dir).is_file():
        raise NotADirectoryError(f"{run_dir} is a file; pass the folder of a run")
    run = Run(run_dir)
    files = RunFolder(run.folder)
    folders = files.checkpoint_folders()
    rows = [["checkpoint", p.name, _state(p, files.check)] for p in folders]
    rows = rows or [["checkpoint", "", "none yet"]]
    for aside in sorted(files.checkpoints.glob("*.corrupt*.txt")):
        reason = aside.read_text(encoding="utf-8", errors="replace").strip()
        rows.append(["checkpoint", aside.stem, f"was set aside: {reason}"])
    caches = run.config.get("caches", []) if files.exists() else []
    root = current_session().cache_folder(files.root.parent)
    for folder in (root / name for name in caches):
        missing = "missing; it is made again from the data when needed"
        state = _state(folder) if folder.exists() else missing
        rows.append(["token cache", folder.name, state])
    return Verdict(f"Files of {files.root}", rows)


def _state(folder: Path, check: Callable[[Path], object] = verified.verify) -> str:
    try:
        check(folder)
    except verified.DamagedFolder as damage:
        return f"damaged: {damage}" if folder.exists() else "removed meanwhile"
    return "intact"
