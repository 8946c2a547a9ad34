"""Everything that is settled before a process is started: the plan of a run.

Cheap checks come first, and nothing that exists is changed until all have passed.
"""

import contextlib
import dataclasses
import json
import logging
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config import (
    STAGES,
    ResolvedConfig,
    TrainConfig,
    default_run_name,
    fill_defaults,
    fit_batch,
    resolve,
    shorten_home,
)
from ..data.containers import find_files
from ..data.corpus import Corpus
from ..data.demo import check_files, require_data
from ..data.token_cache import REJECTED
from ..data.tokenizer import TokenizerSpec, read_tokenizer
from ..hardware import (
    Hardware,
    count_cores,
    detect_hardware,
    machine_flops,
    pays_to_compile,
)
from ..model.loading import FoundWeights
from ..session import current_session
from ..storage import verified
from ..storage.run_folder import SHORTER, RunFolder, run_of, step_of
from .checkpoint import Progress, read_state
from .initial_weights import find_initial_weights, find_runs, keep_reference
from .machine import check_room, machine_defaults
from .resuming import (
    copy_run,
    find_checkpoint,
    keep_identity,
    plan_decay,
    reconcile_with_existing_run,
    recover,
    source_run,
    undo_decay,
)
from .run_plan import (
    RunPlan,
    describe_rows,
    describe_run,
    describe_truncated,
    open_corpus,
)

logger = logging.getLogger(__name__)
_FEW_STEPS = 100
_LENGTH = ("epochs", "max_steps")


@contextlib.contextmanager
def prepare(cfg: TrainConfig) -> Iterator[tuple[RunPlan, int]]:
    """Plan a run, tokenise, and write config.json and plan.json.

    Yields the plan and the descriptor of the run folder's lock, which is held while the
    block runs. Raises what `train` raises before anything is started.
    """
    began = time.monotonic()
    check_files(cfg.data_path, cfg.val_path)
    folder, initial = locate_run(cfg)
    hardware = detect_hardware()
    machine = machine_defaults(cfg, hardware)
    verified.check_writable(folder.root.parent)
    with folder.lock() as lock:
        recover(folder)
        checkpoint = find_checkpoint(folder, cfg, repair=True)
        plan = _draft(cfg, machine, folder, initial, checkpoint)
        if checkpoint and plan.checkpoint and run_of(checkpoint).root != folder.root:
            plan.checkpoint = copy_run(plan.checkpoint, checkpoint, folder)
        hours, spent = plan.cfg.max_session_hours, time.monotonic() - began
        left = current_session().seconds_left(hours, spent)
        plan.deadline = None if left is None else time.monotonic() + left
        if not plan.complete:
            check_room(plan)
            gpus = hardware.gpus
            plan.machine_flops = machine_flops(plan.cfg, plan.cfg.dtype, gpus)
            _begin(plan)
        yield plan, lock


def draft(cfg: TrainConfig, hardware: Hardware | None = None) -> RunPlan:
    """Return the plan of a run, tokenised, without a deadline; makes no run folder.

    Raises what `train` raises for the configuration, the data and an existing run.
    """
    if not isinstance(cfg, TrainConfig):
        found = type(cfg).__name__
        raise TypeError(f"expected a TrainConfig, found {found}: use mm.TrainConfig(…)")
    check_files(cfg.data_path, cfg.val_path)
    folder, initial = locate_run(cfg)
    machine = machine_defaults(cfg, hardware)
    return _draft(cfg, machine, folder, initial, find_checkpoint(folder, cfg))


def _draft(
    cfg: TrainConfig,
    machine: dict[str, Any],
    folder: RunFolder,
    initial: FoundWeights | None,
    checkpoint: Path | None,
) -> RunPlan:
    resolved, tokenizer, initial = _resolve(cfg, machine, initial, checkpoint)
    corpus = open_corpus(resolved, tokenizer)
    if not checkpoint:
        tokens = int(corpus.truncated.pieces[:, 2].sum())
        batch = fit_batch(vars(resolved), cfg.explicit(), tokens)
        resolved = dataclasses.replace(resolved, **batch)
    total = count_steps(corpus, resolved, checkpoint)
    if not checkpoint and cfg.compile == "auto":
        pays = resolved.compile and pays_to_compile(resolved, total, count_cores())
        resolved = dataclasses.replace(resolved, compile=pays)
    config = describe_run(cfg, resolved, tokenizer, corpus, initial)
    if checkpoint:
        keep_identity(run_of(checkpoint), config, cfg, resolved)
    resumed = checkpoint and undo_decay(total, resolved, checkpoint)
    if resumed != checkpoint:  # whose steps may have had another global batch
        total = count_steps(corpus, resolved, resumed)
    start = plan_decay(total, resolved, resumed)
    config |= {"total_steps": total, "decay_start": start}
    return RunPlan(
        config=config,
        folder=folder,
        tokenizer=tokenizer,
        corpus=corpus,
        initial=initial.file.absolute() if initial else None,
        checkpoint=resumed,
        complete=resumed is not None
        and run_of(resumed).status() == "finished"
        and step_of(resumed) >= total,
    )


