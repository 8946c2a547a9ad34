"""The state of a chain: a file that is replaced whole; its lock, and its hours."""

import argparse
import contextlib
import fcntl
import io
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from building import SOURCES, run_build
from fetching import FetchedRun, ask_runs, ask_state, fetched_folder, tell
from kaggle_command import Quota, Refused, Unreadable, read_quota, shorten
from pushing import kernel_of

HOURS = 30.0  # a week's quota
LEAST_HOURS = 0.5  # below which a session is not worth starting
MARGIN_HOURS = 0.2  # for what a notebook does after its training
BEGINNING = {
    "identity": None,  # of the run, which it keeps when it is resumed
    "path": None,  # of its folder in the output
    "step": 0,  # saved in the last good output
    "good": None,  # the kernel that holds that output
    "trial": None,  # a kernel that holds a later one, of a version that did not complete
    "trial_step": 0,  # saved there
    "failures": 0,  # versions since without progress
    "finished": False,
    "checked": False,  # whether its notebooks held a run before this chain
}
BEGUN = {
    "plan": None,  # notebooks, parameters and data
    "limit": HOURS,
    "hours": 0.0,  # of the sessions that have ended
    "uploaded": False,  # the data sets
    "session": None,  # that runs, or is about to
    "pushed": [],  # the kernels that are known to exist
    "runs": {},
}
TURNS = ("", "-b", "-c")  # suffixes of a notebook's kernels


class Chain:
    """A chain, whose state is a file that is replaced whole at every step."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.file = options.out / "chain.json"
        self.built = options.out / "chain"  # which a `build` by hand does not change
        self.again = f"`python kaggle/kernels.py run --out {options.out}`"
        self.state = self.open()
        self.state["limit"] = options.hours or self.state["limit"]

    def open(self) -> dict[str, Any]:
        """Return the state of the chain, which is built if there is none.

        Raises `Refused` for a chain of other parameters.
        """
        options = self.options
        names = list(dict.fromkeys(options.notebook or ["pretrain"]))
        names.sort(key=list(SOURCES).index)
        data = [str(file.absolute()) for file in options.data]
        plan = {"notebooks": names, "parameters": options.p, "data": data}
        if self.file.is_file():
            state = self.read()
            if plan == state["plan"] or not (options.notebook or options.p or data):
                if options.adopt:
                    runs = {name: dict(BEGINNING) for name in state["runs"]}
                    state |= {"session": None, "runs": runs}
                return state
            if not options.adopt:
                raise Refused(
                    f"{self.file} is a chain of other parameters: leave out -p, --data "
                    "and --notebook to resume it, or add --adopt to train its run "
                    "further with these"
                )
        values = {**vars(options), "out": self.built, "notebook": names}
        with contextlib.redirect_stdout(io.StringIO()):
            run_build(argparse.Namespace(**values))
        runs = {name: dict(BEGINNING) for name in names}
        return BEGUN | {"plan": plan, "runs": runs, "pushed": []}

    def read(self) -> dict[str, Any]:
        """Return the state in the file; raises `Refused` if it is damaged."""
        try:
            state = json.loads(self.file.read_bytes())
            runs = list(state["runs"].values())
            if state.keys() >= BEGUN.keys() and all(
                r.keys() >= BEGINNING.keys() for r in runs
            ):
                return state
        except (ValueError, LookupError, TypeError, AttributeError):
            pass
        raise Refused(
            f"{self.file} is damaged: delete it, then the first command with --adopt "
            "resumes the run that the notebooks hold"
        )

    def save(self) -> None:
        """Write the state aside, and rename it."""
        aside = self.file.with_suffix(".new")
        with aside.open("w", encoding="utf-8") as file:
            json.dump(self.state, file, indent=2)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(self.file)

    def kernels(self, name: str) -> list[str]:
        """Return the kernels of a notebook, which take turns."""
        kernel = kernel_of(self.built / "kernels" / name)
        return [f"{kernel}{suffix}" for suffix in TURNS]

    def free(self, name: str) -> str:
        """Return the first kernel of a notebook that holds nothing of its run."""
        run = self.state["runs"][name]
        kernels = self.kernels(name)
        return next(k for k in kernels if k not in (run["good"], run["trial"]))

    def ask_state(self, kernel: str) -> str | None:
        """Return the state of a kernel's last version, or None if it does not exist, which
        is not concluded of one that did."""
        exists = kernel in self.state["pushed"]
        return ask_state(kernel, self.options.poll, exists)

    def ask_runs(self, kernel: str, state: str) -> list[FetchedRun]:
        """Return the runs in the output of a kernel's last version, in this state."""
        return ask_runs(kernel, self.options.out, state, self.options.poll)

    def next(self, kernel: str) -> Path:
        """Return the folder from which the next version of a kernel is pushed."""
        return self.built / "next" / kernel.partition("/")[2]

    def fetched(self, kernel: str) -> Path:
        """Return the folder with the small files of a kernel's last output."""
        return fetched_folder(self.options.out, kernel)

    def hours_left(self) -> float:
        """Return the hours that the chain may still use, without the running session."""
        return self.state["limit"] - self.state["hours"]


@contextlib.contextmanager
def hold_lock(file: Path) -> Iterator[None]:
    """Hold a lock, which the `kaggle` that runs keeps if this process is killed.

    Raises `Refused` if another chain holds it.
    """
    with file.open("a+") as lock:
        os.set_inheritable(lock.fileno(), True)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            if Path("/proc", holder or "self").exists():
                raise Refused(
                    f"process {holder} runs a chain in {file.parent} already: wait for "
                    "it, or take another --out"
                ) from None
            fcntl.flock(lock, fcntl.LOCK_EX)  # until the kaggle of a killed chain ends
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


def wait_for_hours(chain: Chain) -> float:
    """Return the hours that a session may take, after waiting for the week's quota.

    Raises `Refused` if --hours are used up.
    """
    left = chain.hours_left()
    if left < LEAST_HOURS:
        raise Refused(
            f"{chain.state['hours']:.1f} of {chain.state['limit']:g} h are used: "
            f"{chain.again} with a larger --hours resumes the chain"
        )
    while quota := ask_quota():
        if quota.hours_left >= LEAST_HOURS:
            return min(left, quota.hours_left) - MARGIN_HOURS
        wait_for_turn(
            chain,
            f"the GPU quota is used up ({quota.hours_left:g} h left, new hours at "
            f"{quota.refresh_at})",
        )
    tell("kaggle quota names no GPU hours: relying on --hours")
    return left - MARGIN_HOURS


def ask_quota() -> Quota | None:
    """Return the quota, or None if it cannot be read."""
    with contextlib.suppress(Unreadable):
        return read_quota()
    return None


def wait_for_turn(chain: Chain, reason: str) -> None:
    """Wait 60 polls, an hour; with --no-wait, raise `Refused`."""
    if chain.options.no_wait:
        raise Refused(f"{shorten(reason)}; {chain.again} resumes the chain later")
    tell(f"{shorten(reason)}: asking again in {chain.options.poll:g} min")
    time.sleep(60 * chain.options.poll)
