"""Tiny corpora, tiny settings, and a run to begin from."""

import itertools
import json
import multiprocessing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch._dynamo  # what each rank would import by itself
from support.runs import Settings

from minimind_nb.launch import spawn
from minimind_nb.training import launching, worker


@pytest.fixture(scope="session")
def corpus_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """70 documents of 20 to 60 tokens."""
    file = tmp_path_factory.mktemp("corpus") / "corpus.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for number in range(70):
            digits = " ".join(str(number * k % 97) for k in range(number % 25 + 5))
            text = f"第 {number} 篇 document says {digits}"
            out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
    return file


def write_rows(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    lines = (json.dumps(row, ensure_ascii=False) for row in rows)
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return file


def talk(number: int, last: str) -> list[dict[str, str]]:
    """One or two turns of the user's, the last answered with `last`."""
    said = [f"第 {number} 问?"]
    if number % 3 == 0:
        said += [f"It is {number}.", "Sure?"]
    roles = itertools.cycle(("user", "assistant"))
    texts = zip(roles, [*said, last], strict=False)
    return [{"role": role, "content": text} for role, text in texts]


@pytest.fixture(scope="session")
def chat_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 conversations of 15 to 60 tokens."""
    digits = [" ".join(str(n * k % 97) for k in range(n % 7 + 1)) for n in range(50)]
    rows = ({"conversations": talk(n, text)} for n, text in enumerate(digits))
    return write_rows(tmp_path_factory.mktemp("chats") / "chats.jsonl", rows)


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 pairs: the number of the question is preferred to "no"."""
    rows = (
        {"chosen": talk(n, f"{n} {n}"), "rejected": talk(n, "no" * (n % 3 + 1))}
        for n in range(50)
    )
    return write_rows(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", rows)


@pytest.fixture
def sft_settings(settings: Settings, chat_file: Path) -> Settings:
    """12 steps of 4 rows of 64 tokens, across an epoch's end, from new weights."""
    chats = {"stage": "sft", "data_path": str(chat_file), "init_from": "none"}
    rows = {"max_seq_len": 64, "accumulation_steps": 1, "val_fraction": 0.1}
    return {**settings, **chats, **rows}


@pytest.fixture
def dpo_settings(sft_settings: Settings, pair_file: Path) -> Settings:
    """12 steps of 4 pairs, from new weights."""
    pairs = {"stage": "dpo", "data_path": str(pair_file), "learning_rate": 1e-3}
    return {**sft_settings, **pairs}


@pytest.fixture(scope="session")
def twelve_steps(corpus_file: Path) -> Settings:
    """12 steps of 8 rows of 32 tokens, across an epoch's end, wherever they are made."""
    return {
        "data_path": str(corpus_file),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_seq_len": 32,
        "batch_size": 4,
        "accumulation_steps": 2,
        "learning_rate": 3e-3,
        "warmup_iters": 3,
        "epochs": 3,
        "max_steps": 12,
        "save_interval": 4,
        "eval_interval": 4,
        "log_interval": 1,
        "eval_tokens": 500,
        "sample_tokens": 2,
        "device": "cpu",
        "dtype": "float32",
        "val_fraction": 0.05,
        "seed": 7,
        "hang_timeout_seconds": 120.0,  # what hangs in a test shall be seen
    }


@pytest.fixture
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are forked, which spares each the long imports of a spawned one.

    With one thread each: OpenMP's pool of this process is dead in a fork, and a tensor
    large enough to be shared out would wait for it without end.
    """
    assert torch._dynamo
    monkeypatch.setattr(spawn, "_SPAWN", multiprocessing.get_context("fork"))
    for module in (launching, worker):
        monkeypatch.setattr(module, "choose_threads", lambda *_: 1)


@pytest.fixture
def settings(tmp_path: Path, twelve_steps: Settings) -> Settings:
    """The same in one process, below the test's own folder."""
    return {**twelve_steps, "out_dir": str(tmp_path / "out"), "num_processes": 1}
