"""The process group: ranks that meet, and sum tensors."""

import datetime

import torch
import torch.distributed as dist

# The parent notices a hang, and can tell it from a machine that slept.
_LONG = datetime.timedelta(days=7)


class Group:
    """The ranks that train together; one process is a group that sums nothing.

    They meet in the file `store`: no port is ever taken.
    """

    def __init__(self, rank: int, size: int, store: str, device: str) -> None:
        self.rank = rank
        self.size = size
        self.device = torch.device(f"cuda:{rank}" if device == "cuda" else device)
        if device == "cuda":
            torch.cuda.set_device(self.device)
        if size == 1:
            return
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=dist.FileStore(store, size),  # pyright: ignore[reportPrivateImportUsage]
            rank=rank,
            world_size=size,
            timeout=_LONG,
        )

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` on every rank by its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def meet(self, count: int = 1) -> None:
        """Raise `RuntimeError` unless the ranks sum `count` ones to their number."""
        self.sum(ones := torch.ones(count, device=self.device))
        if (total := int(ones[-1])) != self.size:
            raise RuntimeError(f"{self.size} ranks summed ones to {total}")

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()
