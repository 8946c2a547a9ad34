"""Random inputs for every reader, and what becomes of each of them.

    make fuzz
    PYTHONPATH=tests python benchmarks/fuzz.py --cases 100
    PYTHONPATH=tests python benchmarks/fuzz.py --only weights:17

A case is drawn from the seed, its reader and its number, so `--only` repeats it. Cases
run in forked batches, with limits of time and memory. Damage that nothing can show, in
files without a checksum, counts as "unsealed".
"""

import argparse
import faulthandler
import json
import linecache
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fuzz_inputs import READERS, Finding, Seeds, make_seeds, start_nothing

from minimind_nb.storage.verified import DamagedFolder

WRONG = ("silent acceptance", "hang", "crash", "loss")
OUTCOMES = ("fine", "refused", "raw error", "unsealed", *WRONG)
PLAIN = (ValueError, OSError, RuntimeError, TypeError, DamagedFolder)
TIMERS = {signal.SIGALRM: signal.ITIMER_REAL, signal.SIGPROF: signal.ITIMER_PROF}
BATCH, SHOWN = 50, 300
CPU_SECONDS, SECONDS, MOST_BYTES = 10.0, 60.0, 3 << 30
MOST_CHARACTERS = 2000  # of a line of a message


class Result(NamedTuple):
    """What became of a case; `cause` is the same for those that fail alike."""

    case: int
    outcome: str
    cause: str = ""
    detail: str = ""
    input: str = ""


