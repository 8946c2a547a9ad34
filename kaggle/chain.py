"""The chain: push, wait, fetch and continue until the runs are finished.

Two notebooks of Kaggle's take turns, `minimind-pretrain` and `minimind-pretrain-b`. What
is mounted is the output of a notebook's last version, and that of a failed or cancelled
one is empty; so a new version is always pushed to the notebook that does not hold the
last good output.
"""

import argparse
import re
import shlex
import time
from typing import Any

from building import SOURCES, id_of
from chain_state import Chain, hold_lock, wait_for_hours, wait_for_turn
from fetching import (
    FetchedRun,
    ask_runs,
    ask_state,
    mounted,
    output_command,
    tell,
    wait_until_ended,
)
from kaggle_command import BUSY, Refused, Unreadable
from pushing import (
    check_command,
    push_command,
    push_datasets,
    push_kernel,
    write_version,
)

from minimind_nb.session import KAGGLE_HOURS

SESSION_HOURS = 12.0  # the longest that Kaggle lets a session be
LATE = {"COMPLETE": 10}  # times to fetch again what may be an older output, by state


def run_chain(options: argparse.Namespace) -> None:
    """Train each notebook to its end, over as many sessions as it takes."""
    options.out.mkdir(parents=True, exist_ok=True)
    with hold_lock(options.out / ".chain.lock"):
        if not options.dry_run:
            check_command()
        chain = Chain(options)
        if options.dry_run:
            show_commands(chain)
            return
        chain.save()
        if not chain.state["uploaded"]:
            push_datasets(chain.built, options.wait)
            chain.state["uploaded"] = True
            chain.save()
        for name, run in chain.state["runs"].items():
            while not run["finished"]:
                step = end_session if chain.state["session"] else start_session
                try:
                    step(chain, name, run)
                finally:
                    chain.save()
            show_end(chain, name, run)


def start_session(chain: Chain, name: str, run: dict[str, Any]) -> None:
    """Push the next version, unless a session runs already, which is waited for."""
    poll, pair = chain.options.poll, chain.pair(name)
    hours = wait_for_hours(chain)
    states = {kernel: ask_state(kernel, poll) for kernel in pair}
    for kernel in pair:
        if states[kernel] in BUSY:
            tell(f"{kernel} is {states[kernel]} already: waiting for that session")
            if run["identity"]:
                note_session(chain, kernel, attached=False)
            else:
                wait_until_ended(kernel, poll, lambda s, k=kernel: tell(f"{k}: {s}"))
            return
    existing = [kernel for kernel in pair if states[kernel]]
    if run["foreign"] is None:
        run["foreign"] = find_foreign(chain, existing)
    sources, lines = choose_sources(chain, name, run, existing)
    lines.append(
        f"max_session_hours = min(max_session_hours or {KAGGLE_HOURS}, {hours:.2f})"
    )
    kernel = pair[run["good"] == pair[0]]
    built = chain.built / "kernels" / name
    folder = write_version(built, chain.next(kernel), kernel, sources, lines)
    # First, so that a kill while it pushes does not start a second session.
    note_session(chain, kernel, attached=bool(sources))
    try:
        chain.state["session"]["version"] = push_kernel(folder)
    except Unreadable as reason:
        tell(f"{reason}; looking whether it started")
    except Refused as reason:
        chain.state["session"] = None
        if not re.search("quota|session count", str(reason), re.IGNORECASE):
            raise
        wait_for_turn(chain, str(reason))


def find_foreign(chain: Chain, kernels: list[str]) -> list[str]:
    """Return the identities of the runs in outputs of before the chain, and name them."""
    out, poll = chain.options.out, chain.options.poll
    states = {k: ask_state(k, poll) or "" for k in kernels}
    found = [(k, r) for k in kernels for r in ask_runs(k, out, states[k], poll)]
    for kernel, run in found:
        tell(
            f"{kernel} holds another run, saved at step {run.step}: it is not resumed, "
            "and new versions hide that output, which stays with its version on Kaggle"
        )
    return [run.identity for _, run in found]


def note_session(chain: Chain, kernel: str, attached: bool) -> None:
    """Write down that a session of a kernel runs or is about to; what is `attached` to
    it may be mounted empty."""
    session = {"kernel": kernel, "version": None, "pushed": time.time()}
    chain.state["session"] = session | {"attached": attached}
    chain.save()


def choose_sources(
    chain: Chain, name: str, run: dict[str, Any], existing: list[str]
) -> tuple[list[str], list[str]]:
    """Return the kernels to attach, and the parameters that name the run to start from.

    A name that is not mounted is an error in the notebook, which thus never starts over.
    """
    if holder := run["trial"] or run["good"]:
        return existing, [f"resume = {mounted(holder, run['path'])!r}"]
    for before in SOURCES[name]:
        holder, path = find_before(chain, before, chain.pair(name)[0])
        if holder:
            return [holder], [f"init_from = init_from or {mounted(holder, path)!r}"]
    return [], []


def find_before(chain: Chain, before: str, kernel: str) -> tuple[str, str]:
    """Return the kernel and the path of the run of the stage before, or ""."""
    if run := chain.state["runs"].get(before):
        return run["good"], run["path"]
    first = id_of(kernel.partition("/")[0], before)
    found, poll = [], chain.options.poll
    for other in (first, f"{first}-b"):
        if state := ask_state(other, poll):
            runs = ask_runs(other, chain.options.out, state, poll)
            found += [(r.step, other, r.path) for r in runs if r.stage == before]
    return max(found)[1:] if found else ("", "")


