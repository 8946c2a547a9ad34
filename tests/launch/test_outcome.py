"""Who failed first, and what is said about it."""

import json
import os
import pickle
import signal
from pathlib import Path

import pytest

from minimind_nb.launch.outcome import (
    SESSION,
    Exit,
    RankRecord,
    TrainingFailed,
    collect_outcome,
)
from minimind_nb.storage.run_folder import RunFolder


def write(folder: Path, rank: int, **fields: object) -> RankRecord:
    record = RankRecord(folder / f"rank{rank}.json", rank, phase="training")
    record.update(total_steps=12, **fields)
    return record


def ended(*codes: int | None, time: float = 0.0) -> list[Exit]:
    return [Exit(code, time) for code in codes]


@pytest.mark.parametrize("status", ["finished", "time_budget", "interrupted"])
def test_an_ending_that_all_ranks_recorded_is_the_outcome(
    tmp_path: Path, status: str
) -> None:
    for rank in range(2):
        write(tmp_path, rank, step=12, status=status)
    assert collect_outcome(RunFolder(tmp_path), ended(0, 0)) == status


def test_the_error_survives_a_process_pool() -> None:
    failed = pickle.loads(pickle.dumps(TrainingFailed("it broke", 1, "training")))
    assert (str(failed), failed.rank, failed.phase) == ("it broke", 1, "training")


@pytest.mark.fault("F02")
def test_a_process_that_dies_slowly_is_the_root_of_a_closed_connection(
    tmp_path: Path,
) -> None:
    """Killed, it closes its connections long before it is seen dead."""
    write(tmp_path, 0, step=8)
    lost = 'File "minimind_nb/launch/process_group.py", line 48, in sum\nRuntimeError'
    failed = write(tmp_path, 1, step=8, status="failed", error="x", traceback=lost)
    late = [Exit(-9, failed.time + 1.0), Exit(1, failed.time + 1.0)]
    with pytest.raises(TrainingFailed, match="rank 0 was killed by SIGKILL at step 8"):
        collect_outcome(RunFolder(tmp_path), late)
    write(tmp_path, 0, step=8, status="failed", error="mine", traceback="ValueError")
    with pytest.raises(TrainingFailed, match="rank 0 failed at step 8 of 12: mine"):
        collect_outcome(RunFolder(tmp_path), late)


def test_exit_code_0_without_a_word_is_a_failure(tmp_path: Path) -> None:
    write(tmp_path, 0, step=12, status="finished")
    write(tmp_path, 1, step=5)
    with pytest.raises(
        TrainingFailed, match=r"rank 1 left at step 5 of 12 \(exit code 0"
    ):
        collect_outcome(RunFolder(tmp_path), ended(0, 0))


@pytest.mark.fault("F101")
def test_a_word_fits_on_a_full_disk_where_the_last_one_was(
    tmp_path: Path,
) -> None:
    record = write(tmp_path, 0, step=5)
    before = record.file.stat()
    record.update(step=6)
    found = RankRecord.read(record.file)
    assert found and found.step == 6
    try:
        raise ValueError("今" * before.st_size)
    except ValueError as error:
        record.fail(error)
    after = record.file.stat()
    assert (after.st_size, after.st_ino) == (before.st_size, before.st_ino)
    told = json.loads(record.file.read_bytes())
    assert told["status"] == "failed"
    assert told["error"].startswith("ValueError: 今今")
    assert [path.name for path in tmp_path.iterdir()] == ["rank0.json"]


def test_of_two_errors_the_earlier_is_the_root_and_both_are_shown(
    tmp_path: Path,
) -> None:
    for rank in (1, 0):
        record = write(tmp_path, rank, step=5)
        record.fail(ValueError(f"error of rank {rank}"))
    with pytest.raises(TrainingFailed) as failure:
        collect_outcome(RunFolder(tmp_path), ended(1, 1))
    text = str(failure.value)
    assert text.startswith("rank 1 failed at step 5 of 12: ValueError: error of rank 1")
    assert "rank 0 failed too: ValueError: error of rank 0" in text


def test_a_silent_death_goes_before_the_broken_connection_it_causes(
    tmp_path: Path,
) -> None:
    write(tmp_path, 0, step=5)
    survivor = write(tmp_path, 1, step=5)
    survivor.fail(RuntimeError("Connection closed by peer"))
    exits = ended(-signal.SIGKILL, 1, time=survivor.time - 0.1)
    with pytest.raises(TrainingFailed, match="rank 0 was killed by SIGKILL at step 5"):
        collect_outcome(RunFolder(tmp_path), exits)


def test_a_rank_that_the_parent_ended_is_not_the_root(tmp_path: Path) -> None:
    write(tmp_path, 0, step=5)
    late = write(tmp_path, 1, step=5)
    late.fail(ValueError("late"))
    exits = [Exit(-9, late.time - 9, "another rank failed"), Exit(1, late.time)]
    with pytest.raises(TrainingFailed, match="rank 1 failed at step 5"):
        collect_outcome(RunFolder(tmp_path), exits)


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (signal.SIGKILL, "the machine ran out of memory"),
        (signal.SIGBUS, "/dev/shm or the disk is full"),
        (signal.SIGSEGV, "A native library crashed"),
    ],
)
def test_the_signal_says_what_to_do(tmp_path: Path, number: int, hint: str) -> None:
    write(tmp_path, 0, step=5)
    with pytest.raises(TrainingFailed, match="the same call starts over") as failure:
        collect_outcome(RunFolder(tmp_path), ended(-number))
    assert hint in str(failure.value)
    RunFolder(tmp_path).checkpoint_folder(4).mkdir(parents=True)
    with pytest.raises(
        TrainingFailed, match="resumes from the newest checkpoint that verifies"
    ):
        collect_outcome(RunFolder(tmp_path), ended(-number))


def test_the_end_of_the_log_is_shown(tmp_path: Path) -> None:
    write(tmp_path, 0)
    lines = [f"line {number}" for number in range(40)]
    log = tmp_path / "rank0.log"
    log.write_text("\n".join([f"{SESSION}{os.getpid()}, now", *lines]))
    with pytest.raises(TrainingFailed) as failure:
        collect_outcome(RunFolder(tmp_path), ended(1))
    assert "line 39" in str(failure.value)
    assert "line 9\n" not in str(failure.value)
    log.write_text("\n".join([f"{SESSION}1, before", *lines]))
    with pytest.raises(TrainingFailed) as failure:
        collect_outcome(RunFolder(tmp_path), ended(1))
    assert "line 39" not in str(failure.value), "it is of an earlier start"


def test_without_any_record_the_startup_failed(tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="before its first step") as failure:
        collect_outcome(RunFolder(tmp_path), ended(1))
    assert failure.value.phase == "startup"
