import contextlib
import json
import math
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minimind_nb.storage import verified
from minimind_nb.storage.run_folder import (
    NoGoodCheckpoint,
    RunFolder,
    RunLocked,
    step_of,
)

HOLDER = """
import sys, time
from minimind_nb.storage.run_folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def run(tmp_path) -> RunFolder:
    return RunFolder(tmp_path / "out" / "pretrain_32")


def save(run: RunFolder, step: int, val_loss: Any = None) -> Path:
    folder = run.checkpoint_folder(step)
    with verified.writing(folder, {"step": step, "val_loss": val_loss}) as aside:
        (aside / "model.safetensors").write_bytes(bytes([step]) * 9)
    return folder


def spoil(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"spoiled..")


def steps(run: RunFolder) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in run.checkpoint_folders()]


@contextlib.contextmanager
def held_elsewhere(run: RunFolder):
    """Another process that holds the run's lock while the block runs."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(run.root)], stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout
    try:
        assert holder.stdout.readline() == "held\n"
        yield holder
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def test_a_lock_that_is_a_link_empties_nothing(run, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    run.root.parent.mkdir()
    run.lock_file.symlink_to(precious)
    with pytest.raises(OSError, match=r"symbolic links: .*\.pretrain_32\.lock"):
        with run.lock():
            pass
    assert precious.read_text() == "mine"


def test_everything_of_a_run_lies_in_its_folder(run):
    assert run.log_file(1) == run.root / "rank1.log"
    assert run.record_file(0) == run.root / "rank0.json"
    assert run.metrics_file == run.root / "metrics.jsonl"
    assert run.checkpoint_folder(1000) == run.root / "checkpoints" / "step_00001000"


def test_a_run_exists_once_its_configuration_is_written(run):
    assert not run.exists()
    run.write_config({"settings": {"seed": 1}, "名": "值"})
    assert run.exists()
    assert run.read_config() == {"settings": {"seed": 1}, "名": "值"}
    assert "值" in run.config_file.read_text(encoding="utf-8")


def test_a_configuration_that_is_not_there_or_no_json_is_named(run):
    with pytest.raises(FileNotFoundError, match="config.json"):
        run.read_config()
    run.write_config({})
    for text in ("{", "[" * 100_000):  # also of a data set attached by a stranger
        run.config_file.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=r"config\.json is not JSON: "):
            run.read_config()


def test_the_status_is_rank_0s_own_word(run):
    assert run.status() == "new"
    run.write_config({})
    run.record_file(0).write_text('{"sta', encoding="utf-8")
    assert run.status() == "new"
    for status in ("finished", "time_budget", "interrupted", "terminated", "failed"):
        run.record_file(0).write_text(json.dumps({"status": status}), encoding="utf-8")
        assert run.status() == status


def test_a_run_without_a_last_word_runs_while_its_lock_is_held(run):
    run.write_config({})
    run.record_file(0).write_text('{"status": "running"}', encoding="utf-8")
    assert run.status() == "killed"
    with run.lock():
        assert run.status() == "running"
    assert run.status() == "killed"


@pytest.mark.fault("F58")
def test_the_lock_is_for_one_writer_and_names_the_holder(run):
    with held_elsewhere(run) as holder:
        assert run.is_locked()
        began = time.monotonic()
        with pytest.raises(RunLocked) as caught:
            with run.lock():
                pass
        assert time.monotonic() - began < 20, "it does not wait for the holder"
        who = f"pid {holder.pid} on {socket.gethostname()} since 20"
        assert str(caught.value).startswith(f"{run.root} is in use by {who}")
        assert str(caught.value).endswith(
            "Wait for that run, stop it, or take another run_name."
        )
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        assert not run.is_locked()
        with run.lock():
            assert run.is_locked()
    mine = run.lock_file.read_text(encoding="utf-8")
    assert mine.startswith(f"pid {os.getpid()} on ")


def test_a_holder_without_a_name_is_another_process(run):
    with run.lock():
        os.truncate(run.lock_file, 0)
        with pytest.raises(RunLocked, match="is in use by another process"):
            with run.lock():
                pass


def test_the_lock_is_free_after_an_error(run):
    with pytest.raises(KeyboardInterrupt):
        with run.lock():
            raise KeyboardInterrupt
    assert not run.is_locked()


def test_the_lock_is_free_though_a_forked_process_has_its_descriptor(run):
    wait = multiprocessing.get_context("fork").Event()
    with run.lock():
        child = multiprocessing.get_context("fork").Process(target=wait.wait)
        child.start()
    try:
        with run.lock():
            assert run.is_locked()
        assert not run.is_locked()
    finally:
        wait.set()
        child.join()


def test_checkpoints_are_listed_newest_first_and_nothing_else(run):
    assert run.checkpoint_folders() == []
    for step in (4, 12, 8):
        save(run, step)
    for name in ("step_00000016.corrupt", ".step_00000020.1.tmp", "step_5", "notes"):
        (run.checkpoints / name).mkdir()
    assert steps(run) == [12, 8, 4]


