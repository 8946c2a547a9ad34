"""Ranks that torchrun started: they meet through its store and work in place.

Rank 0 prepares and speaks, the others listen and do the jobs that it launches.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import functools
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..data.faults import DataError
from ..hardware import choose_threads, count_cores
from ..lifetime import die_with_parent
from ..storage.run_folder import NoGoodCheckpoint, RunFolder, RunLocked
from ..storage.verified import write_text
from .cancellation import StopRequest
from .outcome import Exit, RankRecord, TrainingFailed, judge
from .process_group import leave_at_once
from .spawn import IMPORT_SECONDS, POLL_SECONDS, Job

PREPARATION_SECONDS = 7200.0
SIGHT_SECONDS = 60.0  # what a network file system may remember of a missing file
LEAVE_SECONDS = 10.0
_PAUSE_SECONDS = 0.05
_NAMES = "RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
_ERRORS: dict[str, type[BaseException]] = {
    kind.__name__: kind
    for kind in (
        *(DataError, NoGoodCheckpoint, RunLocked),
        *(ValueError, TypeError, FileNotFoundError, FileExistsError, PermissionError),
        *(OSError, MemoryError, RuntimeError, KeyboardInterrupt),
    )
}


@dataclass(frozen=True)
class Place:
    """Which of all processes this one is, and which of those on its machine."""

    rank: int
    size: int
    local_rank: int
    local_size: int

    @classmethod
    def find(cls, environ: Mapping[str, str] | None = None) -> Place | None:
        """What torchrun set, or None where RANK is not set.

        Raises `RuntimeError` where RANK is set and something else is not.
        """
        environ = os.environ if environ is None else environ
        if not environ.get("RANK"):
            return None
        if missing := [name for name in _NAMES if not environ.get(name)]:
            raise RuntimeError(
                f"RANK is set, as torchrun does, but not {', '.join(missing)}; start "
                "with torchrun, or unset RANK"
            )
        return cls(*(int(environ[name]) for name in _NAMES[:4]))

    @property
    def alone(self) -> bool:
        """Whether all processes are on this machine."""
        return self.local_size == self.size


class Meeting:
    """One call of `train` or `evaluate`, made by all ranks of torchrun.

    Calls are told apart by their number, which is the same on all ranks as long as all
    make the same calls.
    """

    def __init__(self, place: Place, store: Store) -> None:
        self.place = place
        number = store.add(f"minimind_nb/calls/{place.rank}", 1)
        self._store = PrefixStore(f"minimind_nb/{number}", store)
        self._said = 0
        self._stop: StopRequest | None = None

    def take_part(self, lead: Callable[[], Any]) -> Any:
        """Call `lead` on rank 0 and return what it returns, plain data, on all ranks.

        The others do the job that it launches. What it raises is raised by all, at
        least as the nearest of the usual errors.
        """
        try:
            if self.place.rank:
                return self._follow()
            return self._lead(lead)
        finally:
            self._store.set(f"left/{self.place.rank}", "")
            self._listen_no_more()

    def launch(self, job: Job, on_poll: Callable[[], None]) -> str:
        """On rank 0: have all ranks do a job, and return how it ended.

        Calls `on_poll` twice a second, from a thread. Raises `TrainingFailed` where a
        rank failed, `FileNotFoundError` where a machine does not see the files.
        """
        for rank in range(self.place.size):
            job.folder.record_file(rank).unlink(missing_ok=True)
        token = secrets.token_hex(8)
        sight = job.folder.root / ".meeting"
        write_text(sight, token)
        fields = {"target": job.target, "payload": job.payload, "paths": job.paths}
        self._say(job={**fields, "folder": str(job.folder.root)}, token=token)
        try:
            with _polled(on_poll):
                return self._do(job, token)
        finally:
            sight.unlink(missing_ok=True)

    def _lead(self, lead: Callable[[], Any]) -> Any:
        try:
            answer = lead()
        except BaseException as error:
            self._say(error=_describe(error))
            # torchrun ends all as soon as one leaves, so all leave together; of a job
            # that failed the others know by themselves.
            if not self._stop:
                self._wait_for_all("left")
            raise
        self._say(answer=answer)
        self._wait_for_all("left")
        return answer

    def _follow(self) -> Any:
        while True:
            said = self._hear()
            if "answer" in said:
                return said["answer"]
            if "error" in said:
                raise _rebuild(said["error"])
            fields = said["job"] | {"folder": RunFolder(said["job"]["folder"])}
            self._do(Job(num_processes=self.place.size, **fields), said["token"])
            self._listen_no_more()

    def _do(self, job: Job, token: str) -> str:
        """Do this rank's part of a job; on rank 0, how it ended for all."""
        place, ended = self.place, False
        if not place.alone:
            self._see_all(job, token)
        else:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._stop = StopRequest()
        record = RankRecord(job.folder.record_file(place.rank), place.rank)
        own = {
            "store": PrefixStore("group", self._store),
            "local_rank": place.local_rank,
            "threads": choose_threads(place.local_size, count_cores()),
        }
        job = dataclasses.replace(job, payload={**job.payload, **own})
        with contextlib.suppress(BaseException):  # it is in the record
            job.run(place.rank, record, self._stop)
            ended = True
        self._store.set(f"done/{place.rank}", "")
        if ended and place.rank:
            return record.status
        if ended:
            self._wait_for_all("done")
        else:
            leave_at_once()
        silent = Exit(None, time.time(), "it did not say how it ended")
        return judge(job.folder, [silent] * place.size, logs=False)

    def _see_all(self, job: Job, token: str) -> None:
        """Raise, on every rank, where the machine of some rank does not see the files."""
        place, problem = self.place, ""
        sight, end = job.folder.root / ".meeting", time.monotonic() + SIGHT_SECONDS
        while not _reads(sight, token) and time.monotonic() < end:
            time.sleep(_PAUSE_SECONDS)
        unseen = [path for path in job.paths if not Path(path).exists()]
        if not _reads(sight, token):
            unseen = [str(job.folder.root.absolute())]
        if unseen:
            problem = (
                f"rank {place.rank} on {socket.gethostname()} does not see {unseen[0]} "
                "as rank 0 does; out_dir, and what init_from and resume name, must lie "
                "in a folder that all machines share"
            )
        self._store.set(f"sight/{place.rank}", problem)
        for rank in range(place.size):
            if problem := self._read(f"sight/{rank}", IMPORT_SECONDS):
                raise FileNotFoundError(problem)

    def _say(self, **message: Any) -> None:
        self._store.set(f"said/{self._said}", json.dumps(message))
        self._said += 1

    def _hear(self) -> dict[str, Any]:
        message = json.loads(self._read(f"said/{self._said}", PREPARATION_SECONDS))
        self._said += 1
        return message

    def _read(self, key: str, seconds: float) -> str:
        """Wait for what another rank sets. In short naps, so that signals are heard."""
        end = time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"rank {self.place.rank} has waited {seconds:.0f} s for the others "
                    f"({key}); the output of rank 0 tells how far it is. Tokenised data "
                    "is kept: start again when it is ready"
                )
            time.sleep(_PAUSE_SECONDS)
        return self._store.get(key).decode()

    def _wait_for_all(self, what: str) -> None:
        """Wait some seconds for the other ranks to get somewhere."""
        for rank in range(1, self.place.size):
            with contextlib.suppress(TimeoutError):
                self._read(f"{what}/{rank}", LEAVE_SECONDS)

    def _listen_no_more(self) -> None:
        if self._stop:
            self._stop.restore()


