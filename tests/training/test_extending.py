"""A run with a linear schedule that is made longer, or shorter, when it has begun."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
from support.injection import Fault, inject
from support.runs import Settings, metric_rows, notes_of, state_hashes, train_here

from minimind_nb import TrainConfig, TrainingFailed, train
from minimind_nb.storage.run_folder import RunFolder


@pytest.fixture
def short(settings: Settings) -> Settings:
    """10 steps, of which the last 4 decay."""
    return {**settings, "max_steps": 10, "decay_fraction": 0.4, "save_interval": 4}


def longer(short: Settings, **more: Any) -> Settings:
    return {**short, "max_steps": 15, **more}  # decays from step 9 on


@pytest.fixture
def planned(short: Settings, tmp_path: Path) -> RunFolder:
    """The run that was planned with 15 steps."""
    return train_here(longer(short, out_dir=str(tmp_path / "planned")))[1]


def names(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.checkpoints.iterdir())


def rates(folder: RunFolder) -> dict[int, float]:
    return dict(metric_rows(folder, "train", "step", "learning_rate"))


def test_the_rate_is_constant_then_falls_in_a_line(planned: RunFolder) -> None:
    found, highest = rates(planned), 3e-3
    assert [found[step] for step in (1, 2, 3)] == pytest.approx([1e-3, 2e-3, 3e-3])
    assert {found[step] for step in range(4, 10)} == {highest}
    falling = [highest * left / 6 for left in (6, 5, 4, 3, 2, 1)]
    assert [found[step] for step in range(10, 16)] == pytest.approx(falling)


def test_a_finished_run_that_is_extended_equals_one_planned_that_long(
    short: Settings, planned: RunFolder
) -> None:
    _, folder = train_here(short)
    weights = folder.root.parent / "pretrain_32.pth"
    before = weights.read_bytes()
    assert names(folder) == ["step_00000006", "step_00000008", "step_00000010"]
    status, _ = train_here(longer(short), stop_at=8)
    assert status == "interrupted"
    aside = weights.with_name("pretrain_32.pth.shorter1")
    assert aside.read_bytes() == before != weights.read_bytes()
    later = ["step_00000008.shorter1", "step_00000010.shorter1"]
    assert names(folder) == sorted(["step_00000006", "step_00000008", *later])
    assert train_here(longer(short))[0] == "finished"
    assert state_hashes(folder) == state_hashes(planned)
    assert (
        names(folder) == names(planned) == [f"step_000000{n}" for n in ("09", 12, 15)]
    )
    ends = rates(folder)
    assert ends == rates(planned)


def test_a_kill_before_the_first_save_of_the_extension_loses_nothing(
    short: Settings, planned: RunFolder
) -> None:
    _, folder = train_here(short)
    for _ in range(2):  # planned, and killed at once
        texts, complete = notes_of(longer(short))
        assert not complete and f"{folder.root} is resumed from step 6 of 15" in texts
        assert not [text for text in texts if "schedule is recomputed" in text]
    train_here(longer(short))
    assert state_hashes(folder) == state_hashes(planned)


@pytest.mark.parametrize("stopped", [5, 6, 8])
def test_a_stopped_run_that_is_extended_equals_one_planned_that_long(
    short: Settings, planned: RunFolder, stopped: int
) -> None:
    """Before its decay, where that begins, and within it."""
    train_here(short, stop_at=stopped)
    _, folder = train_here(longer(short))
    assert state_hashes(folder) == state_hashes(planned)


def test_a_lower_max_steps_decays_at_once(short: Settings) -> None:
    train_here(longer(short), stop_at=7)
    status, folder = train_here({**longer(short), "max_steps": 9})
    assert status == "finished"
    found = rates(folder)
    assert [found[n] for n in (7, 8, 9)] == pytest.approx([3e-3, 3e-3, 1.5e-3])
    # And longer again, from where that began.
    _, folder = train_here(longer(short))
    assert rates(folder)[9] == 3e-3


def test_a_run_that_is_killed_within_a_forced_decay_keeps_it(short: Settings) -> None:
    train_here(longer(short), stop_at=7)
    ended = {**longer(short), "max_steps": 12}
    train_here(ended, stop_at=9)
    _, folder = train_here(ended)
    falling = [3e-3 * left / 5 for left in (5, 4, 3, 2, 1)]
    assert [rates(folder)[n] for n in range(8, 13)] == pytest.approx(falling)


def test_what_a_shorter_run_ended_with_outlives_a_change_of_mind(
    short: Settings,
) -> None:
    _, folder = train_here(short)
    train_here(longer(short), stop_at=8)
    assert train_here(short)[0] == "finished"
    assert "step_00000010.shorter1" in names(folder)
    assert train_here(longer(short))[0] == "finished"
    assert names(folder) == [f"step_000000{n}" for n in ("09", 12, 15)]


def test_a_max_steps_without_a_decay_is_named(short: Settings) -> None:
    train_here(longer(short), stop_at=7)
    texts, _ = notes_of({**longer(short), "max_steps": 7})
    assert [text for text in texts if "max_steps=7 leaves no step in which" in text]


def test_another_global_batch_does_not_undo_a_decay(short: Settings) -> None:
    _, folder = train_here(short, stop_at=8)
    changed = {"global_batch": 4, "allow_change": ("global_batch",)}
    changed |= {"batch_size": 4, "accumulation_steps": 1}
    texts, _ = notes_of({**short, **changed, "max_steps": 15})
    assert f"{folder.root} is resumed from step 8 of 15" in texts


def test_a_copied_run_is_extended_as_well(
    short: Settings, planned: RunFolder, tmp_path: Path
) -> None:
    _, folder = train_here({**short, "out_dir": str(tmp_path / "first")})
    shutil.rmtree(folder.checkpoint_folder(8))
    place = {"out_dir": str(tmp_path / "copy"), "resume": str(folder.root)}
    train_here(longer(short, **place), stop_at=8)
    _, copy = train_here(longer(short, **place))
    assert copy.root != folder.root
    assert state_hashes(copy) == state_hashes(planned)


def test_without_a_checkpoint_from_before_the_decay_it_says_so(short: Settings) -> None:
    _, folder = train_here(short)
    for step in (6, 8):
        shutil.rmtree(folder.checkpoint_folder(step), ignore_errors=True)
    texts, _ = notes_of(longer(short))
    assert [text for text in texts if "is from before the decay" in text]
    assert f"{folder.root} is resumed from step 10 of 15" in texts


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_extended_and_killed_twice_it_equals_the_long_run(
    short: Settings, processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"num_processes": processes, "global_batch": 6, "sample_tokens": 0}
    for name in ("batch_size", "accumulation_steps"):
        short.pop(name)

    def run(settings: Settings, name: str) -> RunFolder:
        cfg = TrainConfig(**{**settings, **more, "out_dir": str(tmp_path / name)})
        return RunFolder(train(cfg, view=False).folder)

    long = run(longer(short), "long")
    run(short, "extended")
    kills = [
        Fault("after_step", "kill", str(tmp_path / f"{step}"), processes - 1, step)
        for step in (8, 13)
    ]
    inject(monkeypatch, *kills)
    for _ in kills:
        with contextlib.suppress(TrainingFailed):
            run(longer(short), "extended")
    folder = run(longer(short), "extended")
    assert all(Path(kill.marker).exists() for kill in kills)
    assert state_hashes(folder) == state_hashes(long)
