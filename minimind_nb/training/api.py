"""`train` and `evaluate`: run worker processes from a cell, a script or a shell."""

import contextlib
import functools
import json
import logging
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import SHAPE_FIELDS, TrainConfig, resolve
from ..data.corpus import detect_format
from ..data.demo import locate
from ..data.tokenizer import read_tokenizer
from ..hardware import choose_threads, count_cores
from ..launch.outcome import TrainingFailed
from ..launch.spawn import Job, run_processes
from ..launch.torchrun import on_first_rank
from ..model.loading import find_weights
from ..monitor.live import View, choose_view
from ..monitor.metrics import History
from ..monitor.runs import Run, save_chart, write_summary
from ..monitor.tables import Facts
from ..monitor.wandb_follower import WandbFollower, require_wandb
from ..session import current_session
from ..storage.run_folder import RunFolder
from .machine import machine_defaults
from .preparation import find_finished_run, prepare
from .run_plan import RunPlan, open_corpus
from .worker import smaller_batch

logger = logging.getLogger(__name__)
_COMPILERS = "TORCHINDUCTOR_COMPILE_THREADS"
# Changes for ranks that do not connect: two T4 over PCIe can hang until peer-to-peer, or
# shared memory, is off. A file store fails once in some 2,000 starts; a fresh one helps.
_RETRIES: dict[str, list[dict[str, str]]] = {
    "cpu": [{}],
    "cuda": [{"NCCL_P2P_DISABLE": "1"}, {"NCCL_SHM_DISABLE": "1"}],
}


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
    traceback of the rank that failed first. Under torchrun all its processes make this
    call and get the run; the first of them starts the workers and shows it.
    """
    if not isinstance(cfg, TrainConfig):
        data_path: Any = cfg  # which TrainConfig checks
        cfg = TrainConfig(data_path=data_path, **settings)
    elif settings:
        raise TypeError(
            f"{', '.join(settings)}: put settings into the TrainConfig, or call "
            'mm.train("corpus.jsonl", …) with a path'
        )
    return Run(on_first_rank(functools.partial(_train, cfg, view)))


def _train(cfg: TrainConfig, view: bool | Callable[[History], object] | None) -> str:
    """Train, and return the run folder."""
    shown = choose_view(view)
    if cfg.use_wandb:
        require_wandb()
    with shown.attached():
        if finished := find_finished_run(cfg):
            run = Run(finished.root)
            shown.attempt(shown.finish, run.history, run.status)
            return str(run.folder)
    with shown.attached(), prepare(cfg) as (plan, lock):
        run = Run(plan.folder.root)
        if plan.complete:
            capped = plan.cfg.max_steps == plan.total_steps
            limit = "max_steps" if capped else "epochs"
            logger.info(
                f"{run.folder} is finished: {limit}={getattr(plan.cfg, limit)} ends after "
                f"{plan.total_steps:,} steps. Raise {limit} to train longer, or start over "
                "with resume=False"
            )
            shown.attempt(shown.finish, run.history, run.status)
        else:
            _run(plan, lock, run, shown)
    return str(run.folder)


def _run(plan: RunPlan, lock: int, run: Run, shown: View) -> None:
    """Carry out a plan while its lock is held."""
    history = run.history
    history.rewind(plan.done if plan.checkpoint else -1)

    def show() -> None:
        with contextlib.suppress(OSError):  # the metrics may be there at the next look
            history.refresh()
        shown.attempt(shown.update, history)
        shown.attempt(follower.report)

    follower = WandbFollower(history, plan.cfg)
    shown.attempt(shown.update, history)
    shown.attempt(follower.start)
    status = "failed"
    try:
        status = _launch("run", plan, show, lock)
    except KeyboardInterrupt:
        status = "killed"
        raise
    finally:
        show()
        shown.attempt(follower.finish)
        shown.attempt(shown.finish, history, status)
        shown.attempt(save_chart, run)
        shown.attempt(write_summary, run, status, plan.weights_file)


def evaluate(
    source: str | os.PathLike[str],
    data_path: str | os.PathLike[str],
    which: str = "last",
    rope_scaling: float | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Facts:
    """Measure the loss of a model on a file: the mean over tokens, by all processes.

    `source`, `which` and `rope_scaling` are those of `load`. `data_path` has one
    {"text": "…"} per line, or {"conversations": […]}, of which the answers are predicted.
    `settings` are `TrainConfig`'s: max_seq_len (default: what the run trained with, or
    what the stretched model reads), batch_size, num_processes, device, dtype, … (with
    `eval_tokens` only so many tokens are looked at).

    Returns loss (nats per token), perplexity, and bits_per_byte of the text or answers,
    which is comparable across tokenizers; the number of `documents`, of those that are
    `cut` to fit a row, and of those `dropped` because no whole answer fits. Raises what
    `train` raises.
    """
    given = source, data_path, which, rope_scaling, settings
    work = functools.partial(_evaluate, *given)
    return Facts(f"{os.fspath(source)} on {os.fspath(data_path)}", on_first_rank(work))


def _evaluate(
    source: Any, data_path: Any, which: str, rope_scaling: Any, settings: dict[str, Any]
) -> dict[str, float]:
    if given := {"stage", "data_path", "val_path", "init_from"} & settings.keys():
        raise ValueError(f"{', '.join(given)}: source and data_path say this already")
    source = Path(source).expanduser()
    open_shape = SHAPE_FIELDS if source.is_file() else ()  # a .pth does not record all
    shape = {name: settings[name] for name in open_shape if name in settings}
    tokenizer = settings.get("tokenizer")
    weights = find_weights(source, which, tokenizer, rope_scaling, **shape)
    stage = detect_format(data_path, weights.stage or "pretrain")
    home = source.absolute().parent
    out_dir = home if os.access(home, os.W_OK) else "out"
    choices = {"out_dir": out_dir, "eval_tokens": 1 << 62}
    length, config = weights.trained_length, weights.config
    if rope_scaling is not None or (config.inference_rope_scaling and not length):
        length, choices["batch_size"] = config.max_position_embeddings, 1
    if length:
        choices["max_seq_len"] = length
    asked = TrainConfig(stage=stage, **choices | settings)
    caches = current_session().cache_folder(asked.out_dir)
    file = str(locate(data_path, caches, stage))
    asked = replace(asked, data_path=file, val_path=file, compile=False)
    cfg = resolve(asked, **machine_defaults(asked), **weights.shape())
    tokenizer = read_tokenizer(weights.tokenizer)
    corpus = open_corpus(cfg, tokenizer)
    with tempfile.TemporaryDirectory(prefix="minimind_nb_") as folder:
        rope, place = weights.config.rope_parameters, RunFolder(folder)
        config = {"settings": cfg.portable(), "rope_scaling": rope}
        plan = RunPlan(config, place, tokenizer, corpus, weights.file)
        plan.write()
        _launch("measure", plan, lambda: None)
        scores = json.loads((place.root / "scores.json").read_bytes())
    return scores | {"cut": corpus.truncated.cut, "dropped": corpus.truncated.dropped}


def compile_cache() -> str:
    """Return the folder of compiled graphs: the user's own, not torch's default in a
    shared /tmp, since they are read with pickle."""
    given = os.environ.get("TORCHINDUCTOR_CACHE_DIR", "")  # torch's import sets it, too
    if given and not given.startswith(f"{tempfile.gettempdir()}/torchinductor_"):
        return given
    caches = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser()
    return str(caches / "minimind_nb" / "inductor")


def _launch(
    target: str, plan: RunPlan, on_poll: Callable[[], None], lock: int | None = None
) -> str:
    """Start the workers, again with smaller micro-batches if memory runs out."""
    asked = plan
    while True:
        try:
            return _start(target, plan, on_poll, lock)
        except TrainingFailed as failure:
            rows = plan.cfg.batch_size
            if failure.phase != "out_of_memory" or not plan.cfg.allow_smaller_batch:
                raise
            if rows == 1:
                asked.write()  # the number of rows was not the cause
                raise
        plan = plan.halve_batch()
        logger.warning(
            f"out of memory with batch_size={rows}: restarting at step {plan.done:,} with "
            f"batch_size={plan.cfg.batch_size} and the same global batch"
        )


def _start(
    target: str, plan: RunPlan, on_poll: Callable[[], None], lock: int | None
) -> str:
    """Start the workers, again in another environment if they do not connect."""
    cfg = plan.cfg
    threads = str(choose_threads(cfg.num_processes, count_cores()))
    job = Job(
        target=f"minimind_nb.training.worker:{target}",
        folder=plan.folder,
        num_processes=cfg.num_processes,
        environment={
            **dict.fromkeys(["OMP_NUM_THREADS", "MKL_NUM_THREADS"], threads),
            _COMPILERS: os.environ.get(_COMPILERS, threads),
            "TORCHINDUCTOR_CACHE_DIR": compile_cache(),
        },
        hang_timeout=cfg.hang_timeout_seconds,
        less_memory=smaller_batch(cfg),
        lock=lock,
    )
    for changes in _RETRIES[cfg.device]:
        try:
            return run_processes(job, on_poll)
        except TrainingFailed as failure:
            if failure.phase != "meeting":
                raise
            logger.warning(f"the processes did not connect; retrying {changes or ''}")
        job = replace(job, environment={**job.environment, **changes})
    return run_processes(job, on_poll)