def locate_run(cfg: TrainConfig) -> tuple[RunFolder, FoundWeights | None]:
    """Return the folder of the run that the settings mean, new or not.

    For sft and dpo without run_name it is the only existing run that fits. If there is
    none, the initial weights, which are returned too, give the shape in its name.
    """
    name, initial = cfg.run_name, None
    init_from = cfg.init_from or STAGES[cfg.stage]["init_from"]
    if source := source_run(cfg):
        name = name or source.settings().get("run_name")
    elif not name and init_from != "none":
        name = _find_run_name(cfg, shorten_home(init_from))
        initial = None if name else find_initial_weights(cfg)
    shape = initial.shape() if initial else {}
    name = name or fill_defaults(cfg.explicit(), shape)["run_name"]
    return RunFolder(Path(cfg.out_dir, name)), initial


def _find_run_name(cfg: TrainConfig, init_from: str) -> str | None:
    """Return the name of the only run of the stage that fits, or None without one."""
    fits = []
    for run in find_runs(cfg, cfg.stage) if cfg.resume else ():
        config = run.read_config()
        settings = config["settings"]
        started_so = init_from in ("auto", settings["init_from"])
        if settings["use_moe"] and "use_moe" in config["explicit"]:
            started_so &= cfg.use_moe is not None
        if started_so and run.root.name == default_run_name(settings):
            fits.append(run.root.name)
    if len(fits) > 1:
        raise ValueError(
            f"out_dir={cfg.out_dir!r} has several runs of stage={cfg.stage!r}: "
            f"{', '.join(fits)}. Name one with run_name=…, or set hidden_size"
        )
    return fits[0] if fits else None


def _resolve(
    cfg: TrainConfig,
    machine: dict[str, Any],
    initial: FoundWeights | None,
    checkpoint: Path | None,
) -> tuple[ResolvedConfig, TokenizerSpec, FoundWeights | None]:
    """Return the settings, tokenizer and initial weights, if it needs them, of a run."""
    if checkpoint:
        run = run_of(checkpoint)
        resolved = reconcile_with_existing_run(run, cfg, machine)
        own = run.tokenizer if run.tokenizer.is_dir() else resolved.tokenizer
        tokenizer = read_tokenizer(cfg.tokenizer or own)
        if cfg.tokenizer and cfg.stage == "pretrain":  # which applies no chat template
            kept = read_tokenizer(own)
            other = dataclasses.replace(kept, chat_template=tokenizer.chat_template)
            if other.fingerprint == tokenizer.fingerprint != kept.fingerprint:
                logger.warning(
                    f"{run.root} keeps its chat template, not that of {cfg.tokenizer}"
                )
                tokenizer = kept
    else:
        require_data(cfg)
        initial = initial or find_initial_weights(cfg)
        tokenizer = read_tokenizer(cfg.tokenizer or (initial and initial.tokenizer))
        shape = initial.shape() if initial else {}
        found = {"vocab_size": tokenizer.vocab_size, **machine, **shape}
        resolved = resolve(cfg, **found)
    if resolved.vocab_size < tokenizer.vocab_size:
        raise ValueError(
            f"vocab_size={resolved.vocab_size} is too small for the tokenizer, which has "
            f"{tokenizer.vocab_size} entries; leave vocab_size out, or name the tokenizer "
            "that belongs to the weights"
        )
    return resolved, tokenizer, initial


