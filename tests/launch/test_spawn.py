"""Spawned ranks are started and watched, and none is left behind."""

import contextlib
import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import is_alive

from minimind_nb.launch import spawn
from minimind_nb.launch.outcome import Exit, RankRecord, TrainingFailed
from minimind_nb.launch.spawn import HangWatch, Job, is_decided, run_processes
from minimind_nb.lifetime import without_main_script
from minimind_nb.storage.run_folder import RunFolder

HERE = Path(__file__).parent


def make_job(folder: Path, size: int, target: str = "work", **todo: Any) -> Job:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "todo.json").write_text(json.dumps(todo))
    return Job(
        target=f"support.rank_targets:{target}",
        num_processes=size,
        folder=RunFolder(folder),
        environment={"OMP_NUM_THREADS": "1"},
    )


def pids(folder: Path, size: int) -> list[int]:
    records = [RankRecord.read(folder / f"rank{rank}.json") for rank in range(size)]
    return [record.pid for record in records if record]


def wait_until(condition: Any, seconds: float) -> bool:
    """Whether a condition is met in time; it is looked at after the end once more."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def test_two_ranks_finish_and_each_has_its_own_log(tmp_path: Path) -> None:
    polls: list[int] = []
    before = dict(os.environ), signal.getsignal(signal.SIGINT), threading.active_count()
    status = run_processes(make_job(tmp_path, 2), lambda: polls.append(1))
    after = dict(os.environ), signal.getsignal(signal.SIGINT), threading.active_count()
    assert status == "finished"
    assert polls
    assert before == after, "environment, handlers and threads are as before"
    for rank in range(2):
        assert (
            f"rank {rank} met the others" in (tmp_path / f"rank{rank}.log").read_text()
        )


@pytest.mark.fault("F08")
@pytest.mark.parametrize(
    ("action", "text"),
    [
        ("raise", "rank 1 failed at step 4 of 12: ValueError: line 8 of the data is"),
        ("kill", "rank 1 was killed by SIGKILL at step 4 of 12"),
        ("exit", "rank 1 failed at step 4 of 12: SystemExit: 0"),
    ],
)
def test_the_rank_that_failed_first_is_named_and_none_is_left(
    tmp_path: Path, action: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    job = make_job(tmp_path, 2, action=action, ranks=[1])
    with pytest.raises(TrainingFailed) as failure:
        run_processes(job, lambda: None)
    assert str(failure.value).startswith(text)
    assert failure.value.rank == 1
    assert failure.value.phase == "training"
    assert "The end of" in str(failure.value)
    assert not list(temporary.iterdir()), "no temporary file is left"
    assert not any(map(is_alive, pids(tmp_path, 2)))


def record(status: str = "running", phase: str = "training") -> RankRecord:
    return RankRecord(Path("nowhere"), 0, phase=phase, status=status, time=1.0)


def test_a_rank_that_failed_or_left_silently_decides_a_run() -> None:
    left = {0: Exit(0, 0.0)}
    assert not is_decided([record(), record()], {})
    assert is_decided([record(), record()], left)
    assert not is_decided([record("finished"), record()], left)
    failed = [record(), record("failed")]
    assert is_decided(failed, {}), "it may hang while it leaves"
    assert is_decided([record("finished"), record("finished")], left)


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Watch ranks whose records stay the same for so long; returns what is noticed."""

    def check(seconds: float, *records: RankRecord) -> str:
        now = 0.0
        monkeypatch.setattr(spawn.time, "monotonic", lambda: now)
        hang_watch = HangWatch(600.0)
        noticed = hang_watch.check(records)
        while not noticed and now < seconds:
            now += 0.5
            noticed = hang_watch.check(records)
        return noticed

    return check


@pytest.mark.fault("F106")
def test_a_rank_that_imports_is_given_longer_than_one_that_meets(
    watch: Callable[..., str],
) -> None:
    waiting, importing = record(phase="meeting"), record(phase="startup")
    assert watch(61.0, waiting, waiting) == "the ranks did not meet in 60 s"
    assert watch(61.0, waiting, record()) == "the ranks did not meet in 60 s"
    assert not watch(299.0, waiting, importing)
    assert watch(301.0, waiting, importing) == "it was not ready in 300 s"
    assert watch(301.0, importing) == "it was not ready in 300 s", "one process, too"
    assert watch(61.0, waiting) == "the ranks did not meet in 60 s", "nor its device"
    assert not watch(599.0, record(), record())
    assert watch(601.0, record(), record()).startswith("no step was made for 600 s")
    assert not watch(999.0, record("finished"), record("failed"))


@pytest.mark.fault("F11")
def test_sigterm_to_one_rank_stops_all_at_the_same_step(tmp_path: Path) -> None:
    job = make_job(tmp_path, 2, action="sigterm", ranks=[1])
    assert run_processes(job, lambda: None) == "terminated"
    records = [RankRecord.read(tmp_path / f"rank{rank}.json") for rank in range(2)]
    assert [(r.step, r.status) for r in records if r] == [(5, "terminated")] * 2


