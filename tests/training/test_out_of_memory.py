"""A run that runs out of memory restarts with smaller micro-batches by itself."""

from pathlib import Path
from typing import Any

import pytest
from support.injection import Fault, inject
from support.runs import Settings, logged, metric_rows, train_here

import minimind_nb as mm
from minimind_nb.config import TrainConfig
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import launching
from minimind_nb.training.preparation import draft

pytestmark = pytest.mark.usefixtures("forked")
EVENTS = ("start", "resume", "smaller_batch")


def full_above(rows: int, tmp_path: Path, **place: Any) -> Fault:
    """Memory runs out in every session with more rows at once."""
    marker = str(tmp_path / "full")
    return Fault(
        **{"point": "batch", **place},
        action="out_of_memory",
        marker=marker,
        above_rows=rows,
    )


def sessions(folder: RunFolder) -> list[tuple[str, int]]:
    rows = metric_rows(folder, "event", "event", "step")
    return [row for row in rows if row[0] in EVENTS]


def losses(folder: RunFolder) -> list[tuple[float, ...]]:
    """By step, as they stand after the last resume."""
    names = ("step", "samples", "tokens", "loss", "learning_rate")
    rows = {row[0]: row for row in metric_rows(folder, "train", *names)}
    return [row for _, row in sorted(rows.items())]


BEGIN = [("start", 0), ("start", 0), ("smaller_batch", 0)]
AT_4 = [("start", 0), ("resume", 4), ("smaller_batch", 4)]


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ({"step": 0}, [*BEGIN, ("start", 0), ("smaller_batch", 0)]),
        ({"step": 4, "point": "validation"}, BEGIN),
        ({"step": 5, "rank": 1}, AT_4),
    ],
    ids=["first step, twice", "validation", "a later step of the second rank"],
)
def test_a_run_out_of_memory_equals_one_with_smaller_micro_batches(
    place: dict[str, Any],
    expected: list[tuple[str, int]],
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processes = 1 + place.get("rank", 0)
    settings |= {"num_processes": processes, "global_batch": 8}
    settings |= {"accumulation_steps": None, "max_steps": 6}
    rows = 1 if place["step"] == 0 else 2
    small = {"num_processes": 1, "batch_size": rows, "out_dir": str(tmp_path / "small")}
    _, straight = train_here({**settings, **small})
    with logged() as notes, monkeypatch.context() as patch:
        inject(patch, full_above(rows, tmp_path, **place))
        run = mm.train(TrainConfig(**settings), view=False)
    folder = RunFolder(run.folder)
    assert run.status == "finished"
    assert sessions(folder) == expected
    start = expected[-1][1]
    assert any(
        f"out of memory with batch_size=4: restarting at step {start} with "
        "batch_size=2 and the same global batch" in note
        for note in notes
    )
    for ours, theirs in zip(losses(folder), losses(straight), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    saved = folder.settings()
    assert (saved["batch_size"], saved["global_batch"]) == (rows, 8)
    assert saved["accumulation_steps"] == 8 // processes // rows
    assert run.history.select("event")[-1]["event"] == "end"


def test_the_next_session_knows_what_was_too_large(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"batch_size": 8, "accumulation_steps": 1, "max_steps": 2}
    with monkeypatch.context() as patch:
        inject(patch, full_above(4, tmp_path, step=0))
        mm.train(TrainConfig(**settings), view=False)
    longer = {**settings, "max_steps": 4}
    folder = train_here(longer)[1]
    assert (folder.settings()["batch_size"], folder.settings()["max_steps"]) == (4, 4)
    assert [name for name, _ in sessions(folder)][-2:] == ["resume", "smaller_batch"]

    def batch(**asked: Any) -> tuple[int, int]:
        cfg = draft(TrainConfig(**{**longer, "max_steps": 6, **asked})).cfg
        return cfg.batch_size, cfg.accumulation_steps

    unset = {"batch_size": None, "accumulation_steps": None}
    assert batch(**unset) == batch(batch_size=None) == (4, 2)
    assert batch(batch_size=2, accumulation_steps=None) == (2, 4)
    assert batch(**unset, num_processes=2) == (4, 1)
    assert batch(allow_smaller_batch=False) == (8, 1), "as it was asked for"


@pytest.mark.parametrize(
    ("changes", "rows"),
    [
        ({"allow_smaller_batch": False}, "batch_size=4: halve batch_size and double"),
        ({"batch_size": 1, "accumulation_steps": 8}, "batch_size=1: "),
    ],
    ids=["not allowed", "one row"],
)
def test_where_no_smaller_batch_is_left_or_allowed_the_error_gives_advice(
    changes: Settings,
    rows: str,
    settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A marker of its own in place of `above_rows`, which would spare a single row.
    inject(monkeypatch, Fault("batch", "out_of_memory", str(tmp_path / "m"), step=1))
    with pytest.raises(
        mm.TrainingFailed, match=f"MemoryError: out of memory with {rows}"
    ):
        mm.train(TrainConfig(**settings | changes), view=False)
    assert sessions(RunFolder(Path(settings["out_dir"]) / "pretrain_32")) == BEGIN[:1]


def test_rows_that_were_not_the_cause_stay_as_they_were(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings |= {"batch_size": 2, "accumulation_steps": 4}
    once = Fault("batch", "out_of_memory", str(tmp_path / "once"), step=1)
    inject(monkeypatch, once, full_above(1, tmp_path, step=1))
    with pytest.raises(mm.TrainingFailed, match="with batch_size=1: "):
        mm.train(TrainConfig(**settings), view=False)
    assert draft(TrainConfig(**settings)).cfg.batch_size == 2
    saved = RunFolder(Path(settings["out_dir"]) / "pretrain_32").settings()
    assert (saved["batch_size"], saved["accumulation_steps"]) == (2, 4)


def test_a_run_that_was_to_stop_is_not_restarted(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = Fault("batch", "sigterm_to_parent", str(tmp_path / "stop"))
    inject(monkeypatch, full_above(1, tmp_path, step=5), stop)
    with pytest.raises(mm.TrainingFailed, match="out of memory") as failure:
        mm.train(TrainConfig(**settings), view=False)
    assert failure.value.phase == "stopping"
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    assert sessions(folder) == BEGIN[:1]
    assert not folder.is_locked()


def test_an_evaluation_takes_smaller_batches_too(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = train_here({**settings, "max_steps": 1})
    how: dict[str, Any] = {"num_processes": 1, "device": "cpu", "dtype": "float32"}
    expected = mm.evaluate(folder.root, settings["data_path"], batch_size=1, **how)
    inject(monkeypatch, full_above(2, tmp_path, point="validation", step=0))
    starts: list[int] = []
    run_processes = launching.run_processes
    monkeypatch.setattr(
        launching, "run_processes", lambda *a: starts.append(1) or run_processes(*a)
    )
    scores = mm.evaluate(folder.root, settings["data_path"], batch_size=4, **how)
    assert scores == pytest.approx(expected, rel=1e-6)
    assert len(starts) == 2
