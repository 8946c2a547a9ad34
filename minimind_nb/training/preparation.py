"""Everything settled before a process is started: what runs, where, from which state.

Cheap checks come before dear ones, and nothing that exists is changed until all of
them have passed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import itertools
import math
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ..config import TrainConfig, resolve, shorten_home
from ..data.corpus import Corpus
from ..data.demo import DEMO, locate
from ..data.jsonl import check_file
from ..data.tokenizer import TokenizerSpec, read_tokenizer, write_tokenizer
from ..hardware import Hardware, choose_dtype, detect_hardware
from ..launch.spawn import RankInfo
from ..session import current_session
from ..storage import verified
from ..storage.run_folder import Checkpoint, RunFolder
from .checkpoint import read_progress
from .disk import check_room, check_writable
from .initial_weights import Initial, find_initial
from .notes import describe_cuts, tell_horizon, tell_rejected
from .resuming import compare_hashes, find_checkpoint, keep_origin, meet_run
from .trainer import Progress

_VERSIONED = ("minimind_nb", "torch", "transformers", "tokenizers", "numpy")
_ROWS = {
    "pretrain": '{"text": "…"}',
    "sft": '{"conversations": [{"role": "user", "content": "…"}, …]}',
    "dpo": '{"chosen": […], "rejected": […]}',
}
_Note = Callable[[str], None]


@dataclass(frozen=True)
class Settled:
    """A configuration with nothing left open, and what it was settled with."""

    cfg: TrainConfig
    tokenizer: TokenizerSpec
    hardware: Hardware
    cache_root: Path
    initial: Initial | None


class Start(NamedTuple):
    """Where a run starts: its newest checkpoint, None for a new run; the weights that it
    begins, or began, from, None for new ones and where they are lost."""

    checkpoint: Checkpoint | None
    initial_file: Path | None


@dataclass(frozen=True)
class Prepared:
    """A run that can start.

    `config` is what config.json holds; `total_steps` its horizon; `complete` tells that
    there is nothing left to do; `began` is when the call began, on the monotonic clock
    in seconds; `lock` the descriptor of the folder's lock.
    """

    settled: Settled
    folder: RunFolder
    corpus: Corpus
    start: Start
    config: dict[str, Any]
    total_steps: int
    complete: bool
    began: float
    lock: int

    @property
    def cfg(self) -> TrainConfig:
        """The resolved configuration."""
        return self.settled.cfg

    @property
    def weights_file(self) -> Path:
        """The bare weights beside the run folder."""
        return self.folder.root.parent / self.cfg.weights_name


def settle(cfg: TrainConfig, on_note: _Note = lambda _: None) -> Settled:
    """Resolve a configuration on this machine, with the weights it begins from.

    Raises `ValueError`, `TypeError` or `FileNotFoundError` for what cannot be.
    """
    if not isinstance(cfg, TrainConfig):
        found = type(cfg).__name__
        raise TypeError(f"expected a TrainConfig, found {found}: mm.TrainConfig(…)")
    if not cfg.data_path:
        raise ValueError(
            f"data_path is not set: name a JSONL file with one {_ROWS[cfg.stage]} a line, "
            'or take data_path="demo"'
        )
    cache_root = current_session().cache_folder(cfg.out_dir)
    if cfg.data_path != DEMO:
        check_file(cfg.data_path)
    if cfg.val_path:
        check_file(cfg.val_path)
    initial = find_initial(cfg, on_note)
    own = initial.weights.tokenizer if initial else None
    tokenizer = read_tokenizer(cfg.tokenizer or own)
    hardware = detect_hardware()
    machine = {"vocab_size": tokenizer.vocab_size, **_machine_defaults(cfg, hardware)}
    resolved = resolve(cfg, **machine | (initial.weights.shape() if initial else {}))
    assert resolved.vocab_size
    if resolved.vocab_size < tokenizer.vocab_size:
        whose = f"of {initial.source} " if initial else ""
        raise ValueError(
            f"vocab_size={resolved.vocab_size} {whose}is too small for the tokenizer, "
            f"which has {tokenizer.vocab_size} entries; leave vocab_size out, or name "
            "the tokenizer that belongs to the weights"
        )
    return Settled(resolved, tokenizer, hardware, cache_root, initial)


def open_corpus(settled: Settled) -> Corpus:
    """The tokenised documents of a settled configuration."""
    cfg, root = settled.cfg, settled.cache_root
    assert cfg.data_path
    if cfg.data_path == DEMO:
        data_path = str(locate(DEMO, cfg.stage))
        cfg = dataclasses.replace(cfg, data_path=data_path)
    cores = settled.hardware.cpu_cores
    return Corpus.prepare(cfg, settled.tokenizer, root, cores, cfg.max_bad_fraction)


@contextlib.contextmanager
def prepare(cfg: TrainConfig, on_note: _Note = lambda _: None) -> Iterator[Prepared]:
    """Settle a run, meet the one that is there, tokenise, and write config.json.

    The run folder is locked while the block runs. Raises the errors of `settle`,
    `OSError` for a folder that cannot be written or a disk too small, `RunLocked`,
    `NoGoodCheckpoint`, and `RuntimeError` for a run there that is a different one.
    """
    began = time.monotonic()
    settled = settle(cfg, on_note)
    assert settled.cfg.run_name
    check_writable(Path(settled.cfg.out_dir))
    folder = RunFolder(Path(settled.cfg.out_dir) / settled.cfg.run_name)
    with folder.lock() as lock:
        asked = settled.cfg.accumulation_steps
        resolved = meet_run(folder, settled.cfg, on_note)
        settled = dataclasses.replace(settled, cfg=resolved)
        check_room(resolved, cache=settled.cache_root)
        corpus = open_corpus(settled)
        config = _describe(cfg, settled, corpus)
        config["accumulation_asked"] = asked
        start = _find_start(settled, folder, config, on_note)
        done = start.checkpoint.step if start.checkpoint else 0
        total_steps = _total_steps(corpus, resolved, start.checkpoint)
        prepared = Prepared(
            settled=settled,
            folder=folder,
            corpus=corpus,
            start=start,
            config=config,
            total_steps=total_steps,
            complete=folder.status() == "finished" and done >= total_steps,
            began=began,
            lock=lock,
        )
        if not prepared.complete:
            _begin(prepared, on_note)
        yield prepared


def _find_start(
    settled: Settled, folder: RunFolder, config: dict[str, Any], on_note: _Note
) -> Start:
    """Where the run begins or goes on; a run in the way is set aside if that is asked.

    Of a run that goes on, `config` gets what it began from.
    """
    cfg, initial = settled.cfg, settled.initial
    file = initial.weights.file if initial else None
    weights_file = folder.root.parent / cfg.weights_name
    if file and file.resolve() == weights_file.resolve():
        raise ValueError(
            f"init_from={str(file)!r} is the file that this run would write its own "
            "weights to; rename it, or take another out_dir"
        )
    checkpoint = None
    if folder.exists() and cfg.resume is False:
        inside = file and os.path.relpath(file, folder.root)
        kept = folder.move_aside()
        on_note(f"the earlier run is kept as {kept}")
        if inside and not inside.startswith(os.pardir):
            file = kept / inside  # the weights to begin from were its own
    elif folder.exists():
        compare_hashes(folder, config, cfg, on_note)
        checkpoint = find_checkpoint(folder)
    if not checkpoint:
        _spare(weights_file, on_note)
    elif not keep_origin(config, folder.read_config()):
        file = None  # other weights, which this run has nothing to do with
    return Start(checkpoint, file)


def _begin(prepared: Prepared, on_note: _Note) -> None:
    """Say what is about to be done, and write down what it is done with."""
    cfg, folder, corpus = prepared.cfg, prepared.folder, prepared.corpus
    checkpoint, initial = prepared.start.checkpoint, prepared.settled.initial
    for parent, name in (
        (folder.root, ""),
        (folder.root.parent, folder.root.name),
        (folder.root.parent, cfg.weights_name),
    ):
        verified.remove_leftovers(parent, name)
    check_writable(folder.checkpoints)
    check_room(cfg, prepared.total_steps - (checkpoint.step if checkpoint else 0))
    if checkpoint:
        total = prepared.total_steps
        tell_horizon(checkpoint.step, total, folder, cfg, on_note)
    elif initial:
        on_note(f"begins from {initial.source}")
    tell_rejected(corpus, folder, on_note)
    for told in describe_cuts(corpus, cfg):
        on_note(told)
    write_tokenizer(prepared.settled.tokenizer, folder.tokenizer)
    folder.write_config(prepared.config)


def _spare(weights_file: Path, on_note: _Note) -> None:
    """Set weights aside that a new run would replace; nothing is deleted."""
    if weights_file.exists():
        names = (f"{weights_file.name}.old{n}" for n in itertools.count(1))
        spared = verified.first_free(weights_file, names)
        weights_file.rename(spared)
        on_note(f"{weights_file} is of another run; it is kept as {spared.name}")


def _describe(cfg: TrainConfig, settled: Settled, corpus: Corpus) -> dict[str, Any]:
    """What config.json holds of a run that is settled, `cfg` being what was asked."""
    initial = settled.initial
    return {
        "run": uuid.uuid4().hex,
        "settings": settled.cfg.portable(),
        "explicit": sorted(cfg.explicit()),
        "caches": [cache["folder"].rpartition("/")[2] for cache in corpus.describe()],
        "hashes": {
            "data": corpus.cache.facts["content"],
            "validation": corpus.val_cache.facts["content"],
            "tokenizer": settled.tokenizer.fingerprint,
            "initial": initial.digest if initial else None,
        },
        "began_from": shorten_home(initial.source) if initial else None,
        "rejected_rows": corpus.cache.facts["bad_rows"],
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }


def _machine_defaults(cfg: TrainConfig, hardware: Hardware) -> dict[str, Any]:
    device = cfg.device or ("cuda" if hardware.gpus else "cpu")
    if device == "cuda" and not hardware.gpus:
        raise ValueError('device="cuda", and no GPU was found; take device="cpu"')
    started = _started_by_torchrun(cfg)
    count = len(hardware.gpus) if device == "cuda" else 1
    here = started.local_world_size if started else cfg.num_processes or 1
    if not sys.platform.startswith("linux"):
        count = 1
        if here > 1:
            raise ValueError("several processes need Linux; take num_processes=1")
    if device == "cuda" and here > count:
        raise ValueError(f"num_processes={here}, and there are {count} GPUs")
    most = 4 * hardware.cpu_cores
    if here > most:
        raise ValueError(
            f"num_processes={here} is too many for {hardware.cpu_cores} CPU cores; take "
            f"at most {most}"
        )
    count = started.world_size if started else count
    capability = min((gpu.capability for gpu in hardware.gpus), default=None)
    dtype = choose_dtype(device, capability, hardware.cpu_native_bf16)
    return {"device": device, "num_processes": count, "dtype": dtype}


def _started_by_torchrun(cfg: TrainConfig) -> RankInfo | None:
    """Where torchrun put this process; it says how many there are."""
    place = RankInfo.from_environment()
    if place and cfg.num_processes not in (None, place.world_size):
        raise ValueError(
            f"num_processes={cfg.num_processes}, and torchrun started {place.world_size} "
            "(WORLD_SIZE); leave num_processes out, or start as many"
        )
    return place


def _total_steps(
    corpus: Corpus, cfg: TrainConfig, checkpoint: Checkpoint | None
) -> int:
    """Steps made, and those that the samples left make; `max_steps` caps them.

    The steps made may have been of another global batch, and the last of them short.
    """
    progress = read_progress(checkpoint.folder) if checkpoint else Progress()
    stream = corpus.training_stream(cfg, 0, size=cfg.num_processes or 1)
    left = max(0, stream.total_samples - progress.samples)
    total = progress.step + math.ceil(left / stream.global_batch)
    return min(total, cfg.max_steps or total)
