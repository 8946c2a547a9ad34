"""The demo corpora shipped with the package, and the questions they hold out.

`tools/demo_corpus.py` in the repository generates them: small, bilingual, with computed
answers, so that a model trained on them can be examined.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
from importlib import resources
from pathlib import Path

from .jsonl import check_file

DEMO = "demo"
_FILES = {
    "pretrain": "pretrain.jsonl.gz",
    "sft": "sft.jsonl.gz",
    "rlaif": "sft.jsonl.gz",
    "dpo": "dpo.jsonl.gz",
}


def _shipped(name: str) -> Path:
    return Path(str(resources.files("minimind_nb.data") / "demo_corpora" / name))


def locate(data_path: str | os.PathLike[str], record_format: str = "pretrain") -> Path:
    """Return the file that `data_path` names; for "demo" the shipped corpus.

    Raises what `jsonl.check_file` does for a file that cannot be read.
    """
    path = _shipped(_FILES[record_format]) if data_path == DEMO else Path(data_path)
    check_file(path)
    return path


def held_out_questions(per_kind: int) -> list[dict[str, str]]:
    """Return at most `per_kind` held-out questions of each kind in each language.

    Each has `kind`, `language`, `question`, `answer`, and `prompt`, the question as a
    document of the pretraining corpus asks it. Always the same ones; some kinds have only one or two.
    """
    with gzip.open(_shipped("questions.jsonl.gz"), "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    groups = itertools.groupby(rows, key=lambda row: (row["kind"], row["language"]))
    return [row for _, group in groups for row in itertools.islice(group, per_kind)]
