"""Weights & Biases: a process that reads a run's metrics file and sends its rows.

wandb asks for keys, waits for networks and changes the notebook that imports it. In a
process without a terminal none of that reaches the training or the cell.
"""

import contextlib
import importlib.util
import json
import logging
import multiprocessing
import os
import secrets
import shlex
import traceback
from multiprocessing.context import SpawnProcess
from multiprocessing.queues import SimpleQueue
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from ..config import ResolvedConfig
from ..lifetime import die_with_parent, without_main_script
from ..storage import verified
from ..storage.run_folder import RunFolder
from .metrics import History, flatten

FINISH_SECONDS = 30.0
LOG_NAME = "wandb.log"
_POLL_SECONDS = 1.0
_DEFAULTS = {
    "WANDB_MODE": "online",
    "WANDB_INIT_TIMEOUT": "20",  # seconds for the server's answer, offline after that
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}

logger = logging.getLogger(__name__)


def require_wandb() -> None:
    """Raise `ValueError` if wandb is not installed."""
    # A mere folder named wandb has no origin.
    if not getattr(importlib.util.find_spec("wandb"), "origin", None):
        raise ValueError(
            "use_wandb=True needs wandb, which is not installed: "
            "pip install 'minimind_nb[wandb]', or leave use_wandb out"
        )


class WandbFollower:
    """A process beside a run that sends its metrics, if `cfg.use_wandb`.

    It ends at the `end` row of this session, at `finish`, which waits for it at most
    `FINISH_SECONDS`, or with its parent. Its output is in `wandb.log`.
    """

    def __init__(self, history: History, cfg: ResolvedConfig) -> None:
        self._history, self._cfg = history, cfg
        self._process: SpawnProcess | None = None

    def start(self) -> None:
        """Start the process before the session's first row is written."""
        if not self._cfg.use_wandb:
            return
        context = multiprocessing.get_context("spawn")
        self._finish, self._messages = context.Event(), context.SimpleQueue()
        project = self._cfg.wandb_project
        arguments = (self._history, project, self._finish, self._messages)
        self._process = context.Process(target=_follow, args=arguments, daemon=True)
        with without_main_script():
            self._process.start()

    def report(self) -> None:
        """Log the process's message, and once that it failed."""
        if self._process is None:
            return
        while not self._messages.empty():
            logger.info(self._messages.get())
        if self._process.exitcode:
            self._process = None
            logger.warning(
                "wandb failed or did not finish in time; the training is not affected, "
                f"see {self._history.path.with_name(LOG_NAME)}"
            )

    def finish(self) -> None:
        """Let the process send the last row and end."""
        if self._process is None:
            return
        self._finish.set()
        with contextlib.suppress(KeyboardInterrupt):  # it ends the wait, not the call
            self._process.join(FINISH_SECONDS)
        self._process.kill()
        self._process.join()
        self.report()


def _follow(
    history: History, project: str, finish: Event, messages: SimpleQueue[str]
) -> None:
    """Run the process; `history` has the rows that this session begins with."""
    die_with_parent(os.getppid())
    os.setsid()  # no terminal to ask in, and no interrupts
    with open(history.path.with_name(LOG_NAME), "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.update(_DEFAULTS | dict(os.environ))
    file = history.path.with_name("wandb.json")
    state = json.loads(file.read_bytes()) if file.is_file() else {}
    if state.get("project") != project:
        state = {"id": secrets.token_hex(4), "project": project, "step": -1}
    verified.write_text(file, json.dumps(state))
    run, message = _open_run(history.path.parent, project, state["id"])
    messages.put(message)
    before, begun, sent, over, status = state["step"], len(history.rows), 0, False, ""
    while not (over or status):
        over = finish.wait(_POLL_SECONDS)
        history.refresh()
        logged = (row for row in history.rows if row["kind"] in ("train", "eval"))
        rows = [row for row in logged if row["step"] > before]
        for row in rows[sent:]:
            names = row.keys() - {"kind", "step"}
            values = {f"{row['kind']}/{name}": row[name] for name in names}
            run.log(dict(flatten(values)), step=row["step"])
        if rows[sent:]:
            state["step"] = rows[-1]["step"]
            verified.write_text(file, json.dumps(state))
        sent = len(rows)
        ends = (row for row in history.rows[begun:] if row.get("event") == "end")
        status = next((row["status"] for row in ends), "")
    run.finish(exit_code=int(status in ("", "failed")))


def _open_run(folder: Path, project: str, name: str) -> tuple[Any, str]:
    """Return a wandb run, offline without key or network, and a message about it."""
    import requests  # wandb needs it
    import wandb  # pyright: ignore[reportMissingImports]

    settings: Any = {
        "project": project,
        "id": name,
        "resume": "allow",
        "name": folder.name,
        "dir": str(folder),
        "config": RunFolder(folder).read_config()["settings"],
    }
    mode: Any = os.environ["WANDB_MODE"]
    reason = ""
    if mode == "online":
        try:
            wandb.login(verify=False)  # raises without a key
            # wandb before 0.31 waits for its server beyond any timeout.
            server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
            requests.get(server, timeout=float(os.environ["WANDB_INIT_TIMEOUT"]))
            run = wandb.init(**settings, mode=mode)
            return run, f"wandb: {run.url}"
        except Exception as error:
            traceback.print_exc()
            wandb.teardown()  # it would hold the id
            mode, reason = "offline", f" ({' '.join(str(error).split())})"
    run: Any = wandb.init(**settings, mode=mode)
    synced = shlex.quote(str(Path(run.dir).parent))
    return run, f"wandb is {mode}{reason}; later: wandb sync {synced}"
