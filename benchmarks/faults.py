"""What runs survive: the rows of faults, random kills, flipped bits; into faults.md.

    make faults
    PYTHONPATH=tests python benchmarks/faults.py --rows 0 --single 100 --double 20

Kills: rank, step and point (or any moment) are drawn from the seed. After each there
must be a checkpoint that verifies, if one was due, and the run that goes on must end
with the weights and moments of the run that nothing befell.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import torch._dynamo  # what every forked rank would otherwise import by itself
from support.injection import POINTS, Fault, with_faults
from support.runs import state_hashes

from minimind_nb import TrainConfig, TrainingFailed, load, train
from minimind_nb.data import shards
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.launch import processes, verdict
from minimind_nb.launch.processes import run_processes
from minimind_nb.storage import verified
from minimind_nb.storage.runs import RunFolder
from minimind_nb.training import api

ROOT = Path(__file__).resolve().parents[1]
STEPS, SAVE_EVERY = 12, 4
FLIPS = 200
SHAPE = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
RUN = {
    **SHAPE,
    **{"max_seq_len": 32, "batch_size": 2, "accumulation_steps": 1, "epochs": 50},
    **{"max_steps": STEPS, "save_interval": SAVE_EVERY, "eval_interval": 6},
    **{"log_interval": 1, "eval_tokens": 300, "sample_tokens": 0, "dropout": 0.1},
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


def tabulate_rows(cases: list[ElementTree.Element], seconds: float) -> Lines:
    """Rows survived, and how long what took."""
    tests: dict[str, list[str]] = defaultdict(list)
    took: dict[str, list[float]] = defaultdict(list)
    for case in cases:
        outcome = next((c.tag for c in case if c.tag != "properties"), "passed")
        for found in case.iter("property"):
            name, value = found.get("name", ""), found.get("value", "")
            if name == "fault":
                tests[value].append("passed" if outcome.startswith("sys") else outcome)
            else:
                took[name].append(float(value))
    survived = [name for name, outcomes in tests.items() if {*outcomes} == {"passed"}]
    lost = sorted(tests.keys() - {*survived})
    lines = [
        "## Rows",
        "",
        f"{len(survived)} of {len(tests)} rows survived, by "
        f"{sum(map(len, tests.values()))} tests in {seconds / 60:.1f} min."
        + (f" Not: {', '.join(lost)}." if lost else ""),
        "",
        "| row | tests |",
        "| --- | --- |",
        *(f"| {name} | {', '.join(sorted(tests[name]))} |" for name in sorted(tests)),
        "",
    ]
    for name, values in sorted(took.items()):
        words = name.removesuffix("_seconds").replace("_", " ")
        middle, worst = statistics.median(values), max(values)
        lines += [f"- {words}: median {middle:.2f} s, worst {worst:.2f} s"]
    return [*lines, ""]


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
        processes._SPAWN = multiprocessing.get_context("fork")
        processes.POLL_SECONDS = 0.02
        assert torch._dynamo
        api.choose_threads = lambda *_: 1  # pyright: ignore[reportAttributeAccessIssue]
        api.save_chart = lambda _: None  # pyright: ignore[reportAttributeAccessIssue]

    def kill(self, ranks: int, kills: int) -> Lines:
        """Kill so many runs, each once, and see what becomes of them."""
        straight = self._train(f"straight_{ranks}", ranks, None, None)
        expected = state_hashes(straight)
        lost, wrong, orphans, seconds = [], [], 0, []
        began = time.monotonic()
        for number in range(kills):
            fault, delay = self._choose(ranks, number)
            name = f"run_{ranks}_{number}"
            folder = self._train(name, ranks, fault, delay)
            reached = self._step(folder, ranks)
            found = folder.newest_good_checkpoint()
            kept = found.step if found else 0
            seconds.append(self._told)
            orphans += self._count_living(folder, ranks)
            lost.append(reached - kept)
            self._train(name, ranks, None, None)
            due = SAVE_EVERY * (reached // SAVE_EVERY)
            same = state_hashes(folder) == expected
            # The save of the step just made may be the very one that was killed.
            if not same or kept < due - SAVE_EVERY * (reached == due):
                wrong.append(f"{number}: {fault or delay}")
            subprocess.run(["rm", "-rf", folder.root], check=True)
            if number % 20 == 19:
                print(f"{number + 1} of {kills} kills, {len(wrong)} wrong", flush=True)
        survived = kills - len(wrong)
        bound = 1 - 0.05 ** (1 / kills) if not wrong else math.nan
        minutes = (time.monotonic() - began) / 60
        return [
            f"## Kills of runs of {ranks} process{'es' * (ranks > 1)}",
            "",
            f"{survived} of {kills} survived (95 % bound on the share that is not: "
            f"{bound:.2%}), {minutes:.1f} min. Steps lost: mean "
            f"{statistics.mean(lost):.2f}, most {max(lost)}, with a save every "
            f"{SAVE_EVERY}. From the kill to the exception: median "
            f"{statistics.median(seconds):.2f} s, worst {max(seconds):.2f} s. "
            f"Processes left: {orphans}.",
            *(f"- not survived: {text}" for text in wrong),
            "",
        ]

    def _choose(self, ranks: int, number: int) -> tuple[Fault | None, float | None]:
        """A named point of a rank, or any moment."""
        rank, step = self._draw.randrange(ranks), self._draw.randrange(STEPS)
        if self._draw.random() < 1 / 4:
            return None, self._draw.uniform(0.0, self._duration)
        points = list(POINTS)
        point = self._draw.choice(points)
        if point in points[4:12]:  # of a save, which rank 0 makes
            rank, step = 0, SAVE_EVERY * self._draw.randint(1, STEPS // SAVE_EVERY)
        if point == "after_step":
            step += 1
        if point == "exit":
            step = STEPS
        marker = str(self._folder / f"marker_{ranks}_{number}")
        return Fault(point, "kill", marker, rank, step), None

    def _train(
        self, name: str, ranks: int, fault: Fault | None, delay: float | None
    ) -> RunFolder:
        out = self._folder / "out"
        settings = {**RUN, "num_processes": ranks, "run_name": name}
        cfg = TrainConfig(**settings, data_path=str(self._data), out_dir=str(out))
        folder = RunFolder(out / name)
        killed: list[float] = []
        started = time.monotonic()

        def kill_in_time(_: object) -> None:
            record = verdict.RankRecord.read(folder.record_file(self._draw_rank(ranks)))
            if (
                delay is not None
                and not killed
                and record
                and record.status == "running"
            ):
                if time.monotonic() - started > delay:
                    killed.append(time.time())
                    os.kill(record.pid, signal.SIGKILL)

        real = run_processes
        with pytest.MonkeyPatch.context() as patch:
            if fault:
                patch.setattr(
                    api,
                    "run_processes",
                    lambda job, on_poll: real(with_faults(job, fault), on_poll),
                )
            try:
                run = train(cfg, view=kill_in_time)
                self._told = 0.0
                if fault is None and delay is None:
                    self._duration = time.monotonic() - started
                    assert run.status == "finished", run.status
            except TrainingFailed:
                at = killed[0] if killed else float(Path(fault.marker).read_text())  # pyright: ignore[reportOptionalMemberAccess]
                self._told = time.time() - at
        return folder

    def _draw_rank(self, ranks: int) -> int:
        return ranks - 1

    def _step(self, folder: RunFolder, ranks: int) -> int:
        records = [verdict.RankRecord.read(folder.record_file(r)) for r in range(ranks)]
        return max((record.step for record in records if record), default=0)

    def _count_living(self, folder: RunFolder, ranks: int) -> int:
        records = [verdict.RankRecord.read(folder.record_file(r)) for r in range(ranks)]
        return sum(Path(f"/proc/{r.pid}").exists() for r in records if r)


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
            f"{verifying * 1e3:.1f} ms",
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
    return found.folder


def make_cache(folder: Path) -> Path:
    """A token cache of conversations, which has every kind of file."""
    file = folder / "chats.jsonl"
    draw = np.random.default_rng(0)
    with file.open("w", encoding="utf-8") as out:
        for number in draw.integers(0, 999, 40).tolist():
            turns = ({"role": "user", "content": f"{number}?"},)
            turns += ({"role": "assistant", "content": f"It is {number}."},)
            out.write(json.dumps({"conversations": turns}) + "\n")
    source = shards.Source(str(file), "sft", read_tokenizer())
    return shards.open_cache(source, folder / "cache", 1).folder


if __name__ == "__main__":
    main()
