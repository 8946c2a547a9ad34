"""Bytes of text a token, Chinese and English apart, for one vocabulary or several.

    python benchmarks/bytes_per_token.py held_out.jsonl --tokenizer other.json

Rows hold ``text``, ``conversations`` or ``chosen`` and ``rejected``; a ``source`` in a
row gives it a line of its own. The shipped vocabulary comes first. A document counts as
Chinese where at least half of its words are Chinese characters, as English where none
is. More bytes a token means a shorter sequence for the same text.
"""

import argparse
import json
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.tokenizer import read_tokenizer

CHINESE = re.compile("[\u3400-\u9fff]")
WORDS = re.compile("[A-Za-z]+|[\u3400-\u9fff]")


def language(text: str) -> str:
    chinese = len(CHINESE.findall(text))
    words = len(WORDS.findall(text))
    if chinese == 0:
        return "English"
    return "Chinese" if chinese * 2 >= words else "mixed"


def texts(row: dict[str, Any]) -> Iterator[str]:
    if "text" in row:
        yield row["text"]
    for key in ("conversations", "chosen", "rejected"):
        for turn in row.get(key, ()):
            yield turn["content"]


def read_groups(files: list[Path]) -> dict[tuple[str, str], list[str]]:
    """The texts by (language, source)."""
    groups: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files:
        with file.open(encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                for text in texts(row):
                    source = row.get("source", file.name)
                    groups[language(text), source].append(text)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description="Bytes of text a token.")
    parser.add_argument("files", nargs="+", type=Path, help="JSON Lines files")
    parser.add_argument(
        "--tokenizer",
        action="append",
        default=[],
        help="another tokenizer.json or Hugging Face folder; may be repeated",
    )
    options = parser.parse_args()
    names = ["shipped", *options.tokenizer]
    encoders = [BulkEncoder(read_tokenizer(name)) for name in (None, *names[1:])]
    print(f"{'language':10}{'source':28}{'bytes':>12}", *map(column, names))
    totals: dict[str, list[list[int]]] = defaultdict(list)
    for (kind, source), group in sorted(read_groups(options.files).items()):
        size = sum(len(text.encode()) for text in group)
        counts = [sum(map(len, encoder.encode(group))) for encoder in encoders]
        totals[kind].append([size, *counts])
        show(kind, source, size, counts)
    for kind, rows in totals.items():
        size, *counts = map(sum, zip(*rows, strict=True))
        show(kind, "all", size, counts)


def column(name: str) -> str:
    return f"{Path(name).name[-20:]:>21}"


def show(kind: str, source: str, size: int, counts: list[int]) -> None:
    rates = [f"{size / max(count, 1):21.3f}" for count in counts]
    print(f"{kind:10}{source:28}{size:12,}", *rates)


if __name__ == "__main__":
    main()