def find_meeting() -> Meeting | None:
    """The meeting of this call; None where torchrun did not start this process."""
    place = Place.find()
    return Meeting(place, _connect()) if place else None


@functools.cache
def _connect() -> Store:
    """torchrun's own store: no other port is ever taken."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    timeout = datetime.timedelta(seconds=IMPORT_SECONDS)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    return store


@contextlib.contextmanager
def _polled(on_poll: Callable[[], None]) -> Iterator[None]:
    """Call a function twice a second while the block runs."""
    over = threading.Event()

    def poll() -> None:
        while not over.wait(POLL_SECONDS):
            on_poll()

    thread = threading.Thread(target=poll, name="view", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _reads(file: Path, token: str) -> bool:
    try:
        return file.read_text(encoding="utf-8") == token
    except OSError:
        return False


def _describe(error: BaseException) -> dict[str, Any]:
    """An error as plain data."""
    if isinstance(error, TrainingFailed):
        return {"text": str(error), "rank": error.rank, "phase": error.phase}
    names = [kind.__name__ for kind in type(error).__mro__]
    return {"text": str(error), "kinds": names}


def _rebuild(error: Mapping[str, Any]) -> BaseException:
    """The error that `_describe` described."""
    if "phase" in error:
        return TrainingFailed(error["text"], error["rank"], error["phase"])
    known = (_ERRORS[name] for name in error["kinds"] if name in _ERRORS)
    return next(known, RuntimeError)(error["text"])