def end_session(chain: Chain, name: str, run: dict[str, Any]) -> None:
    """Wait until the session has ended, and note how far its run has come."""
    session, poll = chain.state["session"], chain.options.poll
    kernel, version = session["kernel"], session["version"] or "?"

    def elapsed() -> float:
        return min(SESSION_HOURS, (time.time() - session["pushed"]) / 3600)

    def show(state: str) -> None:
        hours = chain.state["hours"] + elapsed()
        used = f"{hours:.1f} of {chain.state['limit']:g} h used"
        tell(f"{kernel.partition('/')[2]} version {version}: {state}, {used}")

    if session["version"] is None:
        time.sleep(poll)
        if ask_state(kernel, poll) is None:  # killed before it was pushed
            chain.state["session"] = None
            run["failures"] += 1
            return
    state = wait_until_ended(kernel, poll, show)
    used = elapsed()
    found = pick(run, name, ask_runs(kernel, chain.options.out, state, poll))
    for _ in range(LATE.get(state, 3)):
        if is_further(run, found):
            break
        time.sleep(poll)
        found = pick(run, name, ask_runs(kernel, chain.options.out, state, poll))
    if session["version"] or is_further(run, found):
        chain.state["hours"] += used
    judge(chain, run, state, found)


def pick(run: dict[str, Any], name: str, runs: list[FetchedRun]) -> FetchedRun | None:
    """Return the chain's run among those fetched; failing that the furthest new one."""
    own = [r for r in runs if r.stage == name and r.identity not in run["foreign"]]
    same = [r for r in own if r.identity == run["identity"]]
    return (same or own or [None])[-1]


def is_further(run: dict[str, Any], found: FetchedRun | None) -> bool:
    """Return whether a fetched run is the chain's, and has made progress."""
    if found is None or run["identity"] not in (None, found.identity):
        return False
    return found.step > run["step"] or found.status == "finished"


def judge(
    chain: Chain,
    run: dict[str, Any],
    state: str,
    found: FetchedRun | None,
) -> None:
    """Note what an ended version has brought; raise `Refused` for what a person must see.

    The output of a version that is not COMPLETE is tried once, since Kaggle may have
    lost it; the last good one is in the other kernel.
    """
    session, chain.state["session"] = chain.state["session"], None
    kernel = session["kernel"]
    at = f"the run is {found.status}, saved at step {found.step}" if found else "no run"
    tell(f"{kernel}: {at} in the output")
    other = found and run["identity"] not in (None, found.identity)
    further = is_further(run, found)
    if found and further:
        run |= {"identity": found.identity, "path": found.path, "trial": kernel}
        if state == "COMPLETE" and found.status != "failed":
            run |= {"good": kernel, "trial": None, "step": found.step, "failures": 0}
            run["finished"] = found.status == "finished"
            return
    elif run["trial"]:
        run["trial"] = None
        if not run["good"]:
            tell(f"{kernel}: nothing of the run is left, it starts over")
            run["foreign"].append(run["identity"])
            run |= {"identity": None, "path": None}
    run["failures"] += 1
    log = chain.fetched(kernel)
    if other:
        problem = "trained another run than the chain's; its output is not used"
    elif found and found.status == "failed":
        problem = "ended in an error of its training"
    elif run["failures"] >= (3 if session["attached"] else 2):
        problem = f"ended {state}: {run['failures']} versions without progress"
    else:
        return
    run["failures"] = 0
    raise Refused(
        f"{kernel} {problem}: see its log in {log}; {chain.again} tries again"
    )


def show_end(chain: Chain, name: str, run: dict[str, Any]) -> None:
    """Print a finished run's summary, and how to fetch its weights."""
    root = chain.fetched(run["good"]) / run["path"]
    tell(f"{name} is finished at step {run['step']}")
    if (root / "summary.md").is_file():
        print((root / "summary.md").read_text(encoding="utf-8"))
    print(
        f"All of it: kaggle kernels output {run['good']} -p {chain.options.out / name}"
    )


def show_commands(chain: Chain) -> None:
    """Print the commands of a chain, for `--dry-run`, and write the folders to push."""

    def show(*arguments: str) -> None:
        print("would run:", shlex.join(["kaggle", *arguments]))

    for folder in sorted((chain.built / "datasets").iterdir()):
        if folder.is_dir() and not chain.state["uploaded"]:
            show("datasets", "create", "-p", str(folder))
    for name, run in chain.state["runs"].items():
        kernel = chain.pair(name)[run["good"] == chain.pair(name)[0]]
        built = chain.built / "kernels" / name
        folder = write_version(built, chain.next(kernel), kernel)
        print(f"{name}: sessions of {folder}, until it is finished:")
        show("quota")
        for other in chain.pair(name):
            show("kernels", "status", other)
        show(*push_command(folder))
        show("kernels", "status", kernel)
        show(*output_command(kernel, chain.fetched(kernel)))
    print(
        f"at most {chain.state['limit']:g} h, one session at a time; nothing was contacted"
    )
