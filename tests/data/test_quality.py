import json
from typing import Any

import numpy as np
import pytest

from minimind_nb.data.quality import find_faults, read_lines, sign

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
    """A function that finds faults of rows: what follows each line, by kind."""

    def find(rows, validation=(), **more):
        files = [tmp_path / "rows.jsonl", tmp_path / "validation.jsonl"]
        for file, each in zip(files, (rows, validation), strict=True):
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in each)
            file.write_text(text, encoding="utf-8")
        stage = "pretrain" if "text" in rows[0] else "sft"
        more |= {"val_path": str(files[1])} if validation else {}
        faults, _ = find_faults([str(files[0])], stage, **more)
        return {
            kind: {line: why.partition(":")[0] for line, why in found.items()}
            for kind, found in faults.items()
            if found
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
        "duplicates": {21: "as line 11", 41: "as line 11"},
        "near_duplicates": {22: "as line 12"},
        "repeated_answers": {23: "as line 13"},
        "identity": {24: "I am ChatGPT"},
        "empty": {25: "？？ ！…"},
        "overlap": {26: "as line 4", 27: "as line 5"},
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
        ("I am Claude Monet, a painter.", False),
        ("I am Claude AI.", True),
        ("作为百度的创始人，李彦宏出生于1968年。", False),
        ("我是百度的员工。", False),
        ("李彦宏说：“我由百度的同事介绍，开发了搜索引擎。”", False),
        ("通义千问由阿里云开发，是一个语言模型。", False),
    ],
)
def test_only_an_answer_that_speaks_as_another_model_is_a_claim(answer, claims, find):
    assert ("identity" in find([chat("?a", answer)])) == claims
    assert "identity" not in find([chat(answer, "?a")])


def test_the_names_of_other_models_are_a_setting(find):
    # The first of near duplicates is gone for what it claims, so the second is to stay.
    long = "The moon pulls at the water of the sea, and the water follows it around."
    rows = [chat("?a", f"I am ChatGPT. {long}"), chat("?a", f"I am MiniMind. {long}")]
    assert find(rows) == {"identity": {1: "I am ChatGPT"}}
    rows = [chat("?a", "I am MiniMind."), chat("?b", "I am ChatGPT.")]
    assert find(rows, identities=["MiniMind"]) == {"identity": {1: "I am MiniMind"}}
    assert find(rows, identities=()) == {}


def test_a_short_answer_may_repeat_and_a_row_is_no_other_question(find):
    assert find([chat(text_of(n), "It is Monday.") for n in range(9)]) == {}
    assert "repeated_answers" not in find([chat("a", text_of(2)) for _ in range(3)])


@pytest.mark.parametrize(("changed", "alike"), [(4, True), (40, False)])
def test_signatures_agree_as_far_as_texts_do(changed, alike):
    texts = [text_of(1, 300), text_of(1, 300)[:-changed] + text_of(3)[:changed]]
    first, second = (np.frombuffer(sign(text), np.uint8) for text in texts)
    runs = [{text[n : n + 5] for n in range(len(text))} for text in texts]
    truth = len(runs[0] & runs[1]) / len(runs[0] | runs[1])
    assert np.mean(first == second) == pytest.approx(truth, abs=0.12)


def test_a_text_of_many_letters_has_a_signature_too_and_an_empty_one_none():
    assert len(sign("ab" * 10_000)) == len(sign("一")) == 128
    assert sign("") == b""


def test_rows_alike_in_a_chain_lead_to_the_first(find):
    text = text_of(1, 300)
    chain = [{"text": text[10 * n :] + text_of(7, n * 5)} for n in range(6)]
    alike = dict.fromkeys(range(2, 7), "as line 1")
    assert find(chain) == {"near_duplicates": alike}


def test_roles_tools_and_thoughts_are_counted(tmp_path):
    rows: list[Any] = [chat("a b", "<think>c</think>d"), chat("e", "f"), chat("k", "l")]
    rows[1]["conversations"].insert(0, {"role": "system", "content": "g"})
    rows[1]["conversations"][2]["reasoning_content"] = "h"
    rows[2]["tools"] = [{"name": "t"}]
    rows += [chat('"role": "system"', '"tool_calls": "tools": [{'), {"text": "bad"}]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    faults, traits = find_faults([str(file)], "sft")
    assert traits == {"with_system": 1, "with_thoughts": 2, "with_tools": 1}
    assert 'the keys of the row are ["text"]' in faults["bad_rows"][5]


def test_lines_are_read_without_a_byte_order_mark_and_named_by_file(tmp_path):
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.txt")]
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"b": 2}')
    (tmp_path / "b.txt").write_text("c\n\nd\n")
    lines = [(1, b'{"a": 1}\r'), (3, b'{"b": 2}')]
    assert [*read_lines(names[:1], "reading")] == lines
    both = [place for place, _ in read_lines(names, "reading")]
    assert both == [f"{names[n]}:{line}" for n in (0, 1) for line in (1, 3)]
