"""Kernels of a training step and the bytes that they move, as a T4 would have them.

    python benchmarks/step_kernels.py

Runs forward and backward of a micro-batch on the CPU in float16, with keys expanded as
below compute capability 8.0 and norms of one kernel each way, as on a GPU. Counts what
launches a kernel (no views), and the bytes of its inputs and outputs, but for matrix
products and attention, which compute rather than move. Counts do not depend on the
machine. A T4 moves 300 GB/s: 3,000 kB a token take 10 µs.
"""

import argparse
from collections import Counter
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minimind_nb import TrainConfig
from minimind_nb.config import resolve
from minimind_nb.data.batches import IGNORED, MicroBatch
from minimind_nb.model import architecture
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.training.stages import next_token_loss

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")
ROWS, WIDTH, DOCUMENTS = 4, 512, 6


class Counting(TorchDispatchMode):
    """Counts kernels by name, and the bytes that all but the products move."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = function(*args, **(kwargs or {}))
        name = function.__name__.partition(".")[0]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        places = {x.untyped_storage().data_ptr() for x in inputs}
        in_place = name.endswith("_") or not outputs
        moves = in_place or outputs[0].untyped_storage().data_ptr() not in places
        if moves and "empty" not in name and name != "detach":
            self.kernels[name] += 1
            if not name.startswith(PRODUCTS):
                together = [*inputs, *outputs]
                self.bytes[name] += sum(x.numel() * x.element_size() for x in together)
        return out


@torch.library.custom_op("benchmark::norm", mutates_args=())
def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x.type_as(weight), weight.shape, weight, eps)


@torch.library.custom_op("benchmark::norm_backward", mutates_args=())
def norm_backward(
    gradient: Tensor, x: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight)  # only counted


def keep(ctx: Any, inputs: Any, output: Tensor) -> None:
    ctx.kept = inputs


norm.register_autograd(
    lambda ctx, gradient: (*norm_backward(gradient, *ctx.kept), None),
    setup_context=keep,
)


def micro_batch(stage: str, vocabulary: int) -> MicroBatch:
    ids = torch.randint(3, vocabulary, (ROWS, WIDTH))
    documents = positions = None
    targets = ids.roll(-1, 1)
    if stage == "sft":  # about half of the tokens are answers
        documents = (torch.arange(WIDTH) * DOCUMENTS // WIDTH).int().repeat(ROWS, 1)
        targets[:, ::2] = IGNORED
        positions = (targets.flatten() != IGNORED).nonzero()[:, 0]
    return MicroBatch(ids, targets, documents, ROWS, positions)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--most", type=int, default=6, help="names to list")
    most = parser.parse_args().most
    for preset, stage in (
        ("minimind2-small", "pretrain"),
        ("minimind2-small", "sft"),
        ("minimind2-moe", "pretrain"),
    ):
        torch.manual_seed(0)
        cfg = resolve(TrainConfig(stage=stage, preset=preset, init_from="none"))
        model = MiniMindForCausalLM(MiniMindConfig(**cfg.shape()))
        batch = micro_batch(stage, cfg.vocab_size)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        as_on_gpu: Any = {"lacks_fast_gqa": lambda _: True}
        one_kernel: Any = {"forward": lambda self, x: norm(x, self.weight, self.eps)}
        with (
            mock.patch.multiple(architecture, **as_on_gpu),
            mock.patch.multiple(architecture.RMSNorm, **one_kernel),
            Counting() as counting,
        ):
            with torch.autocast("cpu", torch.float16):
                losses = next_token_loss(model, batch, cfg)
            losses.loss.backward()
        tokens = ROWS * WIDTH
        total, kernels = sum(counting.bytes.values()), sum(counting.kernels.values())
        print(
            f"{preset} {stage}: {kernels:,} kernels a micro-batch, "
            f"{total / tokens / 1e3:.0f} kB a token beside products"
        )
        for name, count in counting.bytes.most_common(most):
            print(
                f"  {name}: {counting.kernels[name]:,} kernels, {count / tokens / 1e3:.1f} kB"
            )


if __name__ == "__main__":
    main()
