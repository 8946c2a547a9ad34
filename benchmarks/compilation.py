"""Compiled against eager: forward and backward of 4 rows of 512, in turns.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/compilation.py minimind2-small 8 float32

The second run in a row shows what the first compiled step takes with a filled cache.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from minimind_nb.config import TrainConfig, resolve
from minimind_nb.data.batches import MicroBatch
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.training.stages import compile_objective, next_token_loss


def main() -> None:
    """Print the seconds of the first compiled step, and the ratio of five turns."""
    preset, layers, dtype = sys.argv[1], int(sys.argv[2]), sys.argv[3]
    torch.set_num_threads(1)
    torch.manual_seed(0)
    cfg = resolve(TrainConfig(preset=preset, num_hidden_layers=layers, dtype=dtype))
    model = MiniMindForCausalLM(MiniMindConfig(**cfg.shape())).train()
    ids = torch.randint(0, 6400, (4, 513))
    batch = MicroBatch(ids[:, :-1].contiguous(), ids[:, 1:].contiguous(), None, 4)
    reduced = dtype != "float32"
    autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=reduced)

    def step(objective: Callable) -> float:
        began = time.process_time()
        with autocast:
            losses = objective(model, batch, cfg)
        (losses.loss / 2048 + losses.aux_loss).backward()
        return time.process_time() - began

    compiled, began = compile_objective(model, cfg), time.monotonic()
    step(compiled)
    print(f"first compiled step: {time.monotonic() - began:.1f} s")
    step(next_token_loss)
    turns = [(step(next_token_loss), step(compiled)) for _ in range(5)]
    ratio = statistics.median(eager / fast for eager, fast in turns)
    speeds = [2048 / statistics.median(times) for times in zip(*turns, strict=True)]
    print(
        f"eager {speeds[0]:.0f}, compiled {speeds[1]:.0f} tokens/s, ratio {ratio:.2f}"
    )


if __name__ == "__main__":
    main()
