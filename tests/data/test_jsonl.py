"""Each malformed row of the promise, its line and its column; and what is accepted."""

import functools
import gzip
import json
import pickle
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minimind_nb.data import jsonl
from minimind_nb.data.containers import iter_chunks
from minimind_nb.data.conversations import understand
from minimind_nb.data.jsonl import Chunk, DataError, Tally, read_rows

read_text = functools.partial(understand, "pretrain")

GOOD = b'{"text": "\xe4\xbd\xa0\xe5\xa5\xbd, world"}'


def read(data: bytes, first_line: int = 1):
    return read_rows(Chunk(first_line, data), read_text)


def read_file(path: Path, size: int = 1 << 20):
    rows, problems = [], []
    for chunk in iter_chunks(path, size):
        good, tally = read_rows(chunk, read_text)
        rows += good
        problems += tally.problems
    return rows, problems


# Kind, column (or two, where versions of the parser differ), reason.
REFUSED = {
    b'{"text": }': ("broken_json", 10, "broken JSON: Expecting value$"),
    b'{"text": "a\\x"}': ("broken_json", 12, r"Invalid \\escape"),
    b'{"text": "a\tb"}': ("broken_json", 12, "Invalid control character"),
    b'{"text": "a", "b": ' + b"9" * 5000 + b"}": ("broken_json", 1, "4300 digits"),
    b'{"text": "a long': ("truncated", 17, "does not end on this line"),
    b'{"text": "a"': ("truncated", 13, "does not end on this line"),
    b"{": ("truncated", 2, "does not end on this line"),
    b'{"text": "' + b"{" * 300: ("truncated", 311, "does not end on this line"),
    b"{'text': 'a'}": ("broken_json", 2, "property name enclosed in double quotes"),
    b'{"text": "a",}': ("broken_json", (13, 14), "broken JSON: "),
    b'{"b": [1, ]}': ("broken_json", (9, 11), "broken JSON: "),
    GOOD + b" " + GOOD: ("extra_data", 23, "more than one object a line"),
    GOOD + b", " + GOOD: ("extra_data", 22, "more than one object a line"),
    b'[{"text": "a"}]': ("not_object", 1, "is a list or a single value"),
    b'"text"': ("not_object", 1, "is a list or a single value"),
    b"  text,label": ("not_json", 3, "begins with 't'"),
    b"\xef\xbb\xbf" + GOOD: ("not_json", 1, "begins with"),
    "{'text': '中文'}".encode("gbk"): ("not_utf8", 11, "0xd6 is not UTF-8; from GBK"),
    b'{"text": "caf\xff"}': ("not_utf8", 14, "byte 0xff is not UTF-8"),
    b'{"text": "a\0b"}': ("nul", 12, "cut off or damaged"),
    b'{"text": "abc\0\0\0\0': ("nul", 14, "cut off or damaged"),
    GOOD + b"\0\0\0\0": ("nul", 22, "cut off or damaged"),
    b"\0\0\0\0": ("nul", 1, "cut off or damaged"),
    b'{"text": "\\ud83d"}': ("lone_surrogate", 11, r"\\ud83d is half"),
    b'{"text": "\\n", "b": ["\\uDE00"]}': ("lone_surrogate", 23, r"\\ude00 is half"),
    b'{"text": NaN, "b": 1}': ("not_a_string", 2, '"text" is NaN, not a string'),
    b'{"text": "a", "text": "b"}': ("duplicate_key", 15, "'text' comes twice"),
    b'{"b": {"c": 1, "c": 1}}': ("duplicate_key", 16, "'c' comes twice"),
    b'{"\\ud800": 1, "\\ud800": 1}': ("duplicate_key", 1, r"'\\ud800' comes twice"),
    b'{"body": "a", "n": 1}': (
        "unknown_form",
        1,
        r'row are \["body", "n"\]: expected text or',
    ),
    b'{"conversations": []}': ("unknown_form", 1, 'rows are for stage="sft"$'),
    b'{"messages": []}': ("unknown_form", 1, 'rows are for stage="sft"'),
    b'{"chosen": [], "rejected": []}': ("unknown_form", 1, 'rows are for stage="dpo"'),
    b'{"text": null}': ("not_a_string", 2, '"text" is null, not a string'),
    b'{"n": 1, "text": 5}': ("not_a_string", 10, '"text" is 5, not a string'),
    b'{"text": ["a"]}': ("not_a_string", 2, r'"text" is \["a"\], not'),
    b'{"a":' * 100_000: ("too_deep", 1, "nested too deep to be read"),
    b'{"a":' + b"[" * 50_000 + b"]" * 50_000 + b"}": ("too_deep", 1, "nested too"),
}


