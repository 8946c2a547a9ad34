"""Weights & Biases: a process that reads a run's metrics file and sends its rows.

wandb asks for keys, waits for networks and changes the notebook that imports it. In a
process without a terminal none of that reaches the training or the cell.
"""

import importlib.util
import json
import os
import secrets
import shlex
import traceback
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from ..config import ResolvedConfig
from ..storage import verified
from ..storage.run_folder import RunFolder
from .follower import Follower
from .metrics import History, flatten

FINISH_SECONDS = 30.0
_POLL_SECONDS = 1.0
_DEFAULTS = {
    "WANDB_MODE": "online",
    "WANDB_INIT_TIMEOUT": "20",  # seconds for the server's answer, offline after that
    "WANDB_CONSOLE": "off",
    "WANDB_DISABLE_GIT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_SILENT": "true",
}


def require_wandb() -> None:
    """Raise `ValueError` if wandb is not installed."""
    # A mere folder named wandb has no origin.
    if not getattr(importlib.util.find_spec("wandb"), "origin", None):
        raise ValueError(
            "use_wandb=True needs wandb, which is not installed: "
            "pip install 'minimind_nb[wandb]', or leave use_wandb out"
        )


def wandb_follower(history: History, cfg: ResolvedConfig) -> Follower | None:
    """Start the process that sends the metrics of a session, if `cfg.use_wandb`.

    `history` has the rows that the session begins with.
    """
    if not cfg.use_wandb:
        return None
    given = (_follow, history, cfg.wandb_project)
    return Follower("wandb", history.path.parent, FINISH_SECONDS, *given)


def _follow(
    finish: Event, say: Callable[[str], None], history: History, project: str
) -> None:
    os.environ.update(_DEFAULTS | dict(os.environ))
    file = history.path.with_name("wandb.json")
    state = json.loads(file.read_bytes()) if file.is_file() else {}
    if state.get("project") != project:
        state = {"id": secrets.token_hex(4), "project": project, "step": -1}
    verified.write_text(file, json.dumps(state))
    run, message = _open_run(history.path.parent, project, state["id"])
    say(message)
    before, begun, sent, over = state["step"], len(history.rows), 0, False
    while not over:
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
    ends = [row["status"] for row in history.rows[begun:] if row.get("event") == "end"]
    run.finish(exit_code=int(ends in ([], ["failed"])))


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
