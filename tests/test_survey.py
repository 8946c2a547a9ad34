import json
import re
from typing import Any

import pytest

from minimind_nb import cli
from minimind_nb.config import TrainConfig
from minimind_nb.data.jsonl import DataError
from minimind_nb.survey import data_report, filter_data, preview

NUMBERS = "one two three four five six seven eight nine ten eleven twelve".split()


def write(path, rows) -> str:
    lines = (
        r if isinstance(r, str) else json.dumps(r, ensure_ascii=False) for r in rows
    )
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return str(path)


def text(n: int) -> str:
    return " ".join(
        NUMBERS[(n * 7 + i * i * (n + 3)) % 12] + f"{n * i}" for i in range(20)
    )


def chat(question: str, answer: str, *more: dict[str, str]) -> dict[str, Any]:
    roles = zip(("user", "assistant"), (question, answer), strict=True)
    first = [{"role": role, "content": said} for role, said in roles]
    return {"conversations": [*first, *more]}


def pair(n: int) -> dict[str, Any]:
    sides = {"chosen": f"{text(n)} 是", "rejected": f"{text(n)} 不是"}
    return {k: chat(f"问 {n}?", said)["conversations"] for k, said in sides.items()}


ROWS = {
    "pretrain": [{"text": text(n)} for n in range(30)],
    "sft": [chat(f"Is {n} a number?", f"Yes, {text(n)}.") for n in range(30)],
    "dpo": [pair(n) for n in range(30)],
}


@pytest.fixture
def own(tmp_path) -> dict[str, Any]:
    """Settings that keep all of a report below the folder of the test."""
    return {"out_dir": str(tmp_path / "out"), "device": "cpu", "max_seq_len": 256}


@pytest.fixture
def planted(tmp_path) -> str:
    """Conversations with a fault of each kind, in the lines from 11 on."""
    rows: list[Any] = list(ROWS["sft"])
    rows[10] = rows[2]
    rows[11] = chat("Is 3 a number??", f"Yes: {text(3)}")
    rows[12] = chat("Who?", "我是ChatGPT。")
    rows[13] = chat(text(99), rows[4]["conversations"][1]["content"])
    rows[14] = chat("Long?", " ".join(map(text, range(40, 60))))
    rows[15] = chat("?", "!")
    rows[16] = '{"conversations": ['
    return write(tmp_path / "rows.jsonl", rows)


def test_a_preview_shows_packed_documents_as_the_model_meets_them(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS["pretrain"])
    first, second = preview(TrainConfig(data_path=path, **own))
    assert first != second
    for row in (first, second):
        assert "<|im_end|><|im_start|>" in row and row.startswith("<|im_start|>")
    assert preview(TrainConfig(data_path=path, **own), rows=1) == [first]


def test_a_preview_without_any_run_marks_what_is_learned_from(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS["sft"])
    (row,) = preview(TrainConfig(stage="sft", data_path=path, **own), rows=1)
    asked = re.findall(r"Is (\d+) a number\?<\|im_end\|>\n<\|im_start\|>assistant", row)
    learned = re.findall(r"\n⟦Yes, .*?\.<\|im_end\|>\n⟧", row)
    assert len(asked) == len(learned) >= 1


def test_a_preview_of_a_pair_shows_the_chosen_answer_first(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS["dpo"])
    first, second = preview(TrainConfig(stage="dpo", data_path=path, **own))
    for shown in (first, second):
        yes, no = re.findall(r"⟦(.*?)<\|im_end\|>\n⟧", shown, re.DOTALL)
        assert yes.endswith(" 是") and no.endswith("不是")
        assert shown.startswith("chosen: <|im_start|>user\n")
        assert "\nrejected: <|im_start|>user\n" in shown
        assert len(set(re.findall(r"问 (\d+)", shown))) == 1
    assert first != second


@pytest.mark.parametrize("stage", ROWS)
def test_a_file_without_faults_of_any_stage_has_no_findings(stage, tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS[stage])
    report = data_report(path, samples=2, **own)
    assert not report.findings and len(report.preview) == 2
    assert report["rows"] == 30 and report["bad_rows"] == 0
    cfg = TrainConfig(stage=stage, data_path=path, **own)
    assert data_report(cfg, samples=2) == report


def test_planted_faults_are_reported_at_their_lines(planted, tmp_path, own):
    val_path = write(tmp_path / "val.jsonl", [chat("a", text(77)), ROWS["sft"][20]])
    report = data_report(planted, val_path=val_path, **own)
    found = {
        kind: each.rows[:, [1, 3]].tolist() for kind, each in report.findings.items()
    }
    assert found == {
        "bad_rows": [[17, -1]],
        "empty": [[16, -1]],
        "duplicates": [[11, 3]],
        "near_duplicates": [[12, 4]],
        "overlap": [[21, 2]],
        "identity": [[13, -1]],
        "repeated_answers": [[14, 5]],
        "long": [[15, -1]],
    }
    assert report["rows"] == 29 and report["longer"] == report["long"] == 1
    assert 0 < report["share_cut"] < 1 and 0 < report["fill"] <= 1
    near = report.findings["near_duplicates"]
    assert near.lines == "line 12 (as 4)" and "Is 3 a number??" in near.example
    assert report.findings["identity"].example == "我是ChatGPT"
    assert f"mm.filter_data('{planted}', 'clean.jsonl', drop=['overlap'], " in repr(
        report
    )


