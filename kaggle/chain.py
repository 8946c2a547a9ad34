"""The chain: push, wait, fetch and continue until the runs are finished.

Notebooks of Kaggle's take turns, `minimind-pretrain` and `minimind-pretrain-b`. What is
mounted is the output of a notebook's last version, and that of a failed or cancelled one
may be empty; so a new version is never pushed to a notebook that holds the last good
output, or a newer one of such a version, for which there is `minimind-pretrain-c`.
"""

import argparse
import re
import shlex
import time
from functools import partial
from typing import Any

from building import SOURCES, id_of
from chain_state import TURNS, Chain, hold_lock, wait_for_hours, wait_for_turn
from fetching import (
    FetchedRun,
    mounted,
    output_command,
    tell,
    wait_until_ended,
)
from kaggle_command import NotPushed, Refused, Unreadable, is_busy
from pushing import (
    check_command,
    push_command,
    push_datasets,
    push_kernel,
    write_version,
)

from minimind_nb.session import KAGGLE_HOURS

SESSION_HOURS = 12.0  # the longest that Kaggle lets a session be
LOOKS = 5  # for a kernel that may have been pushed
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
        for name, run in chain.state["runs"].items():
            if not run["checked"]:
                check_outputs(chain, name, run)
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


def check_outputs(chain: Chain, name: str, run: dict[str, Any]) -> None:
    """Take over the furthest run that a notebook's kernels hold from before the chain.

    Raises `Refused` without --adopt, since new versions would hide it.
    """
    found: list[tuple[int, str, str, FetchedRun]] = []
    for kernel in chain.kernels(name):
        if state := chain.ask_state(kernel):
            if is_busy(state):
                tell(f"{kernel} is {state} already: waiting for that session")
                show = partial(tell_state, kernel)
                state = wait_until_ended(kernel, chain.options.poll, show)
            runs = chain.ask_runs(kernel, state)
            found += [(r.step, kernel, state, r) for r in runs if r.stage == name]
    run["checked"] = True
    step, kernel, state, furthest = max(found, default=(0, "", "", None))
    if not furthest or not step:
        return
    if not chain.options.adopt:
        raise Refused(
            f"{kernel} has a run at step {step}: --adopt resumes it; to start over, "
            "delete that notebook on Kaggle"
        )
    tell(f"{kernel} has a run at step {step}, which is resumed")
    run |= {"identity": furthest.identity, "path": furthest.path}
    if state == "COMPLETE" and furthest.status != "failed":
        run |= {"good": kernel, "step": step}
    else:
        run |= {"trial": kernel, "trial_step": step}


def tell_state(kernel: str, state: str) -> None:
    """Print the state of a kernel."""
    tell(f"{kernel}: {state}")


def start_session(chain: Chain, name: str, run: dict[str, Any]) -> None:
    """Push the next version, unless a session runs already, which is waited for."""
    hours = wait_for_hours(chain)
    states = {kernel: chain.ask_state(kernel) for kernel in chain.kernels(name)}
    for kernel, state in states.items():
        if is_busy(state):
            tell(f"{kernel} is {state} already: waiting for that session")
            note_session(chain, kernel, attached=False)
            return
    if run["trial"] and run["good"] and not holds(chain, run, run["trial"]):
        run["trial"] = None
    existing = [kernel for kernel in states if states[kernel]]
    sources, lines = choose_sources(chain, name, run, existing)
    lines.append(
        f"max_session_hours = min(max_session_hours or {KAGGLE_HOURS}, {hours:.2f})"
    )
    kernel = chain.free(name)
    built = chain.built / "kernels" / name
    folder = write_version(built, chain.next(kernel), kernel, sources, lines)
    # First, so that a kill while it pushes does not start a second session.
    note_session(chain, kernel, attached=bool(sources))
    session = chain.state["session"]
    try:
        session["version"] = push_kernel(folder)
    except Unreadable as reason:
        session["reason"] = str(reason)
        tell(f"{reason}; looking whether it started")
    except NotPushed as reason:
        chain.state["session"] = None
        said = str(reason).removeprefix(str(folder))
        if not re.search("gpu quota|session count", said, re.IGNORECASE):
            raise
        wait_for_turn(chain, str(reason))


def holds(chain: Chain, run: dict[str, Any], kernel: str) -> bool:
    """Return whether a kernel's last output is still that of a run, or further."""
    state = chain.ask_state(kernel) or ""
    step = run["trial_step" if kernel == run["trial"] else "step"]
    return any(
        found.identity == run["identity"] and found.step >= step
        for found in chain.ask_runs(kernel, state)
    )


def choose_holder(chain: Chain, run: dict[str, Any]) -> str:
    """Return the kernel that holds a run; raises `Refused` if it does no longer."""
    holder = run["trial"] or run["good"]
    if holder and not holds(chain, run, holder):
        step = run["trial_step" if run["trial"] else "step"]
        raise Refused(
            f"{holder} no longer holds the run at step {step}, since another version ran "
            f"there: {chain.again} with --adopt resumes what the notebooks hold now"
        )
    return holder


