"""The demo corpora: the same everywhere, nothing twice, and everything in them true."""

import bz2
import itertools
import json
import re
from collections import Counter

import demo_corpus
import pytest

Messages = list[dict[str, str]]
TEXTS = {
    language: demo_corpus.templates()[language] for language in demo_corpus.LANGUAGES
}
EQUATION = re.compile(r"(\d+) ([+×-]) (\d+) = (\d+)")
TURN = re.compile(r"(?:Q: |问：)(.+)\n(?:A: |答：)(.+)")


def read_shipped(name: str) -> list[dict]:
    lines = bz2.decompress((demo_corpus.CORPORA / name).read_bytes()).splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def corpus() -> list[str]:
    return [row["text"] for row in read_shipped("demo.jsonl.bz2")]


@pytest.fixture(scope="module")
def chats() -> list[Messages]:
    return [row["conversations"] for row in read_shipped("demo_sft.jsonl.bz2")]


@pytest.fixture(scope="module")
def pairs() -> list[dict[str, Messages]]:
    return read_shipped("demo_dpo.jsonl.bz2")


def test_shipped_files_are_what_the_program_generates():
    shipped = {path.stem: path.read_bytes() for path in demo_corpus.CORPORA.iterdir()}
    generated = demo_corpus.corpora()
    assert shipped.keys() == generated.keys()
    for name, rows in generated.items():
        assert bz2.decompress(shipped[name]).decode() == demo_corpus.to_lines(rows)
    assert sum(map(len, shipped.values())) < 220_000


def questions_of(messages: Messages) -> list[str]:
    return [each["content"] for each in messages if each["role"] == "user"]


def turns(corpus: list[str], question: str, answer: str) -> list[tuple[str, ...]]:
    """Find the groups of all questions and answers of one form."""
    form = re.compile(f"(?:Q: |问：){question}\n(?:A: |答：){answer}(?:\n|$)")
    found = [match.groups() for text in corpus for match in form.finditer(text)]
    assert len(found) > 100
    return found


def test_no_document_occurs_twice(corpus):
    assert len(set(corpus)) == len(corpus) == 8000


def test_both_languages_have_their_half_and_no_slot_is_left_open(corpus):
    chinese = sum("\n答：" in text for text in corpus)
    assert 0.47 < chinese / len(corpus) < 0.53
    assert not any("{" in text or "}" in text for text in corpus)
    assert all(text.count("\n") >= 4 for text in corpus)


def test_every_equation_is_true(corpus):
    compute = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
    equations = [found for text in corpus for found in EQUATION.findall(text)]
    assert len(equations) > 4000
    assert all(compute[sign](int(a), int(b)) == int(c) for a, sign, b, c in equations)


def test_every_day_of_the_week_is_right(corpus):
    english = turns(corpus, r"What day is it (\d) days after (\w+)\?", r"It is (\w+)\.")
    chinese = turns(corpus, r"(\w+)再过 (\d) 天是星期几？", r"是(\w+)。")
    chinese = [(n, day, later) for day, n, later in chinese]
    for language, found in (("en", english), ("zh", chinese)):
        days = TEXTS[language]["days"]
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
        days = TEXTS["en" if groups[0] else "zh"]["days"]
        assert days[(days.index(day) + int(n)) % 7] == later


def test_every_unit_is_converted_rightly(corpus):
    english = turns(
        corpus, r"How many \w+ are \d+ \w+\?", r"(\d+) (\w+) are (\d+) (\w+)\."
    )
    chinese = turns(corpus, r"\d+ \w+是多少\w+？", r"(\d+) (\w+)是 (\d+) (\w+)。")
    for language, found in (("en", english), ("zh", chinese)):
        factors = {(big, small): f for big, small, f in TEXTS[language]["units"]}
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
        months = TEXTS[language]["months"]
        for month, after in found:
            assert months[(months.index(month) + 1) % 12] == after


def test_held_out_questions_are_in_no_document(corpus):
    titles = {
        drill["title"] for by in TEXTS.values() for drill in by["drills"].values()
    }
    titles |= {by["mixed"] for by in TEXTS.values()}
    drills = [text for text in corpus if text.split("\n")[0] in titles]
    asked = {question for text in drills for question, _ in TURN.findall(text)}
    assert len(asked) > 2000
    assert not any(demo_corpus.is_held_out(question) for question in asked)


@pytest.mark.parametrize("language", demo_corpus.LANGUAGES)
@pytest.mark.parametrize("kind", TEXTS["en"]["drills"])
def test_each_kind_has_questions_held_out(kind, language):
    draw = demo_corpus.Draw(0)
    asked = {demo_corpus.ask(kind, language, draw)[0] for _ in range(1000)}
    held_out = sum(map(demo_corpus.is_held_out, asked))
    assert 0.01 < held_out / len(asked) < 0.15


def test_held_out_questions_are_asked_as_documents_do(corpus):
    rows = read_shipped("questions.jsonl.bz2")
    assert all(demo_corpus.is_held_out(row["question"]) for row in rows)
    assert len({row["question"] for row in rows}) == len(rows)
    sums = [row["answer"] for row in rows if row["kind"] == "sum"]
    assert len(sums) == 35
    assert all(EQUATION.search(answer) for answer in sums)
    begins = {text[: text.index("\n") + 4] for text in corpus}
    assert {row["prompt"][: row["prompt"].index("\n") + 4] for row in rows} <= begins


