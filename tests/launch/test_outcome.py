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


def ended(*codes: int, time: float = 0.0) -> list[Exit]:
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


KILLED = "rank 0 was killed by SIGKILL at step 8"
LOST = 'File "minimind_nb/launch/process_group.py", line 48, in sum'


@pytest.mark.fault("F02")
@pytest.mark.parametrize(
    ("exit_0", "seconds_after", "where", "text"),
    [
        pytest.param(Exit(-9, 0), -0.1, "", KILLED, id="it died first"),
        pytest.param(Exit(-9, 0), 1.0, LOST, KILLED, id="its death was seen late"),
        pytest.param(
            Exit(-9, 0, "another rank failed"), -9.0, "", "rank 1 failed", id="ended"
        ),
    ],
)
def test_of_a_silent_death_and_an_error_the_cause_is_told_from_the_consequence(
    tmp_path: Path, exit_0: Exit, seconds_after: float, where: str, text: str
) -> None:
    """Killed, a process closes its connections long before it is seen dead."""
    write(tmp_path, 0, step=8)
    failed = write(tmp_path, 1, step=8, status="failed", error="x", traceback=where)
    exits = [exit_0._replace(time=failed.time + seconds_after), Exit(1, failed.time)]
    with pytest.raises(TrainingFailed, match=text):
        collect_outcome(RunFolder(tmp_path), exits)


@pytest.mark.fault("F02")
def test_an_error_goes_before_the_closed_connection_it_causes(tmp_path: Path) -> None:
    write(tmp_path, 1, step=8, status="failed", error="x", traceback=LOST)
    write(tmp_path, 0, step=8, status="failed", error="mine", traceback="ValueError")
    with pytest.raises(TrainingFailed, match="rank 0 failed at step 8 of 12: mine"):
        collect_outcome(RunFolder(tmp_path), ended(1, 1))


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