@pytest.mark.fault("F39")
@pytest.mark.parametrize("line", REFUSED, ids=lambda line: repr(line[:40]))
def test_bad_line_is_refused_at_its_place_and_its_neighbours_are_read(line):
    kind, column, reason = REFUSED[line]
    rows, tally = read(GOOD + b"\n\n" + line + b"\r\n" + GOOD, first_line=7)
    assert [number for number, _ in rows] == [7, 10]
    assert (tally.good, tally.kinds) == (2, {kind: 1})
    (bad,) = tally.problems
    assert (bad.line, bad.kind) == (9, kind)
    assert bad.column in (column if isinstance(column, tuple) else (column,))
    assert re.search(reason, bad.reason)
    assert len(bad.excerpt) <= 80
    assert bad.excerpt.isprintable()


ACCEPTED = {
    b"\xef\xbb\xbf" + GOOD: "你好, world",
    GOOD + b"\r": "你好, world",
    b" \t" + GOOD + b" ": "你好, world",
    '{"text": "a\u2028b\x85c"}'.encode(): "a\u2028b\x85c",
    b'{"id": 7, "text": "a", "tags": ["x"]}': "a",
    b'{"text": ""}': "",
    b'{"text": " \\n\\u0000\\ud83d\\ude00 \\\\ud83d"}': " \n\0😀 \\ud83d",
    b'{"text": "a", "b": [NaN, -Infinity]}': "a",
    b'{"text": "NaN [[[", "b": ' + b"[" * 99 + b"]" * 99 + b"}": "NaN [[[",
    json.dumps({"text": "x" * 12_000_000}).encode(): "x" * 12_000_000,
}


@pytest.mark.fault("F40")
@pytest.mark.parametrize("line", ACCEPTED, ids=lambda line: repr(line[:40]))
def test_unusual_but_valid_line_is_accepted_with_its_text_unchanged(line):
    rows, tally = read(line)
    assert not tally.problems
    assert [row.content for _, row in rows] == [ACCEPTED[line]]


def test_blank_lines_keep_the_numbers_physical():
    rows, _ = read(b"\n \r\n" + GOOD + b"\n\n\n" + GOOD)
    assert [number for number, _ in rows] == [3, 6]


@pytest.mark.fault("F41")
def test_many_keys_are_fine():
    keys = ", ".join(f'"{n}": 0' for n in range(100_000))
    assert read(f'{{"text": "a", {keys}}}'.encode())[1].good == 1


def test_excerpt_shows_the_surroundings_of_the_column():
    (bad,) = read(b'{"text": "' + b"x" * 5000 + b"\x01HERE" + b"y" * 5000)[1].problems
    assert bad.column == 5011
    assert "\\x01HERE" in bad.excerpt


def test_results_travel_to_other_processes():
    result = read(GOOD + b"\n{")
    assert pickle.loads(pickle.dumps(result)) == result


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz"])
@pytest.mark.parametrize("size", [1, 7, 64, 1 << 20])
def test_chunks_of_any_size_hold_whole_lines_and_the_whole_file(tmp_path, name, size):
    data = b"\n".join([GOOD, b"", b"{", GOOD * 9, GOOD, GOOD + b"\r"])
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    chunks = list(iter_chunks(path, size))
    assert b"".join(chunk.data for chunk in chunks) == data
    assert all(chunk.data.endswith(b"\n") for chunk in chunks[:-1])
    line = 1
    for chunk in chunks:
        assert chunk.first_line == line
        line += chunk.data.count(b"\n")
    rows, problems = read_file(path, size)
    assert [number for number, _ in rows] == [1, 5, 6]
    assert [bad.line for bad in problems] == [3, 4]


