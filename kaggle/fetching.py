"""Wait until a version has ended, fetch its small files, read its runs, continue them."""

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar

from kaggle_command import (
    Refused,
    Unreadable,
    find_state,
    is_busy,
    is_network_error,
    kaggle,
    shorten,
)
from pushing import find_kernels, kernel_of, push_kernel, write_version

from minimind_nb.monitor.metrics import History
from minimind_nb.storage.run_folder import RunFolder

Answer = TypeVar("Answer")

UNREADABLE = 360  # answers in a row before waiting ends: six hours at the usual poll
# The files of run folders but checkpoints; Kaggle adds the session's log.
SMALL = r"(^|/)(config\.json|plan\.json|metrics\.jsonl|summary\.md|rank\d+\.json)$"


class FetchedRun(NamedTuple):
    """A run in an output: saved step, status, stage, identity, path and local folder."""

    step: int
    status: str
    stage: str
    identity: str
    path: str
    root: Path


def tell(text: str) -> None:
    """Print an event with the time."""
    print(time.strftime("%Y-%m-%d %H:%M"), text, flush=True)


def run_wait(options: argparse.Namespace) -> None:
    """Wait until the last version of each notebook has ended."""
    for folder in find_kernels(options):
        kernel = kernel_of(folder)
        if find_state(kernel) is None:
            raise Refused(f"Kaggle has no notebook {kernel}: check --user and your key")
        wait_until_ended(kernel, options.poll, lambda s, k=kernel: tell(f"{k}: {s}"))


def run_fetch(options: argparse.Namespace) -> None:
    """Fetch the small files of each notebook's last version, and say what they show."""
    for folder in find_kernels(options):
        kernel = kernel_of(folder)
        runs = fetch_runs(kernel, options.out, find_state(kernel))
        for run in runs:
            tell(f"{run.root}: {run.status}, saved at step {run.step}")
        if not runs:
            tell(f"{kernel}: no run in the output of its last version (yet)")


def run_continue(options: argparse.Namespace) -> None:
    """Push each notebook again, resuming the run in the output of its last version.

    If that output is not mounted, the new version ends in an error instead of starting
    over. Raises `Refused` if the notebook is running or its output has no run.
    """
    for folder in find_kernels(options):
        kernel = kernel_of(folder)
        if is_busy(state := find_state(kernel)):
            raise Refused(f"{kernel} is {state}: kernels.py wait, then continue")
        runs = fetch_runs(kernel, options.out, state)
        runs = [run for run in runs if run.stage == folder.name]
        if not runs:
            raise Refused(
                f"the output of the last version of {kernel} has no run of "
                f"{folder.name} (yet): try again later, or start over with kernels.py push"
            )
        if runs[-1].status == "finished":
            tell(f"{kernel} is finished at step {runs[-1].step}: nothing was pushed")
            continue
        version = folder.parent / "next" / folder.name
        resume = f"resume = {mounted(kernel, runs[-1].path)!r}"
        push_kernel(write_version(folder, version, kernel, [kernel], [resume]))


def mounted(kernel: str, path: str) -> str:
    """Return the name under which a run in a kernel's output is found when mounted."""
    return f"{kernel.partition('/')[2]}/{path}"


def wait_until_ended(kernel: str, poll: float, show: Callable[[str], None]) -> str:
    """Return the state in which a kernel's last version ended, asking every `poll` s.

    `show` gets each new state. Nothing is concluded from an answer that cannot be read;
    raises `Unreadable` after 360 of them in a row.
    """
    told: str | None = None
    while True:
        time.sleep(poll)  # first, since a version that was just pushed may not show yet
        state = ask_state(kernel, poll, exists=True) or ""
        if state != told:
            show(state)
        if not is_busy(state):
            return state
        told = state


def ask_state(kernel: str, poll: float, exists: bool = False) -> str | None:
    """Return `find_state`, repeated while the answer cannot be read, or while it says
    that there is no kernel which `exists`."""

    def ask() -> str | None:
        state = find_state(kernel)
        if exists and state is None:
            raise Unreadable(
                f"Kaggle has no notebook {kernel}, which it had: check --user and your key"
            )
        return state

    return insist(ask, poll)


def ask_runs(kernel: str, out: Path, state: str, poll: float) -> list[FetchedRun]:
    """Return `fetch_runs`, repeated while the output cannot be read."""
    return insist(lambda: fetch_runs(kernel, out, state), poll)


def insist(ask: Callable[[], Answer], poll: float) -> Answer:
    """Return what `ask` returns, asking every `poll` s while it raises `Unreadable`;
    raises that after 360 times."""
    for left in range(UNREADABLE - 1, 0, -1):
        try:
            return ask()
        except Unreadable as reason:
            if left == UNREADABLE - 1:
                tell(f"{reason}; nothing is concluded, asking {left} times more")
            time.sleep(poll)
    return ask()


def fetch_runs(kernel: str, out: Path, state: str | None) -> list[FetchedRun]:
    """Fetch the small files of a kernel's last version, which is in this state, and
    return its runs, least advanced first.

    Raises `Unreadable` after a network error, and for a COMPLETE version if its log is
    missing, which Kaggle gives last, or if files of its runs are. Other versions may have
    no output.
    """
    target = fetched_folder(out, kernel)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    said = kaggle(*output_command(kernel, target))
    named = {file.parent for file in target.rglob("config.json")}
    trained = {file.parent for file in target.rglob("metrics.jsonl")}
    begun = {file.parent for file in target.rglob("rank*.json")}
    runs = [run for run in (read_run(folder, target) for folder in named) if run]
    logged = "log downloaded to" in said.lower()
    if state == "COMPLETE":
        whole = named >= trained >= {run.root for run in runs}
        clear = logged and whole and bool(runs or not begun)
    else:
        clear = logged or not is_network_error(said)
    if clear:
        return sorted(runs)
    raise Unreadable(
        f"the output of {kernel} is late or incomplete (kaggle said {shorten(said)!r}): "
        "look at it on Kaggle, then repeat this command"
    )


def fetched_folder(out: Path, kernel: str) -> Path:
    """Return the folder for the small files of a kernel's last output."""
    return out / "fetched" / kernel.partition("/")[2]


def output_command(kernel: str, target: Path) -> list[str]:
    """Return the arguments that fetch the small files of a kernel's output."""
    pattern = ["--file-pattern", SMALL]
    return ["kernels", "output", kernel, "-p", str(target), *pattern]


def read_run(folder: Path, target: Path) -> FetchedRun | None:
    """Return the run in a folder below `target`, or None for another folder."""
    run = RunFolder(folder)
    try:
        identity = run.read_config()["run"]
        stage = run.settings()["stage"]
    except (OSError, ValueError, KeyError):
        return None
    if run.is_aside():
        return None
    events = History(run.metrics_file).select("event")
    saved = [row["step"] for row in events if row.get("event") == "save"]
    path = folder.relative_to(target).as_posix()
    step = max(saved, default=0)
    status = run.status()
    if events and events[-1].get("event") == "end":
        status = events[-1]["status"]
    elif status == "finished":  # by a record that is newer than the metrics
        status = "killed"
    return FetchedRun(step, status, stage, identity, path, folder)