def test_a_run_without_checkpoints_has_no_good_one(run):
    assert run.newest_good_checkpoint() is None
    assert run.best_checkpoint() is None


def test_the_newest_good_checkpoint_knows_its_step(run):
    save(run, 4, 2.5)
    save(run, 8, 1.5)
    found = run.newest_good_checkpoint()
    assert found is not None
    assert (step_of(found), found) == (8, run.checkpoint_folder(8))


@pytest.mark.fault("F20")
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run, caplog):
    save(run, 4)
    spoil(save(run, 8))
    leftover = run.checkpoints / ".step_00000020.1.tmp"
    leftover.mkdir()
    found = run.newest_good_checkpoint()
    assert found == run.checkpoint_folder(4)
    said = caplog.text
    assert f"Checkpoint {run.checkpoint_folder(8)} is not used: " in said
    assert "model.safetensors has the wrong sha256" in said
    assert steps(run) == [8, 4] and leftover.exists(), "a reader changes nothing"
    assert run.newest_good_checkpoint(repair=True) == found
    assert steps(run) == [4] and not leftover.exists()
    aside = run.checkpoints / "step_00000008.corrupt"
    assert (aside / "model.safetensors").read_bytes() == b"spoiled.."
    assert "sha256" in aside.with_name(f"{aside.name}.txt").read_text(encoding="utf-8")


@pytest.mark.fault("F25")
@pytest.mark.parametrize("repair", [False, True])
def test_no_run_starts_over_if_no_checkpoint_is_good(repair, run):
    spoil(save(run, 4))
    (save(run, 8) / verified.MANIFEST).unlink()
    with pytest.raises(NoGoodCheckpoint) as caught:
        run.newest_good_checkpoint(repair)
    head, newest, older, advice = str(caught.value).split("\n")
    assert head == f"no checkpoint in {run.checkpoints} is intact:"
    assert newest.startswith("  step_00000008: manifest.json is missing")
    assert older == "  step_00000004: model.safetensors has the wrong sha256"
    assert advice == (
        "Put a copy of one back, or start over with resume=False, which keeps this "
        "folder under another name."
    )
    with pytest.raises(NoGoodCheckpoint, match="no checkpoint in .* is intact"):
        run.newest_good_checkpoint(repair)


def test_the_best_checkpoint_has_the_lowest_validation_loss(run):
    for step, loss in ((4, 2.0), (8, 1.0), (12, 1.5)):
        save(run, step, loss)
    best = run.best_checkpoint()
    assert best is not None and step_of(best) == 8
    spoil(best)
    assert run.best_checkpoint() == run.checkpoint_folder(12)


def test_without_losses_the_newest_checkpoint_is_the_best(run):
    folders = save(run, 4), save(run, 8)
    assert run.best_checkpoint() == run.checkpoint_folder(8)
    for folder in folders:
        spoil(folder)
    assert run.best_checkpoint() is None


@pytest.mark.parametrize(
    ("losses", "kept"),
    [([2.0, 1.0, 3.0, 2.5, 2.6], [5, 4, 2]), ([None, None, None], [3, 2])],
)
def test_pruning_keeps_the_newest_and_the_best(losses, kept, run):
    for step, loss in enumerate(losses, 1):
        save(run, step, loss)
    run.prune_checkpoints(2, 0)
    assert steps(run) == kept


@pytest.mark.parametrize("loss", [math.nan, "nan", "none", None, [1.0]])
def test_a_loss_that_is_no_number_is_never_the_best(loss, run):
    save(run, 4, 1.0)
    for step in (8, 12, 16):
        save(run, step, loss)
    run.prune_checkpoints(2, 0)
    assert steps(run) == [16, 12, 4]
    assert run.best_checkpoint() == run.checkpoint_folder(4)


@pytest.mark.fault("F30")
def test_pruning_goes_on_where_a_folder_cannot_be_removed(run, monkeypatch):
    for step in (4, 8, 12, 16):
        save(run, step)
    remove = shutil.rmtree

    def refuse(path, ignore_errors=False):
        if path.name != "step_00000008":
            remove(path)
        elif not ignore_errors:
            raise PermissionError("not yours")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    run.prune_checkpoints(2, 0)
    assert steps(run) == [16, 12, 8]


def test_moving_aside_keeps_every_earlier_run(run):
    names = []
    for number in range(3):
        run.write_config({"number": number})
        names.append(verified.rename_aside(run.root, "old", 1).name)
    assert names == ["pretrain_32.old1", "pretrain_32.old2", "pretrain_32.old3"]
    assert not run.root.exists()
    kept = [RunFolder(run.root.with_name(name)).read_config() for name in names]
    assert kept == [{"number": 0}, {"number": 1}, {"number": 2}]