def test_conversations_have_one_to_four_questions_each_answered(chats):
    assert len({json.dumps(messages) for messages in chats}) == len(chats) == 6000
    lengths: Counter[int] = Counter()
    for messages in chats:
        roles = [each["role"] for each in messages if each["role"] != "system"]
        assert messages[0]["role"] in ("system", "user")
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert len(set(questions_of(messages))) == len(roles) // 2
        lengths[len(roles) // 2] += 1
    assert sorted(lengths) == [1, 2, 3, 4]
    assert min(lengths.values()) > 500


def test_both_languages_kinds_and_systems_occur_in_conversations(chats):
    said = [each for messages in chats for each in messages]
    systems = [each["content"] for each in said if each["role"] == "system"]
    assert 0.2 < len(systems) / len(chats) < 0.3
    assert set(systems) == {*TEXTS["en"]["systems"], *TEXTS["zh"]["systems"]}
    chinese = sum(messages[-1]["content"].endswith("。") for messages in chats)
    assert 0.47 < chinese / len(chats) < 0.53
    assert not any("{" in each["content"] for each in said)
    several = [messages for messages in chats if len(questions_of(messages)) > 1]
    months = [
        [question.startswith("Which month") for question in questions_of(messages)]
        for messages in several
    ]
    assert sum(map(all, months)) > 40
    assert sum(any(found) and not all(found) for found in months) > 40


def test_conversations_and_chosen_answers_are_the_right_ones(chats, pairs):
    answers = {}
    for kind, language in itertools.product(
        TEXTS["en"]["drills"], demo_corpus.LANGUAGES
    ):
        draw = demo_corpus.Draw(7)
        for turn in (demo_corpus.ask(kind, language, draw) for _ in range(3000)):
            answers[turn.question] = turn.answer
    checked = 0
    for messages in [*chats, *(row["chosen"] for row in pairs)]:
        for question, answer in itertools.pairwise(messages):
            if question["role"] == "user" and question["content"] in answers:
                assert answer["content"] == answers[question["content"]]
                checked += 1
    assert checked > 6_000


def test_held_out_questions_are_in_no_conversation_and_no_pair(chats, pairs):
    rows = [*chats, *(row["chosen"] for row in pairs)]
    asked = {question for messages in rows for question in questions_of(messages)}
    assert len(asked) > 2000
    assert not any(map(demo_corpus.is_held_out, asked))


def test_pairs_differ_in_their_last_answer_only(pairs):
    assert len({json.dumps(row) for row in pairs}) == len(pairs) == 1500
    for row in pairs:
        assert list(row) == ["chosen", "rejected"]
        assert row["chosen"][:-1] == row["rejected"][:-1]
        right, wrong = (messages[-1] for messages in row.values())
        assert right["role"] == wrong["role"] == "assistant"
        assert right["content"] != wrong["content"]
    earlier = sum(len(questions_of(row["chosen"])) == 2 for row in pairs)
    assert 0.25 < earlier / len(pairs) < 0.4


def test_wrong_answers_have_the_form_of_the_right_ones(pairs):
    names = [
        name
        for by in TEXTS.values()
        for key in ("names", "days", "months")
        for name in by[key]
    ]
    names += [word for pair in demo_corpus.templates()["words"] for word in pair]
    blank = re.compile("|".join([r"\d+", *sorted(names, key=len, reverse=True)]))
    for row in pairs:
        right, wrong = (blank.sub("_", m[-1]["content"]) for m in row.values())
        assert right == wrong


def test_no_wrong_answer_is_true(pairs):
    compute = {"+": int.__add__, "-": int.__sub__, "×": int.__mul__}
    equations = larger = rows = 0
    for row in pairs:
        question, wrong = (each["content"] for each in row["rejected"][-2:])
        if found := EQUATION.match(wrong):
            a, sign, b, c = found.groups()
            assert compute[sign](int(a), int(b)) != int(c)
            assert {a, b} == set(re.findall(r"\d+", question))
            equations += 1
        if found := re.match(r"(\d+) (?:is larger than|比) (\d+)(?:\.| 大)", wrong):
            assert int(found[1]) < int(found[2])
            larger += 1
        if found := re.match(r"(.+?)(?: is (?:first|last)\.|在最[前后]面。)$", wrong):
            assert found[1] in question
            rows += 1
    assert equations > 150
    assert larger > 25
    assert rows > 25


def test_both_languages_have_the_same_kinds_and_as_many_forms():
    english, chinese = TEXTS["en"], TEXTS["zh"]
    assert list(english["drills"]) == list(chinese["drills"])
    for one, other in zip(
        [*english["drills"].values(), *english["stories"]],
        [*chinese["drills"].values(), *chinese["stories"]],
        strict=True,
    ):
        assert len(one["questions"]) == len(other["questions"])


def test_draws_differ_and_reach_every_item():
    draw = demo_corpus.Draw(0)
    assert {draw.pick(range(3, 7)) for _ in range(200)} == {3, 4, 5, 6}
    assert sorted(draw.some("abc", 3)) == ["a", "b", "c"]