def note_session(chain: Chain, kernel: str, attached: bool) -> None:
    """Write down that a session of a kernel runs or is about to; what is `attached` to
    it may be mounted empty."""
    session = {"kernel": kernel, "version": None, "pushed": time.time()}
    chain.state["session"] = session | {"attached": attached, "reason": None}
    chain.save()


def choose_sources(
    chain: Chain, name: str, run: dict[str, Any], existing: list[str]
) -> tuple[list[str], list[str]]:
    """Return the kernels to attach, and the parameters that name the run to start from.

    A name that is not mounted is an error in the notebook, which thus never starts over.
    """
    if holder := choose_holder(chain, run):
        return existing, [f"resume = {mounted(holder, run['path'])!r}"]
    for before in SOURCES[name]:
        holder, path = find_before(chain, before, chain.kernels(name)[0])
        if holder:
            return [holder], [f"init_from = init_from or {mounted(holder, path)!r}"]
    return [], []


def find_before(chain: Chain, before: str, kernel: str) -> tuple[str, str]:
    """Return the kernel and the path of the run of the stage before, or ""."""
    if run := chain.state["runs"].get(before):
        return choose_holder(chain, run), run["path"]
    first = id_of(kernel.partition("/")[0], before)
    found = []
    for other in (f"{first}{suffix}" for suffix in TURNS):
        if state := chain.ask_state(other):
            runs = chain.ask_runs(other, state)
            found += [(r.step, other, r.path) for r in runs if r.stage == before]
    return max(found)[1:] if found else ("", "")


def end_session(chain: Chain, name: str, run: dict[str, Any]) -> None:
    """Wait until the session has ended, and note how far its run has come."""
    session, poll = chain.state["session"], chain.options.poll
    kernel, version = session["kernel"], session["version"] or "?"

    def elapsed() -> float:
        hours = (time.time() - session["pushed"]) / 3600
        return min(SESSION_HOURS, max(0.0, hours))

    def show(state: str) -> None:
        hours = chain.state["hours"] + elapsed()
        used = f"{hours:.1f} of {chain.state['limit']:g} h used"
        tell(f"{kernel.partition('/')[2]} version {version}: {state}, {used}")

    if session["version"] is None and not has_started(chain, kernel):
        chain.state["session"] = None
        run["failures"] += 1
        if run["failures"] >= 3:  # noqa: PLR2004
            run["failures"] = 0
            raise Refused(session["reason"] or f"{kernel} was not pushed")
        return
    state = wait_until_ended(kernel, poll, show)
    chain.state["pushed"] = sorted({*chain.state["pushed"], kernel})
    used = elapsed()
    found = pick(run, name, chain.ask_runs(kernel, state))
    for _ in range(LATE.get(state, 3)):
        if is_further(run, found):
            break
        time.sleep(poll)
        found = pick(run, name, chain.ask_runs(kernel, state))
    if session["version"] or is_further(run, found):
        chain.state["hours"] += used
    judge(chain, run, state, found)


def has_started(chain: Chain, kernel: str) -> bool:
    """Return whether a kernel exists after a push of which nothing is known."""
    for _ in range(LOOKS):
        time.sleep(chain.options.poll)
        if chain.ask_state(kernel):
            return True
    return False


def pick(run: dict[str, Any], name: str, runs: list[FetchedRun]) -> FetchedRun | None:
    """Return the chain's run among those fetched; failing that the furthest new one."""
    own = [r for r in runs if r.stage == name]
    same = [r for r in own if r.identity == run["identity"]]
    return (same or own or [None])[-1]


def is_further(run: dict[str, Any], found: FetchedRun | None) -> bool:
    """Return whether a fetched run is the chain's, and has made progress."""
    if found is None or run["identity"] not in (None, found.identity):
        return False
    return (found.step, found.status == "finished") > (run["step"], False)


def judge(
    chain: Chain,
    run: dict[str, Any],
    state: str,
    found: FetchedRun | None,
) -> None:
    """Note what an ended version has brought; raise `Refused` for what a person must see.

    The output of a version that is not COMPLETE is tried once if there is a good one in
    another kernel, since Kaggle may have lost it.
    """
    session, chain.state["session"] = chain.state["session"], None
    kernel = session["kernel"]
    at = f"the run is {found.status}, saved at step {found.step}" if found else "no run"
    tell(f"{kernel}: {at} in the output")
    other = found and run["identity"] not in (None, found.identity)
    further = is_further(run, found)
    if found and further:
        run |= {"identity": found.identity, "path": found.path}
        run |= {"trial": kernel, "trial_step": found.step}
        if state == "COMPLETE" and found.status != "failed":
            run |= {"good": kernel, "trial": None, "step": found.step, "failures": 0}
            run["finished"] = found.status == "finished"
            return
    elif run["good"]:
        run["trial"] = None
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
    for name in chain.state["runs"]:
        kernel = chain.free(name)
        built = chain.built / "kernels" / name
        folder = write_version(built, chain.next(kernel), kernel)
        print(f"{name}: sessions of {folder}, until it is finished:")
        show("quota")
        for other in chain.kernels(name):
            show("kernels", "status", other)
        show(*push_command(folder))
        show("kernels", "status", kernel)
        show(*output_command(kernel, chain.fetched(kernel)))
    print(
        f"at most {chain.state['limit']:g} h, one session at a time; nothing was contacted"
    )
