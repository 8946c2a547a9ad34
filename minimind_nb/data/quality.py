"""Rows that repeat others, are empty, or claim to be another model."""

import functools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..progress_bar import open_bar
from .containers import iter_chunks
from .conversations import Chat, understand
from .jsonl import Chunk, read_rows, split_lines

ALIKE = 0.8
"""Share of their runs of five letters that two near duplicates have in common."""
KINDS = (
    "bad_rows empty duplicates near_duplicates overlap identity repeated_answers long"
).split()
IDENTITIES = (
    "ChatGPT OpenAI GPT-3 GPT-3.5 GPT-4 GPT-4o GPT-5 Claude Anthropic Gemini Bard Grok "
    "Llama Mistral Qwen 通义千问 阿里云 DeepSeek 深度求索 文心一言 百度 ChatGLM 智谱 Kimi"
).split()
_I_AM = (
    r"\b(?:I(?:['’]m| am)|my name is|call me)\s+(?:(?:an?\s+)?{word}\s+)*{name}"
    r"|\b(?:I(?:['’]m| am| was)|as an? (?:AI|(?:large )?language model))\b[^.!?\n]{{0,60}}"
    r"\b(?:developed|created|trained|made|built|designed)\s+by\s+{name}"
    r"|(?:我是|我叫|我的名字[是叫]|作为)\s*(?:一[个款名位]|来自|基于|名为|AI|人工智能|大型?"
    r"|语言|智能|聊天|机器人|助手|模型|的|[，,\s])*{name}"
    r"|(?:我|(?:我是|作为)[^。！？它他她其\n]{{0,20}})由\s*{name}[^。！？\n]{{0,15}}"
    r"(?:开发|训练|研发|研制|创造|创建|打造|推出|设计|构建)"
)
_WORD = r"(?:AI|large|language|virtual|helpful|model|assistant|chatbot|called|named),?"
# In a row's JSON, where quotation marks in what is said are escaped.
_TRAITS = {
    "with_system": re.compile('"role": "system"'),
    "with_tools": re.compile(r'"tools": \[\{|"tool_calls": '),
    "with_thoughts": re.compile('<think>|"reasoning_content": '),
}
_FEWEST = 30  # bytes of an answer that should not repeat; "It is Monday." may
# A signature has the lowest of each of 128 hashes (Broder 1997), one byte of it (Li and
# König 2010). Rows that share eight bytes in a row are compared: 0.95 of those that are
# alike to 0.8, 0.99 to 0.85.
_HASHES, _BAND = 128, 8
_FACTORS = np.random.PCG64(0).random_raw((_HASHES, 1)).astype(np.uint32) | np.uint32(1)
_BEGINNING = 60  # characters of a row that are kept
_AT_ONCE = 1 << 9  # hashed letters, or compared rows: 128 values each stay in the cache
_NOISE = re.compile(r"[\W_]+")

Place = int | str  # the line of a row; of several files "file:line"


class _Row(NamedTuple):
    """The hashes of a row by which it is compared: of all in it, of its runs of letters,
    and of its answers in the loss, each with its question's. A bad one has no content."""

    place: Place
    beginning: str
    content: int = 0
    signature: bytes = b""
    answers: Sequence[tuple[int, int]] = ()
    traits: Sequence[str] = ()
    claim: str = ""


def name_place(files: Sequence[str], number: int, line: int) -> Place:
    """Return the place of a line of the file of that number."""
    return f"{files[number]}:{line}" if len(files) > 1 else line


def read_lines(files: Sequence[str], title: str) -> Iterator[tuple[Place, bytes]]:
    """Yield the place and the JSON of each row that is not blank, below a bar."""
    total = sum(Path(file).stat().st_size for file in files)
    with open_bar(title, total, unit="B", unit_scale=True) as bar:
        for number, file in enumerate(files):
            for chunk in iter_chunks(file):
                for line, raw in split_lines(chunk):
                    yield name_place(files, number, line), raw
                bar.update(min(len(chunk.data), total - bar.n))


def _read(
    files: Sequence[str], record_format: str, identities: Sequence[str] = ()
) -> Iterator[_Row]:
    names = sorted(map(str.lower, identities), key=len, reverse=True)
    # "I am Claude Monet" and "作为百度的创始人" are about others.
    person = r"(?![a-z]|的|\s+(?-i:[A-Z][^\W\d_A-Z]))"
    name = rf"(?:{'|'.join(map(re.escape, names))}){person}"
    claim = re.compile(_I_AM.format(word=_WORD, name=name), re.IGNORECASE)
    read = functools.partial(understand, record_format)
    for place, raw in read_lines(files, "Comparing rows"):
        rows, tally = read_rows(Chunk(1, raw), read)
        yield from (_Row(place, f"{p.reason}: {p.excerpt}") for p in tally.problems)
        for _, (_, _, content) in rows:
            row, answers = _compare(place, content)
            lower = answers.lower()
            named = any(each in lower for each in names)  # fast, unlike the pattern
            found = claim.search(answers) if named else None
            yield row._replace(claim=found[0]) if found else row


