"""Weights & Biases: a process of its own reads the metrics file and passes it on.

wandb asks for keys, waits for networks and changes the notebook that imports it. Where
it has a process without a terminal, none of that reaches the training or the cell.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import multiprocessing
import netrc
import os
import secrets
import shlex
import sys
import traceback
import urllib.error
import urllib.request
from multiprocessing import connection
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..config import TrainConfig
from ..lifetime import die_with_parent, without_main_script
from ..storage import verified
from ..storage.run_folder import RunFolder
from .live import View
from .metrics import History, Row

INIT_SECONDS = 20.0  # for the server's answer; offline after that
FINISH_SECONDS = 30.0
STATE_NAME = "wandb.json"
LOG_NAME = "wandb.log"
_POLL_SECONDS = 1.0


def track(view: View, cfg: TrainConfig) -> View:
    """The view, which with `use_wandb` also sends the metrics to Weights & Biases.

    Raises `ValueError` where wandb is not installed.
    """
    if not isinstance(cfg, TrainConfig) or not cfg.use_wandb:
        return view
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # None of a mere folder named wandb
        raise ValueError(
            "use_wandb=True needs wandb, which is not installed: "
            "pip install 'minimind_nb[wandb]', or leave use_wandb out"
        )
    return TrackedView(view, cfg.wandb_project)


class TrackedView(View):
    """Shows what another view shows, while a process beside it talks to wandb.

    Only `finish` ever waits for that process, at most `FINISH_SECONDS`.
    """

    def __init__(self, view: View, project: str) -> None:
        super().__init__()
        self._view, self._project = view, project
        self._folder = Path()
        self._process: SpawnProcess | None = None
        self._pipe: Any = None

    def start(self, history: History, plan: Any = None) -> None:
        self._view.start(history, plan)
        if plan:  # a run that was complete has none
            self.attempt(self._start, history.path)

    def update(self, history: History) -> None:
        self._view.update(history)
        self.attempt(self._listen)

    def finish(self, history: History, status: str) -> None:
        try:
            self.attempt(self._end, status)
        finally:
            self._view.finish(history, status)

    def note(self, text: str) -> None:
        self._view.note(text)

    def _start(self, metrics: Path) -> None:
        self._folder = metrics.parent
        known_bytes = metrics.stat().st_size if metrics.exists() else 0
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = connection.Pipe()
        self._process = context.Process(
            target=_follow,
            args=(theirs, metrics, known_bytes, self._project, INIT_SECONDS),
            daemon=True,
        )
        with without_main_script():
            self._process.start()
        theirs.close()

    def _listen(self) -> None:
        """Pass on what the process has to say."""
        try:
            while self._pipe and self._pipe.poll():
                self.note(self._pipe.recv())
        except (EOFError, ConnectionError):
            self._pipe = None

    def _end(self, status: str) -> None:
        if self._process is None:
            return
        try:
            if self._pipe and self._process.is_alive():
                self._pipe.send(status)
            self._process.join(FINISH_SECONDS)
            self._listen()
            code = self._process.exitcode
            if code != 0:
                ended = f"ended with exit code {code}"
                late = f"was not done within {FINISH_SECONDS:.0f} s"
                self.note(
                    f"wandb {late if code is None else ended}; the training is not "
                    f"affected, and what wandb got is in {self._folder / 'wandb'}"
                )
        finally:
            self._process.kill()
            self._process.join()


def _follow(
    pipe: connection.Connection,
    metrics: Path,
    known_bytes: int,
    project: str,
    seconds: float,
) -> None:
    """The process: log every new row until a status comes, or nobody is there."""
    die_with_parent(os.getppid())
    os.setsid()  # no terminal to ask in, and no interrupts
    folder = metrics.parent
    with open(folder / LOG_NAME, "ab") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    try:
        _log_rows(pipe, History(metrics), known_bytes, project, seconds)
    except Exception as error:
        traceback.print_exc()
        name, reason = type(error).__name__, " ".join(str(error).split())
        pipe.send(
            f"wandb failed ({name}: {reason}); the training is not affected, and "
            f"{folder / LOG_NAME} has the details"
        )
    finally:
        sys.stderr.flush()


def _log_rows(
    pipe: connection.Connection,
    history: History,
    known_bytes: int,
    project: str,
    seconds: float,
) -> None:
    folder = history.path.parent
    state = _read_state(folder, project)
    run, told = _open_run(folder, state, seconds)
    if told:
        pipe.send(told)
    before, sent, status = state["step"], 0, None
    while status is None:
        status = _wait_for_status(pipe)
        history.refresh()
        # What was known at the start may have been lost: the first new row tells.
        if not history.path.exists() or history.path.stat().st_size <= known_bytes:
            continue
        rows = [row for row in history.rows if _is_new(row, before)]
        for row in rows[sent:]:
            run.log(_values(row), step=row["step"])
        if rows[sent:]:
            state["step"] = rows[-1]["step"]
            verified.write_text(folder / STATE_NAME, json.dumps(state))
        sent = len(rows)
    run.finish(exit_code=int(status == "failed"))


def _wait_for_status(pipe: connection.Connection) -> str | None:
    try:
        return pipe.recv() if pipe.poll(_POLL_SECONDS) else None
    except EOFError:
        return "failed"


def _open_run(folder: Path, state: dict[str, Any], seconds: float) -> tuple[Any, str]:
    """A wandb run, offline where there is no key or no network, and what to say of it."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
    import wandb  # pyright: ignore[reportMissingImports]

    settings = wandb.Settings(
        console="off", silent=True, disable_git=True, init_timeout=seconds
    )

    def begin(mode: Any) -> Any:
        return wandb.init(
            mode=mode,
            project=state["project"],
            id=state["id"],
            resume="allow",
            name=folder.name,
            dir=str(folder),
            config=RunFolder(folder).read_config()["settings"],
            settings=settings,
        )

    mode = os.environ.get("WANDB_MODE") or ("online" if _has_key() else "offline")
    reason = "" if mode == "offline" and "WANDB_MODE" in os.environ else "no key"
    try:
        if mode == "online":
            _ask_server(seconds)  # wandb before 0.31 waits for it beyond any timeout
        run = begin(mode)
    except Exception as error:
        if mode == "offline":
            raise
        traceback.print_exc()
        wandb.teardown()  # it would hold the id
        mode, reason = "offline", " ".join(str(error).split()) or type(error).__name__
        run = begin(mode)
    if mode != "offline":
        return run, f"wandb: {run.url}" if run.url else ""
    why = f" ({reason})" if reason else ""
    synced = shlex.quote(str(Path(run.dir).parent))
    return run, f"wandb is offline{why}; later: wandb sync {synced}"


