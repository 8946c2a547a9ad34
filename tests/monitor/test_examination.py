"""Examining models: what is asked, in which form, and how right answers are counted."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from minimind_nb.data.demo import held_out_questions
from minimind_nb.data.tokenizer import read_tokenizer, write_tokenizer
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.monitor import examination
from minimind_nb.monitor.examination import Examination, examine

KINDS = list(dict.fromkeys(row["kind"] for row in held_out_questions(1)))
Rule = Callable[[Any], str]


class Models:
    """Stands for `load` and `generate`: models are rules, by the name of their file."""

    def __init__(self) -> None:
        self.rules: dict[str, Rule] = {}
        self.stages: dict[str, str] = {}
        self.prompts: list[Any] = []
        self.batches: list[int] = []
        self.settings: list[dict[str, Any]] = []
        self.loaded: list[tuple[str, str]] = []

    def load(self, source: Path, which: str) -> tuple[Rule, Any]:
        self.loaded.append((str(source), which))
        return self.rules[source.name], lambda texts, **_: {
            "input_ids": [[0] * len(text) for text in texts]
        }

    def find_weights(self, source: Path, which: str) -> Any:
        return SimpleNamespace(stage=self.stages.get(source.name))

    def generate(
        self, model: Rule, tokenizer: Any, prompts: list[Any], **settings: Any
    ) -> list[str]:
        self.prompts += prompts
        self.batches.append(len(prompts))
        self.settings.append(settings)
        return [model(prompt) for prompt in prompts]


@pytest.fixture
def models(monkeypatch) -> Models:
    fake = Models()
    monkeypatch.setattr(examination, "load", fake.load)
    monkeypatch.setattr(examination, "find_weights", fake.find_weights)
    monkeypatch.setattr(examination, "generate", fake.generate)
    return fake


@pytest.fixture(scope="module")
def held_out() -> dict[str, str]:
    return {row["question"]: row["answer"] for row in held_out_questions(2)}


def adds(prompt: list[dict[str, str]]) -> str:
    """Answers English sums, the first form of them only, and nothing else."""
    found = re.fullmatch(r"What is (\d+) plus (\d+)\?", prompt[0]["content"])
    a, b = map(int, found.groups()) if found else (0, 0)
    return f"{a} + {b} = {a + b}. "


def test_right_answers_are_counted_by_kind(models, held_out):
    models.rules["sft_32"] = adds
    result = examine("out/sft_32", questions=2)
    form = re.compile(r"What is \d+ plus \d+\?")
    right = sum(bool(form.fullmatch(question)) for question in held_out)
    assert right == 1
    assert result.count("sft_32", "sum") == (1, 4)
    assert result.count("sft_32", "product") == (0, 4)
    assert result.count("sft_32") == (1, len(held_out))
    assert result.columns == ["kind", "sft_32"]
    assert [row[0] for row in result.rows] == [*KINDS, "all"]
    assert result.rows[0][1] == "1 of 4 (25%)"
    assert "sum" in repr(result)
    assert "1 of 4 (25%)" in result._repr_html_()


def test_a_right_answer_is_right_to_the_character(models):
    answers = {row["question"]: row["answer"] for row in held_out_questions(1)}
    first, *_ = answers
    models.rules["hf"] = lambda prompt: (
        answers[prompt[0]["content"]].rstrip(".。")
        + "." * (prompt[0]["content"] == first)
    )
    result = examine("hf", questions=1)
    assert [answer.question for answer in result.answers if answer.right] == [first]
    assert Examination(result.answers[:2]).rows == [
        ["sum", "1 of 2 (50%)"],
        ["all", "1 of 2 (50%)"],
    ]


def test_every_held_out_question_is_asked_in_a_chat_greedily(models, held_out):
    models.rules["hf"] = lambda _: ""
    result = examine("hf", questions=2)
    assert models.prompts == [[{"role": "user", "content": q}] for q in held_out]
    assert {answer.question: answer.expected for answer in result.answers} == held_out
    assert all(settings["temperature"] == 0 for settings in models.settings)


def test_questions_go_in_batches_with_room_for_the_longest_answer(models, monkeypatch):
    monkeypatch.setattr(examination, "_BATCH", 10)
    models.rules["hf"] = lambda _: ""
    result = examine("hf", questions=2)
    assert max(models.batches) == 10
    assert sum(models.batches) == len(result.answers)
    expected = [len(answer.expected) for answer in result.answers]
    assert models.settings[0]["max_new_tokens"] == max(expected[:10]) + 4


@pytest.mark.parametrize(
    ("name", "stage"), [("run", "pretrain"), ("pretrain_32.pth", "pretrain")]
)
def test_a_pretrained_model_goes_on_with_a_drill(models, held_out, name, stage):
    answers = {q: f" {a}\nQ: What is 1" for q, a in held_out.items()}
    models.rules[name] = lambda prompt: answers[prompt.split("\n")[1][2:].lstrip()]
    models.stages[name] = stage
    result = examine(name, questions=2)
    assert re.fullmatch(r"Adding\nQ: [^\n]+\nA:", models.prompts[0])
    assert any(re.fullmatch(r"排队\n问：[^\n]+\n答：", text) for text in models.prompts)
    assert result.count(name) == (len(held_out), len(held_out))
    assert result.rows[-1][1].endswith("(100%)")


@pytest.mark.parametrize(
    ("stage", "as_chat", "form"),
    [("sft", None, list), ("dpo", None, list), ("sft", False, str)]
    + [("pretrain", None, str), ("pretrain", True, list), (None, None, list)],
)
def test_the_form_is_the_stages_unless_it_is_said(models, stage, as_chat, form):
    models.rules["run"] = lambda _: ""
    models.stages["run"] = stage
    examine("run", questions=1, as_chat=as_chat)
    assert {type(prompt) for prompt in models.prompts} == {form}


def test_several_models_stand_side_by_side(models):
    models.rules |= {"pretrain_32": lambda _: "", "sft_32": adds}
    models.stages["pretrain_32"] = "pretrain"
    result = examine([Path("out/pretrain_32"), "out/sft_32"], questions=2, which="best")
    assert result.columns == ["kind", "pretrain_32", "sft_32"]
    assert result.rows[0] == ["sum", "0 of 4 (0%)", "1 of 4 (25%)"]
    assert models.loaded == [("out/pretrain_32", "best"), ("out/sft_32", "best")]


def test_models_of_one_name_are_told_apart_and_the_same_is_asked_once(models):
    models.rules["sft_32"] = adds
    result = examine(["a/sft_32", "b/sft_32", Path("a/sft_32")], questions=1)
    assert result.columns == ["kind", "a/sft_32", "b/sft_32"]
    assert result.count("a/sft_32", "sum")[1] == 2


def test_nothing_to_ask_is_an_error(models):
    with pytest.raises(ValueError, match="questions=0: 1 or more of each kind"):
        examine("run", questions=0)
    with pytest.raises(ValueError, match="no model to examine: name a run"):
        examine([])


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Iterator[Path]:
    """A model with random weights and the shipped tokenizer, as a saved folder."""
    spec = read_tokenizer()
    torch.manual_seed(0)
    model = MiniMindForCausalLM(
        MiniMindConfig(
            hidden_size=32,
            num_hidden_layers=1,
            intermediate_size=48,
            vocab_size=spec.vocab_size,
        )
    )
    folder = tmp_path_factory.mktemp("saved") / "tiny"
    model.save_pretrained(folder)
    write_tokenizer(spec, folder)
    yield folder


@pytest.mark.parametrize("as_chat", [False, True])
def test_a_real_model_is_examined(tiny, as_chat):
    result = examine(tiny, questions=1, as_chat=as_chat)
    assert len(result.answers) == 18
    assert result.count("tiny") == (0, 18)
    assert as_chat or any(answer.given for answer in result.answers)
    assert as_chat or not any("\n" in answer.given for answer in result.answers)
