"""The loss by position, up to four times the length that a model was trained with.

    python benchmarks/length.py CORPUS.jsonl [--plot docs/yarn.png] [--out FOLDER]

Trains the demo's shape (1.6 M parameters) in rows of 128 tokens on the documents that
are at least four times as long, and measures the loss at each position of others: as it
was trained, seeing only the last 128 tokens, with `rope_scaling=4`, and after 64 steps
more in rows of 512. With `--out` the runs are kept, and found when called again.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import minimind_nb as mm
from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.tokenizer import read_tokenizer

LENGTH, FACTOR = 128, 4
HELD_OUT = 200  # documents
PARTS = 8  # of the positions: a column of the table each
PLACE = {"device": "cpu", "num_processes": 1, "dtype": "float32", "compile": False}
QUIET = {"sample_tokens": 0, "save_interval": 10**6, "eval_tokens": 30_000}
SHORT = {"preset": "demo", "max_seq_len": LENGTH, "batch_size": 32, "global_batch": 32}
# At the default of 3e-3 these few steps undo more than they teach.
LONGER = {"learning_rate": 5e-4, "max_steps": 64, "batch_size": 4, "global_batch": 4}


def split(corpus: Path, positions: int, file: Path) -> Tensor:
    """Write the long documents to train on to a file; return the ids of others."""
    lines = corpus.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    spec = read_tokenizer()
    ids = BulkEncoder(spec).encode([json.loads(line)["text"] for line in lines])
    long = [number for number, one in enumerate(ids) if len(one) >= positions]
    file.write_text("".join(f"{lines[number]}\n" for number in long[HELD_OUT:]))
    rows = [[spec.bos_id, *ids[number][:positions]] for number in long[:HELD_OUT]]
    print(
        f"{len(long) - HELD_OUT:,} documents of {positions} tokens or more to train on"
    )
    return torch.tensor(np.array(rows, dtype=np.int64))


@torch.no_grad()
def losses(model: Any, ids: Tensor, last: int) -> Tensor:
    """Return the loss at each of the `last` positions, a mean over the rows."""
    parts = []
    for rows in ids.split(10):
        logits = model(rows[:, :-1], logits_to_keep=last).logits
        targets = rows[:, -last:]
        parts.append(F.cross_entropy(logits.mT, targets, reduction="none"))
    return torch.cat(parts).mean(0)


def windowed(model: Any, ids: Tensor, length: int) -> Tensor:
    """Return the losses if the model sees no more than the last `length` tokens."""
    stride = length // 4
    parts = [
        losses(model, ids[:, max(0, end - length) : end + 1], stride)
        for end in range(stride, ids.shape[1], stride)
    ]
    return torch.cat(parts)


def measure(corpus: Path, folder: Path) -> dict[str, Tensor]:
    """Return the mean loss by position of each way to read on."""
    positions, file = FACTOR * LENGTH, folder / "long.jsonl"
    ids = split(corpus, positions, file)
    shared: dict[str, Any] = {"out_dir": str(folder), **PLACE, **QUIET}
    short = mm.train(str(file), view=False, run_name="short", **SHORT, **shared)
    begin = {"init_from": str(short.folder), "max_seq_len": positions}
    longer = mm.train(
        str(file), view=False, run_name="longer", **begin, **LONGER, **shared
    )
    plain = mm.load(short)[0]
    stretched = mm.load(short, rope_scaling=FACTOR)[0]
    return {
        "as trained": losses(plain, ids, positions),
        f"last {LENGTH} tokens only": windowed(plain, ids, LENGTH),
        f"rope_scaling={FACTOR}": losses(stretched, ids, positions),
        "64 steps longer rows": losses(mm.load(longer)[0], ids, positions),
    }


def draw(curves: dict[str, Tensor], picture: Path) -> None:
    """Draw the losses, means over a sixteenth of the positions."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        means = curve.unflatten(0, (2 * PARTS, -1)).mean(1)
        middles = (torch.arange(2 * PARTS) + 0.5) * len(curve) / (2 * PARTS)
        axes.plot(middles, means, marker="o", markersize=3, label=name)
    axes.axvline(LENGTH, color="grey", linestyle="--", linewidth=1)
    low, high = axes.get_ylim()
    axes.text(
        LENGTH * 1.03, low + 0.02 * (high - low), "length trained with", color="grey"
    )
    axes.set(xlabel="position in the document (tokens)", ylabel="loss (nats per token)")
    figure.legend(loc="outside upper center", ncols=4, fontsize="small")
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--plot", type=Path, help="draw the losses, too")
    parser.add_argument("--out", type=Path, help="keep the runs in this folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        curves = measure(options.corpus, options.out or Path(folder))
    ends = [FACTOR * LENGTH * n // PARTS for n in range(1, PARTS + 1)]
    print(f"| positions up to | {' | '.join(map(str, ends))} |")
    print(f"| --- | {' | '.join(['---:'] * PARTS)} |")
    for name, curve in curves.items():
        means = curve.unflatten(0, (PARTS, -1)).mean(1).tolist()
        print(f"| {name} | {' | '.join(f'{mean:.2f}' for mean in means)} |")
    if options.plot:
        draw(curves, options.plot)


if __name__ == "__main__":
    main()
