"""Settings and readers for tests of what is built for Kaggle."""

import json
from pathlib import Path
from typing import Any

STEPS = 6
TINY = {
    "data_path": "corpus.jsonl",
    "preset": None,
    "recipe": None,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "max_seq_len": 64,
    "batch_size": 2,
    "accumulation_steps": 1,
    "eval_tokens": 500,
    "log_interval": 1,
    "device": "cpu",
}


def metadata(folder: Path) -> dict[str, Any]:
    """Return the metadata of a kernel's folder."""
    return json.loads((folder / "kernel-metadata.json").read_text())
