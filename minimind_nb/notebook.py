"""Helpers of the notebooks: their parameters as a configuration, and runs to open."""

import ast
import contextlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .config import TrainConfig, describe_unknown, kinds
from .session import current_session, find_inputs, runs_below
from .training.api import train
from .training.runs import Run, runs

_DEMO: dict[str, dict[str, Any]] = {
    "pretrain": {"preset": "demo", "recipe": "demo"},
    "sft": {"recipe": "demo-sft"},
    "dpo": {"recipe": "demo-dpo"},
}
_TRIAL: dict[str, Any] = {"max_steps": 12, "log_interval": 2}
_SHARED = "data_path out_dir max_steps batch_size device num_processes dtype".split()


def notebook_config(
    stage: str, namespace: Mapping[str, Any], own: Iterable[str] = ()
) -> TrainConfig:
    """Return the configuration that the parameters of a notebook describe.

    `namespace` is the notebook's `globals()`. Each global that has the name of a
    setting and is not None is one; `settings`, a dict or a JSON object, holds others.
    `own` names further parameters of the notebook. With data_path="demo" the demo's preset and
    recipe are the defaults, and `trial` limits it to 12 steps. Files and runs are found
    below the mounted inputs, as `find_inputs` does.

    Raises `ValueError` for an unknown or repeated parameter and an invalid configuration.
    """
    fields = [name for name in kinds() if name != "stage"]
    check_parameters(namespace, [*fields, "settings", "trial", *own])
    given: dict[str, Any] = {"stage": stage}
    given |= {n: namespace[n] for n in fields if namespace.get(n) is not None}
    more = namespace.get("settings") or {}
    if isinstance(more, str):  # from `papermill -p`
        with contextlib.suppress(ValueError):
            more = json.loads(more)
    if not isinstance(more, dict):
        raise ValueError(f'settings={more!r}: expected a dict like {{"max_steps": 3}}')
    if repeated := sorted(given.keys() & more):
        names = ", ".join(repeated)
        raise ValueError(f"{names}: set as a parameter and in settings; leave one out")
    given |= more
    if given.get("data_path") == "demo":
        demo = _DEMO[stage] | (_TRIAL if namespace.get("trial") else {})
        # A name that was given as None is meant: papermill's `-p max_steps None`.
        unset = {n: demo[n] for n in demo if n == "preset" or n not in namespace}
        given = unset | given
    return find_inputs(TrainConfig(**given))


def check_parameters(
    namespace: Mapping[str, Any], known: Iterable[str] | None = None
) -> None:
    """Raise `ValueError` for a parameter that the notebook does not have.

    Parameters are what the cells that begin with "# Parameters" assign: the notebook's
    own, and the one that papermill inserts, whose first line is no longer than that.
    `known` defaults to the names in the notebook's own cell.
    """
    assigned: dict[str, set[str]] = {}
    for source in namespace.get("In", ()):  # IPython's history; the last run counts
        if source.startswith("# Parameters"):
            names = (n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Name))
            stored = {name.id for name in names if isinstance(name.ctx, ast.Store)}
            assigned[source.partition("\n")[0]] = stored
    inserted = assigned.pop("# Parameters", set())
    own = set().union(*assigned.values())
    known = own if known is None else set(known)
    if unknown := sorted((own | inserted) - known):
        problems = (describe_unknown(name, known, "parameter") for name in unknown)
        raise ValueError("; ".join(problems))


def train_demo_before(cfg: TrainConfig) -> None:
    """Train the demo runs that a run on the demo corpus starts from, if it has none."""
    if cfg.data_path != "demo" or cfg.init_from or cfg.resume not in ("auto", False):
        return
    found = {run.history.stage for run in _list_runs(cfg.out_dir)}
    stages = list(_DEMO)
    until = stages.index(cfg.stage)
    for number, stage in enumerate(stages[:until]):
        if found.isdisjoint(stages[number : until + 1]):
            print(f"{cfg.out_dir} has no {stage} run: training it on the demo corpus.")
            shared = {name: getattr(cfg, name) for name in _SHARED}
            train(TrainConfig(stage=stage, **_DEMO[stage], **shared))


def find_runs(out_dir: str, demo: str = "pretrain") -> list[Run]:
    """Return the runs in `out_dir`, the last changed first, and in the mounted inputs.

    If there is none, short runs on the demo corpus are trained, up to the stage `demo`.
    """
    if not _list_runs(out_dir):
        trial = {"data_path": "demo", "out_dir": out_dir, "trial": True}
        cfg = notebook_config(demo, trial)
        train_demo_before(cfg)
        train(cfg)
    return _list_runs(out_dir)


def _list_runs(out_dir: str) -> list[Run]:
    found = runs(out_dir).runs if Path(out_dir).expanduser().is_dir() else []
    return [*found, *map(Run, runs_below(current_session().inputs))]
