"""Ranks of torchrun: where they are, what they tell each other, what all raise."""

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]

from minimind_nb.data.faults import DataError
from minimind_nb.launch import torchrun
from minimind_nb.launch.outcome import TrainingFailed
from minimind_nb.launch.spawn import Job
from minimind_nb.launch.torchrun import Meeting, Place
from minimind_nb.storage.run_folder import RunFolder, RunLocked

ENVIRON = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def test_a_place_is_what_torchrun_set() -> None:
    assert Place.find(ENVIRON) == Place(rank=3, size=4, local_rank=1, local_size=2)
    assert not Place(3, 4, 1, 2).alone
    assert Place(0, 2, 0, 2).alone
    assert Place.find({"WORLD_SIZE": "2"}) is None
    assert Place.find({"RANK": ""}) is None


def test_half_an_environment_is_refused() -> None:
    environ = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    text = (
        "RANK is set, as torchrun does, but not LOCAL_WORLD_SIZE, MASTER_ADDR, "
        "MASTER_PORT; start with torchrun, or unset RANK"
    )
    with pytest.raises(RuntimeError, match=text):
        Place.find(environ)


def all_ranks(lead: Callable[[], Any], size: int = 3) -> list[Any]:
    """What each rank, a thread here, gets from one meeting: an answer or an error."""
    store = HashStore()
    got: list[Any] = [None] * size

    def take_part(rank: int) -> None:
        meeting = Meeting(Place(rank, size, rank, size), store)
        try:
            got[rank] = meeting.take_part(lead)
        except BaseException as error:
            got[rank] = error

    threads = [threading.Thread(target=take_part, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return got


def test_what_rank_0_returns_all_return() -> None:
    assert all_ranks(lambda: {"loss": 1.5}) == [{"loss": 1.5}] * 3


@pytest.mark.parametrize(
    "error",
    [
        ValueError("two problems"),
        DataError("line 3 is wrong"),
        RunLocked("in use by pid 5"),
        FileNotFoundError(errno.ENOENT, "No such file", "corpus.jsonl"),
        KeyboardInterrupt(),
    ],
)
def test_what_rank_0_raises_all_raise(error: BaseException) -> None:
    def fail() -> None:
        raise error

    raised = all_ranks(fail)
    assert [type(one) for one in raised] == [type(error)] * 3
    assert [str(one) for one in raised] == [str(error)] * 3


def test_an_error_of_others_is_told_as_the_nearest_of_python_s() -> None:
    class OwnError(RuntimeError):
        pass

    def fail() -> None:
        raise OwnError("odd")

    assert [type(one) for one in all_ranks(fail)] == [OwnError, *[RuntimeError] * 2]


def test_an_error_that_takes_more_than_a_text_is_told_by_its_base() -> None:
    raised = all_ranks(b"\xff".decode)
    assert [type(one) for one in raised] == [UnicodeDecodeError, *[ValueError] * 2]
    assert [str(one) for one in raised] == [str(raised[0])] * 3


def test_a_failure_keeps_its_rank_and_phase() -> None:
    def fail() -> None:
        raise TrainingFailed("rank 2 failed", 2, "meeting")

    for one in all_ranks(fail):
        assert (str(one), one.rank, one.phase) == ("rank 2 failed", 2, "meeting")


def test_whoever_hears_nothing_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchrun, "PREPARATION_SECONDS", 0.1)
    meeting = Meeting(Place(1, 2, 1, 2), HashStore())
    with pytest.raises(TimeoutError, match="rank 1 has waited 0 s for the others"):
        meeting.take_part(lambda: None)


@pytest.mark.parametrize("missing", ["folder", "cache"])
def test_a_machine_that_does_not_see_the_files_is_named_by_all_ranks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(torchrun, "SIGHT_SECONDS", 0.2)
    store = HashStore()
    (tmp_path / "seen").mkdir()
    (tmp_path / "seen" / ".meeting").write_text("token")
    cache = tmp_path / ("seen" if missing == "folder" else "cache")
    raised = {}

    def look(rank: int) -> None:
        """Rank 1's machine has other files under the same name."""
        here = tmp_path / ("elsewhere" if rank and missing == "folder" else "seen")
        paths = [str(cache)] if rank else []
        job = Job("no.module:run", {}, 2, RunFolder(here), paths=paths)
        with pytest.raises(FileNotFoundError) as error:
            Meeting(Place(rank, 2, 0, 1), store)._do(job, "token")
        raised[rank] = str(error.value)

    threads = [threading.Thread(target=look, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    name = "elsewhere" if missing == "folder" else "cache"
    assert raised[0] == raised[1]
    assert f"does not see {tmp_path / name} as rank 0 does; out_dir" in raised[0]
    assert raised[0].startswith("rank 1 on ")
