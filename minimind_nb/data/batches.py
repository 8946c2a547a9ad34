"""The resumable stream: which samples each rank takes in which step.

Its whole state is one number, the samples consumed so far by all ranks together. A
sample is a packed row, or a pair of answers if preferences are trained on.
"""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from ..config import ResolvedConfig
from .containers import find_files
from .packing import (
    Piece,
    TruncatedDocuments,
    arrange_epoch,
    make_rows,
    mix_epoch,
    pack,
)
from .token_cache import TokenCache

IGNORED = -100
"""The target of a position without a loss."""


@dataclass(frozen=True)
class MicroBatch:
    """Samples for one forward pass.

    `inputs` and `targets`, both [B, T] int64, are aligned: `targets[b, t]` is the token
    after `inputs[b, t]`, or `IGNORED`. `documents` [B, T] int32 numbers the pieces in a
    row (-1 is padding), or is None if documents may see each other. `loss_positions` [N]
    int64 are the indices into the flattened rows that have a target, or None for texts.

    Pair p is the documents 2p (chosen) and 2p + 1 (rejected), in any of the rows;
    `reference` [2 · samples] float32 holds their sums of log-probabilities under the
    reference model, once they are known.
    """

    inputs: torch.Tensor
    targets: torch.Tensor
    documents: torch.Tensor | None
    samples: int
    loss_positions: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def to(self, device: torch.device) -> "MicroBatch":
        """Return the same samples on a device."""
        if device.type == "cpu":
            return self
        moved = {
            name: value.pin_memory().to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True)
class StepBatch:
    """This rank's micro-batches of one step, and counts of all ranks.

    `tokens` are those of text, with or without a loss; `num_targets` the tokens or pairs
    that the loss is a mean over.
    """

    micro_batches: list[MicroBatch]
    samples: int
    tokens: int
    num_targets: int


def read_samples(
    cache: TokenCache, cfg: ResolvedConfig, pad_id: int, samples: Sequence[list[Piece]]
) -> "MicroBatch":
    """Return the micro-batch of some samples; pairs are packed into the fewest rows."""
    rows, width = [list(enumerate(sample)) for sample in samples], cfg.max_seq_len
    if cfg.stage == "dpo":
        pieces = list(enumerate(itertools.chain(*samples)))
        numbered = [(number, 0, count) for number, (_, _, count) in pieces]
        packed = pack(np.array(numbered, np.int64), width, split=False)
        rows = [
            [pieces[number] for number, _, _ in packed.row(row)]
            for row in range(len(packed))
        ]
        width = max(sum(count for _, (_, _, count) in row) for row in rows)
    # Empty rows count for nothing; a compiled step has one shape.
    shape = (cfg.batch_size if cfg.compile else len(rows), width)
    inputs = np.full(shape, pad_id, np.int64)
    targets = np.full(shape, IGNORED, np.int64)
    documents = np.full(shape, -1, np.int32)
    for b, row in enumerate(rows):
        begin = 0
        for number, piece in row:
            ids = cache.piece(*piece)
            end = begin + len(ids) - 1
            inputs[b, begin:end] = ids[:-1]
            in_loss = cache.loss_mask(*piece)
            np.copyto(targets[b, begin:end], ids[1:], where=in_loss)
            documents[b, begin:end] = number
            begin = end
    positions = torch.from_numpy(np.flatnonzero(targets != IGNORED))
    return MicroBatch(
        torch.from_numpy(inputs),
        torch.from_numpy(targets),
        torch.from_numpy(documents) if cfg.document_mask else None,
        samples=len(samples),
        loss_positions=None if cache.marks is None else positions,
    )


