"""Asking a model what the demo corpora hold out, and counting its exact answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .data import demo
from .model.generation import generate
from .model.loading import find_weights, load
from .monitor.tables import Table

_Source = str | os.PathLike[str]
_Question = tuple[str, str, str, str]
_BATCH = 64
# An answer that is right needs no more tokens than its own text, give or take a few.
_SPARE_TOKENS = 4


@dataclass(frozen=True)
class Answer:
    """What a model said to a held-out question."""

    source: str
    kind: str
    language: str
    question: str
    expected: str
    given: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one, to the character."""
        return self.given == self.expected


class Examination(Table):
    """Right answers by kind of question, a column for each model; `answers` has all."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        sources = list(dict.fromkeys(answer.source for answer in answers))
        kinds = list(dict.fromkeys(answer.kind for answer in answers))
        super().__init__(
            "Held-out questions answered exactly",
            ["kind", *sources],
            [
                [name, *(_share(*self.count(source, kind)) for source in sources)]
                for name, kind in [*zip(kinds, kinds, strict=True), ("all", None)]
            ],
        )

    def count(self, source: str, kind: str | None = None) -> tuple[int, int]:
        """How many questions were answered right, and how many asked.

        `source` is the head of a column; without a `kind` all of them are counted.
        """
        found = [
            answer.right
            for answer in self.answers
            if answer.source == source and kind in (None, answer.kind)
        ]
        return sum(found), len(found)


def examine(
    source: _Source | Sequence[_Source],
    *,
    questions: int = 20,
    as_chat: bool | None = None,
    which: str = "last",
) -> Examination:
    """Ask a model, or each of several, the demo's held-out questions, greedily.

    Up to `questions` of each kind in each language; some kinds have only one or two.
    A right answer is the corpus's own, to the character. `source` and `which` are what
    `load` takes. A model is asked in a chat; one that was only pretrained (as its run
    tells, or a name that begins with "pretrain_", unless `as_chat` is set) goes on with
    a drill instead: its title, the question, and what follows up to the line's end.

    Raises `ValueError` without a question or a model, and what `load` raises.
    """
    if questions < 1:
        raise ValueError(f"questions={questions}: 1 or more of each kind are expected")
    several = [source] if isinstance(source, str | os.PathLike) else source
    if not (paths := list(dict.fromkeys(map(Path, several)))):
        raise ValueError("there is no model to examine: name a run, or a list of runs")
    heads = [path.name for path in paths]
    if len(set(heads)) < len(heads):
        heads = list(map(str, paths))
    asked = list(_held_out(questions))
    answers = []
    for head, path in zip(heads, paths, strict=True):
        chats = _answers_chats(path, which) if as_chat is None else as_chat
        model, tokenizer = load(path, which)
        for start in range(0, len(asked), _BATCH):
            batch = asked[start : start + _BATCH]
            given = _ask(model, tokenizer, batch, chats)
            answers += [
                Answer(head, *question, text)
                for question, text in zip(batch, given, strict=True)
            ]
    return Examination(answers)


def _held_out(count: int) -> Iterator[_Question]:
    """Yield kind, language, question and answer."""
    for kind in demo.templates()[demo.LANGUAGES[0]]["drills"]:
        for language in demo.LANGUAGES:
            found = demo.held_out_questions(kind, language, count)
            yield from ((kind, language, *pair) for pair in found.items())


def _ask(
    model: Any, tokenizer: Any, batch: list[_Question], as_chat: bool
) -> list[str]:
    answers = tokenizer([answer for *_, answer in batch], add_special_tokens=False)
    longest = max(map(len, answers["input_ids"]))
    prompts: list[Any] = [
        [{"role": "user", "content": question}]
        if as_chat
        else _drill(kind, language, question)
        for kind, language, question, _ in batch
    ]
    texts = generate(
        model,
        tokenizer,
        prompts,
        max_new_tokens=longest + _SPARE_TOKENS,
        temperature=0,
    )
    return [(text if as_chat else text.split("\n")[0]).strip() for text in texts]


def _drill(kind: str, language: str, question: str) -> str:
    title = demo.templates()[language]["drills"][kind]["title"]
    return f"{title}\n{demo.write_turn(question, '', language).rstrip()}"


def _answers_chats(path: Path, which: str) -> bool:
    """Whether the model was trained to answer, by its run or else by its name."""
    return find_weights(path, which).stage != "pretrain"


def _share(right: int, asked: int) -> str:
    return f"{right} of {asked} ({right / asked:.0%})"
