"""A process beside a run that follows what the run writes, and never holds it up."""

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from ..lifetime import die_with_parent, without_main_script

_PATIENCE_SECONDS = 2.0  # before a wait is announced

logger = logging.getLogger(__name__)


class Follower:
    """A process that runs `work(finish, say, *arguments)` beside a run.

    It has no terminal and gets no interrupts; its output goes to the file `log`, and
    `say(text)` logs in the caller's process. It ends by itself after the event `finish`,
    which `Follower.finish` sets, or with its parent.
    """

    def __init__(
        self,
        name: str,
        log: Path,
        finish_seconds: float,
        work: Callable[..., None],
        *arguments: Any,
    ) -> None:
        self._name, self._log, self._finish_seconds = name, log, finish_seconds
        context = multiprocessing.get_context("spawn")
        self._finish, self._messages = context.Event(), context.SimpleQueue()
        given = (log, work, self._finish, self._messages, arguments)
        self._process: SpawnProcess | None
        self._process = context.Process(target=_run, args=given, daemon=True)

    def start(self) -> None:
        """Start the process."""
        assert self._process
        with without_main_script():
            self._process.start()

    def report(self) -> None:
        """Log what the process says, and once that it failed."""
        if self._process is None:
            return
        while not self._messages.empty():
            logger.info(self._messages.get())
        if self._process.exitcode:
            self._process = None
            logger.warning(
                f"{self._name} failed or did not finish in time; the training is not "
                f"affected, see {self._log}"
            )

    def finish(self) -> None:
        """Let the process do its last work, and end it after `finish_seconds`."""
        if self._process is None:
            return
        self._finish.set()
        seconds = self._finish_seconds
        with contextlib.suppress(KeyboardInterrupt):  # it ends the wait, not the call
            self._process.join(min(_PATIENCE_SECONDS, seconds))
            if self._process.is_alive():
                logger.info(
                    f"waiting at most {seconds:.0f} s for {self._name}; an interrupt "
                    "ends the wait"
                )
                self._process.join(seconds)
        self._process.kill()
        self._process.join()
        self.report()


def _run(
    log: Path, work: Callable[..., None], finish: Any, messages: Any, arguments: Any
) -> None:
    die_with_parent(os.getppid())
    os.setsid()  # no terminal to ask in, and no interrupts
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(finish, messages.put, *arguments)
