"""The embedded demo corpora: small, bilingual, made by a program, and checkable.

Everything is made from the sentences in `demo_templates.json`, half of it in English
and half in Chinese. The documents of the pretraining corpus are of two sorts:

- *drills*: five questions with their answers, of one kind (sums, days of the week,
  units, words, …) or of several, each answer following from its question;
- *stories*: a short scene with two questions about it.

The conversations ask the questions of the drills in one to four turns; the pairs give
the last of them its right answer and a wrong one of the same form.

So a model that has learned the corpora can be examined: the answers are computed, not
collected. About one question in sixteen (`is_held_out`) occurs in none of them, and
serves to ask the trained model something that it has never read (though perhaps in
other words, or in the other language).
"""

import functools
import hashlib
import importlib.resources
import json
import os
import random
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..storage import verified
from .jsonl import check_file

DEMO = "demo"
LANGUAGES = ("en", "zh")
QUESTIONS_PER_DRILL = 5
FILES = {
    "pretrain": "demo.jsonl",
    "sft": "demo_sft.jsonl",
    "rlaif": "demo_sft.jsonl",
    "dpo": "demo_dpo.jsonl",
}
"""File names by record format."""
SHA256 = {
    "demo.jsonl": "2b0bd641c15e869c0cb676a39881551134326515a85fa13f6b23e76c1803882c",
    "demo_sft.jsonl": "5fdf6a895eea01582e12419d6587994e30ef651ff69fdb7f99d373c63acbf40d",
    "demo_dpo.jsonl": "dce41f66333e6ae8df1a2e686f6d1a9c364a99ba4774964d829a91b2ae5692ae",
}
"""Of the files, on every machine; change with the sentences."""
# Enough to meet every question of the kinds that have few.
_DRAWS = 4000

T = TypeVar("T")
Row = dict[str, Any]


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


class Turn(NamedTuple):
    """A question and its answer; the forms that they fill, and with what."""

    question: str
    answer: str
    forms: list[str]
    slots: dict[str, Any]


@functools.cache
def templates() -> dict[str, Any]:
    """The words and sentences by language, with {slots}; the two say the same."""
    file = importlib.resources.files("minimind_nb.data") / "demo_templates.json"
    return json.loads(file.read_text(encoding="utf-8"))


def is_held_out(question: str) -> bool:
    """Whether a question is kept out of every corpus (one in sixteen is)."""
    return hashlib.sha256(question.encode()).digest()[0] % 16 == 0


def ask(kind: str, language: str, draw: Draw) -> Turn:
    """Draw a question of a kind of drill, held out or not, and its answer."""
    forms = draw.pick(templates()[language]["drills"][kind]["questions"])
    slots = _draw_slots(language, draw)
    question, answer = (form.format(**slots) for form in forms)
    return Turn(question, answer, forms, slots)


def held_out_questions(kind: str, language: str, count: int) -> dict[str, str]:
    """Up to `count` different held-out questions of a kind, with their answers.

    Always the same ones, in the same order. Some kinds have only one or two.
    """
    draw = Draw(0)
    found: dict[str, str] = {}
    for _ in range(_DRAWS):
        if len(found) == count:
            break
        turn = ask(kind, language, draw)
        if is_held_out(turn.question):
            found[turn.question] = turn.answer
    return found


def documents(count: int = 8000) -> Iterator[str]:
    """Yield `count` different documents, always the same ones."""

    def make(language: str, draw: Draw) -> str:
        return draw.pick((_drill, _drill, _drill, _story, _story))(language, draw)

    return _different(make, count)


def conversations(count: int = 6000) -> Iterator[Row]:
    """Yield `count` different rows of one to four questions with their answers."""

    def make(language: str, draw: Draw) -> Row:
        _, turns = _turns(draw.pick((1, 2, 3, 4)), language, draw)
        return {"conversations": _messages(turns, language, draw)}

    return _different(make, count)


def pairs(count: int = 1500) -> Iterator[Row]:
    """Yield `count` different rows whose last question is answered right and wrong."""

    def make(language: str, draw: Draw) -> Row:
        _, turns = _turns(draw.pick((1, 1, 2)), language, draw)
        chosen = _messages(turns, language, draw)
        wrong = _mistake(turns[-1], language, draw)
        rejected = [*chosen[:-1], {"role": "assistant", "content": wrong}]
        return {"chosen": chosen, "rejected": rejected}

    return _different(make, count)


