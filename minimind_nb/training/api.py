"""`train`: run worker processes from a cell, a script or a shell."""

import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from ..config import TrainConfig
from ..hub import find_token
from ..launch.spawn import enter_torchrun
from ..monitor.live import View, choose_view
from ..monitor.metrics import History
from ..monitor.publishing import publisher
from ..monitor.wandb_follower import require_wandb, wandb_follower
from ..progress_bar import hidden
from ..session import running_kernel
from .launching import launch
from .preparation import prepare
from .run_plan import RunPlan
from .runs import Run, save_chart, write_summary


def train(
    cfg: TrainConfig | str | os.PathLike[str] | Sequence[str],
    view: bool | Callable[[History], object] | None = None,
    **settings: Any,
) -> Run:
    """Train in worker processes, show progress, and return the run when it ended.

    `cfg` is a TrainConfig, or the path of the data with settings by name:
    `mm.train("corpus.jsonl", preset="minimind2-small")`. A run of the same name in
    `out_dir` is resumed; a finished one is returned as it is. `view` is None for a live
    view in the cell or the terminal, False for none, or a function that gets each
    `History` update. An interrupt saves and returns with `run.status == "interrupted"`;
    one more than 2 s later kills at once and raises `KeyboardInterrupt`.

    Raises `ValueError`, `FileNotFoundError`, `DataError`, `OSError` or `RuntimeError`
    before anything is started, and `TrainingFailed` if the run failed, with the
    traceback of the rank that failed first. Under torchrun rank 0 does all of this; the
    other processes end with this call.
    """
    enter_torchrun()
    if not isinstance(cfg, TrainConfig):
        data_path: Any = cfg  # which TrainConfig checks
        cfg = TrainConfig(data_path=data_path, **settings)
    elif settings:
        raise TypeError(
            f"{', '.join(settings)}: put settings into the TrainConfig, change one with "
            'dataclasses.replace(cfg, …), or call mm.train("corpus.jsonl", …) with a path'
        )
    shown = choose_view(view)
    if cfg.use_wandb:
        require_wandb()
    if cfg.publish:
        find_token(cfg.publish)
    with (
        hidden(view not in (None, True)),
        shown.attached(),
        prepare(cfg) as (plan, lock),
    ):
        run = Run(plan.folder.root)
        if plan.complete:
            shown.attempt(shown.finish, run.history, run.status)
        else:
            _run(plan, lock, run, shown)
    if view in (None, True):
        run.shown_in = getattr(running_kernel(), "execution_count", None)
    return run


def _run(plan: RunPlan, lock: int, run: Run, shown: View) -> None:
    """Carry out a plan while its lock is held."""
    history = run.history
    history.rewind(plan.done if plan.checkpoint else -1)

    def show() -> None:
        with contextlib.suppress(OSError):  # the metrics may be there at the next look
            history.refresh()
        shown.attempt(shown.update, history)
        for follower in followers:
            shown.attempt(follower.report)

    makers = (wandb_follower, publisher)
    made = [shown.attempt(make, history, plan.cfg) for make in makers]
    followers = list(filter(None, made))
    shown.attempt(shown.update, history)
    status = "failed"
    try:
        status = launch("run", plan, show, lock)
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        show()
        shown.attempt(save_chart, run)
        shown.attempt(write_summary, run, status)
        shown.attempt(shown.finish, history, status)
        for follower in followers:
            shown.attempt(follower.finish)
