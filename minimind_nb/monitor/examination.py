"""Ask models the questions that the demo corpora hold out, and count exact answers."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..data.demo import held_out_questions
from ..model.generation import generate
from ..model.loading import find_weights, load
from .tables import Table

_Source = str | os.PathLike[str]
_BATCH = 64
# An exact answer needs no more tokens than its own text, give or take a few.
_SPARE_TOKENS = 4


class Answer(NamedTuple):
    """A model's answer to a held-out question; `right` if it is exactly the expected."""

    source: str
    kind: str
    language: str
    question: str
    expected: str
    given: str
    right: bool


class Examination(Table):
    """Right answers by kind of question, one column per model; `answers` has them all."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        sources = list(dict.fromkeys(answer.source for answer in answers))
        kinds = [*dict.fromkeys(answer.kind for answer in answers), None]
        rows = []
        for kind in kinds:
            counts = [self.count(source, kind) for source in sources]
            cells = [f"{right} of {n} ({right / n:.0%})" for right, n in counts]
            rows.append([kind or "all", *cells])
        super().__init__(
            "Held-out questions answered exactly", ["kind", *sources], rows
        )

    def count(self, source: str, kind: str | None = None) -> tuple[int, int]:
        """Return how many questions were answered right, and how many were asked.

        `source` is the head of a column; without `kind` all its questions count.
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
    """Ask one or several models the held-out questions of the demo corpora, greedily.

    At most `questions` of each kind in each language are asked; some kinds have only one
    or two. An answer is right if it is the corpus's own, to the character. `source` and
    `which` are what `load` takes. A model is asked in a chat; one that was only
    pretrained (according to its run, or a file name that begins with "pretrain_", unless
    `as_chat` is set) continues a drill instead: its title, the question, and the answer
    up to the end of the line.

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
    asked = held_out_questions(questions)
    answers = []
    for head, path in zip(heads, paths, strict=True):
        chat = as_chat
        if chat is None:
            chat = find_weights(path, which).stage != "pretrain"
        for row, given in zip(asked, _ask(load(path, which), asked, chat), strict=True):
            question = row["kind"], row["language"], row["question"], row["answer"]
            answers.append(Answer(head, *question, given, given == row["answer"]))
    return Examination(answers)


def _ask(
    loaded: tuple[Any, Any], rows: list[dict[str, str]], as_chat: bool
) -> Iterator[str]:
    model, tokenizer = loaded
    for start in range(0, len(rows), _BATCH):
        batch = rows[start : start + _BATCH]
        answers = [row["answer"] for row in batch]
        ids = tokenizer(answers, add_special_tokens=False)["input_ids"]
        prompts: list[Any] = [row["prompt"] for row in batch]
        if as_chat:
            prompts = [[{"role": "user", "content": row["question"]}] for row in batch]
        longest = max(map(len, ids)) + _SPARE_TOKENS
        texts = generate(
            model, tokenizer, prompts, max_new_tokens=longest, temperature=0
        )
        for text in texts:
            yield (text if as_chat else text.split("\n")[0]).strip()
