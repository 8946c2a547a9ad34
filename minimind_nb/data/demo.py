"""The demo corpora shipped with the package, and the questions they hold out.

`tools/demo_corpus.py` in the repository generates them: small, bilingual, with computed
answers, so that a model trained on them can be examined.
"""

import bz2
import itertools
import json
import os
from importlib import resources
from pathlib import Path

from ..config import TrainConfig
from ..storage import verified
from .containers import check_file, find_files

DEMO = "demo"
_FILES = {"pretrain": "demo.jsonl", "dpo": "demo_dpo.jsonl"}
_CHATS = "demo_sft.jsonl"  # of the other formats
_ROWS = {
    "pretrain": '{"text": "…"}',
    "sft": '{"conversations": [{"role": "user", "content": "…"}, …]}',
    "dpo": '{"chosen": […], "rejected": […]}',
}


def _shipped(name: str) -> bytes:
    file = resources.files("minimind_nb.data") / "demo_corpora" / f"{name}.bz2"
    return bz2.decompress(file.read_bytes())


def locate(
    data_path: str | os.PathLike[str], folder: Path, record_format: str = "pretrain"
) -> Path:
    """Return the file that `data_path` names, checked by `check_file`; "demo" is
    unpacked into `folder` first."""
    path, name = Path(data_path), _FILES.get(record_format, _CHATS)
    if data_path == DEMO:
        path, corpus = folder / name, _shipped(name)
        if not path.is_file() or path.read_bytes() != corpus:
            verified.check_writable(folder)
            verified.write_text(path, corpus.decode())
    check_file(path)
    return path


def check_files(*paths: str | tuple[str, ...] | None) -> list[str]:
    """Return the files that paths mean, but "demo", each checked by `check_file`."""
    found = itertools.chain(*(find_files(path) for path in paths if path))
    files = [path for path in found if path != DEMO]
    for path in files:
        check_file(path)
    return files


def require_data(cfg: TrainConfig) -> None:
    """Raise `ValueError` if no data is named."""
    if not cfg.data_path:
        raise ValueError(
            f"data_path is not set: name a file with rows like {_ROWS[cfg.stage]}, or "
            'use data_path="demo"'
        )


def held_out_questions(per_kind: int) -> list[dict[str, str]]:
    """Return at most `per_kind` held-out questions of each kind in each language.

    Each has `kind`, `language`, `question`, `answer`, and `prompt`, the question as a
    document of the pretraining corpus asks it. Always the same ones; some kinds have only one or two.
    """
    rows = map(json.loads, _shipped("questions.jsonl").splitlines())
    groups = itertools.groupby(rows, key=lambda row: (row["kind"], row["language"]))
    return [row for _, group in groups for row in itertools.islice(group, per_kind)]