def _compare(place: Place, content: Any) -> tuple[_Row, str]:
    """Return a row of some content, and its answers in the loss."""
    whole = [Chat([{"role": "", "content": content}], [True])]
    chats = whole if isinstance(content, str) else content
    said = [message for chat in chats for message in chat.messages]
    shown = json.dumps([said, {"tools": chats[0].tools}], ensure_ascii=False)
    text = "\n".join(
        f"{message['content']}{message.get('tool_calls', '')}"
        for message in said
        if message["role"] != "system"
    )
    texts = [message["content"].strip() for message in chats[0].messages]
    turns = zip(["", *texts], texts, chats[0].in_loss, strict=False)
    pairs = [(answer, before) for before, answer, learned in turns if learned]
    row = _Row(
        place,
        " ".join(text[:_BEGINNING].split()),
        hash(shown),
        sign(_NOISE.sub("", text.lower())),
        tuple((hash(a), hash(q)) for a, q in pairs if q and len(a.encode()) >= _FEWEST),
        tuple(trait for trait, mark in _TRAITS.items() if mark.search(shown)),
    )
    return row, "\n".join(answer for answer, _ in pairs)


def sign(text: str) -> bytes:
    """Return the MinHash signature of a text, 128 bytes; none of an empty one."""
    if not text:
        return b""
    codes = np.frombuffer((text + "\0" * 4).encode("utf-32-le"), np.uint32)
    runs = sliding_window_view(codes, 5) @ _FACTORS[:5, 0]
    runs ^= runs >> np.uint32(15)
    parts = np.array_split(runs, len(runs) // _AT_ONCE + 1)
    lowest = [((part ^ _FACTORS) * _FACTORS).min(1) for part in parts]
    return np.min(lowest, 0).astype(np.uint8).tobytes()


def _find_alike(signatures: np.ndarray) -> list[int]:
    """Return for each of signatures [n, 128] the number of the first that is alike, or
    linked by others that are; its own if there is none."""
    first = np.arange(len(signatures))
    for band in range(0, _HASHES, _BAND):
        share = np.ascontiguousarray(signatures[:, band : band + _BAND])
        values = share.view(np.uint64).ravel()
        _, leads, which = np.unique(values, return_index=True, return_inverse=True)
        (rows,) = np.nonzero(leads[which] < np.arange(len(which)))
        for some in np.array_split(rows, len(rows) // _AT_ONCE + 1):
            lead = leads[which[some]]
            same = (signatures[some] == signatures[lead]).mean(1) >= ALIKE
            np.minimum.at(first, some[same], lead[same])
    while (first[first] < first).any():
        first = first[first]
    return first.tolist()


def find_faults(
    files: Sequence[str],
    record_format: str,
    identities: Sequence[str] = IDENTITIES,
    val_path: str | None = None,
) -> tuple[dict[str, dict[Place, str]], Counter[str]]:
    """Return for each of `KINDS` but "long" the places of rows, and why each is there,
    and how many rows have a system message, tools and thoughts.

    A row is in one at most of "overlap", "duplicates", "near_duplicates" and
    "repeated_answers".
    """
    held_out = _read([val_path] if val_path else [], record_format)
    known = [row for row in held_out if row.signature]
    rows = [*_read(files, record_format, identities)]
    faults: dict[str, dict[Place, str]] = {kind: {} for kind in KINDS}
    for row in rows:
        if not row.signature:
            faults["empty" if row.content else "bad_rows"][row.place] = row.beginning
        if row.claim:
            faults["identity"][row.place] = row.claim
    # The first of rows that repeat each other is to stay, so it has no other fault.
    every = known + [row for row in rows if row.signature and not row.claim]
    for row, kind, other in _find_repeats(every, len(known)):
        faults[kind][row.place] = f"as line {every[other].place}: {row.beginning}"
    return faults, Counter(trait for row in rows for trait in row.traits)


def _find_repeats(rows: Sequence[_Row], known: int) -> Iterator[tuple[_Row, str, int]]:
    """Yield each row after the `known` that repeats another, how, and the number of that."""
    signatures = np.frombuffer(b"".join(row.signature for row in rows), np.uint8)
    alike = _find_alike(signatures.reshape(-1, _HASHES))
    equal, answered = dict[int, int](), dict[int, tuple[int, int]]()
    for n, (row, other) in enumerate(zip(rows, alike, strict=True)):
        same = equal.setdefault(row.content, n)
        if n < known:
            continue
        if other < known:
            yield row, "overlap", other
        elif same < n:
            yield row, "duplicates", same
        elif other < n:
            yield row, "near_duplicates", other
        for answer, question in row.answers if other == n else ():
            first, asked = answered.setdefault(answer, (n, question))
            if first < n and asked != question:
                yield row, "repeated_answers", first
