"""Files of every usual kind give the same rows; others are named in one line."""

import bz2
import functools
import gzip
import json

import pytest

from minimind_nb.data import containers
from minimind_nb.data.containers import check_file, iter_chunks
from minimind_nb.data.conversations import understand
from minimind_nb.data.jsonl import DataError, Tally, read_rows

GOOD = b'{"text": "\xe4\xbd\xa0\xe5\xa5\xbd, world"}'
ROWS = [{"text": "你好\u2028"}, {"text": "b", "n": 1.5}, {"text": "c"}]


def read_file(path, size=1 << 20):
    check_file(path)
    rows, tally = [], Tally()
    for chunk in iter_chunks(path, size):
        good, counted = read_rows(chunk, functools.partial(understand, "pretrain"))
        rows += [(number, row.content) for number, row in good]
        tally.add(counted)
    return rows, tally


def lines(rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


KINDS = {
    "rows.jsonl": (lines(ROWS), [1, 2, 3]),
    "rows.GZ": (gzip.compress(lines(ROWS)), [1, 2, 3]),
    "packed.jsonl": (gzip.compress(lines(ROWS)), [1, 2, 3]),
    "plain.jsonl.gz": (lines(ROWS), [1, 2, 3]),
    "pretty.json": (json.dumps(ROWS, indent=2).encode(), [2, 5, 9]),
    "array.json": (b"\xef\xbb\xbf" + json.dumps(ROWS).encode(), [1, 1, 1]),
    "array.json.gz": (gzip.compress(json.dumps(ROWS, indent=2).encode()), [2, 5, 9]),
    "book.txt": ("你好\u2028\n\n \nb\n\n\nc".encode(), [1, 4, 7]),
    "book.TXT.gz": (gzip.compress("\n你好\u2028\r\n\r\nb\n\nc\n".encode()), [2, 4, 6]),
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("size", [1, 1 << 20])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, name, size):
    data, numbers = KINDS[name]
    (tmp_path / name).write_bytes(data)
    rows, tally = read_file(tmp_path / name, size)
    assert rows == list(zip(numbers, ["你好\u2028", "b", "c"], strict=True))
    assert not tally.kinds


def test_parquet_gives_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)
    rows, _ = read_file(path)
    assert rows == list(enumerate(["你好\u2028", "b", "c"], 1))
    nested = [{"text": "a", "x": {"b": 1}}, {"text": "b", "x": {"c": [{"d": 2}]}}]
    parquet.write_table(pyarrow.Table.from_pylist(nested), path)
    (chunk,) = iter_chunks(path)
    assert [json.loads(line) for line in chunk.data.splitlines()] == nested
    text = pyarrow.array([b"\xdf"]).view(pyarrow.string())
    parquet.write_table(pyarrow.table({"text": text}), path)
    with pytest.raises(DataError, match="is a damaged parquet file: 'utf-8'"):
        read_file(path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="is a damaged parquet file"):
        read_file(path)


def test_rows_in_a_file_named_as_text_are_rows(tmp_path):
    array = json.dumps(ROWS, indent=2).encode()
    for name in ("rows.txt", "rows.txt.jsonl"):
        for data in (lines(ROWS), array):
            (tmp_path / name).write_bytes(data)
            assert [text for _, text in read_file(tmp_path / name)[0]][1:] == ["b", "c"]


def test_a_fault_in_an_array_has_its_line(tmp_path):
    path = tmp_path / "rows.json"
    path.write_text('[\n{"text":\n1},\n{"text": "a"}]')
    _, tally = read_file(path)
    assert [(row.line, row.kind) for row in tally.problems] == [(2, "not_a_string")]
    for broken, line in (
        ('[\n{"text" 1}]', 2),
        ('[\n{"text": "a"}\n', 3),
        ("[{} {}]", 1),
    ):
        path.write_text(broken)
        with pytest.raises(DataError, match=rf"rows\.json:{line} is"):
            read_file(path)


def test_a_large_array_names_the_command_that_makes_lines_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(containers, "MOST_ARRAY_BYTES", 20)
    (tmp_path / "rows.json").write_text(json.dumps(ROWS))
    with pytest.raises(DataError, match=r"jq -c '\.\[\]' .*rows\.json > rows\.jsonl"):
        read_file(tmp_path / "rows.json")


def test_text_in_another_encoding_is_named(tmp_path):
    (tmp_path / "book.txt").write_bytes("a\n\n你".encode("gbk"))
    with pytest.raises(DataError, match=r"book\.txt:3 is not UTF-8; from GBK: iconv"):
        read_file(tmp_path / "book.txt")


WHOLE_FILE = {
    "empty.jsonl": (b"", "is empty: write one row a line"),
    "empty.jsonl.gz": (gzip.compress(b""), "is empty"),
    "cut.jsonl.gz": (gzip.compress(GOOD)[:-4], r"cannot be unpacked \(.*copy it again"),
    "bom16.jsonl": ('{"text": "a"}'.encode("utf-16"), "is UTF-16: use iconv -f UTF-16"),
    "le.jsonl": ('{"text": "a"}'.encode("utf-16-le"), "is UTF-16"),
    "be.jsonl": ('{"text": "a"}'.encode("utf-16-be"), "is UTF-16"),
    "table.csv": (b"text\nhello\n", r"is CSV or text: .* or name it \.txt"),
    "rows.zip": (b"PK\x03\x04..", "is a zip archive: unpack it with unzip"),
    "rows.xz": (b"\xfd7zXZ\0", "is compressed with xz: unpack it with xz -d"),
    "rows.zst": (b"\x28\xb5\x2f\xfd", "is compressed with zstd: unpack it with zstd"),
    "rows.bz2": (bz2.compress(GOOD), "is compressed with bzip2"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\n", "run git lfs pull"),
    "page.json": (b"\n<!DOCTYPE html><html>", "is an HTML page: download the file"),
}


@pytest.mark.fault("F40")
@pytest.mark.parametrize("name", WHOLE_FILE)
def test_other_formats_get_one_line_with_cause_and_fix(tmp_path, name):
    data, message = WHOLE_FILE[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=message) as caught:
        check_file(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_gzip_damaged_far_from_its_beginning_is_named(tmp_path):
    path = tmp_path / "cut.jsonl.gz"
    text = b"".join(GOOD + f"{n}\n".encode() for n in range(50_000))
    path.write_bytes(gzip.compress(text, 1)[:-40])
    check_file(path)
    with pytest.raises(DataError, match=r"cut\.jsonl\.gz cannot be unpacked"):
        list(iter_chunks(path, 1 << 16))


@pytest.mark.fault("F42")
def test_missing_file_suggests_a_near_name(tmp_path):
    (tmp_path / "corpus.jsonl").write_bytes(GOOD)
    with pytest.raises(FileNotFoundError, match=r"did you mean .*/corpus\.jsonl\?"):
        check_file(tmp_path / "corpsu.jsonl")
    with pytest.raises(FileNotFoundError, match="does not exist, or is no file: check"):
        check_file(tmp_path / "nowhere" / "x.jsonl")


@pytest.mark.fault("F42")
def test_folder_is_no_file(tmp_path):
    with pytest.raises(IsADirectoryError, match=r"is a folder: name a file in it"):
        check_file(tmp_path)
