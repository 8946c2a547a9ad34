"""What this machine is and what will go wrong on it; whether a run is intact."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .hardware import BF16_CAPABILITY, Hardware, choose_dtype, detect_hardware
from .monitor.runs import Run
from .monitor.tables import Facts, Table
from .session import current_session
from .storage import verified
from .storage.run_folder import RunFolder

_GIB = 2**30
_LITTLE_DISK_GIB = 5
_LITTLE_SHM_GIB = 1
_INTACT = "intact"
_DAMAGED = "damaged: "


def doctor(out_dir: str | os.PathLike[str] = "out") -> Facts:
    """Look at this machine as a run would meet it; a table, with advice where needed.

    Starts no run and writes nothing that stays.
    """
    try:
        hardware = detect_hardware()
        processors, uses = hardware.describe(), _training(hardware)
    except RuntimeError as error:  # a GPU that does not answer
        processors, uses = str(error), "unknown until that is mended"
    session = current_session()
    left = session.seconds_left(None)
    ends = (
        f"{left / 3600:.1f} hours left"
        if left is not None
        else "nothing ends the session"
    )
    linux = sys.platform.startswith("linux")
    several = "several processes are supported"
    several = several if linux else "one process only: several need Linux"
    return Facts(
        "This machine",
        {
            "place": f"{session.kind}{' (batch run)' if session.batch else ''}, {ends}",
            "system": f"{platform.system()} {platform.release()}, {several}",
            "python": f"{platform.python_version()} in {sys.prefix}",
            "versions": _versions("torch", "transformers", "tokenizers"),
            "processors": processors,
            "training uses": uses,
            "disk": _disk(Path(out_dir)),
            "shared memory": _shared_memory(),
            "notebook": _versions("ipykernel", "ipywidgets", "papermill", "matplotlib"),
        },
    )


class Verdict(Table):
    """What `verify` found.

    `intact` tells whether there is a checkpoint and nothing is damaged; a run whose
    newest one is damaged goes on from the one before it.
    """

    def __init__(self, title: str, rows: list[list[str]]) -> None:
        super().__init__(title, ["what", "name", "state"], rows)
        states = [state for _, _, state in rows]
        damaged = any(state.startswith(_DAMAGED) for state in states)
        self.intact = states[0] == _INTACT and not damaged


def verify(run_dir: str | os.PathLike[str]) -> Verdict:
    """Check every byte that a run keeps against the manifests it was written with.

    A row for each checkpoint, the newest first, those set aside too, for the reference
    of a preference run, and for the token caches that it used: "intact", or how it is
    damaged. Changes nothing, and may run beside a training. Raises `FileNotFoundError`
    for a folder that is no run, naming the runs near it, `NotADirectoryError` for a
    file.
    """
    if Path(run_dir).is_file():
        raise NotADirectoryError(f"{run_dir} is a file; name the folder of a run")
    run = Run(run_dir)
    files = RunFolder(run.folder)
    folders = files.checkpoint_folders()
    rows = [["checkpoint", p.name, _state(p, files.check)] for p in folders]
    rows = rows or [["checkpoint", "", "none yet"]]
    for aside in sorted(files.checkpoints.glob("*.corrupt*.txt")):
        reason = aside.read_text(encoding="utf-8", errors="replace").strip()
        rows.append(["checkpoint", aside.stem, f"was set aside: {reason}"])
    if files.reference.exists():
        rows.append(["reference", files.reference.name, _state(files.reference)])
    caches = run.config.get("caches") if files.exists() else []
    root = current_session().cache_folder(files.root.absolute().parent)
    for name in caches if isinstance(caches, list) else []:
        if isinstance(name, str) and Path(name).name == name != "..":
            missing = "not here; it is made again from the data when it is needed"
            there = (root / name).exists()
            rows.append(
                ["token cache", name, _state(root / name) if there else missing]
            )
    return Verdict(f"What lies in {files.root}", rows)


def _state(folder: Path, check: Callable[[Path], object] = verified.verify) -> str:
    try:
        check(folder)
    except verified.DamagedFolder as damage:
        return f"{_DAMAGED}{damage}" if folder.exists() else "removed meanwhile"
    return _INTACT


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
        dtype = choose_dtype("cpu", None, hardware.cpu_native_bf16)
        return f"the CPU in {dtype}; a GPU is some hundred times faster"
    capability = min(gpu.capability for gpu in hardware.gpus)
    dtype = choose_dtype("cuda", capability)
    emulated = "; bfloat16 is emulated there" if capability < BF16_CAPABILITY else ""
    count = len(hardware.gpus)
    processes = "1 process on 1 GPU" if count == 1 else f"{count} processes, one a GPU"
    return f"{processes}, in {dtype}{emulated}"


def _disk(out_dir: Path) -> str:
    there = next(p for p in (out_dir, *out_dir.absolute().parents) if p.exists())
    free = shutil.disk_usage(there).free / _GIB
    text = f"{free:.1f} GiB free for {out_dir}"
    if free < _LITTLE_DISK_GIB:
        text += "; little: a checkpoint of 100 M parameters takes 1.2 GiB"
    try:
        with tempfile.TemporaryFile(dir=there):
            return text
    except OSError as error:
        return f"{text}; it cannot be written ({error.strerror}): set another out_dir"


def _shared_memory() -> str:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return "none"
    size = shutil.disk_usage(folder).total / _GIB
    small = "; small, but no loader processes use it" if size < _LITTLE_SHM_GIB else ""
    return f"{size:.2f} GiB{small}"
