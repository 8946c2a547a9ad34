"""What a killed parent left is found and ended; what is somebody else's never is."""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from minimind_nb.launch.leftovers import end_orphans, scratch_folder
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.lifetime import identify_process
from minimind_nb.storage.run_folder import RunFolder, RunLocked

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


@pytest.mark.fault("F58")
def test_a_rank_at_work_whose_parent_lives_is_a_run_in_use(
    sleeper: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    """Somebody deleted the lock's file, which ends nothing."""
    mine = identify_process(int(Path("/proc/self").resolve().name))
    folder = leave(tmp_path, sleeper.pid, identify_process(sleeper.pid), mine)
    with pytest.raises(RunLocked, match=f"in use by pid {sleeper.pid}, rank 0"):
        end_orphans(folder)
    assert sleeper.poll() is None


@pytest.mark.fault("F111")
def test_temporary_folders_of_the_dead_go_and_of_the_living_stay(
    sleeper: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with scratch_folder() as folder:
        here = "_".join(folder.name.split("_")[:3])
    _, pid, started = identify_process(sleeper.pid).split("/")
    kept = [
        f"{here}_{pid}_{started}_x",
        f"minimind_nb_0123456789ab_{GONE}_{started}_x",  # of another container
        "minimind_nb_demo",
        here,
    ]
    gone = [f"{here}_{GONE}_{started}_x", f"{here}_{pid}_1_x"]
    for name in (*kept, *gone):
        (tmp_path / name).mkdir()
    with scratch_folder() as folder:
        found = {path.name for path in tmp_path.iterdir()}
        assert found == {*kept, folder.name}
    assert {path.name for path in tmp_path.iterdir()} == {*kept}


@pytest.mark.fault("F110")
@pytest.mark.parametrize("broken", [{"parent": 5}, {"parent": "x"}, {"pid": "1"}])
def test_a_record_that_is_none_stops_nobody(broken: dict, tmp_path: Path) -> None:
    folder = leave(tmp_path, 1, "a/1/2", "b/3/4")
    file = folder.record_file(0)
    file.write_text(json.dumps(json.loads(file.read_text()) | broken))
    assert end_orphans(folder) == []
