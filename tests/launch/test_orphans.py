"""Ranks of a parent that was killed are ended; the processes of others never are."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind_nb.launch.outcome import RankRecord
from minimind_nb.launch.spawn import end_orphans
from minimind_nb.lifetime import identify_process
from minimind_nb.storage.run_folder import RunFolder

GONE = 1 << 22  # above the highest number that Linux gives a process


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that does nothing for a minute."""
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    with subprocess.Popen(command) as process:
        yield process
        process.kill()


def renumbered(identity: str, **parts: str) -> str:
    """An identity of a process with another boot, number or start."""
    names = dict(zip(("boot", "pid", "start"), identity.split("/"), strict=True))
    return "/".join((names | parts).values())


def leave(folder: Path, pid: int, process: str, parent: str) -> RunFolder:
    record = RankRecord(folder / "rank0.json", 0, pid, process, parent)
    record.update(phase="training")
    return RunFolder(folder)


@pytest.mark.fault("F110", "F14")
def test_a_rank_whose_parent_is_gone_is_ended(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    me = identify_process(sleeper.pid)
    folder = leave(tmp_path, sleeper.pid, me, renumbered(me, pid=str(GONE)))
    assert end_orphans(folder) == [sleeper.pid]
    assert sleeper.wait(60) < 0
    assert end_orphans(folder) == []


@pytest.mark.fault("F110")
def test_a_parent_whose_number_another_process_has_is_gone(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    me = identify_process(sleeper.pid)
    mine = identify_process(int(Path("/proc/self").resolve().name))
    folder = leave(tmp_path, sleeper.pid, me, renumbered(mine, start="1"))
    assert end_orphans(folder) == [sleeper.pid]


@pytest.mark.fault("F110")
@pytest.mark.parametrize("part", ["boot", "start", "unknown", "gone"])
def test_any_other_process_is_left_alone(
    part: str, sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    me = identify_process(sleeper.pid)
    parent = renumbered(me, pid=str(GONE))
    process, pid = me, sleeper.pid
    if part in ("boot", "start"):
        process = renumbered(me, **{part: "1"})
    elif part == "unknown":
        process = parent = ""
    else:
        process, pid = parent, GONE
    assert end_orphans(leave(tmp_path, pid, process, parent)) == []
    assert sleeper.poll() is None


@pytest.mark.fault("F110")
@pytest.mark.parametrize("broken", [{"parent": 5}, {"parent": "x"}, {"pid": "1"}])
def test_a_record_that_is_none_stops_nobody(broken: dict, tmp_path: Path) -> None:
    folder = leave(tmp_path, 1, "a/1/2", "b/3/4")
    file = folder.record_file(0)
    file.write_text(json.dumps(json.loads(file.read_text()) | broken))
    assert end_orphans(folder) == []
