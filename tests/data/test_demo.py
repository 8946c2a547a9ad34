"""The demo corpus: the same everywhere, nothing twice, and everything in it true."""

import hashlib
import re

import pytest

from minimind_nb.data import demo, templates
from minimind_nb.data.jsonl import check_text_row, iter_chunks, read_rows

SHA256 = "168df26ef978e58dacab0a6782857acd8b185536ff623633e8230b6829c2f758"
EQUATION = re.compile(r"(\d+) ([+×-]) (\d+) = (\d+)")
TURN = re.compile(r"(?:Q: |问：)(.+)\n(?:A: |答：)(.+)")


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return list(demo.documents())


def turns(corpus: list[str], question: str, answer: str) -> list[tuple[str, ...]]:
    """Find the groups of all questions and answers of one form."""
    form = re.compile(f"(?:Q: |问：){question}\n(?:A: |答：){answer}(?:\n|$)")
    found = [match.groups() for text in corpus for match in form.finditer(text)]
    assert len(found) > 100
    return found


def test_corpus_has_these_bytes_on_every_machine(tmp_path):
    path = demo.write_corpus(tmp_path / "new")
    assert path == tmp_path / "new" / "demo.jsonl"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def test_identical_file_is_left_alone_and_another_is_replaced(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "documents", lambda: iter(["a text", "一段文字"]))
    path = demo.write_corpus(tmp_path)
    first = path.stat()
    demo.write_corpus(tmp_path)
    assert path.stat().st_mtime_ns == first.st_mtime_ns
    assert path.stat().st_ino == first.st_ino
    path.write_text("another")
    demo.write_corpus(tmp_path)
    assert path.stat().st_size == first.st_size
    assert [p.name for p in tmp_path.iterdir()] == ["demo.jsonl"]


def test_every_row_passes_validation(tmp_path, corpus):
    chunks = iter_chunks(demo.write_corpus(tmp_path))
    results = [read_rows(chunk, check_text_row) for chunk in chunks]
    assert not any(result.problems or result.blank for result in results)
    assert [row["text"] for result in results for _, row in result.rows] == corpus


def test_no_document_occurs_twice(corpus):
    assert len(set(corpus)) == len(corpus) == demo.DOCUMENTS


def test_both_languages_have_their_half_and_no_slot_is_left_open(corpus):
    chinese = sum("\n答：" in text for text in corpus)
    assert 0.47 < chinese / len(corpus) < 0.53
    assert not any("{" in text or "}" in text for text in corpus)
    assert all(text.count("\n") >= 4 for text in corpus)


def test_every_equation_is_true(corpus):
    compute = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
    equations = [found for text in corpus for found in EQUATION.findall(text)]
    assert len(equations) > 5000
    assert all(compute[sign](int(a), int(b)) == int(c) for a, sign, b, c in equations)


def test_every_day_of_the_week_is_right(corpus):
    english = turns(corpus, r"What day is it (\d) days after (\w+)\?", r"It is (\w+)\.")
    chinese = turns(corpus, r"(\w+)再过 (\d) 天是星期几？", r"是(\w+)。")
    chinese = [(n, day, later) for day, n, later in chinese]
    for language, found in (("en", english), ("zh", chinese)):
        days = templates.DAYS[language]
        for n, day, later in found:
            assert days[(days.index(day) + int(n)) % 7] == later


def test_beans_come_up_on_the_right_day(corpus):
    scene = re.compile(
        r"^On (\w+) .*Then, (\d) days later.*\nQ: On which.*\nA: It was (\w+)\."
        r"|^(\w+)那天.*过了 (\d) 天.*\n问：豆子.*\n答：是(\w+)。"
    )
    found = [match.groups() for text in corpus if (match := scene.match(text))]
    assert len(found) > 100
    for groups in found:
        day, n, later = groups[:3] if groups[0] else groups[3:]
        days = templates.DAYS["en" if groups[0] else "zh"]
        assert days[(days.index(day) + int(n)) % 7] == later


def test_every_unit_is_converted_rightly(corpus):
    english = turns(
        corpus, r"How many \w+ are \d \w+\?", r"(\d) (\w+) are (\d+) (\w+)\."
    )
    chinese = turns(corpus, r"\d \w+是多少\w+？", r"(\d) (\w+)是 (\d+) (\w+)。")
    for language, found in (("en", english), ("zh", chinese)):
        factors = {(big, small): f for big, small, f in templates.UNITS[language]}
        for n, large, many, small in found:
            assert int(n) * factors[large, small] == int(many)


def test_every_comparison_is_true(corpus):
    pair = r"\d+ or \d+\?"
    for high, low in turns(corpus, f"Which is larger, {pair}", r"(\d+) is .* (\d+)\."):
        assert int(high) > int(low)
    for high, low in turns(corpus, r".* 哪个大？", r"(\d+) 比 (\d+) 大。"):
        assert int(high) > int(low)


def test_months_follow_each_other(corpus):
    for language, found in (
        (
            "en",
            turns(corpus, r"Which month comes after .*", r"After (\w+) comes (\w+)\."),
        ),
        ("zh", turns(corpus, r".*的下一个月是几月？", r"(\w+)的下一个月是(\w+)。")),
    ):
        months = templates.MONTHS[language]
        for month, after in found:
            assert months[(months.index(month) + 1) % 12] == after


def test_held_out_questions_are_in_no_document(corpus):
    titles = {title for by in templates.TITLES.values() for title in by.values()}
    drills = [text for text in corpus if text.split("\n")[0] in titles]
    asked = {question for text in drills for question, _ in TURN.findall(text)}
    assert len(asked) > 2000
    assert not any(demo.is_held_out(question) for question in asked)


@pytest.mark.parametrize("language", demo.LANGUAGES)
@pytest.mark.parametrize("kind", demo.KINDS)
def test_each_kind_has_questions_held_out(kind, language):
    draw = demo.Draw(0)
    asked = {demo.ask(kind, language, draw) for _ in range(2000)}
    held_out = sum(demo.is_held_out(example.question) for example in asked)
    assert 0.01 < held_out / len(asked) < 0.15


def test_every_kind_has_a_title_and_questions_in_both_languages():
    assert set(templates.QUESTIONS) == set(demo.KINDS)
    assert set(templates.TITLES) == {*demo.KINDS, "mixed"}
    for table in (*templates.QUESTIONS.values(), *templates.TITLES.values()):
        assert set(table) == set(demo.LANGUAGES)


def test_draws_stay_within_their_bounds_and_reach_them():
    draw = demo.Draw(0)
    assert {draw.number(3, 6) for _ in range(200)} == {3, 4, 5, 6}
    assert sorted(draw.some("abc", 3)) == ["a", "b", "c"]
    assert draw.pick(["only"]) == "only"
