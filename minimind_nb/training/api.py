"""`train` and `evaluate`: what runs in worker processes, from a cell, script or shell.

Under torchrun the processes are there: each makes the call and works in place.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..config import SHAPE_FIELDS, TrainConfig
from ..data.corpus import Corpus, detect_format
from ..data.demo import locate
from ..data.tokenizer import write_tokenizer
from ..hardware import choose_threads
from ..launch.outcome import TrainingFailed
from ..launch.spawn import Job, run_processes
from ..launch.torchrun import TorchrunSession, join_torchrun
from ..model.loading import find_weights
from ..monitor.live import View, choose_view
from ..monitor.metrics import History
from ..monitor.runs import Run, save_chart, write_summary
from ..monitor.tables import Facts
from ..monitor.wandb_follower import WandbFollower, require_wandb
from ..session import current_session
from ..storage.run_folder import STATE, RunFolder
from .preparation import Prepared, Settled, prepare, settle
from .worker import smaller_batch

_Callback = Callable[[History], object]
# On two T4 over PCIe hangs were reported until peer-to-peer, or shared memory, was off.
# A file store without a cause times out once in some 2,000 starts; a fresh one helps.
_ENVIRONMENTS: dict[str, list[dict[str, str]]] = {
    "cpu": [{}, {}],
    "cuda": [
        {},
        {"NCCL_P2P_DISABLE": "1"},
        {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1"},
    ],
}


def train(cfg: TrainConfig, view: bool | _Callback | None = None) -> Run:
    """Train in worker processes, show progress, and return the run when it ended.

    A run found in `out_dir` under the same name goes on where it stood; a finished one
    is returned as it is. `view` is None for the cell's or the terminal's view, False
    for none, or a function that gets each `History` update. An interrupt saves and
    returns with `run.status == "interrupted"`; a second one kills at once and raises
    `KeyboardInterrupt`.

    Raises `ValueError`, `FileNotFoundError`, `DataError`, `OSError` or `RuntimeError`
    before anything is started, saying what to change; `TrainingFailed` when the run
    failed, with the traceback of the rank that failed first.

    Under torchrun its processes are the workers, and all of them make this call and get
    the run; rank 0 shows it.
    """
    return Run(_together(functools.partial(_train, cfg, view)))


def _together(work: Callable[[TorchrunSession | None], Any]) -> Any:
    """What `work` returns, plain data; under torchrun rank 0 does it, for all ranks."""
    torchrun = join_torchrun()
    if torchrun is None:
        return work(None)
    return torchrun.run(functools.partial(work, torchrun))


def _train(
    cfg: TrainConfig, view: bool | _Callback | None, torchrun: TorchrunSession | None
) -> str:
    """Train, and return the run folder."""
    shown = choose_view(view)
    if getattr(cfg, "use_wandb", False):
        require_wandb()
    with shown.attached(), prepare(cfg, shown.note) as prepared:
        return _run(prepared, shown, torchrun)


def _run(prepared: Prepared, shown: View, torchrun: TorchrunSession | None) -> str:
    """Train what is prepared, while its lock is held, and return the run folder."""
    run = Run(prepared.folder.root)
    history = run.history

    def show() -> None:
        with contextlib.suppress(OSError):  # the metrics may be there at the next look
            history.refresh()
        shown.update(history)
        shown.attempt(follower.report)

    follower = WandbFollower(history, prepared.cfg)
    if prepared.complete:
        shown.start(history)
        limit = prepared.cfg.max_steps or math.inf
        further = "max_steps" if limit <= prepared.total_steps else "epochs"
        shown.note(f"{run.folder} is finished; raise {further} to train longer")
        shown.finish(history, run.status)
        return str(run.folder)
    shown.start(history, prepared.total_steps)
    shown.attempt(follower.start)
    status = "failed"
    try:
        status = _launch(
            functools.partial(training_job, prepared),
            prepared.cfg.device,
            show,
            shown.note,
            torchrun,
        )
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        show()
        shown.attempt(follower.finish)
        shown.finish(history, status)
        shown.attempt(save_chart, run)
        shown.attempt(write_summary, run, status, prepared.weights_file)
    return str(run.folder)


class Scores(dict[str, float]):
    """What `evaluate` measured, by name; shows itself as a table."""

    def __init__(self, title: str, scores: dict[str, float]) -> None:
        super().__init__(scores)
        self._facts = Facts(title, {name: f"{v:,.6g}" for name, v in scores.items()})

    def __repr__(self) -> str:
        return repr(self._facts)

    def _repr_html_(self) -> str:
        return self._facts._repr_html_()


def evaluate(
    source: str | os.PathLike[str],
    data_path: str | os.PathLike[str],
    which: str = "last",
    **settings: Any,
) -> Scores:
    """The loss of a model on a file: a mean over tokens, by all processes.

    `source` and `which` are what `load` takes. `data_path` has one {"text": "…"} a line,
    or {"conversations": […]}, and then it is the answers that are predicted. `settings`
    are `TrainConfig`'s: max_seq_len, batch_size, num_processes, device, dtype, … (with
    `eval_tokens` only so many tokens are looked at).

    Returns loss (nats a token), perplexity, and bits_per_byte of the text or answers,
    which can be compared across tokenizers; the number of `documents`, of those that
    are cut to fit a row, and of those `dropped` because no whole answer fits. Raises
    what `train` raises.
    """
    scores = _together(functools.partial(_evaluate, source, data_path, which, settings))
    return Scores(f"{os.fspath(source)} on {os.fspath(data_path)}", scores)


def _evaluate(
    source: str | os.PathLike[str],
    data_path: str | os.PathLike[str],
    which: str,
    settings: Mapping[str, Any],
    torchrun: TorchrunSession | None,
) -> dict[str, float]:
    if given := {"stage", "data_path", "val_path", "init_from"} & settings.keys():
        raise ValueError(f"{', '.join(given)}: source and data_path say this already")
    shape = settings if Path(source).is_file() else {}
    shape = {name: shape[name] for name in SHAPE_FIELDS if name in shape}
    weights = find_weights(source, which, settings.get("tokenizer"), **shape)
    stage = detect_format(data_path, weights.stage or "pretrain")
    choices = {"out_dir": _home(weights.file), "eval_tokens": 1 << 62, **settings}
    file = locate(data_path, stage)
    choices |= {"stage": stage, "data_path": file, "val_path": file}
    in_folder = weights.file.suffix in (".safetensors", ".bin")
    init_from = str(weights.file.parent if in_folder else weights.file)
    settled = settle(TrainConfig(**choices, init_from=init_from), print)
    cfg, cores = settled.cfg, settled.hardware.cpu_cores
    at = (settled.tokenizer, settled.cache_root, cores)
    corpus = Corpus.prepare(cfg, *at, max_dropped=1.0)
    shared = settled.cache_root if torchrun else None  # other machines must see it
    with tempfile.TemporaryDirectory(prefix="minimind_nb_", dir=shared) as folder:
        run = RunFolder(folder)
        write_tokenizer(settled.tokenizer, run.tokenizer)
        job = functools.partial(
            _job, "measure", settled, run, corpus, initial=weights.file
        )
        _launch(job, cfg.device, lambda: None, lambda _: None, torchrun)
        scores = json.loads((run.root / "scores.json").read_bytes())
    return scores | {"cut": corpus.truncated.cut, "dropped": corpus.truncated.dropped}


def _home(weights: Path) -> str:
    """The out_dir that holds a run or its weights file, for the token cache."""
    above = 0
    if weights.suffix == ".safetensors":
        above = 3 if (weights.parent / STATE).exists() else 1
    home = weights.absolute().parents[above]
    return str(home) if os.access(home, os.W_OK) else "out"


def _launch(
    make_job: Callable[[Mapping[str, str]], Job],
    device: str | None,
    on_poll: Callable[[], None],
    on_note: Callable[[str], None],
    torchrun: TorchrunSession | None,
) -> str:
    """Start the workers; again in another environment where they did not meet."""
    if torchrun:
        return torchrun.launch(make_job({}), on_poll)
    environments = _ENVIRONMENTS[device or "cpu"]
    for environment, following in itertools.pairwise(environments):
        try:
            return run_processes(make_job(environment), on_poll)
        except TrainingFailed as failure:
            if failure.phase != "meeting":
                raise
            changes = " ".join(f"{k}={v}" for k, v in following.items())
            on_note(f"the processes did not meet; once more {changes}".rstrip())
    return run_processes(make_job(environments[-1]), on_poll)


def training_job(prepared: Prepared, environment: Mapping[str, str]) -> Job:
    """What the workers of a prepared run get."""
    age = time.monotonic() - prepared.began
    left = current_session().seconds_left(prepared.cfg.max_session_hours, age)
    checkpoint, initial_file = prepared.start
    return _job(
        "run",
        prepared.settled,
        prepared.folder,
        prepared.corpus,
        environment,
        initial=initial_file,
        config=prepared.config,
        weights_file=str(prepared.weights_file),
        total_steps=prepared.total_steps,
        checkpoint=str(checkpoint.folder) if checkpoint else None,
        # The monotonic clock of Linux is one for all processes.
        deadline=None if left is None else time.monotonic() + left,
        lock=prepared.lock,
        less_memory=smaller_batch(prepared.cfg),
    )


def _job(
    target: str,
    settled: Settled,
    folder: RunFolder,
    corpus: Corpus,
    environment: Mapping[str, str],
    *,
    initial: Path | None,
    lock: int | None = None,
    less_memory: str = "",
    **more: Any,
) -> Job:
    cfg = settled.cfg
    assert cfg.num_processes and cfg.hang_timeout_seconds
    threads = choose_threads(cfg.num_processes, settled.hardware.cpu_cores)
    caches = [one["folder"] for one in corpus.describe()]
    payload = {
        "settings": dataclasses.asdict(cfg),
        "folder": str(folder.root),
        "corpus": corpus.describe(),
        "initial": initial and str(initial),
        "threads": threads,
        **more,
    }
    threading = {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)}
    return Job(
        target=f"minimind_nb.training.worker:{target}",
        payload=payload,
        num_processes=cfg.num_processes,
        folder=folder,
        environment={**threading, **environment},
        paths=[path for path in (*caches, payload["initial"]) if path],
        hang_timeout=cfg.hang_timeout_seconds,
        less_memory=less_memory,
        lock=lock,
    )
