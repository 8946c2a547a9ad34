"""Ranks of torchrun: where they are, what they send each other, what each raises."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from minimind_nb.launch import torchrun
from minimind_nb.launch.outcome import TrainingFailed
from minimind_nb.launch.spawn import Job, RankInfo
from minimind_nb.launch.torchrun import TorchrunSession
from minimind_nb.storage.run_folder import RunFolder

ENVIRON = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


@pytest.fixture(autouse=True)
def _no_head_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "_HEAD_START_SECONDS", 0.0)


def test_a_rank_is_where_torchrun_put_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", ENVIRON)
    assert RankInfo.from_environment() == RankInfo(3, 4, 1, 2)
    monkeypatch.setattr(os, "environ", ENVIRON | {"RANK": ""})
    assert RankInfo.from_environment() is None


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    monkeypatch.setattr(os, "environ", half)
    text = (
        "RANK is set, as torchrun does, but not LOCAL_WORLD_SIZE, MASTER_ADDR, "
        "MASTER_PORT: start with torchrun, or unset RANK"
    )
    with pytest.raises(RuntimeError, match=text):
        RankInfo.from_environment()


def on_all_ranks(lead: Callable[[], Any], size: int = 3) -> list[Any]:
    """What each rank, a thread here, gets from one session: a result or an error."""
    store = HashStore()
    got: list[Any] = [None] * size

    def run(rank: int) -> None:
        session = TorchrunSession(RankInfo(rank, size, rank, size), store)
        try:
            got[rank] = session.run(lead)
        except BaseException as error:
            got[rank] = error

    together(run, size)
    return got


def together(run: Callable[[int], None], size: int) -> None:
    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)


def test_what_rank_0_returns_all_return() -> None:
    assert on_all_ranks(lambda: {"loss": 1.5}) == [{"loss": 1.5}] * 3


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two problems"),
        FileNotFoundError(2, "No such file", "corpus.jsonl"),
        TrainingFailed("rank 2 failed", 2, "meeting"),
        KeyboardInterrupt(),
    ],
)
def test_what_rank_0_raises_the_others_quote(error: BaseException) -> None:
    def fail() -> None:
        raise error

    first, *others = on_all_ranks(fail)
    assert first is error
    assert [type(one) for one in others] == [RuntimeError] * 2
    text = f"rank 0 failed: {type(error).__name__}: {error}"
    assert [str(one) for one in others] == [text] * 2


def test_a_rank_that_receives_nothing_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "PREPARATION_SECONDS", 0.1)
    session = TorchrunSession(RankInfo(1, 2, 1, 2), HashStore())
    with pytest.raises(TimeoutError, match="rank 1 timed out after 0 s waiting"):
        session.run(lambda: None)


def test_a_machine_that_does_not_see_the_run_folder_names_the_missing_file(
    tmp_path: Path,
) -> None:
    store = HashStore()
    sessions = [TorchrunSession(RankInfo(rank, 2, 0, 1), store) for rank in range(2)]
    job = Job("minimind_nb.training.worker:run", RunFolder(tmp_path / "run"), 2)
    raised: list[Any] = [None, None]

    def run(rank: int) -> None:
        with pytest.raises(FileNotFoundError) as error:
            sessions[rank].run(lambda: sessions[0].launch(job, lambda: None))
        raised[rank] = error.value.filename

    together(run, 2)
    assert raised == [str(job.folder.plan_file)] * 2
