"""The resumable iterator: which rows each rank takes in which step.

Its whole state is one number, the samples consumed so far by all ranks together, so it
means the same for any number of processes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

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


class RowReader:
    """Reads packed rows of a token cache into tensors."""

    def __init__(self, cache: TokenCache, pad_id: int, document_mask: bool) -> None:
        self.cache = cache
        self.pad_id = pad_id
        self.document_mask = document_mask

    def read(self, rows: PackedRows, numbers: range | list[int]) -> MicroBatch:
        """The rows of those numbers as one micro-batch."""
        shape = (len(numbers), rows.width)
        inputs = np.full(shape, self.pad_id, np.int64)
        targets = np.full(shape, IGNORED, np.int64)
        documents = np.full(shape, -1, np.int32)
        for b, number in enumerate(numbers):
            at = 0
            pieces = range(rows.bounds[number], rows.bounds[number + 1])
            for p in pieces:
                count = int(rows.count[p])
                begin = self.cache.offsets[rows.document[p]] + rows.start[p]
                ids = self.cache.tokens[begin : begin + count + 1]
                inputs[b, at : at + count] = ids[:-1]
                targets[b, at : at + count] = ids[1:]
                documents[b, at : at + count] = p - pieces.start
                at += count
        return MicroBatch(
            torch.from_numpy(inputs),
            torch.from_numpy(targets),
            torch.from_numpy(documents) if self.document_mask else None,
        )


class TrainingStream:
    """All samples of a run, `epochs × rows`, cut into steps.

    A step takes the next global batch, across an epoch's end too; the last takes what
    is left. Within a step, micro-batch m of rank r takes the rows from
    (m · size + r) · batch_size on, so a rank may get fewer rows, or none.
    """

    def __init__(
        self,
        reader: RowReader,
        documents: np.ndarray,
        *,
        width: int,
        seed: int,
        epochs: int,
        batch_size: int,
        accumulation_steps: int,
        rank: int = 0,
        size: int = 1,
        samples: int = 0,
    ) -> None:
        self.reader = reader
        self.documents = documents
        self.targets = reader.cache.targets[documents]
        self.width = width
        self.seed = seed
        self.batch_size = batch_size
        self.accumulation_steps = accumulation_steps
        self.rank = rank
        self.size = size
        self.samples = samples
        self.rows = -(-int(self.targets.sum()) // width)
        self.total_samples = epochs * self.rows
        self._epochs: dict[int, PackedRows] = {}

    @property
    def global_batch(self) -> int:
        """Rows of a full step over all ranks."""
        return self.batch_size * self.accumulation_steps * self.size

    @property
    def total_steps(self) -> int:
        """Steps until all samples are consumed."""
        return -(-self.total_samples // self.global_batch)

    @property
    def fill(self) -> float:
        """Share of the positions of an epoch that hold a target."""
        return int(self.targets.sum()) / max(1, self.rows * self.width)

    def next_step(self) -> StepBatch:
        """Take the next global batch; this rank's rows of it are read."""
        begin = self.samples
        end = min(begin + self.global_batch, self.total_samples)
        assert begin < end, "the stream is at its end"
        targets = sum(
            int(rows.targets[numbers].sum()) for rows, numbers in self._runs(begin, end)
        )
        micro_batches = []
        for m in range(self.accumulation_steps):
            first = begin + (m * self.size + self.rank) * self.batch_size
            last = min(first + self.batch_size, end)
            micro_batches += [
                self.reader.read(rows, range(numbers.start, numbers.stop))
                for rows, numbers in self._runs(first, last)
            ]
        self.samples = end
        return StepBatch(micro_batches, end - begin, targets)

    def lines(self, begin: int, end: int) -> list[int]:
        """The physical lines of the file that samples begin to end come from."""
        numbers = [
            rows.document[rows.bounds[run.start] : rows.bounds[run.stop]]
            for rows, run in self._runs(begin, end)
        ]
        documents = np.unique(np.concatenate(numbers)) if numbers else []
        return self.reader.cache.lines[documents].tolist()

    def _runs(self, begin: int, end: int) -> Iterator[tuple[PackedRows, slice]]:
        """The samples from begin to end, cut at the ends of epochs."""
        while begin < end:
            epoch, row = divmod(begin, self.rows)
            stop = min(self.rows, row + end - begin)
            yield self._epoch(epoch), slice(row, stop)
            begin += stop - row

    def _epoch(self, epoch: int) -> PackedRows:
        if epoch not in self._epochs:
            # Two at a time: a step may reach across an epoch's end.
            self._epochs = {e: r for e, r in self._epochs.items() if e == epoch - 1}
            self._epochs[epoch] = pack_epoch(
                self.documents, self.targets, self.width, self.seed, epoch
            )
        return self._epochs[epoch]


class ValidationRows:
    """The held-out documents, packed once in the file's order."""

    def __init__(
        self, reader: RowReader, documents: np.ndarray, width: int, most_tokens: int
    ) -> None:
        self.reader = reader
        targets = reader.cache.targets[documents]
        before = np.cumsum(targets) - targets
        kept = before < most_tokens
        self.rows = pack(documents[kept], targets[kept], width)
        self.text_bytes = int(reader.cache.sizes[documents[kept]].sum())

    def __len__(self) -> int:
        return len(self.rows)

    def micro_batches(
        self, batch_size: int, rank: int, size: int
    ) -> Iterator[MicroBatch]:
        """This rank's share of the rows, `batch_size` at a time."""
        mine = list(range(rank, len(self.rows), size))
        for begin in range(0, len(mine), batch_size):
            yield self.reader.read(self.rows, mine[begin : begin + batch_size])