def test_filtering_keeps_the_other_rows_byte_by_byte_and_logs_the_rest(
    planted, tmp_path, own
):
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    clean = tmp_path / "clean.jsonl"
    counts = filter_data(planted, clean, **own)
    gone = {11: 3, 12: 4, 13: None, 16: None, 17: None}
    kept = [line for n, line in enumerate(lines, 1) if n not in gone]
    assert clean.read_bytes() == b"".join(kept)
    log = map(json.loads, (tmp_path / "clean.jsonl.log").read_text().splitlines())
    assert {row["line"]: row["repeats"] for row in log} == gone
    assert counts == {
        "kept": 25,
        **dict.fromkeys(["bad_rows", "empty", "duplicates"], 1),
        **dict.fromkeys(["near_duplicates", "identity"], 1),
    }
    report = data_report(str(clean), **own)
    assert report.findings.keys() == {"repeated_answers", "long"}
    both = ["repeated_answers", "long"]
    assert filter_data(str(clean), clean.with_name("b"), drop=both, **own)["kept"] == 23
    assert not [*tmp_path.glob(".*.tmp")]


def test_rows_of_several_files_are_named_by_file(tmp_path, own):
    first = write(tmp_path / "a.jsonl", ROWS["pretrain"][:5])
    second = (tmp_path / "b.txt").write_text("\n\n".join(map(text, (7, 2, 8))))
    report = data_report([first, str(tmp_path / "b.txt")], **own)
    assert second and report["rows"] == 8
    assert report.findings["duplicates"].lines == "line b.txt:3 (as a.jsonl:3)"
    filter_data([first, str(tmp_path / "b.txt")], tmp_path / "c.jsonl", **own)
    assert (tmp_path / "c.jsonl").read_text().count("\n") == 7
    log = json.loads((tmp_path / "c.jsonl.log").read_text())
    assert log == {"line": "b.txt:3", "reason": "duplicates", "repeats": "a.jsonl:3"}


def test_a_source_and_an_existing_file_are_not_overwritten(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS["pretrain"])
    out = tmp_path / "clean.jsonl"
    out.write_text("mine")
    with pytest.raises(FileExistsError, match=r"clean.jsonl exists: .*overwrite=True"):
        filter_data(path, out, **own)
    with pytest.raises(FileExistsError, match="rows.jsonl exists"):
        filter_data(path, path, overwrite=True, **own)
    assert out.read_text() == "mine"
    assert filter_data(path, out, overwrite=True, **own) == {"kept": 30}
    assert out.read_bytes() == (tmp_path / "rows.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"unknown kind of rows 'duplicate'; did you"):
        filter_data(path, tmp_path / "c", drop=["duplicate"], **own)


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        ("", DataError, "is empty: write one row a line"),
        ("\n\n", DataError, "has no rows: every line in it is blank"),
        ('{"text": ""}\n', ValueError, "has no text to use"),
        ('{"a": 1}\n', DataError, "neither texts nor conversations"),
        ('{"text": "a"}\n{"content": "b"}\n', DataError, "rows of several forms"),
        (None, FileNotFoundError, "does not exist"),
    ],
)
def test_a_file_without_rows_is_refused_in_words(content, error, words, tmp_path, own):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(error, match=words):
        data_report(str(path), **own)
    with pytest.raises(
        FileNotFoundError, match="has no .jsonl, .json, .parquet or .txt"
    ):
        (tmp_path / "folder").mkdir(exist_ok=True)
        data_report(str(tmp_path / "folder"), **own)


def test_one_row_and_a_row_of_a_megabyte_are_reported(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", [{"text": "字" * 350_000}])
    report = data_report(path, samples=1, **own)
    assert report["rows"] == 1 and report["bytes"] > 1e6 and not report.findings


def test_the_demo_corpus_is_reported(own):
    report = data_report(TrainConfig(stage="sft", data_path="demo", **own), samples=1)
    assert report["rows"] > 1000 and report["duplicates"] == 0


def test_the_commands_report_and_filter(planted, tmp_path, own, capsys):
    clean = str(tmp_path / "clean.jsonl")
    given = ["--stage", "sft", "--data_path", planted, "--out_dir", own["out_dir"]]
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *given, "--device", "cpu"])
    assert ended.value.code == 0
    assert "equal to an earlier row: line 11 (as 3)" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        cli.main(["filter", clean, *given, "--drop", "duplicates,bad_rows"])
    assert ended.value.code == 0
    assert re.search(r"kept +28", capsys.readouterr().out)