@pytest.mark.fault("F41")
@pytest.mark.parametrize("size", [1 << 20, 64 << 20])
def test_line_over_the_limit_is_refused_and_the_next_one_is_read(tmp_path, size):
    path = tmp_path / "long.jsonl"
    long = b'{"text": "' + b"x" * 17_000_000 + b'"}'
    path.write_bytes(b"\n".join([GOOD, long, GOOD, long]))
    rows, problems = read_file(path, size)
    assert [number for number, _ in rows] == [1, 3]
    places = [(bad.line, bad.kind) for bad in problems]
    assert places == [(2, "too_long"), (4, "too_long")]
    assert "the line has more than 16 MB, the most for one row" in problems[0].reason
    assert problems[0].excerpt.startswith('{"text": "xxx')


@pytest.mark.fault("F41")
def test_memory_stays_flat_on_a_line_of_a_hundred_megabytes(tmp_path):
    path = tmp_path / "long.jsonl.gz"
    with gzip.GzipFile(path, "wb", compresslevel=1) as stream:
        stream.write(GOOD + b'\n{"text": "')
        for _ in range(100):
            stream.write(b"x" * 1_000_000)
    script = (
        "import resource, sys\n"
        "from minimind_nb.data.jsonl import *\n"
        "from minimind_nb.data.containers import *\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "parts = [read_rows(c, dict) for c in iter_chunks(sys.argv[1])]\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
        "bad = parts[-1][1].problems[0]\n"
        "print(bad.kind, bad.line)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(path)],
        capture_output=True,
        text=True,
        check=True,
    )
    grown_kib, kind, line = done.stdout.split()
    assert (kind, line) == ("too_long", "2")
    assert int(grown_kib) < 60 * 1024


def test_array_on_the_first_line_only_is_a_bad_row_not_a_bad_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"[1]\n" + GOOD)
    rows, problems = read_file(path)
    assert len(rows) == 1
    assert problems[0].kind == "not_object"


def tally(good: int, bad: bytes) -> Tally:
    total = Tally(good)
    total.add(read(bad)[1])
    return total


def test_default_policy_lists_the_first_five_and_counts_by_kind():
    lines = b'{"text": 1}\n' * 2 + b"{\n" * 5
    with pytest.raises(DataError) as caught:
        tally(93, lines).raise_if_too_many("some/corpus.jsonl")
    message = str(caught.value).splitlines()
    assert message[0] == (
        "some/corpus.jsonl: 7 of 100 rows read cannot be used: 5 truncated, "
        "2 not a string"
    )
    assert message[1] == '  corpus.jsonl:1:2: "text" is 1, not a string'
    assert message[2] == '      {"text": 1}'
    assert sum(line.startswith("  corpus.jsonl:") for line in message) == 5
    assert message[-2] == "  … and 2 more"
    assert message[-1] == (
        'Fix these lines; on_bad_line="skip" leaves out at most max_bad_fraction=0.01 '
        "of the rows, here 7.000%."
    )
    assert len(caught.value.problems) == 7
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


@pytest.mark.fault("F41")
def test_of_endless_bad_rows_all_are_counted_and_few_are_kept(monkeypatch):
    monkeypatch.setattr(jsonl, "KEPT_PROBLEMS", 7)
    total = Tally()
    for first_line in (1, 6, 11):
        total.add(read(b"{}\n" * 5, first_line)[1])
    assert total.kinds == {"unknown_form": 15}
    assert [row.line for row in total.problems] == list(range(1, 8))
    assert len(read(b"{}\n" * 5000)[1].problems) == 7


def test_skipping_is_allowed_up_to_the_fraction():
    tally(99, b"{").raise_if_too_many("x", "skip")
    with pytest.raises(DataError, match=r"fraction=0\.01 of the rows, here 1\.010%"):
        tally(98, b"{").raise_if_too_many("x", "skip")
    tally(50, b"{\n" * 50).raise_if_too_many("x", "skip", 0.5)
    with pytest.raises(DataError, match="fraction=1 of the rows, here 100"):
        tally(0, b"{").raise_if_too_many("x", "skip", 1.0)


@pytest.mark.fault("F42")
def test_file_of_blank_lines_is_refused():
    with pytest.raises(DataError, match=r"x\.jsonl has no rows: every line"):
        read(b"\n \n")[1].raise_if_too_many("x.jsonl")
