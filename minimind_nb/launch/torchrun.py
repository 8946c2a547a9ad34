"""Under torchrun, rank 0 makes each call and starts the workers; the others wait for it.

The launcher starts a process for each GPU by itself. So there is one way to run, and
torchrun's own processes have nothing to do.
"""

import functools
import json
import os
import time
from collections.abc import Callable
from typing import Any

from ..lifetime import die_with_parent
from .cancellation import StopRequest

# torchrun reports the process that fails first as the root cause: rank 0, if it raises.
_HEAD_START_SECONDS = 1.0
_PAUSE_SECONDS = 0.05


def find_torchrun() -> tuple[int, int] | None:
    """Return the rank that torchrun gave this process, and their number, or None.

    Raises `RuntimeError` if RANK is set and other variables are missing, or name several
    machines.
    """
    if not os.environ.get("RANK"):
        return None
    needed = "WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT".split()
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise RuntimeError(
            f"RANK is set, as torchrun does, but not {', '.join(missing)}: start with "
            "torchrun, or unset RANK"
        )
    size, here = (int(os.environ[name]) for name in needed[:2])
    if size != here:
        raise RuntimeError(
            f"torchrun started {size} processes, of which {here} are here: training on "
            "several machines is not supported; leave --nnodes out"
        )
    return int(os.environ["RANK"]), size


def on_first_rank(work: Callable[[], Any]) -> Any:
    """Return what `work` returns, plain data; under torchrun rank 0 calls it for all.

    All ranks must make the same calls in the same order. What `work` raises is raised
    on rank 0; the others raise a `RuntimeError` that quotes it.
    """
    place = find_torchrun()
    if place is None:
        return work()
    rank, store = place[0], _connect()
    call = f"minimind_nb/{store.add(f'minimind_nb/calls/{rank}', 1)}"
    if rank:
        return _wait(store, call)
    try:
        answer = work()
    except BaseException as error:
        store.set(call, json.dumps({"error": f"{type(error).__name__}: {error}"}))
        raise
    store.set(call, json.dumps({"answer": answer}))
    return answer


def _wait(store: Any, call: str) -> Any:
    """Wait for rank 0's answer. Signals reach it, too: it decides what they mean.

    If it dies, torchrun ends the others.
    """
    stop = StopRequest()
    try:
        while not store.check([call]):
            time.sleep(_PAUSE_SECONDS)
    finally:
        stop.restore()
    message = json.loads(store.get(call))
    if "error" in message:
        time.sleep(_HEAD_START_SECONDS)
        raise RuntimeError(f"rank 0 failed: {message['error']}")
    return message["answer"]


@functools.cache
def _connect() -> Any:
    """Return torchrun's own store: no other port is ever taken."""
    from torch.distributed.rendezvous import rendezvous

    if "TORCHELASTIC_RUN_ID" in os.environ:
        die_with_parent(os.getppid())
    store, _, _ = next(rendezvous("env://"))
    return store
