"""Processes of torchrun: rank 0 makes a call, and the others get what comes of it."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from minimind_nb.launch import torchrun
from minimind_nb.launch.outcome import TrainingFailed
from minimind_nb.launch.torchrun import find_torchrun, on_first_rank

ENVIRON = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_rank_and_size_are_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", ENVIRON)
    assert find_torchrun() == (1, 2)
    monkeypatch.setattr(os, "environ", ENVIRON | {"RANK": ""})
    assert find_torchrun() is None


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    half = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    monkeypatch.setattr(os, "environ", half)
    text = (
        "RANK is set, as torchrun does, but not LOCAL_WORLD_SIZE, MASTER_ADDR, "
        "MASTER_PORT: start with torchrun, or unset RANK"
    )
    with pytest.raises(RuntimeError, match=text):
        find_torchrun()


def test_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", ENVIRON | {"WORLD_SIZE": "4"})
    with pytest.raises(
        RuntimeError, match="4 processes, of which 2 are here: training"
    ):
        find_torchrun()


@pytest.fixture
def on_ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Any]]:
    """What each rank, a thread here, gets from one call: a result or an error."""
    store, place = HashStore(), threading.local()
    monkeypatch.setattr(torchrun, "_HEAD_START_SECONDS", 0.0)
    monkeypatch.setattr(torchrun, "_connect", lambda: store)
    monkeypatch.setattr(torchrun, "find_torchrun", lambda: (place.rank, 3))

    def call(work: Callable[[], Any], *ranks: int) -> list[Any]:
        got: list[Any] = [None] * len(ranks)

        def run(at: int) -> None:
            place.rank = ranks[at]
            try:
                got[at] = on_first_rank(work)
            except BaseException as error:
                got[at] = error

        threads = [threading.Thread(target=run, args=(at,)) for at in range(len(ranks))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        return got

    return call


def test_the_work_is_done_once_and_all_get_its_result(on_ranks: Any) -> None:
    done: list[int] = []

    def work() -> list[int]:
        time.sleep(0.2)
        done.append(len(done))
        return done

    assert on_ranks(work, 0, 1, 2) == [[0]] * 3
    assert on_ranks(work, 0, 1, 2) == [[0, 1]] * 3


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two problems"),
        FileNotFoundError(2, "No such file", "corpus.jsonl"),
        TrainingFailed("rank 2 failed", 2, "meeting"),
        KeyboardInterrupt(),
    ],
)
def test_what_rank_0_raises_the_others_quote(
    error: BaseException, on_ranks: Any
) -> None:
    def fail() -> None:
        raise error

    first, *others = on_ranks(fail, 0, 1, 2)
    assert first is error
    assert [type(one) for one in others] == [RuntimeError] * 2
    text = f"rank 0 failed: {type(error).__name__}: {error}"
    assert [str(one) for one in others] == [text] * 2
