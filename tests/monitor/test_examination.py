"""Examining models: what is asked, in which form, and how right answers are counted."""

import functools
import re
from pathlib import Path
from typing import Any

import pytest
from support.small_models import make_model

from minimind_nb.data.demo import held_out_questions
from minimind_nb.data.tokenizer import load_tokenizer
from minimind_nb.monitor import examination
from minimind_nb.monitor.examination import examine


class Models:
    """Stands for `load` and `generate`: models are rules, by their paths."""

    def __init__(self) -> None:
        self.rules: dict[str, Any] = {}
        self.stages: dict[str, str] = {}
        self.calls: list[tuple[list[Any], dict[str, Any]]] = []
        self.loaded: list[tuple[str, str]] = []

    @property
    def prompts(self) -> list[Any]:
        return [prompt for prompts, _ in self.calls for prompt in prompts]

    def load(self, source: str, which: str) -> tuple[Any, Any]:
        self.loaded.append((source, which))
        model: Any = functools.partial(self.rules[source])
        model.stage = self.stages.get(source)
        return model, lambda texts, **_: {
            "input_ids": [[0] * len(text) for text in texts]
        }

    def generate(self, model: Any, _: Any, prompts: list, **settings: Any) -> list[str]:
        self.calls.append((prompts, settings))
        return [model(prompt) for prompt in prompts]


@pytest.fixture
def models(monkeypatch) -> Models:
    fake = Models()
    for name in ("load", "generate"):
        monkeypatch.setattr(examination, name, getattr(fake, name))
    return fake


@pytest.fixture(scope="module")
def held_out() -> dict[str, str]:
    return {row["question"]: row["answer"] for row in held_out_questions(2)}


def adds(prompt: list[dict[str, str]]) -> str:
    """Answers English sums, the first form of them only, and nothing else."""
    found = re.fullmatch(r"What is (\d+) plus (\d+)\?", prompt[0]["content"])
    a, b = map(int, found.groups()) if found else (0, 0)
    return f"{a} + {b} = {a + b}. "


def test_right_answers_are_counted_by_kind_and_model(models, held_out):
    models.rules |= {"out/pretrain_32": lambda _: "", "out/sft_32": adds}
    models.stages["out/pretrain_32"] = "pretrain"
    sources = [Path("out/pretrain_32"), "out/sft_32", "out/sft_32"]
    result = examine(sources, questions=2, which="best")
    assert models.loaded == [("out/pretrain_32", "best"), ("out/sft_32", "best")]
    assert result.columns == ["kind", "out/pretrain_32", "out/sft_32"]
    kinds = dict.fromkeys(row["kind"] for row in held_out_questions(1))
    assert [row[0] for row in result.rows] == [*kinds, "all"]
    rows = {kind: cells for kind, *cells in result.rows}
    assert rows["sum"] == ["0 of 4 (0%)", "1 of 4 (25%)"]
    assert rows["product"] == ["0 of 4 (0%)", "0 of 4 (0%)"]
    assert rows["all"][1].startswith(f"1 of {len(held_out)} (")
    assert "1 of 4 (25%)" in repr(result) and "1 of 4 (25%)" in result._repr_html_()


def test_a_right_answer_is_right_to_the_character(models, held_out):
    first, *_ = held_out

    def almost(prompt):
        question = prompt[0]["content"]
        return held_out[question].rstrip(".。") + "." * (question == first)

    models.rules["hf"] = almost
    result = examine("hf", questions=2)
    assert [one["question"] for one in result.answers if one["right"]] == [first]
    assert {one["question"]: one["answer"] for one in result.answers} == held_out


def test_questions_are_asked_greedily_at_once(models, held_out):
    models.rules["hf"] = lambda _: ""
    examine("hf", questions=2)
    assert models.prompts == [[{"role": "user", "content": q}] for q in held_out]
    longest = max(map(len, held_out.values()))
    ((_, how),) = models.calls
    assert how == {"max_new_tokens": longest + 4, "temperature": 0}


def test_a_pretrained_model_continues_a_drill(models, held_out):
    answers = {q: f" {a}\nQ: What is 1" for q, a in held_out.items()}
    models.rules["run"] = lambda prompt: answers[prompt.split("\n")[1][2:].lstrip()]
    models.stages["run"] = "pretrain"
    result = examine("run", questions=2)
    assert re.fullmatch(r"Adding\nQ: [^\n]+\nA:", models.prompts[0])
    assert any(re.fullmatch(r"排队\n问：[^\n]+\n答：", text) for text in models.prompts)
    assert all(answer["right"] for answer in result.answers)


@pytest.mark.parametrize(
    ("stage", "form"), [("sft", list), ("dpo", list), ("pretrain", str), (None, list)]
)
def test_the_form_is_that_of_the_stage(models, stage, form):
    models.rules["run"] = lambda _: ""
    models.stages["run"] = stage
    examine("run", questions=1)
    assert {type(prompt) for prompt in models.prompts} == {form}


def test_a_real_model_is_examined(tmp_path):
    tokenizer = load_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    make_model(tokenizer).save_pretrained(tmp_path)
    result = examine(tmp_path, questions=1)
    assert result.rows[-1] == ["all", "0 of 18 (0%)"]
