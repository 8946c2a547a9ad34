"""The report on a file in which faults were planted."""

import json

import pytest
from support.lab import ROOT

import minimind_nb as mm

DARK = pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])

LISTED = {
    "bad_rows": "line 26, the row does not end",
    "empty": "line 27",
    "duplicates": "line 21, as line 4",
    "near_duplicates": "line 25, as line 24",
    "identity": "line 23, 我是通义千问",
    "long": "line 58",
}


def chat(question: str, answer: str) -> str:
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return json.dumps({"conversations": turns}, ensure_ascii=False)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """The example chats, and rows of each kind that should not be there."""
    texts = (ROOT / "examples" / "corpus.jsonl").read_text().splitlines()
    good = (ROOT / "examples" / "chat.jsonl").read_text().splitlines()
    story = " ".join(json.loads(row)["text"] for row in texts[:6])
    rows = [
        *good[:20],
        good[3],
        chat("Who are you?", "I am ChatGPT, a language model trained by OpenAI."),
        chat("你是谁？", "我是通义千问，由阿里云开发的语言模型。"),
        chat("Tell me a story.", story),
        chat("Tell me a story!", story + "That is all."),
        '{"conversations": [{"role": "user", "content": "unfinished',
        chat("?", "…"),
        *good[20:],
        chat("Tell me everything.", "All of it, in order. " * 700),
    ]
    (tmp_path / "chat.jsonl").write_text("\n".join(rows) + "\n")
    monkeypatch.chdir(tmp_path)
    return "chat.jsonl"


@DARK
def test_every_planted_fault_is_listed_with_its_row(show, planted, dark):
    report = mm.data_report(planted, stage="sft")
    page = show(report._repr_html_(), "data-report", dark, gallery=True)
    rows = page.locator("tr").all_inner_texts()
    for words, lines in LISTED.items():
        assert any(words in row and lines in row for row in rows), words
    assert page.evaluate("document.body.scrollWidth <= innerWidth")


@DARK
def test_what_is_learned_is_marked_in_a_preview(show, planted, dark):
    cfg = mm.TrainConfig(
        stage="sft", data_path=planted, on_bad_line="skip", max_bad_fraction=0.1
    )
    page = show(mm.preview(cfg, rows=1)._repr_html_(), "preview", dark, gallery=True)
    learned = page.locator(".learned").all_inner_texts()
    assert learned and not any("<|im_start|>" in text for text in learned)
