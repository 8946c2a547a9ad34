"""A report on this machine, and a check that a run is intact."""

import importlib.metadata
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from .config import TrainConfig
from .hardware import detect_hardware
from .launch.spawn import Job
from .monitor.tables import Facts, Table
from .session import GPU_REMEDIES, current_session
from .storage import verified
from .storage.file_system import free_bytes
from .storage.run_folder import RunFolder
from .training.launching import connect
from .training.machine import machine_defaults
from .training.runs import Run

_GIB = 2**30
_LITTLE_DISK_GIB = 5
_TIME_SUMS = "minimind_nb.training.worker:time_sums"


def doctor(out_dir: str | os.PathLike[str] = "out") -> Facts:
    """Return a table of what a run would use on this machine, with advice.

    Several GPUs sum gradients, in a process each. Starts no run and leaves no file.
    """
    session = current_session()
    left = session.seconds_left(None)
    end = f"{left / 3600:.1f} hours left" if left else "nothing ends the session"
    if session.kind == "kaggle":
        end += "; its panel shows what is left of some 30 GPU hours a week"
    support = "one process only, several need Linux"
    if sys.platform.startswith("linux"):
        shared = free_bytes(Path("/dev/shm")) / _GIB
        support = f"several processes, {shared:.1f} GiB free in /dev/shm"
    facts = {
        "place": f"{session.kind}{' (batch run)' if session.batch else ''}, {end}",
        "image": _first_line("/etc/build_date"),
        "system": f"{platform.system()}, {support}",
        "python": f"{platform.python_version()} in {sys.prefix}",
        "versions": _versions(),
        "memory": f"{psutil.virtual_memory().available / _GIB:.1f} GiB free",
        "disk": _disk(Path(out_dir)),
        "driver": _first_line("/proc/driver/nvidia/version"),
    }
    try:
        hardware = detect_hardware()
        facts["torch built for"] = hardware.architectures
        facts["processors"] = hardware.describe()
        machine = machine_defaults(TrainConfig(), hardware)
        names = ("device", "num_processes", "dtype")
        short = f"ready to train: {', '.join(f'{n}={machine[n]}' for n in names)}"
        if machine["device"] == "cpu":
            remedy = GPU_REMEDIES.get(session.kind, "")
            short += f"; a GPU is some hundred times faster{remedy}"
        if (count := machine["num_processes"]) > 1:
            with tempfile.TemporaryDirectory(prefix="minimind_nb_") as folder:
                job = Job(_TIME_SUMS, RunFolder(folder), count)
                connect(job, machine["device"], lambda: None)
                facts["all-reduce"] = _first_line(f"{folder}/all_reduce")
    except (ValueError, RuntimeError) as error:  # GPUs too old, or without an answer
        short = f"not ready: {error}"
    wrong = [facts[name] for name in ("versions", "disk") if "; " in facts[name]]
    facts["in short"] = f"not ready: {wrong[0]}" if wrong else short
    return Facts("This machine", {name: text for name, text in facts.items() if text})


def _first_line(file: str) -> str:
    return Path(file).read_text().partition("\n")[0] if Path(file).exists() else ""


def _versions() -> str:
    """Return the main versions, and what is missing or older than was tested."""
    found, wanted = [], []
    own = importlib.metadata.distributions(name="minimind_nb")
    needs = next((one.requires for one in own), None)  # none: not installed
    for need in map(Requirement, needs or ()):
        if need.marker:  # of an extra
            continue
        try:
            version = importlib.metadata.version(need.name)
        except importlib.metadata.PackageNotFoundError:
            version = "0"
        found.append(f"{need.name} {version}")
        if not need.specifier.contains(version, prereleases=True):
            wanted.append(f'"{need}"')
    problem = f"; missing or older than tested: pip install {' '.join(wanted)}"
    return ", ".join(found[:2]) + problem * bool(wanted)


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
