"""Ranks that torchrun started: they run the same worker, in place.

Rank 0 prepares, and passes the job to the others through torchrun's own store.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from ..lifetime import die_with_parent
from ..storage.run_folder import RunFolder
from .cancellation import StopRequest
from .outcome import ENDINGS, Exit, RankRecord, collect_outcome
from .spawn import IMPORT_SECONDS, POLL_SECONDS, Job, RankInfo

PREPARATION_SECONDS = 7200.0
LEAVE_SECONDS = 10.0
# torchrun reports the process that fails first as the root cause: rank 0, if it raises.
_HEAD_START_SECONDS = 1.0
_PAUSE_SECONDS = 0.05


class TorchrunSession:
    """One call of `train` or `evaluate`, made by every rank that torchrun started.

    Calls are numbered, so all ranks must make the same calls in the same order.
    """

    def __init__(self, info: RankInfo, store: Store) -> None:
        self.info = info
        number = store.add(f"minimind_nb/calls/{info.rank}", 1)
        self._store = PrefixStore(f"minimind_nb/{number}", store)
        self._messages = 0
        self._stop: StopRequest | None = None

    def run(self, lead: Callable[[], Any]) -> Any:
        """Call `lead` on rank 0 and return its result, plain data, on every rank.

        The other ranks run the job that it launches. What `lead` raises is raised on
        rank 0; the others raise a `RuntimeError` that quotes it, or the
        `TrainingFailed` of the job.
        """
        try:
            return self._follow() if self.info.rank else self._lead(lead)
        finally:
            if self._stop:
                self._stop.restore()

    def launch(self, job: Job, on_poll: Callable[[], None]) -> str:
        """On rank 0: run a job on all ranks and return how it ended.

        Calls `on_poll` twice a second, from a thread. Raises `TrainingFailed`.
        """
        for rank in range(self.info.world_size):
            job.folder.record_file(rank).unlink(missing_ok=True)
        self._send(job=[job.target, str(job.folder.root)])
        over = threading.Event()

        def poll() -> None:
            while not over.wait(POLL_SECONDS):
                on_poll()

        view = threading.Thread(target=poll, name="view", daemon=True)
        view.start()
        try:
            return self._work(job)
        finally:
            over.set()
            view.join()

    def _lead(self, lead: Callable[[], Any]) -> Any:
        try:
            answer = lead()
            self._send(answer=answer)
            return answer
        except BaseException as error:
            self._send(error=f"{type(error).__name__}: {error}")
            raise
        finally:  # torchrun ends all ranks, and its store, as soon as one has failed
            self._wait_for_all("left")

    def _follow(self) -> Any:
        """Run the job that rank 0 launches, if any, and return what rank 0 does."""
        try:
            while job := (message := self._receive()).get("job"):
                target, folder = job
                self._work(Job(target, RunFolder(folder), self.info.world_size))
        finally:
            self._store.set(f"left/{self.info.rank}", "")
        if "error" in message:  # rank 0 raises as soon as all have left
            time.sleep(_HEAD_START_SECONDS)
            raise RuntimeError(f"rank 0 failed: {message['error']}")
        return message["answer"]

    def _work(self, job: Job) -> str:
        """Run this rank's part of a job; return how it ended, on rank 0 for all."""
        info = self.info
        self._stop = StopRequest()
        record = RankRecord(job.folder.record_file(info.rank), info.rank)
        try:
            job.run(info, PrefixStore("group", self._store), record, self._stop)
        except BaseException:
            if not record.file.exists():  # this machine does not see the run folder
                raise
            # A closed connection makes the others fail at once; NCCL's could wait.
            if dist.is_initialized() and dist.get_backend() == "gloo":
                dist.destroy_process_group()
        self._store.set(f"done/{info.rank}", "")
        if record.status in ENDINGS:
            if info.rank:
                return record.status
            self._wait_for_all("done")
        silent = Exit(None, time.time(), "it did not say how it ended")
        return collect_outcome(job.folder, [silent] * info.world_size)

    def _send(self, **message: Any) -> None:
        self._store.set(f"messages/{self._messages}", json.dumps(message))
        self._messages += 1

    def _receive(self) -> dict[str, Any]:
        text = self._get(f"messages/{self._messages}", PREPARATION_SECONDS)
        self._messages += 1
        return json.loads(text)

    def _get(self, key: str, seconds: float) -> str:
        """Wait for a value in short naps: torch's own wait handles no signal."""
        end = time.monotonic() + seconds
        while not self._store.check([key]):
            if time.monotonic() > end:
                raise TimeoutError(
                    f"rank {self.info.rank} timed out after {seconds:.0f} s waiting for "
                    f"the other ranks ({key}); see rank 0's output"
                )
            time.sleep(_PAUSE_SECONDS)
        return self._store.get(key).decode()

    def _wait_for_all(self, what: str) -> None:
        """Wait some seconds until every other rank has set a key."""
        end = time.monotonic() + LEAVE_SECONDS
        for rank in range(1, self.info.world_size):
            with contextlib.suppress(TimeoutError):
                self._get(f"{what}/{rank}", end - time.monotonic())


def join_torchrun() -> TorchrunSession | None:
    """Return the session of this call, or None if torchrun did not start this process."""
    info = RankInfo.from_environment()
    return TorchrunSession(info, _connect()) if info else None


@functools.cache
def _connect() -> Store:
    """Return torchrun's own store: no other port is ever taken."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    timeout = datetime.timedelta(seconds=IMPORT_SECONDS)
    store, _, _ = next(rendezvous("env://", timeout=timeout))
    return store
