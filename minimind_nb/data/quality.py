"""Which rows repeat others, or speak as another model. Of a row only hashes are kept."""

import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .containers import iter_chunks
from .conversations import understand
from .jsonl import Chunk, read_rows

ALIKE = 0.8
"""Share of their runs of five letters that two near duplicates have in common."""
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
_FEWEST_BYTES = 30  # of an answer that should not repeat; "It is Monday." may
_CHUNK_BYTES, _COMPARED = 1 << 18, 1 << 14
# A signature has the lowest of each of 128 hashes (Broder 1997), one byte of it (Li and
# König 2010). Rows that share eight bytes in a row are compared: 0.95 of those that are
# alike to 0.8, 0.99 to 0.85.
_HASHES, _BAND, _LETTERS = 128, 8, 5
_FACTORS = np.random.PCG64(0).random_raw(_HASHES).astype(np.uint32) | np.uint32(1)
_MIX = np.uint32(0x9E3779B1)
_NOISE = re.compile(r"[\W_]+")


class Rows(NamedTuple):
    """Rows in order: `table` [n, 5] int64 has file and line of each, a hash, the turns of
    the user and the letters; `signatures` are [n, 128] uint8.

    `answers` [m, 3] int64 are a row, the hash of an answer in it, and of its question.
    `claims` has the words in which a row speaks as another model. `traits` counts rows
    with a role, with a key of a message, with tools and with "<think>".
    """

    table: np.ndarray
    answers: np.ndarray
    signatures: np.ndarray
    claims: dict[int, str]
    traits: Counter[str]


def read_chunks(files: Sequence[str], title: str) -> Iterator[tuple[int, Chunk]]:
    """Yield the chunks of files, each with the number of its file; a bar shows how far."""
    chunks = ((n, c) for n, f in enumerate(files) for c in iter_chunks(f, _CHUNK_BYTES))
    style: Any = {"unit": "MB", "unit_scale": _CHUNK_BYTES / 1e6, "leave": False}
    yield from tqdm(chunks, title, disable=None, **style)


def measure(
    files: Sequence[str], record_format: str, identities: Sequence[str] = IDENTITIES
) -> Rows:
    """Read files as training does; rows that it refuses are left out."""
    names = sorted(map(str.lower, identities), key=len, reverse=True)
    name = rf"(?:{'|'.join(map(re.escape, names))})(?![a-z])"
    find_claim = re.compile(_I_AM.format(word=_WORD, name=name), re.IGNORECASE).search
    claims, traits, numbers = dict[int, str](), Counter[str](), itertools.count()
    columns: list[Sequence[np.ndarray]] = []
    for file, chunk in read_chunks(files, "comparing rows"):
        texts, table, answers = [], [], []
        rows, _ = read_rows(chunk, lambda row: understand(record_format, row))
        for (line, (_, _, said)), number in zip(rows, numbers, strict=False):
            text, pairs, found = said, [("", said)], []
            if not isinstance(said, str):
                text, pairs, found = _look(said)
            traits.update({*found})
            lower = text.lower()
            named = any(
                name in lower for name in names
            )  # found fast, the words are not
            texts.append(_NOISE.sub("", lower))
            content = _hash(json.dumps(said, ensure_ascii=False))
            table.append([file, line, content, found.count("user"), len(texts[-1])])
            for question, answer in pairs:
                if len(answer.encode()) >= _FEWEST_BYTES:
                    answers.append([number, _hash(answer.strip()), _hash(question)])
                if named and (claim := find_claim(answer)):
                    claims.setdefault(number, claim[0])
        shapes = (table, 5), (answers, 3)
        whole = [np.array(each, np.int64).reshape(-1, n) for each, n in shapes]
        columns.append([*whole, sign(texts)])
    joined = [np.concatenate(column) for column in zip(*columns, strict=True)]
    return Rows(*joined, claims=claims, traits=traits)


