"""What packing conversations brings: text tokens a second, and that it changes nothing.

    python benchmarks/packed_conversations.py CHAT.jsonl [--preset minimind2-small]

The same conversations go forward and backward in three ways, in turn, several rounds:
packed into rows of max_seq_len; one a row, 16 rows padded to max_seq_len, as MiniMind's
scripts do; and one at a time, without padding. Printed are the greatest differences of
loss and gradients, and the ratios of text tokens a second (medians over the rounds).
"""

import argparse
import functools
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from minimind_nb.config import ResolvedConfig, TrainConfig, resolve
from minimind_nb.data.batches import MicroBatch, read_samples
from minimind_nb.data.packing import pack, truncate_documents
from minimind_nb.data.token_cache import Source, open_cache
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.model.architecture import MiniMindForCausalLM
from minimind_nb.model.loading import model_config
from minimind_nb.training.stages import next_token_loss

ROUNDS = 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--max_seq_len", type=int, default=1024)
    parser.add_argument("--conversations", type=int, default=64)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    cfg = resolve(
        TrainConfig(stage="sft", preset=options.preset, max_seq_len=options.max_seq_len)
    )
    spec = read_tokenizer()
    model = MiniMindForCausalLM(model_config(vars(cfg), spec)).train()
    with tempfile.TemporaryDirectory() as folder:
        cache = open_cache(Source(options.file, "sft", spec), Path(folder))
        width = options.max_seq_len
        found = truncate_documents(cache, np.arange(len(cache)), width)
        pieces = found.pieces[: options.conversations]
        tokens = int(pieces[:, 2].sum())
        read = functools.partial(read_samples, cache, cfg, spec.pad_id)
        rows = pack(pieces, width, split=False)
        alone = [[(d, start, n)] for d, start, n in pieces.tolist()]
        ways = {
            "packed": [read([rows.row(n)]) for n in range(len(rows))],
            "padded": [read(alone[n : n + 16]) for n in range(0, len(alone), 16)],
            "one at a time": [trimmed(read([one])) for one in alone],
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        results = {}
        for _ in range(ROUNDS):
            for name, batches in ways.items():
                began = time.perf_counter()
                results[name] = run(model, batches, cfg)
                seconds[name].append(time.perf_counter() - began)
    speed = {name: tokens / statistics.median(times) for name, times in seconds.items()}
    print(f"{len(pieces)} conversations, {tokens:,} text tokens, {options.preset}")
    print(f"fill packed {tokens / (len(rows) * width):.3f}, "
          f"padded {tokens / (len(alone) * width):.3f}")  # fmt: skip
    loss, gradient = results["packed"]
    for name in ("padded", "one at a time"):
        other_loss, other = results[name]
        print(
            f"{name}: loss differs by {abs(loss - other_loss):.1e}, gradients by "
            f"{(gradient - other).abs().max():.1e} (greatest {gradient.abs().max():.1e}); "
            f"packed is {speed['packed'] / speed[name]:.2f} times as fast"
        )


def trimmed(batch: MicroBatch) -> MicroBatch:
    """A single row without its padding."""
    assert batch.documents is not None
    length = int((batch.documents[0] >= 0).sum())
    parts = (batch.inputs, batch.targets, batch.documents)
    return MicroBatch(*(each[:, :length] for each in parts), samples=1)


def run(
    model: MiniMindForCausalLM, batches: list[MicroBatch], cfg: ResolvedConfig
) -> tuple[float, torch.Tensor]:
    """The mean loss of a target, and the gradient, over all batches."""
    model.zero_grad()
    targets = sum(int((batch.targets >= 0).sum()) for batch in batches)
    total = 0.0
    for batch in batches:
        loss = next_token_loss(model, batch, cfg).loss / targets
        loss.backward()
        total += float(loss.detach())
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(grads)


if __name__ == "__main__":
    main()
