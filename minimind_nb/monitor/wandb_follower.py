"""Weights & Biases: a process that reads a run's metrics file and sends its rows.

wandb asks for keys, waits for networks and changes the notebook that imports it. In a
process without a terminal none of that reaches the training or the cell.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import json
import logging
import multiprocessing
import netrc
import os
import secrets
import shlex
import traceback
import urllib.error
import urllib.request
from multiprocessing.context import SpawnProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config import ResolvedConfig
from ..lifetime import die_with_parent, without_main_script
from ..storage import verified
from ..storage.run_folder import RunFolder
from .metrics import History, Row, flatten

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
    output is in `wandb.log`, and it has one message, which `report` logs. Only `finish`
    waits, at most `FINISH_SECONDS`.
    """

    def __init__(self, history: History, cfg: ResolvedConfig) -> None:
        self._history, self._cfg = history, cfg
        self._folder = history.path.parent
        self._message = ""
        self._process: SpawnProcess | None = None

    def start(self) -> None:
        """Start the process before the session's first row is written."""
        if not self._cfg.use_wandb:
            return
        state = _read_state(self._folder, self._cfg.wandb_project)
        _write_state(self._folder, state)
        context = multiprocessing.get_context("spawn")
        self._finish = context.Event()
        arguments = (self._history, state, self._finish, INIT_SECONDS)
        self._process = context.Process(target=_follow, args=arguments, daemon=True)
        with without_main_script():
            self._process.start()

    def report(self) -> None:
        """Log the process's message when it is new."""
        if self._process is None:
            return
        message = json.loads((self._folder / STATE_NAME).read_bytes())["message"]
        if message != self._message:
            self._message = message
            logger.info(message)

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
                self._folder / LOG_NAME,
            )


def _follow(
    history: History, state: dict[str, Any], finish: Event, seconds: float
) -> None:
    """Run the process; `history` is as the parent saw it before this session."""
    die_with_parent(os.getppid())
    os.setsid()  # no terminal to ask in, and no interrupts
    folder = history.path.parent
    with open(folder / LOG_NAME, "ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        _send_rows(history, state, finish, seconds)
    except Exception as error:
        traceback.print_exc()
        state["message"] = (
            f"wandb failed ({type(error).__name__}: {_one_line(error)}); the training "
            f"is not affected, see {folder / LOG_NAME}"
        )
        _write_state(folder, state)


def _send_rows(
    history: History, state: dict[str, Any], finish: Event, seconds: float
) -> None:
    """Send each new row until the session ends."""
    folder = history.path.parent
    run, state["message"] = _open_run(folder, state, seconds)
    _write_state(folder, state)
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
            run.log(_values(row), step=row["step"])
        if rows[sent:]:
            state["step"] = rows[-1]["step"]
            _write_state(folder, state)
        sent = len(rows)
        end = next((row for row in session if row.get("event") == "end"), None)
        over = over or end is not None
    run.finish(exit_code=int(end is None or end["status"] == "failed"))


def _open_run(folder: Path, state: dict[str, Any], seconds: float) -> tuple[Any, str]:
    """Return a wandb run, offline without key or network, and a message about it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # pyright: ignore[reportMissingImports]

    settings = wandb.Settings(
        console="off", silent=True, disable_git=True, init_timeout=seconds
    )
    begin: Any = functools.partial(
        wandb.init,
        project=state["project"],
        id=state["id"],
        resume="allow",
        name=folder.name,
        dir=str(folder),
        config=RunFolder(folder).read_config()["settings"],
        settings=settings,
    )
    asked = os.environ.get("WANDB_MODE")
    mode = asked or ("online" if _has_key() else "offline")
    reason = "" if asked else "no key"
    try:
        if mode == "online":
            _ask_server(seconds)  # wandb before 0.31 waits for it beyond any timeout
        run = begin(mode=mode)
    except Exception as error:
        if mode == "offline":
            raise
        traceback.print_exc()
        wandb.teardown()  # it would hold the id
        mode, reason = "offline", _one_line(error) or type(error).__name__
        run = begin(mode=mode)
    if mode != "offline":
        return run, f"wandb: {run.url}" if run.url else ""
    why = f" ({reason})" if reason else ""
    synced = shlex.quote(str(Path(run.dir).parent))
    return run, f"wandb is offline{why}; later: wandb sync {synced}"


def _has_key() -> bool:
    """Return whether wandb would find a key, in the environment or in a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server, home = urlsplit(_server()).netloc, Path.home()
    named = os.environ.get("NETRC")
    for file in [named] if named else [home / ".netrc", home / "_netrc"]:
        with contextlib.suppress(OSError, netrc.NetrcParseError):
            if netrc.netrc(file).authenticators(server):
                return True
    return False


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _ask_server(seconds: float) -> None:
    """Raise `OSError` if wandb's server does not answer in time."""
    with contextlib.suppress(urllib.error.HTTPError):  # an answer, too
        urllib.request.urlopen(_server(), timeout=seconds).close()


def _read_state(folder: Path, project: str) -> dict[str, Any]:
    """Return the wandb run of a run folder and the last step sent; at first a new one."""
    new = {"id": secrets.token_hex(4), "project": project, "step": -1}
    file = folder / STATE_NAME
    known = json.loads(file.read_bytes()) if file.is_file() else new
    return {**(known if known["project"] == project else new), "message": ""}


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    verified.write_text(folder / STATE_NAME, json.dumps(state))


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _values(row: Row) -> dict[str, Any]:
    """Name each value as in "train/loss" and "train/expert_load_0_3"."""
    values = ((k, v) for k, v in flatten(row) if k not in ("kind", "step"))
    return {f"{row['kind']}/{name}": value for name, value in values}
