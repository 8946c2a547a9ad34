"""Training a byte-level BPE vocabulary from JSON Lines, as the shipped one was."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .jsonl import (
    Fault,
    Tally,
    check_file,
    check_text_row,
    iter_chunks,
    read_rows,
)
from .tokenizer import read_tokenizer, write_tokenizer

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SPECIAL_STRINGS = re.compile("|".join(map(re.escape, _SPECIAL)))
_SMALLEST = 256 + len(_SPECIAL) + 1


def train_tokenizer(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    vocab_size: int = 6400,
    max_bytes: int = 64 << 20,
) -> Path:
    """Train a vocabulary on JSONL files (or one), write it to ``out_dir``, return that.

    Rows hold ``text``, or ``conversations`` of which the contents are read. The result
    is a folder with ``tokenizer.json`` and ``tokenizer_config.json``: all 256 bytes,
    GPT-2's split, ``<|endoftext|>`` 0 (pad), ``<|im_start|>`` 1 (begin),
    ``<|im_end|>`` 2 (end), and the package's ChatML template. The same rows in the same
    order give the same file.

    Of more than ``max_bytes`` of text a part of that size is read, chosen by the hash of
    each row's text. That bounds the memory: Chinese, in which whole clauses count as
    words, took 82 bytes for each byte of text, English far less, so the default stays
    within 6 GB. The files are read twice, the first time to check every row before the
    training starts. 50 MB take half a minute.

    Raises FileNotFoundError or DataError for the files and their rows, FileExistsError
    for an ``out_dir`` with a vocabulary in it, ValueError for a ``vocab_size`` that is
    too small, or too large for the text.
    """
    out_dir = Path(out_dir)
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if vocab_size < _SMALLEST:
        raise ValueError(
            f"vocab_size is {vocab_size}, at least {_SMALLEST} are needed: 256 bytes,"
            f" {len(_SPECIAL)} special tokens, and something to learn"
        )
    if not paths:
        raise ValueError("no file to train on: name one or more JSONL files")
    if (out_dir / "tokenizer.json").exists():
        raise FileExistsError(
            f"{out_dir} holds a tokenizer.json already, and models may depend on it:"
            " choose another out_dir, or move it away"
        )
    total = sum(_count_bytes(Path(path)) for path in paths)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in _SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    share = min(1.0, max_bytes / max(total, 1))
    tokenizer.train_from_iterator(_sample(paths, share), trainer)
    if (found := tokenizer.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"{total:,} bytes of text yield {found} entries, {vocab_size} were asked"
            f" for: add text, or set vocab_size to {found} or less"
        )
    write_tokenizer(read_tokenizer(tokenizer), out_dir)
    return out_dir


def _count_bytes(path: Path) -> int:
    """Check every row of a file and add up its text, in bytes."""
    check_file(path)
    tally = Tally()
    total = 0
    for chunk in iter_chunks(path):
        rows, counted = read_rows(chunk, _check_row)
        tally.add(counted)
        total += sum(len(text.encode()) for _, row in rows for text in _texts(row))
    tally.raise_if_too_many(path)
    return total


def _sample(paths: Sequence[str | os.PathLike[str]], share: float) -> Iterator[str]:
    """Yield the texts to train on, without the special strings in them."""
    limit = int(share * 2**32)
    for path in paths:
        for chunk in iter_chunks(path):
            for _, row in read_rows(chunk, _check_row)[0]:
                texts = _texts(row)
                if zlib.crc32("\n".join(texts).encode()) < limit:
                    for text in texts:
                        yield from _SPECIAL_STRINGS.split(text)


def _check_row(row: dict[str, Any]) -> Fault | None:
    if "conversations" not in row:
        return check_text_row(row)
    try:
        if all(isinstance(text, str) for text in _texts(row)):
            return None
    except (TypeError, KeyError):  # no list, no objects in it, or no content in them
        pass
    reason = '"conversations" is not a list of {"role": "…", "content": "…"}'
    return Fault("not_turns", reason, "conversations")


def _texts(row: dict[str, Any]) -> list[str]:
    if "conversations" in row:
        return [turn["content"] for turn in row["conversations"]]
    return [row["text"]]
