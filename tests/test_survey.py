import json
import re
from pathlib import Path
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
    first, second = preview(TrainConfig(data_path=path, **own)).samples
    assert first != second
    for document in first[:-1]:
        assert document.startswith("<|im_start|>") and document.endswith("<|im_end|>")
    assert preview(TrainConfig(data_path=path, **own), rows=1).samples == [first]


def test_a_preview_without_any_run_marks_what_is_learned_from(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS["sft"])
    cfg = TrainConfig(stage="sft", data_path=path, **own)
    (row,) = preview(cfg, rows=1).samples
    for document in row:
        assert re.search(r"Is (\d+) a number\?<\|im_end\|>\n<\|im_start\|>", document)
        assert re.search(r"\n⟦Yes, [^⟦]*\.<\|im_end\|>\n⟧$", document)


def test_a_preview_of_a_pair_shows_the_chosen_answer_first(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS["dpo"])
    for yes, no in preview(TrainConfig(stage="dpo", data_path=path, **own)).samples:
        assert yes.startswith("chosen: <|im_start|>user\n") and " 是<|im_end|>" in yes
        assert no.startswith("rejected: <|im_start|>user\n") and "不是<|im_end|>" in no
        assert len(set(re.findall(r"问 (\d+)", yes + no))) == 1


@pytest.mark.parametrize("stage", ROWS)
def test_a_file_without_faults_of_any_stage_has_no_findings(stage, tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS[stage])
    report = data_report(path, samples=2, **own)
    assert report.findings == {} and report.facts["rows"] == 30
    assert "Nothing to leave out was found." in repr(report)
    assert len(report.preview.samples) == 2
    cfg = TrainConfig(stage=stage, data_path=path, **own)
    assert data_report(cfg).facts == report.facts


def test_planted_faults_are_reported_at_their_lines(planted, tmp_path, own):
    val_path = write(tmp_path / "val.jsonl", [chat("a", text(77)), ROWS["sft"][20]])
    report = data_report(planted, val_path=val_path, **own)
    found = {
        kind: {line: why.partition(":")[0] for line, why in lines.items()}
        for kind, lines in report.findings.items()
    }
    assert found["long"].pop(15).endswith(" tokens")
    assert found == {
        "bad_rows": {17: "the row does not end on this line"},
        "empty": {16: "? !"},
        "duplicates": {11: "as line 3"},
        "near_duplicates": {12: "as line 4"},
        "overlap": {21: "as line 2"},
        "identity": {13: "我是ChatGPT"},
        "repeated_answers": {14: "as line 5"},
        "long": {},
    }
    assert report.facts["rows"] == 29 and report.facts["turns"] == 1
    assert report.facts["cut"] != "0.00%" and report.facts["fill"] < "99%"
    code = f"mm.filter_data('{planted}', 'clean.jsonl', drop=['bad_rows', 'empty', "
    assert code in repr(report) and f", val_path='{val_path}'" in repr(report)


def test_filtering_keeps_the_other_rows_byte_by_byte_and_logs_the_rest(
    planted, tmp_path, own
):
    lines = (tmp_path / "rows.jsonl").read_bytes().splitlines(keepends=True)
    clean, log = tmp_path / "clean.jsonl", tmp_path / "clean.jsonl.log"
    counts = filter_data(planted, clean, **own)
    gone = "duplicates near_duplicates identity empty bad_rows".split()
    lost = dict(zip([11, 12, 13, 16, 17], gone, strict=True))
    kept = [line for n, line in enumerate(lines, 1) if n not in lost]
    assert clean.read_bytes() == b"".join(kept)
    logged = [json.loads(line) for line in log.read_text().splitlines()]
    assert {row["line"]: row["kind"] for row in logged} == lost
    assert counts == {"kept": 25, **dict.fromkeys(gone, 1)}
    assert filter_data(planted, clean, **own) == counts  # again, over its own file
    report = data_report(str(clean), **own)
    assert report.findings.keys() == {"repeated_answers", "long"}
    both = ["repeated_answers", "long"]
    assert filter_data(str(clean), clean.with_name("b"), drop=both, **own)["kept"] == 23
    assert not [*tmp_path.glob(".*.tmp")]


def test_rows_of_several_files_are_named_by_file(tmp_path, own):
    first, second = (
        write(tmp_path / "a.jsonl", ROWS["pretrain"][:5]),
        str(tmp_path / "b.txt"),
    )
    (tmp_path / "b.txt").write_text("\n\n".join(map(text, (7, 2, 8))))
    report = data_report([first, second], **own)
    ((place, why),) = report.findings["duplicates"].items()
    assert place == f"{second}:3" and why.startswith(f"as line {first}:3: ")
    assert filter_data([first, second], tmp_path / "c", **own)["kept"] == 7


def test_a_source_and_an_existing_file_are_not_overwritten(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", ROWS["pretrain"])
    out = tmp_path / "clean.jsonl"
    out.write_text("mine")
    (tmp_path / "rows.jsonl.log").write_text("")
    taken = tmp_path / "a.jsonl.log"
    taken.write_text(Path(path).read_text())
    with pytest.raises(FileExistsError, match=r"a\.jsonl\.log exists: name a new file"):
        filter_data(taken, tmp_path / "a.jsonl", **own)
    for name in (out, path, tmp_path / ".." / tmp_path.name / "rows.jsonl"):
        with pytest.raises(FileExistsError, match=r"jsonl exists: name a new file"):
            filter_data(path, name, **own)
    assert out.read_text() == "mine"
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


def test_one_row_of_a_megabyte_is_reported(tmp_path, own):
    path = write(tmp_path / "rows.jsonl", [{"text": "字" * 350_000}])
    report = data_report(path, samples=1, **own)
    assert report.facts["rows"] == 1 and report.findings == {}


def test_the_demo_corpus_is_reported(own):
    report = data_report(TrainConfig(stage="sft", data_path="demo", **own), samples=1)
    assert report.facts["rows"] > 1000 and "duplicates" not in report.findings


def test_the_command_report_takes_bad_rows(planted, own, capsys):
    given = ["--stage", "sft", "--data_path", planted, "--out_dir", own["out_dir"]]
    with pytest.raises(SystemExit) as ended:
        cli.main(["report", *given, "--device", "cpu"])
    assert ended.value.code == 0
    assert "line 11, as line 3: " in capsys.readouterr().out