def main(arguments: list[str] | None = None) -> None:
    """Run the campaign, or one case of it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, help="of each reader, instead of all")
    parser.add_argument("--only", help="READER, or READER:CASE to see one case")
    given = parser.parse_args(arguments)
    name, _, case = (given.only or "").partition(":")
    torch.set_num_threads(1)  # threads would not survive a fork
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), given.seed)
        if case:
            return campaign.show(name, int(case))
        readers = [name] if name else [*READERS]
        found = {each: campaign.run(each, given.cases) for each in readers}
    print("\n".join(tabulate(found, given.seed)))
    wrong = sum(one.outcome in WRONG for results in found.values() for one in results)
    if wrong:
        sys.exit(f"{wrong} cases were not survived")
    return None


class Campaign:
    """Cases of all readers; `folder` is for what they are made of, and their files."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._seed, self._folder = seed, folder
        self._stack = folder / "stack"
        self._seeds: Seeds = make_seeds(folder / "seeds")

    def run(self, reader: str, cases: int | None = None) -> list[Result]:
        """Run so many cases of a reader, or all, in batches."""
        began, results = time.monotonic(), list[Result]()
        cases = cases or READERS[reader].cases
        while (done := len(results)) < cases:
            results += self._run_batch(reader, range(done, min(done + BATCH, cases)))
            if len(results) % (5 * BATCH) == 0 or len(results) == cases:
                seconds = time.monotonic() - began
                print(f"{reader}: {len(results)} cases, {seconds:.0f} s", flush=True)
        return results

    def show(self, reader: str, case: int) -> None:
        """Print a case, and what it raises in this process."""
        drawn = self._draw(reader, case)
        print(f"{show(drawn):.5000}")
        prepare_process()
        try:
            self._feed(reader, drawn)
        except BaseException as error:
            traceback.print_exc()
            print(classify(error))

    def _run_batch(self, reader: str, cases: Iterable[int]) -> list[Result]:
        """Run cases in a forked process, up to the one that ends it."""
        read, write = os.pipe()
        if not (child := os.fork()):
            try:
                os.close(read)
                self._answer(reader, cases, write)
            finally:
                os._exit(0)
        os.close(write)
        with open(read, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        _, status = os.waitpid(child, 0)
        results = [Result(*row) for row in rows[1::2]]
        if len(rows) % 2:  # the last case began only
            (case,) = rows[-1]
            outcome = "hang" if os.WTERMSIG(status) in TIMERS else "crash"
            frames = re.findall(r'"\S*?([^/"]+)", line \d+ in', self._stack.read_text())
            text = show(self._draw(reader, case))
            results.append(Result(case, outcome, " < ".join(frames[:4]), "", text))
        return results

    def _answer(self, reader: str, cases: Iterable[int], write: int) -> None:
        """Run cases; say of each that it begins, and then what became of it."""
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        os.dup2(0, 1)
        os.dup2(0, 2)
        stack = self._stack.open("w")
        for number in TIMERS:
            faulthandler.register(number, stack, all_threads=False, chain=True)
        prepare_process()
        for case in cases:
            os.write(write, b"[%d]\n" % case)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
            result, drawn = ("fine",), self._draw(reader, case)
            try:
                self._feed(reader, drawn)
            except BaseException as error:
                result = (*classify(error), show(drawn))
            for timer in TIMERS.values():
                signal.setitimer(timer, 0)
            os.write(write, f"{json.dumps([case, *result])}\n".encode())

    def _draw(self, reader: str, case: int) -> Any:
        draw = random.Random(f"{self._seed}:{reader}:{case}")
        return READERS[reader].draw(draw, self._seeds)

    def _feed(self, reader: str, drawn: Any) -> None:
        """Feed a case, in an empty folder that is deep enough for "../.."."""
        place = self._folder / "a" / "b" / "c"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        os.chdir(place)
        os.environ["HOME"] = str(self._folder)
        READERS[reader].feed(drawn, place, self._seeds)


def prepare_process() -> None:
    """Limit the memory of this process, and what it may start."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MOST_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    start_nothing()


def show(value: object) -> str:
    try:
        return repr(value)
    except RecursionError:
        return "(nested too deep to be shown)"


def classify(error: BaseException) -> tuple[str, str, str]:
    """Return the outcome that an exception stands for, its cause, and its text.

    A refusal is plain if the package raised it by its own `raise`, or the system named
    the file, in lines that can be read.
    """
    text = str(error)
    if isinstance(error, ExceptionGroup):  # the worst of several
        found = map(classify, error.exceptions)
        return max(found, key=lambda one: OUTCOMES.index(one[0]))
    if isinstance(error, Finding):
        return error.outcome, text.partition(":")[0], text
    if isinstance(error, MemoryError):
        return "crash", "MemoryError", text
    frames = traceback.extract_tb(error.__traceback__)
    own = [
        f
        for f in frames
        if "/minimind_nb/" in f.filename and "/site-" not in f.filename
    ]
    line = linecache.getline(frames[-1].filename, frames[-1].lineno or 0)
    raised = frames[-1] in own and line.strip().startswith("raise")
    raised |= isinstance(error, OSError) and error.filename is not None
    readable = 0 < max(map(len, text.splitlines()), default=0) <= MOST_CHARACTERS
    if raised and readable and isinstance(error, PLAIN):
        return "refused", "", ""
    place = f"{Path(own[-1].filename).stem}.{own[-1].name}" if own else "outside"
    words = re.sub(r"'.*?'|\".*?\"|0x\w+|\d+", "…", text.partition("\n")[0])
    return "raw error", f"{type(error).__name__} in {place}: {words:.60}", text


def tabulate(found: dict[str, list[Result]], seed: int) -> Iterator[str]:
    """Yield the table of outcomes, and the shortest example of each cause."""
    yield f"| reader | cases | {' | '.join(OUTCOMES)} |"
    yield "| --- |" + " ---: |" * (len(OUTCOMES) + 1)
    for reader, results in found.items():
        counts = Counter(one.outcome for one in results)
        cells = (str(counts[outcome]) for outcome in OUTCOMES)
        yield f"| {reader} | {len(results)} | {' | '.join(cells)} |"
    for reader, results in found.items():
        alike: defaultdict[tuple[str, str], list[Result]] = defaultdict(list)
        for one in results:
            if one.outcome not in ("fine", "refused"):
                alike[one.outcome, one.cause].append(one)
        for (outcome, cause), those in sorted(alike.items()):
            best = min(those, key=lambda one: len(one.input))
            yield f"\n{reader}, {outcome}, {len(those)} times: {cause}"
            yield f"    {best.detail!r:.{SHOWN}}\n    {best.input:.{SHOWN}}"
            yield f"    --seed {seed} --only {reader}:{best.case}"


if __name__ == "__main__":
    main()
