"""The embedded demo corpus: small, bilingual, made by a program, and checkable.

Every document is made from the sentences in `demo_templates.json`, half of them in
English and half in Chinese. Two sorts:

- *drills*: five questions with their answers, of one kind (sums, days of the week,
  units, words, …) or of several, each answer following from its question;
- *stories*: a short scene with two questions about it.

So a model that has learned the corpus can be examined: the answers are computed, not
collected. About one question in sixteen (`is_held_out`) occurs in no document, and
serves to ask the trained model something that it has never read.
"""

import functools
import hashlib
import importlib.resources
import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from ..storage import verified
from .jsonl import check_file

DEMO = "demo"
LANGUAGES = ("en", "zh")
DOCUMENTS = 8000
QUESTIONS_PER_DRILL = 5
SHA256 = "2b0bd641c15e869c0cb676a39881551134326515a85fa13f6b23e76c1803882c"
"""Of the corpus as a file, on every machine; changes with the sentences."""

T = TypeVar("T")


class Draw:
    """Random choices that are the same on every version of Python.

    Only `random.Random(seed).random()` is used, whose sequence is guaranteed.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def pick(self, items: Sequence[T]) -> T:
        """Draw one of `items`."""
        return items[int(self._random.random() * len(items))]

    def some(self, items: Sequence[T], count: int) -> list[T]:
        """Draw `count` different ones of `items`, in the order drawn."""
        left = list(items)
        return [left.pop(self.pick(range(len(left)))) for _ in range(count)]


@functools.cache
def templates() -> dict[str, Any]:
    """The words and sentences by language, with {slots}; the two say the same."""
    file = importlib.resources.files("minimind_nb.data") / "demo_templates.json"
    return json.loads(file.read_text(encoding="utf-8"))


def is_held_out(question: str) -> bool:
    """Whether a question of a drill is kept out of every document (one in sixteen)."""
    return hashlib.sha256(question.encode()).digest()[0] % 16 == 0


def ask(kind: str, language: str, draw: Draw) -> tuple[str, str]:
    """Draw a question of a kind of drill, held out or not, and its answer."""
    turn = draw.pick(templates()[language]["drills"][kind]["questions"])
    question, answer = _fill(turn, language, draw)
    return question, answer


def documents(count: int = DOCUMENTS, seed: int = 1) -> Iterator[str]:
    """Yield `count` different documents, always the same ones for a seed."""
    draw = Draw(seed)
    seen: set[str] = set()
    while len(seen) < count:
        language = draw.pick(LANGUAGES)
        text = draw.pick((_drill, _drill, _drill, _story, _story))(language, draw)
        if text not in seen:
            seen.add(text)
            yield text


def write_corpus(folder: str | os.PathLike[str]) -> Path:
    """Write `demo.jsonl` into `folder` (made if missing) and return its path.

    A row is `{"text": "…"}`, 8,000 of them, 2.8 MB, about a million tokens. A file that
    is the corpus already is left alone.
    """
    path = Path(folder) / "demo.jsonl"
    if not (path.is_file() and verified.hash_file(path) == SHA256):
        rows = (json.dumps({"text": t}, ensure_ascii=False) for t in documents())
        path.parent.mkdir(parents=True, exist_ok=True)
        verified.write_text(path, "".join(f"{row}\n" for row in rows))
    return path


def locate(data_path: str | os.PathLike[str], folder: Path) -> Path:
    """The file that `data_path` names; for "demo" the corpus, written into `folder`.

    Raises what `jsonl.check_file` does for a file that cannot be read.
    """
    if data_path == DEMO:
        return write_corpus(folder)
    check_file(data_path)
    return Path(data_path)


def _drill(language: str, draw: Draw) -> str:
    texts = templates()[language]
    kinds = list(texts["drills"])
    only = draw.pick(kinds) if draw.pick((True, False)) else None
    turns: dict[str, str] = {}
    while len(turns) < QUESTIONS_PER_DRILL:
        question, answer = ask(only or draw.pick(kinds), language, draw)
        if not is_held_out(question):
            turns[question] = answer
    lines = [texts["turn"].format(*turn) for turn in turns.items()]
    title = texts["drills"][only]["title"] if only else texts["mixed"]
    return "\n".join([title, *lines])


def _story(language: str, draw: Draw) -> str:
    texts = templates()[language]
    story = draw.pick(texts["stories"])
    lines = [texts["turn"].format(*turn) for turn in story["questions"]]
    return _fill(["\n".join([story["scene"], *lines])], language, draw)[0]


def _fill(forms: list[str], language: str, draw: Draw) -> list[str]:
    """Fill the slots of some texts that belong together.

    A value is drawn for every slot there is; what follows from others is computed.
    """
    texts = templates()[language]
    x, y, days = (draw.pick(range(2, most + 1)) for most in (12, 12, 6))
    p, q = draw.some(range(1, 31), 2)
    day, month = draw.pick(range(7)), draw.pick(range(12))
    large, small, factor = draw.pick(texts["units"])
    english, chinese = draw.pick(templates()["words"])
    a, b, c = draw.some(texts["names"], 3)
    slots = {
        "x": x,
        "y": y,
        "sum": x + y,
        "product": x * y,
        "p": p,
        "q": q,
        "high": max(p, q),
        "low": min(p, q),
        "large": large,
        "small": small,
        "many": x * factor,
        "english": english,
        "chinese": chinese,
        "a": a,
        "b": b,
        "c": c,
        "day": texts["days"][day],
        "days": days,
        "later": texts["days"][(day + days) % 7],
        "before": texts["months"][month - 1],
        "month": texts["months"][month],
        "after": texts["months"][(month + 1) % 12],
        "place": draw.pick(texts["places"]),
        "pet": draw.pick(texts["pets"]),
        "foods": draw.pick(texts["foods"]),
        "animals": draw.pick(texts["animals"]),
    }
    return [form.format(**slots) for form in forms]