def _has_key() -> bool:
    """Whether wandb would find a key, in the environment or in a netrc file."""
    if os.environ.get("WANDB_API_KEY") or os.environ.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    server, home = _server(), Path.home()
    named = os.environ.get("NETRC")
    for file in [Path(named)] if named else [home / ".netrc", home / "_netrc"]:
        try:
            if netrc.netrc(file).authenticators(urlsplit(server).netloc):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False


def _server() -> str:
    return os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")


def _ask_server(seconds: float) -> None:
    """Raise `OSError` where wandb's server does not answer in time."""
    with contextlib.suppress(urllib.error.HTTPError):  # an answer, too
        urllib.request.urlopen(_server(), timeout=seconds).close()


def _read_state(folder: Path, project: str) -> dict[str, Any]:
    """The wandb run of a run folder, and the last step it got; a new one at first."""
    file = folder / STATE_NAME
    if file.is_file():
        state = json.loads(file.read_bytes())
        if state["project"] == project:
            return state
    state = {"id": secrets.token_hex(4), "project": project, "step": -1}
    verified.write_text(file, json.dumps(state))
    return state


def _is_new(row: Row, step: int) -> bool:
    return row["kind"] in ("train", "eval") and row["step"] > step


def _values(row: Row) -> dict[str, Any]:
    """What is logged of a row: "train/loss", and of lists each entry by its place."""
    kind = row["kind"]
    return {
        f"{kind}/{k}": _spread(v) for k, v in row.items() if k not in ("kind", "step")
    }


def _spread(value: Any) -> Any:
    if isinstance(value, list):
        return {str(place): _spread(item) for place, item in enumerate(value)}
    return value
