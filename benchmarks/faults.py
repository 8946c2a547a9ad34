"""What runs survive: the rows of faults, random kills, flipped bits; into faults.md.

    make faults
    PYTHONPATH=tests python benchmarks/faults.py --rows 0 --single 100 --double 20

Kills: rank, step and point (or any moment) are drawn from the seed. After each there
must be a checkpoint that verifies, if one was due, and the run that goes on must end
with the weights and moments of the run that nothing befell.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import psutil
import pytest
import torch._dynamo  # what every forked rank would otherwise import by itself
from support.injection import POINTS, SAVING, VALIDATING, Fault, inject
from support.rows import PLACES, ROWS
from support.runs import state_hashes

from minimind_nb import TrainConfig, TrainingFailed, load, train
from minimind_nb.data import token_cache
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.launch import spawn
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.launch.spawn import Job
from minimind_nb.storage import verified
from minimind_nb.storage.run_folder import RunFolder, step_of
from minimind_nb.training import api, launching

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY, VALIDATE_EVERY = 12, 4, 6
FLIPS = 200
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
RUN = {
    **SHAPE,
    **{"max_seq_len": 32, "batch_size": 2, "accumulation_steps": 1, "epochs": 50},
    **{"max_steps": STEPS, "save_interval": SAVE_EVERY},
    **{"eval_interval": VALIDATE_EVERY, "eval_tokens": 300, "sample_tokens": 2},
    **{"log_interval": 1, "dropout": 0.1},
    **{"device": "cpu", "dtype": "float32", "seed": 7, "hang_timeout_seconds": 60.0},
}
Lines = list[str]


def main() -> None:
    """Do what was asked for, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__)
    option = parser.add_argument
    option("--rows", type=int, default=1, help="0 leaves the rows out")
    option("--single", type=int, default=800, help="kills of runs of one process")
    option("--double", type=int, default=200, help="kills of runs of two ranks")
    option("--seed", type=int, default=0)
    option("--out", type=Path, default=ROOT / "faults.md")
    given = parser.parse_args()
    lines = ["# Faults survived", ""]
    lines += [f"`python benchmarks/faults.py --seed {given.seed}`", ""]
    if given.rows:
        lines += describe_rows()
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), given.seed)
        for ranks, kills in ((1, given.single), (2, given.double)):
            if kills:
                lines += campaign.kill(ranks, kills)
        lines += flip_bits(Path(folder))
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{given.out.read_text(encoding='utf-8')}\n({given.out})")
    if any("NOT" in line for line in lines):
        sys.exit("not everything was survived")


def describe_rows() -> Lines:
    """Run the tests that show a row, and count."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "fault", "tests"]
        began = time.monotonic()
        subprocess.run(
            [*command, f"--junitxml={report}", "-o", "junit_family=xunit1"],
            cwd=ROOT,
            check=False,
        )
        seconds = time.monotonic() - began
        cases = ElementTree.parse(report).iter("testcase")
        return tabulate_rows([*cases], seconds)


def count_left() -> int:
    """Processes of this machine that work in a folder of pytest's after it ended."""
    left = 0
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            left += any("/pytest-" in file.path for file in process.open_files())
    return left


def tabulate_rows(cases: list[ElementTree.Element], seconds: float) -> Lines:
    """Rows survived, by the place where they are shown, and how long what took."""
    outcomes: dict[str, Counter[str]] = {name: Counter() for name in ROWS}
    took: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        tags = {part.tag for part in case}
        outcome = next((t for t in ("failure", "error", "skipped") if t in tags), "")
        for found in case.iter("property"):
            name, value = found.get("name", ""), found.get("value", "")
            if name == "fault":
                outcomes[value][outcome or "passed"] += 1
            else:
                took[name].append(float(value))
    lines = ["## Rows", ""]
    if left := count_left():
        lines += [f"{left} processes were NOT ended.", ""]
    survived = {name for name, found in outcomes.items() if {*found} == {"passed"}}
    places = [
        f"{places[0]} {len(survived & {*names})} of {len(names)} ({places[1]})"
        for places in PLACES.items()
        if (names := [name for name, (place, _) in ROWS.items() if place == places[0]])
    ]
    lines += [
        f"{len(survived)} of {len(ROWS)} rows survived, by {len(cases)} tests in "
        f"{seconds / 60:.1f} min: {', '.join(places)}. Processes left: {left}.",
        "",
        "| row | place | fault | tests |",
        "| --- | --- | --- | --- |",
    ]
    for name, (place, words) in ROWS.items():
        found = ", ".join(f"{n} {what}" for what, n in sorted(outcomes[name].items()))
        found += " NOT survived" * (name not in survived)
        lines += [f"| {name} | {place} | {words} | {found or 'none'} |"]
    lines += [""]
    for name, values in sorted(took.items()):
        words = name.removesuffix("_seconds").replace("_", " ")
        middle, worst = statistics.median(values), max(values)
        lines += [f"- {words}: median {middle:.2f} s, worst {worst:.2f} s"]
    return [*lines, ""]


