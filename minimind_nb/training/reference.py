"""The reference model's log-probabilities of all answers: computed once, and kept."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import nn

from ..data.batches import SampleReader
from ..data.packing import PackedRows
from ..launch.cancellation import agreed_stop_reason
from ..model.architecture import MiniMindForCausalLM
from ..storage import verified
from .stages import answer_log_probabilities
from .trainer import Trainer

_MICRO_BATCHES = 8  # of a rank between two looks at whether to stop
_TELL_SECONDS = 10.0


def prepare_reference(
    t: Trainer, build_reference: Callable[[], MiniMindForCausalLM]
) -> str | None:
    """Tell the readers of pairs what the reference model makes of each answer.

    It is read from the run folder where it lies there intact, made from this data and
    these weights; else all ranks compute it, with the model that `build_reference`
    gives, and it is written there; "reference" events tell how far that is. Returns why
    to stop, if any rank wishes to; what was computed is lost then.
    """
    if not t.stream.reader.pairs:
        return None
    places = {"training": (t.stream.reader, t.stream.arrange(0))}
    if t.validation is not None:
        places["validation"] = (t.validation.reader, t.validation.rows)
    kept = _read(t, places.keys())
    if kept is None:
        kept = {}
        model = build_reference().eval()
        nn.Module.to(model, t.device)
        for name, (reader, rows) in places.items():
            kept[name], ending = _compute(t, model, reader, rows)
            if ending:
                return ending
        if t.group.rank == 0:
            with verified.writing(t.folder.reference, {"key": _key(t)}) as aside:
                for name, values in kept.items():
                    values.tofile(aside / name)
    for name, (reader, _) in places.items():
        reader.reference = kept[name]
    return None


def _compute(
    t: Trainer, model: MiniMindForCausalLM, reader: SampleReader, rows: PackedRows
) -> tuple[np.ndarray, str | None]:
    """The sum for each document of the cache, 0 for one that is in none of the rows."""
    assert t.cfg.batch_size
    batch_size, rank, size = t.cfg.batch_size, t.group.rank, t.group.size
    sums = torch.zeros(len(reader.cache), dtype=torch.float64, device=t.device)
    block = batch_size * size * _MICRO_BATCHES
    told = time.monotonic()
    for begin in range(0, len(rows), block):
        end = min(begin + block, len(rows))
        for first in range(begin + rank * batch_size, end, batch_size * size):
            last = min(first + batch_size, end)
            pairs = [rows.row(number) for number in range(first, last)]
            with torch.no_grad(), t.autocast:
                batch = reader.read(pairs).to(t.device)
                found, _, _ = answer_log_probabilities(model, batch)
            numbers = [document for pair in pairs for document, _, _ in pair]
            sums[numbers] = found.double()
            t.record.beat()
        if t.clock.is_over():
            t.stop.reason = t.stop.reason or "time_budget"
        flags = torch.tensor(t.stop.stop_flags(), device=t.device)
        t.group.sum(flags)
        if ending := agreed_stop_reason(flags.tolist()):
            return np.zeros(0), ending
        if time.monotonic() - told > _TELL_SECONDS:
            told, where = time.monotonic(), t.progress.position()
            reached = {"pairs": end, "total_pairs": len(rows)}
            t.metrics.append("event", **where, event="reference", **reached)
    t.group.sum(sums)
    return sums.cpu().numpy(), None


def _read(t: Trainer, names: Iterable[str]) -> dict[str, np.ndarray] | None:
    """What lies in the run folder, unless another rank finds it wanting."""
    try:
        facts = verified.verify(t.folder.reference)
        usable = facts["key"] == _key(t)
    except (verified.DamagedFolder, FileNotFoundError):
        usable = False
    missing = torch.tensor([float(not usable)], device=t.device)
    t.group.sum(missing)
    if missing.item():
        if t.group.rank == 0 and t.folder.reference.exists():
            shutil.rmtree(t.folder.reference)
        return None
    return {name: np.fromfile(t.folder.reference / name) for name in names}


def _key(t: Trainer) -> str:
    """Equal for the same answers of the same data under the same weights."""
    cfg = t.cfg
    parts = [t.config["hashes"], cfg.max_seq_len, cfg.val_fraction, cfg.eval_tokens]
    text = verified.canonical_json([*parts, cfg.seed])
    return hashlib.sha256(text.encode()).hexdigest()
