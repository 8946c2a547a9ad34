"""A file system that is really full, or a limit on files, while a run goes on."""

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from support.injection import Fault, fill_disk, inject
from support.runs import Settings, metric_rows, state_hashes, train_here

import minimind_nb as mm
from minimind_nb.monitor.metrics import History
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import loop
from minimind_nb.training.checkpoint import Progress
from minimind_nb.training.run_plan import RunPlan

pytestmark = pytest.mark.fault("F27")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 32 MiB, in memory."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(place)]
    try:
        made = subprocess.run(mount, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        made = False
    if not made:
        pytest.skip("mounting a file system is for root")
    yield place
    subprocess.run(["umount", "--lazy", str(place)], check=True)  # caches are mapped


@pytest.mark.usefixtures("forked")
def test_a_disk_that_stays_full_ends_the_run_with_the_checkpoint_before(
    disk: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**settings, "save_interval": 2, "num_processes": 2, "batch_size": 2}
    straight = mm.train(mm.TrainConfig(**settings), view=False)
    expected = state_hashes(RunFolder(straight.folder))
    cfg = mm.TrainConfig(**{**settings, "out_dir": str(disk / "out")})
    marker = str(tmp_path / "happened")
    inject(monkeypatch, Fault("before_save", "fill_disk", marker, rank=0, step=4))
    told = r"^rank 0 failed at step 8 of 12: OSError: saving at step 8 failed \(3 in a "
    told += r"row\): .* the disk is full: step_00000008 needs at least \d\.\d MiB, and 0\.0 MiB"
    with pytest.raises(mm.TrainingFailed, match=told):
        mm.train(cfg, view=False)
    folder = RunFolder(disk / "out" / "pretrain_32")
    assert state_hashes(folder)[0] == 2
    assert not [*folder.checkpoints.glob(".*")]
    with pytest.raises(OSError, match="(?i)no space|disk is full|free"):
        mm.train(cfg, view=False)
    (disk / "out" / "filler").unlink()
    assert mm.train(cfg, view=False).status == "finished"
    assert state_hashes(folder) == expected


def test_a_disk_that_gets_room_again_loses_no_row(
    disk: Path, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, straight = train_here(settings)
    filler = disk / "filler"
    real = loop.save_checkpoint

    def save_checkpoint(plan: RunPlan, progress: Progress, *parts: Any) -> Path:
        if progress.step == 4:
            fill_disk(filler)
        else:
            filler.unlink(missing_ok=True)
        return real(plan, progress, *parts)

    monkeypatch.setattr(loop, "save_checkpoint", save_checkpoint)
    ending, folder = train_here({**settings, "out_dir": str(disk / "out")})
    assert ending == "finished"
    assert state_hashes(folder) == state_hashes(straight)
    history = History(folder.metrics_file)
    assert history.damaged_lines == 0
    assert history.column("train", "step") == [*range(1, 13)]
    events = metric_rows(folder, "event", "event", "step")
    assert events[1:] == [("save_failed", 4), ("save", 8), ("save", 12), ("end", 12)]


def test_a_limit_on_the_size_of_files_is_told(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    real = loop.save_checkpoint

    def save_checkpoint(plan: RunPlan, progress: Progress, *parts: Any) -> Path:
        small = progress.step == 8
        limit = (1 << 19 if small else resource.RLIM_INFINITY, hard)
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        try:
            return real(plan, progress, *parts)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))

    monkeypatch.setattr(loop, "save_checkpoint", save_checkpoint)
    ending, folder = train_here(settings)
    assert ending == "finished"
    rows = metric_rows(folder, "event", "event", "step")
    assert rows[1:] == [("save", 4), ("save_failed", 8), ("save", 12), ("end", 12)]
    failed = [e for e in History(folder.metrics_file).rows if "error" in e]
    assert "File too large" in failed[0]["error"]
