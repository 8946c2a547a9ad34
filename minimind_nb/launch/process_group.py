"""The process group: ranks that meet, and sum tensors."""

from __future__ import annotations

import datetime
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store


class Group:
    """The ranks that train together; one process is a group that sums nothing.

    They meet through a file (then gloo uses the loopback interface) or a store that
    they have in common, so no port is ever taken.
    """

    def __init__(
        self,
        rank: int,
        size: int,
        store: str | Path | Store,
        device: str,
        timeout_seconds: float,
    ) -> None:
        self.rank = rank
        self.size = size
        if size == 1:
            return
        if not isinstance(store, Store):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            store = dist.FileStore(str(store), size)  # pyright: ignore[reportPrivateImportUsage]
        dist.init_process_group(
            "nccl" if device == "cuda" else "gloo",
            store=store,
            rank=rank,
            world_size=size,
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )

    def sum(self, tensor: torch.Tensor) -> None:
        """Replace `tensor` on every rank by its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(tensor)

    def meet(self, device: torch.device) -> None:
        """Prove that the ranks reach each other: raises `RuntimeError` unless a sum of
        ones is their number."""
        ones = torch.ones(1, device=device)
        self.sum(ones)
        if int(ones) != self.size:
            raise RuntimeError(f"{self.size} ranks summed ones to {int(ones)}")

    def close(self) -> None:
        """Leave the group. Ranks may leave at different times."""
        if self.size > 1:
            dist.destroy_process_group()


def leave_at_once() -> None:
    """Close the connections of a rank that failed and may live on, so that others fail.

    Not on CUDA, where that could wait for them.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
