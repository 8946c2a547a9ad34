"""A tiny corpus and tiny settings."""

import json
from pathlib import Path

import pytest
from support.runs import Settings


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


@pytest.fixture
def settings(tmp_path: Path, corpus_file: Path) -> Settings:
    """12 steps of 8 rows of 32 tokens, across an epoch's end."""
    return {
        "data_path": str(corpus_file),
        "out_dir": str(tmp_path / "out"),
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
        "num_processes": 1,
        "device": "cpu",
        "dtype": "float32",
        "val_fraction": 0.05,
        "seed": 7,
    }