@dataclass(frozen=True)
class Kill:
    """SIGKILL for a rank: at a point after a step, or `delay` seconds into the run."""

    rank: int
    point: str = ""
    step: int = 0
    delay: float = 0.0


class Campaign:
    """Kills at random, over runs that differ in nothing but their name."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._draw = random.Random(seed)
        self._data = folder / "corpus.jsonl"
        with self._data.open("w", encoding="utf-8") as out:
            for number in range(80):
                text = " ".join(str(number * k % 97) for k in range(number % 25 + 8))
                out.write(json.dumps({"text": f"第 {number} 篇 {text}"}) + "\n")
        # The launcher of always; forked ranks are spared the imports of spawned ones.
        spawn._SPAWN = multiprocessing.get_context("fork")
        spawn.POLL_SECONDS = 0.02
        assert torch._dynamo
        launching.choose_threads = lambda *_: 1  # pyright: ignore[reportAttributeAccessIssue]
        api.save_chart = lambda _: None  # pyright: ignore[reportAttributeAccessIssue]

    def kill(self, ranks: int, kills: int) -> Lines:
        """Kill so many runs, each once, and see what becomes of them."""
        began = time.monotonic()
        straight, _ = self._train(f"straight_{ranks}", ranks)
        duration = time.monotonic() - began
        expected = state_hashes(straight)
        lost: list[int] = []
        wrong: list[str] = []
        seconds: list[float] = []
        orphans = missed = 0
        while len(seconds) < kills:
            kill, name = self._choose(ranks, duration), f"{ranks}_{len(seconds)}"
            folder, told = self._train(name, ranks, kill)
            if told is None:  # the run was over before its moment came
                missed += 1
            else:
                records = [RankRecord.read(folder.record_file(r)) for r in range(ranks)]
                reached = max((record.step for record in records if record), default=0)
                found = folder.newest_good_checkpoint()
                kept = step_of(found) if found else 0
                seconds.append(told)
                lost.append(reached - kept)
                orphans += sum(Path(f"/proc/{r.pid}").exists() for r in records if r)
                self._train(name, ranks)
                due = SAVE_EVERY * (reached // SAVE_EVERY)
                same = state_hashes(folder) == expected
                # The save of the step just made may be the very one that was killed.
                if not same or kept < due - SAVE_EVERY * (reached == due):
                    wrong.append(f"{len(seconds)}: {kill}")
                if len(seconds) % 20 == 0:
                    print(f"{len(seconds)} kills, {len(wrong)} wrong", flush=True)
            shutil.rmtree(folder.root)
        bound = f"{1 - 0.05 ** (1 / kills):.2%}" if not wrong else "more"
        return [
            f"## Kills of runs of {ranks} forked process{'es' * (ranks > 1)}",
            "",
            f"{kills - len(wrong)} of {kills} survived (95 % bound on the share that is "
            f"not: {bound}), {(time.monotonic() - began) / 60:.1f} min; {missed} more "
            f"runs were over before their moment came. Steps lost: mean "
            f"{statistics.mean(lost):.2f}, most {max(lost)}, with a save every "
            f"{SAVE_EVERY}. From the kill to the exception: median "
            f"{statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s. "
            f"Processes left: {orphans}.",
            *(f"- NOT survived: {text}" for text in wrong),
            *(["- processes were NOT ended"] if orphans else []),
            "",
        ]

    def _choose(self, ranks: int, duration: float) -> Kill:
        """A rank and a named point of a step of its, or any moment."""
        rank, step = self._draw.randrange(ranks), self._draw.randrange(STEPS)
        if self._draw.random() < 1 / 4:
            return Kill(rank, delay=self._draw.uniform(0.0, duration))
        point = self._draw.choice([p for p in POINTS if p != "reference"])
        if point in SAVING:  # which rank 0 does
            rank, step = 0, SAVE_EVERY * self._draw.randint(1, STEPS // SAVE_EVERY)
        elif point in VALIDATING:
            step = VALIDATE_EVERY * self._draw.randint(0, STEPS // VALIDATE_EVERY)
        elif point == "exit":
            step = STEPS
        return Kill(rank, point, step)

    def _train(
        self, name: str, ranks: int, kill: Kill | None = None
    ) -> tuple[RunFolder, float | None]:
        """The run, and the seconds from the kill to the exception if it was met."""
        out = self._folder / "out"
        settings = {**RUN, "num_processes": ranks, "run_name": name}
        cfg = TrainConfig(**settings, data_path=str(self._data), out_dir=str(out))
        folder = RunFolder(out / name)
        marker = self._folder / f"marker_{name}"
        marker.unlink(missing_ok=True)
        started = time.monotonic()

        real = launching.run_processes

        def kill_in_time(job: Job, on_poll: Callable[[], None]) -> str:
            def look() -> None:
                on_poll()
                due = kill and time.monotonic() - started > kill.delay
                if not kill or not due or marker.exists():
                    return
                record = RankRecord.read(folder.record_file(kill.rank))
                if record and record.status == "running":
                    os.kill(record.pid, signal.SIGKILL)
                    marker.write_text(json.dumps(time.time()))

            return real(job, look)

        with pytest.MonkeyPatch.context() as patch:
            if kill and kill.point:
                fault = Fault(kill.point, "kill", str(marker), kill.rank, kill.step)
                inject(patch, fault)
            elif kill:
                patch.setattr(launching, "run_processes", kill_in_time)
            try:
                assert train(cfg, view=False).status == "finished"
            except TrainingFailed:
                return folder, time.time() - json.loads(marker.read_text())
        return folder, None


def flip_bits(folder: Path) -> Lines:
    """Flip bits in, and cut, every file of a checkpoint and of a token cache."""
    lines = ["## Flipped bits and cut files", ""]
    for what, found in (
        ("checkpoint", make_checkpoint(folder)),
        ("token cache", make_cache(folder)),
    ):
        rows = [*damage_each(found)]
        began = time.perf_counter()
        verified.verify(found)
        verifying = time.perf_counter() - began
        flips, cuts = sum(row[1] for row in rows), sum(row[2] for row in rows)
        lines += [
            f"- {what}, {len(rows)} files: {flips} of {FLIPS * len(rows)} flipped bits "
            f"and {cuts} of {4 * len(rows)} cuts found; verifying takes "
            f"{verifying * 1e3:.1f} ms"
            + ("; NOT all" * (flips + cuts < (FLIPS + 4) * len(rows))),
        ]
    return [*lines, ""]


def damage_each(folder: Path) -> Iterator[tuple[str, int, int]]:
    """Of each file: its name, how many flips and how many cuts were found."""
    draw = random.Random(0)
    for file in sorted(folder.iterdir()):
        intact = file.read_bytes()
        flips = cuts = 0
        for _ in range(FLIPS):
            flipped = bytearray(intact)
            flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
            file.write_bytes(flipped)
            flips += is_damaged(folder)
        for kept in (0, 1, len(intact) // 2, len(intact) - 1):
            file.write_bytes(intact[:kept])
            cuts += is_damaged(folder)
        file.write_bytes(intact)
        yield file.name, flips, cuts


def is_damaged(folder: Path) -> bool:
    """Whether verification says so."""
    try:
        verified.verify(folder)
    except verified.DamagedFolder:
        return True
    return False


def make_checkpoint(folder: Path) -> Path:
    """The last checkpoint of a small run that `load` opens."""
    data = folder / "corpus.jsonl"
    settings: dict[str, Any] = {**RUN, "num_processes": 1, "run_name": "whole"}
    cfg = TrainConfig(**settings, data_path=str(data), out_dir=str(folder / "out"))
    run = train(cfg, view=False)
    load(run.folder)
    found = RunFolder(Path(run.folder)).newest_good_checkpoint()
    assert found
    return found


def make_cache(folder: Path) -> Path:
    """A token cache of conversations, which has every kind of file."""
    file = folder / "chats.jsonl"
    draw = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as out:
        for number in draw.integers(0, 999, 40).tolist():
            turns = ({"role": "user", "content": f"{number}?"},)
            turns += ({"role": "assistant", "content": f"It is {number}."},)
            out.write(json.dumps({"conversations": turns}) + "\n")
    source = token_cache.Source(str(file), "sft", read_tokenizer())
    return token_cache.open_cache(source, folder / "cache", 1).folder


if __name__ == "__main__":
    main()
