import errno
import io
import json
import math
import os
import sys
from types import SimpleNamespace

import pytest

from minimind_nb.monitor import metrics
from minimind_nb.monitor.metrics import History, MetricsLog


def write_rows(path, *rows):
    with MetricsLog(path) as log:
        for kind, fields in rows:
            log.append(kind, **fields)


def test_rows_come_back_as_they_were_written(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(
        path,
        ("event", {"event": "start", "step": 0, "total_steps": 3}),
        ("train", {"step": 1, "loss": 2.5, "peak_memory_gib": [0.5, 0.25]}),
        ("train", {"step": 2, "loss": 2.0, "loss_scale": None}),
        ("eval", {"step": 2, "loss": 1.5}),
    )
    history = History.load(tmp_path)
    assert history.column("train", "loss") == [2.5, 2.0]
    assert history.select("eval") == [{"kind": "eval", "step": 2, "loss": 1.5}]
    assert history.last("train") == history.rows[2]
    assert history.last("sample") is None
    assert history.session == history.rows
    assert history.damaged_lines == 0
    assert "4 rows" in repr(history)


def test_a_row_is_on_disk_before_append_returns(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.append("train", step=1, loss=1.0)
    assert json.loads(path.read_bytes()) == {"kind": "train", "step": 1, "loss": 1.0}
    log.close()
    log.close()


@pytest.mark.fault("F101")
def test_rows_that_a_full_disk_does_not_take_come_before_the_next(
    tmp_path, monkeypatch
):
    class Disk(io.FileIO):
        room = 10

        def write(self, data, /):
            if not self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            taken = super().write(data[: self.room])
            self.room -= taken
            return taken

    def full_log():
        disk = Disk(path, "ab")
        with monkeypatch.context() as patched:
            writer = io.BufferedWriter(disk, 1 << 20)
            patched.setattr(metrics, "open", lambda *_, **__: writer, raising=False)
            return disk, MetricsLog(path)

    path = tmp_path / "metrics.jsonl"
    disk, log = full_log()
    for step in (1, 2):
        log.append("train", step=step, loss=1.0)
    assert path.stat().st_size == 10
    disk.room = 1 << 20
    log.append("train", step=3, loss=1.0)
    log.close()
    assert History(path).column("train", "step") == [1, 2, 3]
    path.unlink()
    _, log = full_log()
    log.append("train", step=1, loss=1.0)
    with pytest.raises(OSError, match="No space left"):
        log.close()
    write_rows(path, ("train", {"step": 2}))
    history = History(path)
    assert (history.column("train", "step"), history.damaged_lines) == ([2], 1)


def test_non_finite_values_are_strings_on_disk_and_floats_in_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    nested = {"loss": math.nan, "norms": [math.inf, -math.inf, 1.0]}
    write_rows(
        path, ("train", {"step": 1} | nested), ("sample", {"step": 1, "text": "nan"})
    )
    on_disk = json.loads(path.read_bytes().splitlines()[0])
    assert on_disk["loss"] == "nan"
    assert on_disk["norms"] == ["inf", "-inf", 1.0]
    row, sample = History(path).rows
    assert sample["text"] == "nan", "a model's answer stays text"
    assert math.isnan(row["loss"])
    assert row["norms"] == [math.inf, -math.inf, 1.0]


def test_a_value_json_cannot_hold_is_refused_and_writes_nothing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsLog(path) as log:
        with pytest.raises(TypeError, match=r"PosixPath is not JSON serializable"):
            log.append("event", where=tmp_path)
    assert path.read_bytes() == b""


@pytest.mark.fault("F102")
def test_a_half_line_is_closed_and_never_rewritten(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, ("train", {"step": 1, "loss": 3.0}))
    before = path.read_bytes() + b'{"kind": "train", "st'
    path.write_bytes(before)
    history = History(path)
    assert (len(history.rows), history.damaged_lines) == (1, 0)
    write_rows(path, ("train", {"step": 2, "loss": 2.0}))
    assert path.read_bytes().startswith(before + b"\n{")
    history.refresh()
    assert history.column("train", "step") == [1.0, 2.0]
    assert history.damaged_lines == 1


def test_refresh_reads_only_whole_new_lines(tmp_path):
    path = tmp_path / "metrics.jsonl"
    history = History(path)
    with open(path, "ab", buffering=0) as file:
        file.write(b'{"kind": "train", "step": 1, "loss": 3}\n{"kind": "tr')
        for _ in range(2):
            history.refresh()
            assert history.column("train", "loss") == [3.0]
        file.write(b'ain", "step": 2, "loss": 2}\n')
        history.refresh()
    assert history.column("train", "loss") == [3.0, 2.0]


def test_a_replaced_file_is_read_from_its_start(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write_rows(path, *[("train", {"step": step}) for step in range(1, 6)])
    history = History(path)
    os.rename(path, tmp_path / "old.jsonl")
    write_rows(path, *[("train", {"step": step}) for step in range(1, 8)])
    history.refresh()
    assert len(history.rows) == 7


@pytest.mark.parametrize(
    ("event", "losses"),
    [("resume", [10.0, 20.0, -30.0]), ("start", [-30.0])],
)
def test_resuming_drops_lost_and_partial_rows_and_starting_over_all(
    tmp_path, event, losses
):
    path = tmp_path / "metrics.jsonl"
    write_rows(
        path,
        ("event", {"event": "start", "step": 0}),
        *[("train", {"step": step, "loss": step}) for step in (10, 20, 30)],
        ("eval", {"step": 30, "loss": 1}),
        ("train", {"step": 15, "loss": 15, "partial": True}),
        ("event", {"event": event, "step": 20}),
        ("train", {"step": 30, "loss": -30}),
    )
    history = History(path)
    assert history.column("train", "loss") == losses
    assert history.select("eval") == []
    assert history.select("event")[-1]["event"] == event
    assert history.session == history.rows[-2:]


def test_damaged_lines_inside_are_counted_not_fatal(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": 1, "loss": 3}\n'
    damaged = [
        b"\xff\xfe", b"[1, 2]", b"7", b'{"step": 3}', b'{"kind": 5, "step": 1}',
        b'{"kind": "train", "step": "x"}', b'{"kind": "train", "step": null}',
    ]  # fmt: skip
    path.write_bytes(good + b"\n\n" + b"\n".join(damaged) + b"\n" + good)
    history = History(path)
    assert len(history.rows) == 2
    assert history.damaged_lines == len(damaged)


def test_column_is_nan_where_a_row_has_no_number(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for value in (2, None, "text", [1.0]):
        write_rows(path, ("train", {"step": 1, "loss": value}))
    write_rows(path, ("train", {"step": 1}))
    first, *others = History(path).column("train", "loss")
    assert first == 2.0
    assert len(others) == 4 and all(math.isnan(value) for value in others)


def test_the_newest_start_names_the_stage_and_older_runs_are_pretraining(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert History(path).stage == "pretrain"
    write_rows(path, ("event", {"event": "start", "step": 0}))
    assert History(path).stage == "pretrain"
    write_rows(path, ("event", {"event": "resume", "step": 0, "stage": "dpo"}))
    assert History(path).stage == "dpo"


def test_load_takes_a_folder_a_file_a_run_and_a_history(tmp_path):
    class Run:
        def __fspath__(self):
            return str(tmp_path)

    path = tmp_path / "metrics.jsonl"
    write_rows(path, ("train", {"step": 1}))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    assert History.load(tmp_path / "empty").rows == []
    for source in (tmp_path, str(path), Run()):
        assert len(History.load(source).rows) == 1
    history = History(path)
    assert History.load(history) is history


def test_load_of_what_is_no_run_says_which_runs_are_there(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"metrics.jsonl does not exist; expected"
    ):
        History.load(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"gone/metrics.jsonl does not exist; .*: none\."
    ):
        History.load(tmp_path / "gone")
    for name in ("pretrain_512", "sft_512"):
        (tmp_path / name).mkdir()
        write_rows(tmp_path / name / "metrics.jsonl", ("train", {"step": 1}))
    for source in (tmp_path, tmp_path / "gone"):
        with pytest.raises(
            FileNotFoundError, match=r"Runs in .*/pretrain_512, .*/sft_512\."
        ):
            History.load(source)


def test_load_of_a_file_without_rows_is_an_error(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("hello\nworld\n")
    with pytest.raises(
        ValueError, match=r"notes\.txt has no metrics; pass the folder of a run"
    ):
        History.load(path)


def test_rows_become_a_data_frame_of_one_column_a_name(tmp_path, monkeypatch):
    with MetricsLog(tmp_path / "metrics.jsonl") as log:
        log.append("event", event="start", step=0)
        log.append("eval", step=0, loss=2.5)
        log.append("sample", step=0, answer="a")
        log.append("train", step=1, loss=2, load=[[0.25, 0.75], [0.5, 0.5]])
    history = History(tmp_path / "metrics.jsonl")
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(DataFrame=list))
    loads = {"load_0_0": 0.25, "load_0_1": 0.75, "load_1_0": 0.5, "load_1_1": 0.5}
    assert history.to_frame() == [
        {"kind": "eval", "step": 0, "loss": 2.5},
        {"kind": "train", "step": 1, "loss": 2, **loads},
    ]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="pandas"):
        history.to_frame()
