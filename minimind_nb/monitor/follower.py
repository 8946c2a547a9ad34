"""A process beside a run that follows what the run writes, and never holds it up."""

import contextlib
import logging
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..lifetime import die_with_parent, without_main_script

_PATIENCE_SECONDS = 2.0  # before a wait is announced

logger = logging.getLogger(__name__)


class Follower:
    """A process that runs `work(finish, say, *arguments)` beside a run.

    It has no terminal and gets no interrupts; its output goes to `{name}.log` in the
    folder of the run, and `say(text)` logs in the caller's process. It ends by itself
    after the event `finish`, which `Follower.finish` sets, or with its parent.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        finish_seconds: float,
        work: Callable[..., None],
        *arguments: Any,
    ) -> None:
        self._name, self._log, self._failed = name, folder / f"{name}.log", False
        self._finish_seconds = finish_seconds
        context = multiprocessing.get_context("spawn")
        self._finish, self._messages = context.Event(), context.SimpleQueue()
        given = (self._log, work, self._finish, self._messages.put, *arguments)
        self._process = context.Process(target=_run, args=given, daemon=True)
        with without_main_script():
            self._process.start()

    def report(self) -> None:
        """Log what the process says, and once that it failed."""
        while not self._messages.empty():
            logger.info(self._messages.get())
        if self._process.exitcode and not self._failed:
            self._failed = True
            logger.warning(
                f"{self._name} failed or did not finish in time; the training is not "
                f"affected, see {self._log}"
            )

    def finish(self) -> None:
        """Let the process do its last work, and end it after `finish_seconds`."""
        seconds = self._finish_seconds
        self._finish.set()
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


def _run(log: Path, work: Callable[..., None], *given: Any) -> None:
    die_with_parent(os.getppid())
    os.setsid()  # no terminal to ask in, and no interrupts
    with open(log, "ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    work(*given)
