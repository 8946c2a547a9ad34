"""Ask models the questions that the demo corpora hold out, and count exact answers."""

import os
from collections.abc import Sequence
from typing import Any

from ..data.demo import held_out_questions
from ..model.generation import generate
from ..model.loading import load
from .tables import Table

_SPARE_TOKENS = 4  # an exact answer needs no more than its own text, give or take
_Source = str | os.PathLike[str]


class Examination(Table):
    """Right answers by kind of question, one column a model.

    `answers` has each: a row of `held_out_questions` with `model`, `given`, and `right`.
    """

    def __init__(self, answers: list[dict[str, Any]]) -> None:
        self.answers = answers
        models = list(dict.fromkeys(answer["model"] for answer in answers))
        kinds = [*dict.fromkeys(answer["kind"] for answer in answers), "all"]
        super().__init__("Held-out questions answered exactly", ["kind", *models], [])
        for kind in kinds:
            self.rows.append([kind, *(self._score(kind, model) for model in models)])

    def _score(self, kind: str, model: str) -> str:
        asked = [each for each in self.answers if each["model"] == model]
        right = [each["right"] for each in asked if kind in (each["kind"], "all")]
        return f"{sum(right)} of {len(right)} ({sum(right) / len(right):.0%})"


def examine(
    source: _Source | Sequence[_Source], *, questions: int = 20, which: str = "last"
) -> Examination:
    """Ask one or several models the held-out questions of the demo corpora, greedily.

    At most `questions` of each kind in each language are asked; an answer is right if it
    is the corpus's own, to the character. `source` and `which` are what `load` takes. A
    model is asked in a chat; one that was only pretrained continues a drill instead, up
    to the end of the line. Raises what `load` raises.
    """
    several = [source] if isinstance(source, str | os.PathLike) else source
    asked = held_out_questions(questions)
    answers = []
    for name in dict.fromkeys(os.fspath(each) for each in several):
        model, tokenizer = load(name, which)
        chat = model.stage != "pretrain"
        prompts: list[Any] = [row["prompt"] for row in asked]
        if chat:
            prompts = [[{"role": "user", "content": row["question"]}] for row in asked]
        texts = [row["answer"] for row in asked]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        how = {"max_new_tokens": max(map(len, ids)) + _SPARE_TOKENS, "temperature": 0}
        outputs = generate(model, tokenizer, prompts, **how)
        for row, output in zip(asked, outputs, strict=True):
            given = (output if chat else output.partition("\n")[0]).strip()
            right = given == row["answer"]
            answers.append(row | {"model": name, "given": given, "right": right})
    return Examination(answers)