def write_corpus(folder: str | os.PathLike[str], record_format: str) -> Path:
    """Write the corpus of a record format into `folder` and return its path.

    8,000 documents are 2.8 MB, about a million tokens. A file that is the corpus
    already is left alone.
    """
    path = Path(folder) / FILES[record_format]
    if not (path.is_file() and verified.hash_file(path) == SHA256[path.name]):
        texts = ({"text": text} for text in documents())
        rows = {"pretrain": texts, "dpo": pairs()}.get(record_format, conversations())
        lines = (f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        verified.write_text(path, "".join(lines))
    return path


def locate(
    data_path: str | os.PathLike[str], folder: Path, record_format: str = "pretrain"
) -> Path:
    """The file that `data_path` names; for "demo" the corpus, written into `folder`.

    Raises what `jsonl.check_file` does for a file that cannot be read.
    """
    if data_path == DEMO:
        return write_corpus(folder, record_format)
    check_file(data_path)
    return Path(data_path)


def write_turn(question: str, answer: str, language: str) -> str:
    """A question and its answer as two lines of a document."""
    return templates()[language]["turn"].format(question, answer)


def _different(make: Callable[[str, Draw], T], count: int) -> Iterator[T]:
    """Yield different things until there are `count`, each of a drawn language."""
    draw = Draw(1)
    seen: set[str] = set()
    while len(seen) < count:
        made = make(draw.pick(LANGUAGES), draw)
        if (key := json.dumps(made)) not in seen:
            seen.add(key)
            yield made


def _drill(language: str, draw: Draw) -> str:
    texts = templates()[language]
    only, turns = _turns(QUESTIONS_PER_DRILL, language, draw)
    title = texts["drills"][only]["title"] if only else texts["mixed"]
    lines = [write_turn(turn.question, turn.answer, language) for turn in turns]
    return "\n".join([title, *lines])


def _story(language: str, draw: Draw) -> str:
    story = draw.pick(templates()[language]["stories"])
    lines = [write_turn(asked, said, language) for asked, said in story["questions"]]
    slots = _draw_slots(language, draw)
    return "\n".join([story["scene"], *lines]).format(**slots)


def _turns(count: int, language: str, draw: Draw) -> tuple[str | None, list[Turn]]:
    """Draw different questions that are not held out, all of one kind or of any."""
    kinds = list(templates()[language]["drills"])
    only = draw.pick(kinds) if draw.pick((True, False)) else None
    turns: dict[str, Turn] = {}
    while len(turns) < count:
        turn = ask(only or draw.pick(kinds), language, draw)
        if not is_held_out(turn.question):
            turns[turn.question] = turn
    return only, list(turns.values())


def _messages(turns: list[Turn], language: str, draw: Draw) -> list[dict[str, str]]:
    """The turns as messages, one conversation in four with a system's before them."""
    said: list[tuple[str, str]] = []
    if draw.pick((True, False, False, False)):
        said.append(("system", draw.pick(templates()[language]["systems"])))
    for turn in turns:
        said += [("user", turn.question), ("assistant", turn.answer)]
    return [{"role": role, "content": content} for role, content in said]


def _mistake(turn: Turn, language: str, draw: Draw) -> str:
    """Draw a wrong answer of the same form.

    Other than in the right one is what the answer adds to the question (a number, a
    day, a word); where it adds nothing, it names the wrong one of what was named.
    """
    slots = turn.slots
    asked, answered = (
        {name for _, name, _, _ in string.Formatter().parse(form) if name}
        for form in turn.forms
    )
    wrong = turn.answer
    while wrong == turn.answer:
        other = _draw_slots(language, draw)
        other["many"] = other["x"] * slots["factor"]
        other["high"], other["low"] = slots["low"], slots["high"]
        other["a"] = draw.pick((slots["b"], slots["c"]))
        other["c"] = draw.pick((slots["a"], slots["b"]))
        changed = {name: other[name] for name in answered - asked or answered}
        wrong = turn.forms[1].format(**(slots | changed))
    return wrong


def _draw_slots(language: str, draw: Draw) -> dict[str, Any]:
    """Draw a value for every slot there is; what follows from others is computed."""
    texts = templates()[language]
    x, y, days = (draw.pick(range(2, most + 1)) for most in (12, 12, 6))
    p, q = draw.some(range(1, 31), 2)
    day, month = draw.pick(range(7)), draw.pick(range(12))
    large, small, factor = draw.pick(texts["units"])
    english, chinese = draw.pick(templates()["words"])
    a, b, c = draw.some(texts["names"], 3)
    return {
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
        "factor": factor,
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
