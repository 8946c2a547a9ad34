"""Generate the demo corpora that ship with the package, and their held-out questions.

`python tools/demo_corpus.py` writes them into `minimind_nb/data/demo_corpora/`, with the
same bytes every time. Everything is made from the sentences in `demo_templates.json`,
half of it in English and half in Chinese. The documents for pretraining are of two sorts:

- *drills*: five questions with their answers, of one kind (sums, days of the week,
  units, words, …) or of several, each answer following from its question;
- *stories*: a short scene with two questions about it.

The conversations ask the questions of the drills in one to four turns; the pairs give
the last of them its right answer and a wrong one of the same form. About one question in
sixteen (`is_held_out`) occurs in none of them: `mm.examine` asks a trained model these,
which it has never read (though perhaps in other words, or in the other language).
"""

import bz2
import functools
import hashlib
import json
import random
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

HERE = Path(__file__).resolve().parent
CORPORA = HERE.parent / "minimind_nb" / "data" / "demo_corpora"
LANGUAGES = ("en", "zh")
QUESTIONS_PER_DRILL = 5
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
    return json.loads((HERE / "demo_templates.json").read_text(encoding="utf-8"))


def is_held_out(question: str) -> bool:
    """Return True for a question kept out of every corpus, as one in sixteen is."""
    return hashlib.sha256(question.encode()).digest()[0] % 16 == 0


def ask(kind: str, language: str, draw: Draw) -> Turn:
    """Draw a question of a kind of drill, held out or not, and its answer."""
    forms = draw.pick(templates()[language]["drills"][kind]["questions"])
    slots = _draw_slots(language, draw)
    question, answer = (form.format(**slots) for form in forms)
    return Turn(question, answer, forms, slots)


def held_out_questions() -> Iterator[Row]:
    """Yield the held-out questions of each kind, always the same ones in one order.

    `prompt` is the question as a document of the pretraining corpus asks it. Some kinds
    have only one or two questions.
    """
    for kind in templates()[LANGUAGES[0]]["drills"]:
        for language in LANGUAGES:
            title = templates()[language]["drills"][kind]["title"]
            draw = Draw(0)
            drawn = (ask(kind, language, draw) for _ in range(_DRAWS))
            found = {turn.question: turn.answer for turn in drawn}
            for question in filter(is_held_out, found):
                asked = write_turn(question, "", language).rstrip()
                yield {
                    "kind": kind,
                    "language": language,
                    "question": question,
                    "answer": found[question],
                    "prompt": f"{title}\n{asked}",
                }


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


def corpora() -> dict[str, list[Row]]:
    """Return the rows of each shipped file, by its name."""
    return {
        "demo.jsonl": [{"text": text} for text in documents()],
        "demo_sft.jsonl": list(conversations()),
        "demo_dpo.jsonl": list(pairs()),
        "questions.jsonl": list(held_out_questions()),
    }


def to_lines(rows: Iterable[Row]) -> str:
    """Return rows as JSON Lines."""
    return "".join(f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows)


def main() -> None:
    """Write all files, each compressed."""
    CORPORA.mkdir(exist_ok=True)
    for name, rows in corpora().items():
        packed = bz2.compress(to_lines(rows).encode())
        (CORPORA / f"{name}.bz2").write_bytes(packed)
        print(f"{name}: {len(rows):,} rows, {len(packed):,} bytes")


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


if __name__ == "__main__":
    main()