@pytest.mark.fault("F105")
def test_a_signal_that_comes_before_anybody_listens_is_heard_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """SIGTERM to parent and rank, as a scheduler sends it, in the moment of the start."""
    started: list[int] = []

    @contextlib.contextmanager
    def starting() -> Iterator[None]:
        with without_main_script():
            yield
            children = multiprocessing.active_children()
            started.extend(child.pid for child in children if child.pid)
            for pid in (os.getpid(), *started):
                os.kill(pid, signal.SIGTERM)

    monkeypatch.setattr(spawn, "without_main_script", starting)
    assert run_processes(make_job(tmp_path, 1), lambda: None) == "terminated"
    assert len(started) == 1
    found = RankRecord.read(tmp_path / "rank0.json")
    assert found and (found.status, found.step) == ("terminated", 1)


@pytest.mark.fault("F105", "F116")
@pytest.mark.parametrize(
    ("number", "times", "status"),
    [
        (signal.SIGINT, 1, "interrupted"),
        (signal.SIGTERM, 2, "terminated"),
        (signal.SIGHUP, 2, "terminated"),
    ],
)
def test_a_signal_of_the_parent_stops_the_ranks_once(
    number: signal.Signals, times: int, status: str, tmp_path: Path
) -> None:
    sent: list[int] = []

    def send() -> None:
        record = RankRecord.read(tmp_path / "rank0.json")
        if record and record.step >= 2 and len(sent) < times:
            sent.append(record.step)
            os.kill(os.getpid(), number)
        elif sent:
            until.touch()

    until = tmp_path / "until"
    before = signal.getsignal(number)
    job = make_job(tmp_path, 1, until=str(until))
    assert run_processes(job, send) == status
    assert len(sent) == times
    assert signal.getsignal(number) == before


def test_ranks_end_although_the_caller_ignores_the_end_of_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "_SPAWN", multiprocessing.get_context("fork"))
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert run_processes(make_job(tmp_path, 1), lambda: None) == "finished"
        assert signal.getsignal(signal.SIGCHLD) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.fault("F117")
def test_ranks_that_slept_with_their_parent_did_not_hang(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(spawn.time, "monotonic", lambda: now)
    hang_watch = HangWatch(60.0)
    same = [record()]
    assert not hang_watch.check(same)
    now += 9999.0
    assert not hang_watch.check(same), "nobody looked"
    found = []
    for _ in range(120):
        now += 0.5
        found.append(bool(hang_watch.check(same)))
    assert found.index(True) == 110, "after 60 s, of which 5 had passed asleep"


@pytest.mark.fault("F118")
def test_a_slow_display_blames_nobody_else(tmp_path: Path) -> None:
    """The survivor's broken connection is noticed before the parent looks again."""
    job = make_job(tmp_path, 2, action="kill", ranks=[1], pause=0.5)
    with pytest.raises(TrainingFailed, match="^rank 1 was killed by SIGKILL"):
        run_processes(job, lambda: time.sleep(3.0))


@pytest.mark.fault("F58")
def test_the_lock_is_free_when_the_last_rank_has_left(tmp_path: Path) -> None:
    """Of a parent that dies and so unlocks nothing."""
    until = tmp_path / "until"
    job = make_job(tmp_path, 1, until=str(until))
    lock = os.open(job.folder.lock_file, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX)
    locked: list[bool] = []

    def let_go() -> None:
        record = RankRecord.read(tmp_path / "rank0.json")
        if record and record.step >= 2 and not locked:
            os.close(lock)
            locked.append(job.folder.is_locked())
            until.touch()

    run_processes(dataclasses.replace(job, lock=lock), let_go)
    assert locked and all(locked), "the rank holds it too"
    assert not job.folder.is_locked()


def test_a_later_interrupt_kills_a_rank_that_hangs(tmp_path: Path) -> None:
    def interrupt() -> None:
        record = RankRecord.read(tmp_path / "rank0.json")
        if record and record.step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_processes(make_job(tmp_path, 1, action="hang"), interrupt)
    assert time.monotonic() - began < 60
    assert not any(map(is_alive, pids(tmp_path, 1)))


@pytest.mark.fault("F106")
def test_ranks_that_do_not_meet_are_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spawn, "MEETING_SECONDS", 1.0)
    with pytest.raises(
        TrainingFailed, match=r"(?s)did not meet in 1 s\nrank 0 was in:\n  File"
    ) as failure:
        run_processes(make_job(tmp_path, 2, target="stuck"), lambda: None)
    assert failure.value.phase == "meeting"


@pytest.mark.fault("F03")
def test_no_rank_outlives_a_killed_parent(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(HERE)!r}, {str(HERE.parent)!r}]\n"
        "from pathlib import Path\n"
        "from test_spawn import make_job\n"
        "from minimind_nb.launch.spawn import run_processes\n"
        "if __name__ == '__main__':\n"
        f"    job = make_job(Path({str(tmp_path / 'run')!r}), 2, action='hang')\n"
        "    run_processes(job, lambda: None)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)])
    folder = tmp_path / "run"
    try:
        assert wait_until(lambda: len(pids(folder, 2)) == 2, 90)
        ranks = pids(folder, 2)
        assert all(map(is_alive, ranks))
    finally:
        parent.kill()
        parent.wait()
    assert wait_until(lambda: not any(map(is_alive, ranks)), 3), "gone within 3 s"