class TrainingStream:
    """All samples of a resolved configuration, epoch after epoch, cut into steps.

    A step takes the next global batch, across an epoch's end too; the last takes what
    is left. Micro-batch m of rank r is the (m · size + r)-th run of batch_size samples
    in it, so a rank may get fewer, or none.
    """

    def __init__(
        self,
        cache: TokenCache,
        truncated: TruncatedDocuments,
        cfg: ResolvedConfig,
        pad_id: int,
        *,
        rank: int = 0,
        samples: int = 0,
    ) -> None:
        self.cache = cache
        self.truncated = truncated
        self.cfg = cfg
        self._read = functools.partial(read_samples, cache, cfg, pad_id)
        self.rank = rank
        self.samples = samples
        pieces, shape = truncated.pieces, (cfg.stage, cfg.max_seq_len, cfg.seed)
        arrange = functools.partial(arrange_epoch, pieces, *shape)
        if cfg.data_weights:
            files = cache.file_of(pieces[:, 0])
            sources = [pieces[files == n] for n in range(len(cache.starts))]
            arrange = functools.partial(
                mix_epoch, sources, *shape, weights=cfg.data_weights
            )
        # A step may reach across the end of an epoch.
        self.arrange = functools.lru_cache(maxsize=2)(arrange)
        if cfg.stage == "pretrain" and not cfg.data_weights:  # not worth a packing
            self.tokens = int(pieces[:, 2].sum())
            self.rows = -(-self.tokens // cfg.max_seq_len)
        else:
            first = self.arrange(0)
            self.tokens, self.rows = first.tokens, len(first)
        if cfg.stage == "sft":
            self._loss_tokens = np.zeros(len(cache), np.int64)
            self._loss_tokens[truncated.documents] = truncated.loss_tokens
        self.total_samples = cfg.epochs * self.rows

    def next_step(self) -> StepBatch:
        """Take the next global batch, and read this rank's samples of it."""
        begin = self.samples
        end = min(begin + self.cfg.global_batch, self.total_samples)
        assert begin < end, "the stream is at its end"
        count, every = self.cfg.batch_size, self.cfg.batch_size * self.cfg.num_processes
        micro_batches = [
            self._read([self._row(n) for n in range(first, min(first + count, end))])
            for first in range(begin + self.rank * count, end, every)
        ]
        self.samples = end
        pieces = [piece for n in range(begin, end) for piece in self._row(n)]
        tokens = num_targets = sum(count for _, _, count in pieces)
        if self.cfg.stage == "dpo":
            num_targets = end - begin
        elif self.cfg.stage == "sft":
            num_targets = int(self._loss_tokens[[piece[0] for piece in pieces]].sum())
        return StepBatch(micro_batches, end - begin, tokens, num_targets)

    def pieces(self, sample: int) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each piece of a sample, and which of them are in the loss."""
        return [
            (self.cache.piece(*piece), np.append(False, self.cache.loss_mask(*piece)))
            for piece in self._row(sample)
        ]

    def lines(self, samples: Iterable[int]) -> list[Any]:
        """Return the lines that samples come from; of several files "name:line"."""
        documents = sorted({piece[0] for n in samples for piece in self._row(n)})
        lines = self.cache.lines[documents].tolist()
        if len(self.cache.starts) == 1:
            return sorted(set(lines))
        names = find_files(self.cfg.data_path)
        places = zip(self.cache.file_of(documents).tolist(), lines, strict=True)
        return [f"{names[file]}:{line}" for file, line in sorted({*places})]

    def _row(self, sample: int) -> list[Piece]:
        epoch, row = divmod(sample, self.rows)
        return self.arrange(epoch).row(row)


class ValidationRows:
    """The held-out samples, packed once; their order means nothing.

    Whole documents or pairs of each file are taken in its order, except those with more
    tokens than remain of its part of `eval_tokens`; if all have more, the shortest is
    taken. `references` keeps what the reference model says of each micro-batch.
    """

    def __init__(
        self,
        cache: TokenCache,
        truncated: TruncatedDocuments,
        cfg: ResolvedConfig,
        pad_id: int,
    ) -> None:
        self.cache = cache
        self.references: dict[int, torch.Tensor | None] = {}
        self._read = functools.partial(read_samples, cache, cfg, pad_id)
        together = 2 if cfg.stage == "dpo" else 1
        pieces = truncated.pieces.reshape(-1, together, 3)
        text_bytes = truncated.text_bytes.reshape(-1, together)
        targets, files = pieces[:, :, 2].sum(1), cache.file_of(pieces[:, 0, 0])
        taken: list[int] = []
        self.sources = []
        for file in range(len(cache.starts)):
            (indices,) = np.nonzero(files == file)
            least = int(targets[indices].min(initial=1 << 62))
            left = max(cfg.eval_tokens // len(cache.starts), least)
            begin = len(taken)
            for index in indices.tolist():
                if targets[index] <= left:
                    taken.append(index)
                    left -= int(targets[index])
            chosen = pieces[taken[begin:]].reshape(-1, 3)
            self.sources.append(make_rows(chosen, cfg.stage, cfg.max_seq_len))
        self.documents = pieces[taken, :, 0].ravel()
        self.text_bytes = int(text_bytes[taken].sum())

    def micro_batches(
        self, batch_size: int, rank: int, size: int
    ) -> Iterator[tuple[int, MicroBatch]]:
        """Yield this rank's share of each file's samples, `batch_size` at a time."""
        for file, rows in enumerate(self.sources):
            mine = [rows.row(n) for n in range(rank, len(rows), size)]
            for begin in range(0, len(mine), batch_size):
                yield file, self._read(mine[begin : begin + batch_size])
