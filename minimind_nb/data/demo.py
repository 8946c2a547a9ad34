"""The embedded demo corpus: small, bilingual, made by a program, and checkable.

Every document is made here from the sentences in `templates`, half of them in
English and half in Chinese. Two sorts:

- *drills*: five questions with their answers, of one kind (`KINDS`: sums, days of
  the week, units, words, …) or of several, each answer following from its question;
- *stories*: a short scene with two questions about it.

So a model that has learned the corpus can be examined: the answers are computed, not
collected. About one question in sixteen (`is_held_out`) occurs in no document, and
serves to ask the trained model something that it has never read.

To check the corpus: the same bytes come out on every machine and every version of
Python (only `random.Random(seed).random()` is used, whose sequence is guaranteed),
no document occurs twice, and every equation in it is true; the tests do all three.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from . import templates

LANGUAGES = ("en", "zh")
DOCUMENTS = 8000
QUESTIONS_PER_DRILL = 5

T = TypeVar("T")
Slots = dict[str, object]


class Draw:
    """Random choices that are the same on every version of Python."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def number(self, low: int, high: int) -> int:
        """Draw an integer from `low` to `high`, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def pick(self, items: Sequence[T]) -> T:
        """Draw one of `items`."""
        return items[self.number(0, len(items) - 1)]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Draw `count` different ones of `items`, in the order drawn."""
        left = list(items)
        return [left.pop(self.number(0, len(left) - 1)) for _ in range(count)]


class Example(NamedTuple):
    """A question and the answer that follows from it."""

    kind: str
    language: str
    question: str
    answer: str


def _sum(draw: Draw, language: str) -> Slots:
    a, b = draw.number(1, 10), draw.number(1, 10)
    return {"a": a, "b": b, "c": a + b}


def _difference(draw: Draw, language: str) -> Slots:
    b, c = draw.number(1, 10), draw.number(1, 10)
    return {"a": b + c, "b": b, "c": c}


def _product(draw: Draw, language: str) -> Slots:
    a, b = draw.number(2, 9), draw.number(2, 9)
    return {"a": a, "b": b, "c": a * b}


def _larger(draw: Draw, language: str) -> Slots:
    a, b = draw.some(range(1, 31), 2)
    return {"a": a, "b": b, "high": max(a, b), "low": min(a, b)}


def _weekday(draw: Draw, language: str) -> Slots:
    start, n = draw.number(0, 6), draw.number(2, 6)
    days = templates.DAYS[language]
    return {"day": days[start], "n": n, "later": days[(start + n) % 7]}


def _month(draw: Draw, language: str) -> Slots:
    months, n = templates.MONTHS[language], draw.number(0, 11)
    return {"before": months[n - 1], "month": months[n], "after": months[(n + 1) % 12]}


def _unit(draw: Draw, language: str) -> Slots:
    large, small, factor = draw.pick(templates.UNITS[language])
    n = draw.number(2, 9)
    return {"large": large, "small": small, "n": n, "many": n * factor}


def _word(draw: Draw, language: str) -> Slots:
    english, chinese = draw.pick(templates.WORDS)
    return {"english": english, "chinese": chinese}


def _row(draw: Draw, language: str) -> Slots:
    a, b, c = draw.some(templates.NAMES[language], 3)
    return {"a": a, "b": b, "c": c}


KINDS: dict[str, Callable[[Draw, str], Slots]] = {
    "sum": _sum,
    "difference": _difference,
    "product": _product,
    "larger": _larger,
    "weekday": _weekday,
    "month": _month,
    "unit": _unit,
    "word": _word,
    "row": _row,
}


def is_held_out(question: str) -> bool:
    """Whether a question of a drill is kept out of every document (one in sixteen)."""
    return hashlib.sha256(question.encode()).digest()[0] % 16 == 0


def ask(kind: str, language: str, draw: Draw) -> Example:
    """Draw a question of a kind, held out or not."""
    slots = KINDS[kind](draw, language)
    question, answer = draw.pick(templates.QUESTIONS[kind][language])
    return Example(kind, language, question.format(**slots), answer.format(**slots))


def _drill(draw: Draw, language: str) -> str:
    title = draw.pick([*KINDS, *["mixed"] * len(KINDS)])
    turns: dict[str, str] = {}
    while len(turns) < QUESTIONS_PER_DRILL:
        kind = draw.pick(list(KINDS)) if title == "mixed" else title
        example = ask(kind, language, draw)
        if not is_held_out(example.question):
            turns[example.question] = example.answer
    lines = [templates.TURN[language].format(*turn) for turn in turns.items()]
    return "\n".join([templates.TITLES[title][language], *lines])


def _story(draw: Draw, language: str) -> str:
    scene, turns = draw.pick(templates.STORIES[language])
    a, b, c = draw.some(templates.NAMES[language], 3)
    week = _weekday(draw, language)
    left, k = draw.number(2, 9), draw.number(2, 6)
    slots: Slots = {
        "a": a,
        "b": b,
        "c": c,
        "place": draw.pick(templates.PLACES[language]),
        "pet": draw.pick(templates.PETS[language]),
        "foods": draw.pick(templates.FOODS[language]),
        "animals": draw.pick(templates.SMALL_ANIMALS[language]),
        "n": left + k,
        "k": k,
        "left": left,
        "total": left + k + k,
        "day": week["day"],
        "days": week["n"],
        "later": week["later"],
    }
    lines = [templates.TURN[language].format(*turn) for turn in turns]
    return "\n".join([scene, *lines]).format(**slots)


# Three drills to two stories.
SORTS = (_drill, _drill, _drill, _story, _story)


def documents(count: int = DOCUMENTS, seed: int = 1) -> Iterator[str]:
    """Yield `count` different documents, always the same ones for a seed."""
    draw = Draw(seed)
    seen: set[str] = set()
    while len(seen) < count:
        language = draw.pick(LANGUAGES)
        text = draw.pick(SORTS)(draw, language)
        if text not in seen:
            seen.add(text)
            yield text


def write_corpus(folder: str | os.PathLike[str]) -> Path:
    """Write `demo.jsonl` into `folder` (made if missing) and return its path.

    A row is `{"text": "…"}`, 8,000 of them, 2.8 MB, about a million tokens. Written
    aside and renamed; a file that already has these bytes is left alone.
    """
    rows = ({"text": text} for text in documents())
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = "".join(lines).encode()
    path = Path(folder) / "demo.jsonl"
    if path.is_file() and path.read_bytes() == data:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    aside.write_bytes(data)
    os.replace(aside, path)
    return path
