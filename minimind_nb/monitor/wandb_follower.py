"""Weights & Biases: a process that reads a run's metrics file and sends its rows.

wandb asks for keys, waits for networks and changes the notebook that imports it. In a
process without a terminal none of that reaches the training or the cell.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import multiprocessing
import os
import secrets
import shlex
import traceback
import urllib.error
import urllib.request
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

INIT_SECONDS = 20.0  # for the server's answer; offline after that
FINISH_SECONDS = 30.0
STATE_NAME = "wandb.json"
LOG_NAME = "wandb.log"
_POLL_SECONDS = 1.0

logger = logging.getLogger(__name__)


def require_wandb() -> None:
    """Raise `ValueError` if wandb is not installed."""
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a mere folder named wandb has no origin
        raise ValueError(
            "use_wandb=True needs wandb, which is not installed: "
            "pip install 'minimind_nb[wandb]', or leave use_wandb out"
        )


class WandbFollower:
    """A process beside a run that sends its metrics, if `cfg.use_wandb`.

    It ends at the `end` row of this session, at `finish`, or with its parent. Its
    output is in `wandb.log`; its messages are logged by `report`. Only `finish` waits,
    at most `FINISH_SECONDS`.
    """

    def __init__(self, history: History, cfg: ResolvedConfig) -> None:
        self._history, self._cfg = history, cfg
        self._process: SpawnProcess | None = None

    def start(self) -> None:
        """Start the process before the session's first row is written."""
        if not self._cfg.use_wandb:
            return
        context = multiprocessing.get_context("spawn")
        self._finish = context.Event()
        self._messages = context.SimpleQueue()
        to_child = (self._finish, self._messages, INIT_SECONDS)
        arguments = (self._history, self._cfg.wandb_project, *to_child)
        self._process = context.Process(target=_follow, args=arguments, daemon=True)
        with without_main_script():
            self._process.start()

    def report(self) -> None:
        """Log the process's new messages."""
        while self._process and not self._messages.empty():
            logger.info(self._messages.get())

    def finish(self) -> None:
        """Let the process send the last row and end."""
        if self._process is None:
            return
        self._finish.set()
        with contextlib.suppress(KeyboardInterrupt):  # it ends the wait, not the call
            self._process.join(FINISH_SECONDS)
        code = self._process.exitcode
        self._process.kill()
        self._process.join()
        self.report()
        if code != 0:
            logger.warning(
                "wandb %s; the training is not affected, see %s",
                f"ended with exit code {code}" if code else "did not finish in time",
                self._history.path.with_name(LOG_NAME),
            )


def _follow(
    history: History,
    project: str,
    finish: Event,
    messages: SimpleQueue[str],
    seconds: float,
) -> None:
    """Run the process; `history` is as the parent saw it before this session."""
    die_with_parent(os.getppid())
    os.setsid()  # no terminal to ask in, and no interrupts
    folder = history.path.parent
    with open(folder / LOG_NAME, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        state = _read_state(folder / STATE_NAME, project)
        _write_state(history, state)
        run, message = _open_run(folder, state, seconds)
        messages.put(message)
        _send_rows(run, history, state, finish)
    except Exception as error:
        traceback.print_exc()
        messages.put(
            f"wandb failed ({type(error).__name__}: {_one_line(error)}); the training "
            f"is not affected, see {folder / LOG_NAME}"
        )


def _send_rows(
    run: Any, history: History, state: dict[str, Any], finish: Event
) -> None:
    """Send each new row until the session ends."""
    before, earlier = state["step"], history.session[:1]
    sent, over, end = 0, False, None
    while not over:
        over = finish.wait(_POLL_SECONDS)
        history.refresh()
        session = history.session
        # Until this session's first row, nobody knows which earlier rows it drops.
        if not session or (earlier and session[0] is earlier[0]):
            continue
        logged = (row for row in history.rows if row["kind"] in ("train", "eval"))
        rows = [row for row in logged if row["step"] > before]
        for row in rows[sent:]:
            named = {
                f"{row['kind']}/{n}": row[n] for n in row.keys() - {"kind", "step"}
            }
            run.log(dict(flatten(named)), step=row["step"])
        if rows[sent:]:
            _write_state(history, state | {"step": rows[-1]["step"]})
        sent = len(rows)
        end = next((row for row in session if row.get("event") == "end"), None)
        over = over or end is not None
    run.finish(exit_code=int(end is None or end["status"] == "failed"))


def _open_run(folder: Path, state: dict[str, Any], seconds: float) -> tuple[Any, str]:
    """Return a wandb run, offline without key or network, and a message about it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # pyright: ignore[reportMissingImports]

    def begin(mode: Any) -> Any:
        return wandb.init(
            project=state["project"],
            id=state["id"],
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=RunFolder(folder).read_config()["settings"],
            settings=wandb.Settings(
                console="off", silent=True, disable_git=True, init_timeout=seconds
            ),
            mode=mode,
        )

    mode, reason = os.environ.get("WANDB_MODE", "online"), ""
    try:
        if mode == "online":
            wandb.login(verify=False)  # raises without a key
            _ask_server(seconds)  # wandb before 0.31 waits for it beyond any timeout
        run = begin(mode)
    except Exception as error:
        if mode != "online":
            raise
        traceback.print_exc()
        wandb.teardown()  # it would hold the id
        mode, reason = "offline", f" ({_one_line(error) or type(error).__name__})"
        run = begin(mode)
    if mode != "offline":
        return run, f"wandb: {run.url or mode}"
    synced = shlex.quote(str(Path(run.dir).parent))
    return run, f"wandb is offline{reason}; later: wandb sync {synced}"


def _ask_server(seconds: float) -> None:
    """Raise `OSError` if wandb's server does not answer in time."""
    server = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    with contextlib.suppress(urllib.error.HTTPError):  # an answer, too
        urllib.request.urlopen(server, timeout=seconds).close()


def _read_state(file: Path, project: str) -> dict[str, Any]:
    """Return the wandb run of a run folder and the last step sent; at first a new one."""
    known = json.loads(file.read_bytes()) if file.is_file() else {}
    new = {"id": secrets.token_hex(4), "project": project, "step": -1}
    return known if known.get("project") == project else new


def _write_state(history: History, state: dict[str, Any]) -> None:
    verified.write_text(history.path.with_name(STATE_NAME), json.dumps(state))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
