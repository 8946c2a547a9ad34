import importlib.metadata
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.runs import tree

from minimind_nb import diagnosis
from minimind_nb.diagnosis import doctor, verify
from minimind_nb.hardware import Gpu, Hardware
from minimind_nb.launch.spawn import Job
from minimind_nb.session import Session
from minimind_nb.storage import verified
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import machine

T4 = Gpu("Tesla T4", (7, 5), 14.6)
A100 = Gpu("A100", (8, 0), 40.0)


ARCHITECTURES = "sm_70 sm_75 sm_80"


@pytest.fixture
def place(monkeypatch):
    """A function that sets what the doctor finds."""

    def found(*gpus: Gpu, session: Session | None = None, bf16: bool = False) -> None:
        hardware = Hardware(gpus, 4, bf16, 30.0, ARCHITECTURES if gpus else "")
        monkeypatch.setattr(diagnosis, "detect_hardware", lambda: hardware)
        for module in (diagnosis, machine):
            monkeypatch.setattr(
                module, "current_session", lambda: session or Session("plain")
            )

    def sum_nothing(job: Job, device: str, _on_poll: object) -> None:
        text = f"9 ms on {job.num_processes} × {device}"
        (job.folder.root / "all_reduce").write_text(text)

    monkeypatch.setattr(diagnosis, "connect", sum_nothing)
    found()
    return found


def test_the_doctor_sees_this_machine_and_leaves_nothing(tmp_path):
    facts = doctor(tmp_path / "deep" / "out")
    rows = "place system python versions memory disk processors".split()
    assert [name for name in facts if name not in ("driver", "image")] == [
        *rows,
        "in short",
    ]
    assert not list(tmp_path.iterdir())
    assert f"torch {importlib.metadata.version('torch')}" in facts["versions"]
    assert "GiB free for" in facts["disk"] and "CPU cores" in facts["processors"]
    assert "GiB free in /dev/shm" in facts["system"]
    lines = repr(facts).splitlines()
    assert lines[0] == "This machine"
    assert lines[1].split() == ["place", *facts["place"].split()]
    assert ">disk</td>" in facts._repr_html_()


@pytest.mark.parametrize(
    ("gpus", "bf16", "settings", "sums"),
    [
        ((), True, "device=cpu, num_processes=1, dtype=bfloat16", None),
        (
            (T4, T4),
            True,
            "device=cuda, num_processes=2, dtype=float16",
            "9 ms on 2 × cuda",
        ),
        ((A100,), False, "device=cuda, num_processes=1, dtype=bfloat16", None),
    ],
)
def test_what_a_run_takes_is_told(gpus, bf16, settings, sums, place):
    place(*gpus, bf16=bf16)
    facts = doctor()
    faster = "" if gpus else "; a GPU is some hundred times faster"
    assert facts["in short"] == f"ready to train: {settings}{faster}"
    assert facts.get("torch built for") == (ARCHITECTURES if gpus else None)
    assert facts.get("all-reduce") == sums


def test_a_session_without_a_gpu_that_trains_says_which_to_choose(place):
    choose = ": choose Settings → Accelerator → GPU T4 x2"
    place(session=Session("kaggle"))
    assert doctor()["in short"].endswith(f"hundred times faster{choose}")
    place(Gpu("Tesla P100-PCIE-16GB", (6, 0), 15.9), session=Session("kaggle"))
    short = doctor()["in short"]
    assert short.startswith("not ready: Tesla P100-PCIE-16GB is too old")
    assert ARCHITECTURES in short and short.endswith(choose)


def test_the_place_says_when_the_session_ends(place, monkeypatch):
    assert doctor()["place"] == "plain, nothing ends the session"
    monkeypatch.setattr("minimind_nb.session.oldest_age_seconds", lambda: 3600.0)
    place(session=Session("kaggle", batch=True))
    found = doctor()["place"]
    assert found.startswith("kaggle (batch run), 10.5 hours left; its panel shows")


def test_a_system_other_than_linux_runs_one_process(place, monkeypatch):
    assert "several processes" in doctor()["system"]
    monkeypatch.setattr(sys, "platform", "darwin")
    assert "one process only, several need Linux" in doctor()["system"]


@pytest.mark.parametrize("old", [None, "4.57.1"])
def test_what_is_missing_or_too_old_says_how_to_get_it(place, monkeypatch, old):
    version = importlib.metadata.version

    def found(name: str) -> str:
        if name == "transformers" and not old:
            raise importlib.metadata.PackageNotFoundError(name)
        return (name == "transformers" and old) or version(name)

    monkeypatch.setattr(importlib.metadata, "version", found)
    facts = doctor()
    assert facts["versions"].endswith(
        '; missing or older than tested: pip install "transformers>=5.0"'
    )
    assert facts["in short"] == f"not ready: {facts['versions']}"


