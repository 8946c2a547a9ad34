"""Training a byte-level BPE vocabulary from JSON Lines, as the shipped one was."""

import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from .containers import check_file, iter_chunks
from .conversations import find_stage, understand
from .jsonl import Row, Tally, read_rows
from .tokenizer import read_tokenizer, write_tokenizer

_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def train_tokenizer(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    out_dir: str | os.PathLike[str],
    vocab_size: int = 6400,
    max_bytes: int = 64 << 20,
    special: Sequence[str] = (),
) -> Path:
    """Train a vocabulary on one or more data files and return its folder, `out_dir`.

    Rows are those of pretraining or SFT. `special` are further special strings, which
    get an entry each, such as "<tool_call>". The folder holds `tokenizer.json` and
    `tokenizer_config.json`: all 256 bytes, GPT-2's split, `<|endoftext|>` 0 (pad),
    `<|im_start|>` 1 (begin), `<|im_end|>` 2 (end), and the package's ChatML template.
    The same rows in the same order give the same file. 50 MB take half a minute.

    Of more than `max_bytes` of text a part of that size is read, chosen by the hash of
    each row's text. That bounds the memory: Chinese, in which whole clauses count as
    words, took 82 bytes for each byte of text, so the default stays within 6 GB.

    Raises `FileNotFoundError` or `DataError` for the files and their rows,
    `FileExistsError` if `out_dir` has a vocabulary already, `ValueError` for a
    `vocab_size` that the text cannot give.
    """
    out_dir = Path(out_dir)
    if isinstance(paths, str | os.PathLike):
        paths = [paths]
    if (out_dir / "tokenizer.json").exists():
        raise FileExistsError(
            f"{out_dir} holds a tokenizer.json already: choose another out_dir"
        )
    for path in paths:
        check_file(path)
    total = sum(len(text.encode()) for row in _read(paths) for text in row)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    named = list(dict.fromkeys([*_SPECIAL, *special]))
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocab_size, 0),
        special_tokens=[AddedToken(token, special=True) for token in named],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    most = int(min(1.0, max_bytes / max(total, 1)) * 2**32)
    rows = (r for r in _read(paths) if zlib.crc32("\n".join(r).encode()) < most)
    split = re.compile("|".join(map(re.escape, named))).split
    texts = (part for row in rows for text in row for part in split(text))
    tokenizer.train_from_iterator(texts, trainer)
    if (found := tokenizer.get_vocab_size()) != vocab_size:
        raise ValueError(
            f"{total:,} bytes of text yield {found} entries, not {vocab_size}: add text,"
            f" or set vocab_size to {found}"
        )
    write_tokenizer(read_tokenizer(tokenizer), out_dir)
    return out_dir


def _read(paths: Sequence[str | os.PathLike[str]]) -> Iterator[list[str]]:
    """Yield the texts of each row; raise `DataError` behind a file with bad rows."""
    for path in paths:
        tally = Tally()
        for chunk in iter_chunks(path):
            rows, counted = read_rows(chunk, _read_texts)
            tally.add(counted)
            yield from (texts for _, texts in rows)
        tally.raise_if_too_many(path)


def _read_texts(row: Row) -> list[str]:
    if find_stage(row) == "sft":
        (chat,) = understand("sft", row).content
        return [message["content"] for message in chat.messages]
    return [understand("pretrain", row).content]
