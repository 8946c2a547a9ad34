import json

import numpy as np
import pytest

from minimind_nb.data.quality import find_faults, find_repeats, measure, sign

WORDS = (
    "river stone winter garden letter window music paper silver morning engine forest "
    "bread ladder market ocean candle bridge valley summer harbor kettle mirror pocket"
).split()
LETTERS = (
    "天地玄黄宇宙洪荒日月盈昃辰宿列张寒来暑往秋收冬藏闰余成岁律吕调阳云腾致雨露结为霜"
)


def text_of(number: int, size: int = 40) -> str:
    """A text of its own for each number, Chinese for odd ones."""
    draw = np.random.RandomState(number)
    if number % 2:
        return "".join(draw.choice([*LETTERS], 2 * size))
    return " ".join(draw.choice(WORDS, size))


def chat(question: str, answer: str) -> dict[str, object]:
    roles = zip(("user", "assistant"), (question, answer), strict=True)
    return {"conversations": [{"role": role, "content": text} for role, text in roles]}


def said(number: int) -> tuple[str, str]:
    return text_of(1000 + number, 12), text_of(number)


@pytest.fixture
def find(tmp_path):
    """A function that finds faults of conversations, as [line, line repeated] by kind."""

    def find(rows, validation=(), **more):
        files = tmp_path / "rows.jsonl", tmp_path / "validation.jsonl"
        for file, each in zip(files, (rows, validation), strict=True):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each)
            file.write_text(text, encoding="utf-8")
        held_out = measure([str(files[1])], "sft") if validation else None
        faults = find_faults(measure([str(files[0])], "sft", **more), held_out)
        return {
            k: found[:, [1, 3]].tolist() for k, found in faults.items() if len(found)
        }

    return find


def test_planted_faults_are_found_and_no_others(find):
    rows = [chat(*said(n)) for n in range(60)]
    rows[20] = rows[40] = rows[10]
    rows[21] = chat(f"{said(11)[0]}?", said(11)[1].replace(" ", "，", 3))
    rows[22] = chat(text_of(500), said(12)[1])
    rows[23] = chat("Who are you?", "I am ChatGPT.")
    rows[24] = chat("？？", "！…")
    validation = [chat(*said(n)) for n in range(100, 110)]
    rows[25], rows[26] = validation[3], chat(said(104)[0], f"{said(104)[1]} end")
    assert find(rows, validation) == {
        "duplicates": [[21, 11], [41, 11]],
        "near_duplicates": [[22, 12]],
        "repeated_answers": [[23, 13]],
        "identity": [[24, -1]],
        "empty": [[25, -1]],
        "overlap": [[26, 4], [27, 5]],
    }


def test_nothing_is_found_in_rows_without_faults(find):
    rows = [chat(*said(n)) for n in range(300)]
    assert find(rows, [chat(*said(n)) for n in range(300, 400)]) == {}


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("I'm Claude, made to help.", True),
        ("I am a large language model developed by OpenAI.", True),
        ("As an AI language model trained by Google's rival OpenAI, no.", False),
        ("My name is Qwen.", True),
        ("我是ChatGPT，一个人工智能助手。", True),
        ("我是一个由OpenAI训练的大型语言模型。", True),
        ("作为一个由百度开发的人工智能助手，我很乐意。", True),
        ("我是通义千问。", True),
        ("ChatGPT was developed by OpenAI in 2022.", False),
        ("我在学习使用ChatGPT，它由OpenAI开发。", False),
        ("我是一个人工智能助手，由OpenAI开发。", True),
        ("我不是ChatGPT。", False),
        ("I am not Claude. I am MiniMind.", False),
        ("I am a Gemini, born in June.", False),
        ("I am MiniMind.", False),
        ("通义千问由阿里云开发，是一个语言模型。", False),
    ],
)
def test_only_an_answer_that_speaks_as_another_model_is_a_claim(answer, claims, find):
    assert ("identity" in find([chat("?a", answer)])) == claims
    assert "identity" not in find([chat(answer, "?a")])


def test_the_names_of_other_models_are_a_setting(find):
    rows = [chat("?a", "I am MiniMind."), chat("?b", "I am ChatGPT.")]
    assert find(rows, identities=["MiniMind"]) == {"identity": [[1, -1]]}
    assert find(rows, identities=()) == {}


def test_a_short_answer_may_repeat_and_a_row_is_no_other_question(find):
    assert find([chat(text_of(n), "It is Monday.") for n in range(9)]) == {}
    assert "repeated_answers" not in find([chat("a", text_of(2)) for _ in range(3)])


@pytest.mark.parametrize(("changed", "alike"), [(4, True), (40, False)])
def test_signatures_agree_as_far_as_texts_do(changed, alike):
    texts = [text_of(1, 300), text_of(1, 300)[:-changed] + text_of(3)[:changed]]
    first, second = sign([text.lower() for text in texts])
    runs = [{text[n : n + 5] for n in range(len(text))} for text in texts]
    truth = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    assert np.mean(first == second) == pytest.approx(truth, abs=0.12)


def test_a_signature_depends_on_its_own_text_alone():
    texts = ["ab", "", text_of(1), "一"]
    together = sign(texts)
    for text, signature in zip(texts, together, strict=True):
        assert (sign([text])[0] == signature).all()
    assert sign([]).shape == (0, 128)


def test_rows_alike_in_a_chain_lead_to_the_first(tmp_path):
    text = text_of(1, 300)
    chain = [text[10 * n :] + text_of(7, n * 5) for n in range(6)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"text": each}) + "\n" for each in chain))
    equal, alike = find_repeats(measure([str(file)], "pretrain"))
    assert equal.tolist() == [0, 1, 2, 3, 4, 5]
    assert alike.tolist() == [0] * 6


def test_roles_tools_and_thoughts_are_counted(tmp_path):
    rows = [chat("a b", "<think>c</think>d"), chat("e", "f")]
    first: list[dict[str, object]] = rows[1]["conversations"]  # pyright: ignore
    first.insert(0, {"role": "system", "content": "g"})
    first[2]["reasoning_content"] = "h"
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = measure([str(file)], "sft")
    counted = {n: found.traits[n] for n in ("system", "<think>", "reasoning_content")}
    assert counted == {"system": 1, "<think>": 1, "reasoning_content": 1}
    assert found.table[:, 3].tolist() == [1, 1]