def _begin(plan: RunPlan) -> None:
    """Move aside what is not resumed, and write down what the run starts with."""
    cfg, folder = plan.cfg, plan.folder
    if not plan.checkpoint:
        _move_aside(plan, plan.weights_file)
    if cfg.resume is False:
        _move_aside(plan, folder.root)
    verified.remove_leftovers(folder.root)
    for name in (folder.root.name, cfg.weights_name):
        verified.remove_leftovers(folder.root.parent, name)
    verified.check_writable(folder.checkpoints)
    for text in _describe_start(plan):
        logger.info(text)
    if rejected := _list_rejected(plan):
        target, count = folder.root / REJECTED, rejected.count("\n")
        verified.write_text(target, rejected)
        logger.info(f"{count:,} malformed rows are skipped; see {target}")
    for text in describe_truncated(plan.corpus, cfg):
        logger.info(text)
    keep_reference(plan)
    later = [f for f in folder.checkpoint_folders() if plan.done < step_of(f)]
    if plan.checkpoint and later:
        for file in (plan.weights_file, *later):
            if file.exists():
                verified.rename_aside(file, SHORTER, 1)
    plan.write()


def _list_rejected(plan: RunPlan) -> str:
    """Return the lines of rejected.jsonl; of several files with the file's name."""
    paths = (*find_files(plan.cfg.data_path), plan.cfg.val_path)
    files, text = [path for path in paths if path], ""
    for file, cache in zip(files, plan.corpus.caches, strict=True):
        rejected = cache.folder / REJECTED
        for line in rejected.read_text().splitlines() if rejected.exists() else ():
            named = {"file": file} if len(files) > 1 else {}
            row = json.dumps(named | json.loads(line), ensure_ascii=False)
            text += f"{row}\n"
    return text


def _move_aside(plan: RunPlan, old: Path) -> None:
    """Keep what is replaced under another name; it may hold the initial weights."""
    if not old.exists():
        return
    initial = plan.initial and plan.initial.resolve()
    kept = verified.rename_aside(old, "old", 1)
    logger.info(f"{old} is of another run and kept as {kept.name}")
    if initial and initial.is_relative_to(old.resolve()):
        plan.initial = kept / initial.relative_to(old.resolve())


def _describe_start(plan: RunPlan) -> Iterator[str]:
    """Yield what a user should know of the run before it starts."""
    cfg, total = plan.cfg, plan.total_steps
    if plan.checkpoint:
        folder = shorten_home(str(plan.folder.root))
        yield f"{folder} is resumed from step {plan.done:,} of {total:,}"
        before = plan.folder.settings()
        changed = any(before[name] != getattr(cfg, name) for name in _LENGTH)
        if changed and cfg.schedule == "cosine":
            yield (
                f"epochs={before['epochs']} and max_steps={before['max_steps']} have "
                "changed: the schedule is recomputed for the new total, which differs from "
                "a run planned that long from the start"
            )
    else:
        yield describe_rows(plan.corpus, cfg)
    if plan.checkpoint and cfg.schedule == "linear" and plan.decay_start >= total:
        yield (
            f"max_steps={cfg.max_steps} leaves no step in which the learning rate decays: "
            "set some more to end the run well"
        )
    if plan.initial and not plan.checkpoint:
        yield f"starting from {plan.config['began_from']}"
    if cfg.max_steps and total < cfg.max_steps:
        yield (
            f"epochs={cfg.epochs} end after {total:,} steps, before max_steps="
            f"{cfg.max_steps:,}: raise epochs to train longer"
        )
    elif not cfg.max_steps and total < _FEW_STEPS:
        yield (
            f"the run makes only {total:,} steps, in which a model learns hardly "
            f"anything: raise epochs={cfg.epochs}, or lower global_batch="
            f"{cfg.global_batch} (or batch_size={cfg.batch_size})"
        )
    if cfg.val_fraction and not len(plan.corpus.val_truncated.documents):
        yield (
            f"nothing in {cfg.data_path} can be held out, so there is no validation: it "
            "needs at least two different rows, or name a file with val_path=…"
        )


def count_steps(
    corpus: Corpus, cfg: ResolvedConfig, checkpoint: Path | None = None
) -> int:
    """Return the horizon: the steps made, maybe of another global batch, and those that
    the samples left will make, at most `max_steps` in all."""
    at = read_state(checkpoint)["progress"] if checkpoint else vars(Progress())
    stream = corpus.training_stream(cfg, 0)
    left = max(0, stream.total_samples - at["samples"])
    total = at["step"] + math.ceil(left / cfg.global_batch)
    return min(total, cfg.max_steps or total)
