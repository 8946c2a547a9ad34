"""The resumable iterator: which rows each rank takes in which step.

Its whole state is one number, the samples consumed so far by all ranks together, so it
means the same for any number of processes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ..config import TrainConfig
from .packing import PackedRows, pack, pack_epoch
from .shards import TokenCache

IGNORED = -100
"""The target of a position that nothing is learned from."""


@dataclass(frozen=True)
class MicroBatch:
    """Rows for one forward pass.

    `inputs` and `targets`, both [B, T] int64, are aligned: `targets[b, t]` is the token
    after `inputs[b, t]`, or `IGNORED`. `documents` [B, T] int32 numbers the pieces in a
    row (-1 is padding), or is None where documents may see each other.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None

    def to(self, device: torch.device) -> MicroBatch:
        """The same rows on a device."""
        if device.type == "cpu":
            return self
        documents = self.documents
        return MicroBatch(
            self.inputs.pin_memory().to(device, non_blocking=True),
            self.targets.pin_memory().to(device, non_blocking=True),
            None if documents is None else documents.to(device),
        )


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step, and what all ranks take together.

    `targets` and `samples` are global: predicted tokens and rows of the step.
    """

    micro_batches: list[MicroBatch]
    samples: int
    targets: int


def collate(rows: Sequence[list[np.ndarray]], cfg: TrainConfig, pad: int) -> MicroBatch:
    """Rows, each a list of pieces of ids, as one micro-batch of `max_seq_len`.

    The last id of a piece is a target only.
    """
    assert cfg.max_seq_len
    shape = (len(rows), cfg.max_seq_len)
    inputs = np.full(shape, pad, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    documents = np.full(shape, -1, np.int32)
    for b, pieces in enumerate(rows):
        begin = 0
        for number, ids in enumerate(pieces):
            end = begin + len(ids) - 1
            inputs[b, begin:end] = ids[:-1]
            targets[b, begin:end] = ids[1:]
            documents[b, begin:end] = number
            begin = end
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.from_numpy(documents) if cfg.document_mask else None,
    )


class TrainingStream:
    """All samples of a resolved configuration, `epochs × rows`, cut into steps.

    A step takes the next global batch, across an epoch's end too; the last takes what
    is left. Within a step, micro-batch m of rank r takes the rows from
    (m · size + r) · batch_size on, so a rank may get fewer rows, or none.
    """

    def __init__(
        self,
        cache: TokenCache,
        documents: np.ndarray,
        cfg: TrainConfig,
        pad_id: int,
        *,
        rank: int = 0,
        size: int = 1,
        samples: int = 0,
    ) -> None:
        assert cfg.max_seq_len and cfg.epochs
        assert cfg.batch_size and cfg.accumulation_steps
        self.cache = cache
        self.cfg = cfg
        self.pad_id = pad_id
        self.rank = rank
        self.size = size
        self.samples = samples
        self.width = width = cfg.max_seq_len
        self.batch_size = cfg.batch_size
        self.global_batch = cfg.batch_size * cfg.accumulation_steps * size
        self.targets = targets = cache.targets[documents]
        self.rows = -(-int(targets.sum()) // width)
        self.total_samples = cfg.epochs * self.rows
        self.total_steps = -(-self.total_samples // self.global_batch)

        @functools.lru_cache(maxsize=2)  # a step may reach across an epoch's end
        def rows_of(epoch: int) -> PackedRows:
            return pack_epoch(documents, targets, width, cfg.seed, epoch)

        self._rows_of = rows_of

    @property
    def fill(self) -> float:
        """Share of the positions of an epoch that hold a target."""
        return int(self.targets.sum()) / max(1, self.rows * self.width)

    def next_step(self) -> StepBatch:
        """Take the next global batch; this rank's rows of it are read."""
        begin = self.samples
        end = min(begin + self.global_batch, self.total_samples)
        assert begin < end, "the stream is at its end"
        targets = sum(count for n in range(begin, end) for _, _, count in self._row(n))
        micro_batches = []
        stride = self.size * self.batch_size
        for first in range(begin + self.rank * self.batch_size, end, stride):
            samples = range(first, min(first + self.batch_size, end))
            rows = [self.pieces(sample) for sample in samples]
            micro_batches.append(collate(rows, self.cfg, self.pad_id))
        self.samples = end
        return StepBatch(micro_batches, end - begin, targets)

    def pieces(self, sample: int) -> list[np.ndarray]:
        """The ids of each piece of a document in a sample's row, last targets too."""
        return [self.cache.piece(*piece) for piece in self._row(sample)]

    def lines(self, begin: int, end: int) -> list[int]:
        """The physical lines of the file that samples begin to end come from."""
        documents = {piece[0] for n in range(begin, end) for piece in self._row(n)}
        return self.cache.lines[sorted(documents)].tolist()

    def _row(self, sample: int) -> list[tuple[int, int, int]]:
        epoch, row = divmod(sample, self.rows)
        return self._rows_of(epoch).row(row)


class ValidationRows:
    """The held-out documents, packed once into rows; their order means nothing.

    Whole documents are taken in the file's order, those left out that have more targets
    than remain of `eval_tokens`; where none has as few, the shortest is taken.
    """

    def __init__(
        self, cache: TokenCache, documents: np.ndarray, cfg: TrainConfig, pad_id: int
    ) -> None:
        assert cfg.max_seq_len and cfg.eval_tokens
        self.cache = cache
        self.cfg = cfg
        self.pad_id = pad_id
        targets = cache.targets[documents]
        left = max(cfg.eval_tokens, int(targets.min()))
        kept = []
        for index, count in enumerate(targets.tolist()):
            if count <= left:
                kept.append(index)
                left -= count
        self.rows = pack(documents[kept], targets[kept], cfg.max_seq_len)
        self.text_bytes = int(cache.sizes[documents[kept]].sum())

    def __len__(self) -> int:
        return len(self.rows)

    def micro_batches(
        self, batch_size: int, rank: int, size: int
    ) -> Iterator[MicroBatch]:
        """This rank's share of the rows, `batch_size` at a time."""
        mine = range(rank, len(self.rows), size)
        for begin in range(0, len(mine), batch_size):
            rows = [
                [self.cache.piece(*piece) for piece in self.rows.row(number)]
                for number in mine[begin : begin + batch_size]
            ]
            yield collate(rows, self.cfg, self.pad_id)