def test_little_disk_is_said(place, monkeypatch):
    little = SimpleNamespace(free=2**30, total=2**29)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: little)
    facts = doctor("out")
    assert facts["disk"] == (
        "1.0 GiB free for out; little: a checkpoint of 100 M parameters takes 1.2 GiB"
    )
    assert facts["in short"] == f"not ready: {facts['disk']}"


def test_a_folder_that_cannot_be_written_says_what_to_do(place, tmp_path):
    (tmp_path / "out").write_text("a file")
    assert doctor(tmp_path / "out")["disk"].endswith(
        "; it cannot be written (Not a directory): set another out_dir"
    )


def test_a_gpu_that_does_not_answer_is_a_row_and_no_error(tmp_path, monkeypatch):
    def silent() -> Hardware:
        raise RuntimeError("CUDA does not answer: driver too old")

    monkeypatch.setattr(diagnosis, "detect_hardware", silent)
    short = doctor(tmp_path)["in short"]
    assert short == "not ready: CUDA does not answer: driver too old"


def seal(folder: Path, facts: dict[str, Any] | None = None, **files: str) -> Path:
    with verified.writing(folder, facts or {}) as aside:
        for name, text in files.items():
            (aside / name).write_text(text)
    return folder


@pytest.fixture
def run(tmp_path) -> RunFolder:
    """A preference run of two checkpoints whose cache lies beside it."""
    folder = RunFolder(tmp_path / "out" / "dpo_32")
    folder.write_config({"settings": {}, "caches": ["tokens-1"]})
    for step in (2, 4):
        seal(folder.checkpoint_folder(step), {"step": step}, weights="1234")
    seal(tmp_path / "out" / "cache" / "tokens-1", tokens="123")
    return folder


def test_an_intact_run_is_intact_in_every_part(run):
    found = verify(run.root)
    assert found.intact and found.title == f"Files of {run.root}"
    assert found.rows == [
        ["checkpoint", "step_00000004", "intact"],
        ["checkpoint", "step_00000002", "intact"],
        ["token cache", "tokens-1", "intact"],
    ]


@pytest.mark.fault("F22", "F23")
def test_what_is_damaged_is_named_and_left_as_it_is(run, tmp_path):
    (run.checkpoint_folder(2) / "weights").write_text("1235")
    (tmp_path / "out" / "cache" / "tokens-1" / "tokens").write_text("12")
    before = tree(tmp_path)
    found = verify(run.root)
    assert not found.intact, "though a run resumes from the newest"
    assert [state for _, _, state in found.rows] == [
        "intact",
        "damaged: weights has the wrong sha256",
        "damaged: tokens has 2 of 3 bytes",
    ]
    (run.checkpoint_folder(4) / "weights").write_text("")
    assert not verify(run.root).intact
    (run.checkpoint_folder(4) / "weights").write_text("1234")
    assert tree(tmp_path) == before


@pytest.mark.fault("F115")
def test_checkpoints_set_aside_and_those_of_others_are_told(run):
    verified.set_aside(run.checkpoint_folder(4), "it was dropped")
    seal(run.checkpoint_folder(6), {"step": 6, "run": "other"}, weights="1")
    run.write_config(run.read_config() | {"run": "own"})
    assert [row[1:] for row in verify(run.root).rows[:3]] == [
        ["step_00000006", "damaged: it is of another run"],
        ["step_00000002", "intact"],
        ["step_00000004.corrupt", "was set aside: it was dropped"],
    ]


def test_a_file_is_no_run(run):
    with pytest.raises(NotADirectoryError, match="pass the folder of a run"):
        verify(run.config_file)


@pytest.mark.fault("F24")
def test_what_is_gone_is_said_to_be_gone(run, tmp_path):
    shutil.rmtree(run.checkpoints)
    shutil.rmtree(tmp_path / "out" / "cache")
    found = verify(run.root)
    assert not found.intact
    assert found.rows[0] == ["checkpoint", "", "none yet"]
    state = "missing; it is made again from the data when needed"
    assert found.rows[-1][2] == state


def test_a_checkpoint_that_is_pruned_meanwhile_is_not_damaged(run, monkeypatch):
    old = run.checkpoint_folder(2)
    real = RunFolder.checkpoint_folders

    def prune(folder: RunFolder) -> list[Path]:
        found = real(folder)
        shutil.rmtree(old)
        return found

    monkeypatch.setattr(RunFolder, "checkpoint_folders", prune)
    assert verify(run.root).rows[1] == ["checkpoint", old.name, "removed meanwhile"]


def test_a_folder_that_is_no_run_is_an_error_that_names_the_runs_near_it(run):
    run.metrics_file.touch()
    with pytest.raises(FileNotFoundError, match=rf"Runs in .*: {run.root}\."):
        verify(run.root.parent)
