"""The shipped demo corpora: found by name, and the questions that they hold out."""

import functools
import hashlib
from pathlib import Path

import pytest

from minimind_nb.data import demo
from minimind_nb.data.containers import iter_chunks
from minimind_nb.data.conversations import understand
from minimind_nb.data.jsonl import DataError, read_rows

# A run knows its data by these bytes: with others it cannot be resumed.
SHIPPED = {
    "pretrain": "2b0bd641c15e869c",
    "sft": "5fdf6a895eea0158",
    "rlaif": "5fdf6a895eea0158",
    "dpo": "dce41f66333e6ae8",
}


@pytest.mark.parametrize("record_format", SHIPPED)
def test_demo_is_unpacked_whole_and_once(tmp_path, record_format):
    file = demo.locate("demo", tmp_path / "cache", record_format)
    unpacked = file.stat()
    assert demo.locate("demo", tmp_path / "cache", record_format).stat() == unpacked
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert digest[:16] == SHIPPED[record_format]
    reading = functools.partial(understand, record_format)
    read = [read_rows(chunk, reading) for chunk in iter_chunks(file)]
    assert sum(len(rows) for rows, _ in read) >= 1500
    assert not any(tally.kinds for _, tally in read)


def test_another_data_path_is_a_file_that_can_be_read(tmp_path):
    file = tmp_path / "rows.jsonl"
    with pytest.raises(FileNotFoundError, match=r"rows\.jsonl does not exist"):
        demo.locate(file, tmp_path)
    file.touch()
    with pytest.raises(DataError, match=r"rows\.jsonl is empty"):
        demo.locate(file, tmp_path)
    file.write_text('{"text": "a"}\n')
    assert demo.locate(str(file), tmp_path, "sft") == Path(file)


def test_held_out_questions_are_capped_by_kind_and_language():
    twenty = demo.held_out_questions(20)
    assert len(twenty) == 178
    sums = [row for row in twenty if (row["kind"], row["language"]) == ("sum", "en")]
    assert len(sums) == 20
    assert demo.held_out_questions(5)[:5] == sums[:5]
    (month,) = [
        row for row in twenty if (row["kind"], row["language"]) == ("month", "zh")
    ]
    assert month == {
        "kind": "month",
        "language": "zh",
        "question": "十二月的上一个月是几月？",
        "answer": "十二月的上一个月是十一月。",
        "prompt": "月份\n问：十二月的上一个月是几月？\n答：",
    }
