"""Make the small runs of earlier states in tests/fixtures/runs, by those states' code.

    python tools/make_run_fixtures.py [COMMIT …]

For each commit its package is read from git and trains a tiny model for a few steps,
until it is interrupted. That is the fixture. A copy of it is resumed by the same code,
and the losses of the rest are written down in `expected.json`: today's code must resume
the fixture with them (`tests/training/test_earlier_states.py`).

Nothing in a fixture names this machine: all paths are relative to its folder.
"""

import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "runs"

# Which commit made which runs, and what was particular about them.
STATES = {
    # Before the package was rebuilt: `accumulation_asked`, a run's id, DPO's reference
    # kept as log-probabilities in `reference/`, `rank0.json`.
    "cb07cc1": ("pretrain", "sft", "dpo"),
    # Before runs had an id; the data's hash was the key of its cache.
    "fdf8e14": ("pretrain", "sft", "dpo"),
    # Only pretraining: no initial weights, no samples, no trackers in config.json.
    "a2788de": ("pretrain",),
}
BOOT = "00000000-0000-4000-8000-000000000000"
INTERRUPTED = 5  # the run stops at the end of the step after it

SHARED: dict[str, Any] = {
    "out_dir": "runs",
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_seq_len": 64,
    "batch_size": 2,
    "max_steps": 10,
    "eval_interval": 4,
    "log_interval": 1,
    "val_fraction": 0.1,
    "device": "cpu",
    "dtype": "float32",
    "num_processes": 1,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "pretrain": {
        **SHARED,
        "stage": "pretrain",
        "data_path": "corpus.jsonl",
        "tokenizer": "tokenizer",
        "epochs": 10,
        "learning_rate": 1e-2,
        "warmup_iters": 1,  # a warm-up is a tenth of the steps at most since 600b300
    },
    # Their weights and their tokenizer are those of the run before, found in out_dir.
    "sft": {**SHARED, "stage": "sft", "data_path": "chats.jsonl"},
    "dpo": {**SHARED, "stage": "dpo", "data_path": "pairs.jsonl", "epochs": 2},
}


def main() -> None:
    """Make the fixtures of the named commits, or of all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("commits", nargs="*", default=[*STATES])
    parser.add_argument("--run", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.run:
        train_once(**json.loads(given.run))
        return
    for commit in given.commits:
        make_state(commit)


def make_state(commit: str) -> None:
    """Make the runs of one commit, and write down how they continue."""
    target = FIXTURES / commit
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    write_data(target)
    with tempfile.TemporaryDirectory() as scratch:
        archive = subprocess.run(
            ["git", "archive", commit, "minimind_nb"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        ).stdout
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(scratch, filter="data")
        for stage in STATES[commit]:
            run_in(target, scratch, SETTINGS[stage], INTERRUPTED)
        expected = {}
        for stage in STATES[commit]:
            copy = Path(scratch) / stage
            shutil.copytree(target, copy)
            run_in(copy, scratch, SETTINGS[stage], None)
            expected[stage] = describe(copy, stage)
    tidy(target / "runs")
    text = json.dumps(expected, indent=1)
    (target / "expected.json").write_text(f"{text}\n", encoding="utf-8")


def tidy(runs: Path) -> None:
    """Leave out what is large or names this machine: caches, pictures, locks, its boot."""
    shutil.rmtree(runs / "cache", ignore_errors=True)
    for pattern in ("loss.png", "lock", ".*.lock"):
        for file in [*runs.rglob(pattern)]:
            file.unlink()
    for file in runs.rglob("rank*.json"):
        text = file.read_text(encoding="utf-8")
        text = re.sub(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", BOOT, text)
        file.write_text(text, encoding="utf-8")


def write_data(folder: Path) -> None:
    """Texts, conversations and pairs of a few words each, and a tokenizer of them."""
    from minimind_nb import train_tokenizer

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        lines = (json.dumps(row, ensure_ascii=False) for row in rows)
        (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")

    def talk(number: int, answer: str) -> list[dict[str, str]]:
        question = {"role": "user", "content": f"What is {number} and {number}?"}
        return [question, {"role": "assistant", "content": answer}]

    def text(number: int) -> str:
        count = " ".join(str(number * k % 37) for k in range(4 + number % 9))
        return f"第 {number} 篇 document counts {count}"

    write("corpus.jsonl", [{"text": text(n)} for n in range(60)])
    chats = [{"conversations": talk(n, f"It is {2 * n}.")} for n in range(60)]
    write("chats.jsonl", chats)
    pairs = [
        {"chosen": talk(n, f"It is {2 * n}."), "rejected": talk(n, "I say nothing.")}
        for n in range(40)
    ]
    write("pairs.jsonl", pairs)
    train_tokenizer(folder / "corpus.jsonl", folder / "tokenizer", vocab_size=300)


def run_in(
    folder: Path, code: str, settings: dict[str, Any], stop_after: int | None
) -> None:
    """Train in a process of its own, with `folder` as its working folder."""
    call = json.dumps({"settings": settings, "stop_after": stop_after})
    environment = {**os.environ, "PYTHONPATH": code, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, os.fspath(Path(__file__).resolve()), "--run", call]
    subprocess.run(command, cwd=folder, env=environment, check=True)


def train_once(settings: dict[str, Any], stop_after: int | None) -> None:
    """Train with whichever state's code is imported; stop at the step after a given one.

    The functions that are replaced have these names in every state of `STATES`.
    """
    import multiprocessing

    from minimind_nb import TrainConfig, train
    from minimind_nb.launch import processes  # pyright: ignore
    from minimind_nb.training import launching, loop

    processes._SPAWN = multiprocessing.get_context("fork")  # which keeps the change
    launching.choose_threads = lambda *_: 1  # OpenMP survives no fork with more
    real = loop.count_step  # pyright: ignore

    def count_step(trainer: Any, *given: Any) -> Any:
        answer = real(trainer, *given)
        if trainer.progress.step == stop_after:
            trainer.stop.reason = "interrupted"
        return answer

    loop.count_step = count_step  # pyright: ignore
    run = train(TrainConfig(**settings), view=False)
    wanted = "interrupted" if stop_after else "finished"
    assert run.status == wanted, run.status


def describe(folder: Path, stage: str) -> dict[str, Any]:
    """The settings, where the fixture stands, and the losses of the steps after it."""
    file = folder / "runs" / f"{stage}_{SHARED['hidden_size']}" / "metrics.jsonl"
    rows = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    at = INTERRUPTED + 1
    found: dict[str, Any] = {"settings": SETTINGS[stage], "step": at}
    for kind in ("train", "eval"):
        found[kind] = [
            [row["step"], row["loss"]]
            for row in rows
            if row["kind"] == kind and row["step"] > at
        ]
    return found


if __name__ == "__main__":
    main()
