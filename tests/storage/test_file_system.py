"""A file system may lack locks, flushed folders or a size; an error is still one."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from minimind_nb.storage import file_system, verified
from minimind_nb.storage.run_folder import RunFolder


@pytest.fixture(autouse=True)
def warned() -> Iterator[None]:
    """Each test hears every warning for the first time."""
    file_system._warn_once.cache_clear()
    yield
    file_system._warn_once.cache_clear()


def failing(number: int) -> Any:
    def fail(*_: Any) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def write(folder: Path, needed: int = 0) -> dict[str, Any]:
    with verified.writing(folder, {"step": 1}, needed) as aside:
        (aside / "weights").write_bytes(b"1")
    return verified.verify(folder)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_run_works_without_file_locks(
    number: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(fcntl, "flock", failing(number))
    run = RunFolder(tmp_path / "run")
    with run.lock():
        assert not run.is_locked()
    assert caplog.messages == [
        "this file system has no file locks: start only one run in a folder"
    ]


def test_folders_that_cannot_be_flushed_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    assert [write(tmp_path / name) for name in "ab"] == [{"step": 1}] * 2
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("this file system cannot flush")


def test_a_size_of_zero_is_no_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nothing = SimpleNamespace(total=0, used=0, free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: nothing)
    assert [write(tmp_path / name, 1 << 60) for name in "ab"] == [{"step": 1}] * 2
    assert caplog.messages == [
        "this file system states no size: the free space is not checked"
    ]


@pytest.mark.parametrize("module", [fcntl, os])
def test_other_errors_are_raised(
    module: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        module, {fcntl: "flock", os: "fsync"}[module], failing(errno.EIO)
    )
    with pytest.raises(OSError, match="Input/output error"):
        with RunFolder(tmp_path / "run").lock():
            write(tmp_path / "folder")