def _look(chats: Sequence[Any]) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Return what was said, but by the system; answers in the loss, each after what it
    answers; and the traits. The last two are of the first conversation."""
    said = [m for chat in chats for m in chat.messages if m["role"] != "system"]
    text = "\n".join(f"{m['content']}{m.get('tool_calls', '')}" for m in said)
    messages, in_loss, tools = chats[0]
    turns = zip(itertools.pairwise(messages), in_loss[1:], strict=True)
    pairs = [(a["content"], b["content"]) for (a, b), learned in turns if learned]
    traits = [trait for m in messages for trait in (m["role"], *m)]
    traits += ["<think>" for m in messages if "<think>" in m["content"]]
    return text, pairs, [*traits, *["tools"] * bool(tools)]


def _hash(text: str) -> int:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def sign(texts: Sequence[str]) -> np.ndarray:
    """Return the MinHash signatures [n, 128] uint8 of texts; zeros of an empty one."""
    sizes = np.array([len(text) for text in texts], np.int64)
    signatures = np.zeros((len(texts), _HASHES), np.uint8)
    if not sizes.any():
        return signatures
    padded = "".join(text + "\0" * _LETTERS for text in texts)  # no run has two texts
    codes = np.frombuffer(padded.encode("utf-32-le"), np.uint32)
    runs = np.zeros(len(codes) - _LETTERS + 1, np.uint32)
    for n in range(_LETTERS):
        runs = (runs ^ codes[n : n + len(runs)]) * _MIX
        runs ^= runs >> np.uint32(15)
    begins = np.cumsum(sizes + _LETTERS) - sizes - _LETTERS
    bounds = np.stack([begins, begins + sizes], 1).ravel()
    for n, factor in enumerate(_FACTORS):
        hashed = (runs ^ factor) * factor
        signatures[:, n] = np.minimum.reduceat(hashed, bounds)[::2] & 0xFF
    return signatures * (sizes > 0)[:, None]


def find_repeats(*parts: Rows) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the number of the first that is equal, and that is alike.

    It is the row's own if there is none. The parts are numbered through.
    """
    table = np.concatenate([part.table for part in parts])
    signatures = np.concatenate([part.signatures for part in parts])
    numbers, empty = np.arange(len(table)), table[:, 4] == 0
    equal = np.where(empty, numbers, _first(table[:, 2]))
    alike, (once,) = equal.copy(), np.nonzero((equal == numbers) & ~empty)
    alike[once] = once[_find_alike(signatures[once])]
    return equal, alike[equal]


def _first(values: np.ndarray) -> np.ndarray:
    """Return for each value the number of the first that equals it."""
    _, first, which = np.unique(values, return_index=True, return_inverse=True)
    return first[which]


def _find_alike(signatures: np.ndarray) -> np.ndarray:
    """Return for each signature the first that is alike, or linked by others that are."""
    first = np.arange(len(signatures))
    for band in range(0, _HASHES, _BAND):
        share = np.ascontiguousarray(signatures[:, band : band + _BAND])
        leads = _first(share.view(np.uint64).ravel())
        (rows,) = np.nonzero(leads < np.arange(len(leads)))
        for begin in range(0, len(rows), _COMPARED):
            some = rows[begin : begin + _COMPARED]
            same = (signatures[some] == signatures[leads[some]]).mean(1) >= ALIKE
            np.minimum.at(first, some[same], leads[some][same])
    while (first[first] < first).any():
        first = first[first]
    return first


def find_faults(rows: Rows, validation: Rows | None = None) -> dict[str, np.ndarray]:
    """Return by kind the rows to look at, [n, 4] int64: file and line, and those of the
    row that it repeats, or -1 twice.

    "overlap" are rows that equal or are like one of `validation`, whose file is -1. A
    near duplicate is no duplicate, and a repeated answer is in neither.
    """
    (equal, alike), numbers = find_repeats(rows), np.arange(len(rows.table))
    answers = rows.answers[(alike == numbers)[rows.answers[:, 0]]]
    earlier = answers[_first(answers[:, 1])]
    other = (answers[:, [0, 2]] != earlier[:, [0, 2]]).all(1)
    answered = numbers.copy()
    answered[answers[other, 0]] = earlier[other, 0]
    near = np.where(equal == numbers, alike, numbers)
    repeats = {
        "duplicates": equal,
        "near_duplicates": near,
        "repeated_answers": answered,
    }
    places = rows.table[:, :2]
    faults = {
        kind: np.hstack([places, places[first]])[first != numbers]
        for kind, first in repeats.items()
    }
    empty, claims = np.flatnonzero(rows.table[:, 4] == 0), [*rows.claims]
    for kind, found in ("empty", empty), ("identity", np.array(claims, np.int64)):
        faults[kind] = np.pad(places[found], ((0, 0), (0, 2)), constant_values=-1)
    if validation:
        first = find_repeats(validation, rows)[1][len(validation.table) :]
        known = validation.table[:, :2] * (0, 1) - (1, 0)
        there = np.concatenate([known, places])[first]
        faults["overlap"] = np.hstack([places, there])[first < len(known)]
    return faults
