"""What the ranks of these tests do; spawned processes import it by name."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import torch

from minimind_nb.launch.cancellation import StopRequest, agreed_stop_reason
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.launch.process_group import Group
from minimind_nb.launch.spawn import Job

STEPS = 12
FAILING_STEP = 5
WAITING_STEP = 3


def work(job: Job, store: str, record: RankRecord, stop: StopRequest) -> str:
    """Sum a tensor a step; do what todo.json says at step 5 on its rank.

    After step 3 it waits for the file `until`, if todo.json names one.
    """
    todo = json.loads((job.folder.root / "todo.json").read_text())
    rank = record.rank
    record.update(phase="meeting", total_steps=STEPS)
    group = Group(rank, job.num_processes, store, "cpu")
    group.meet()
    record.update(phase="training")
    print(f"rank {rank} met the others")
    for step in range(1, STEPS + 1):
        if rank in todo.get("ranks", [0]) and step == FAILING_STEP:
            act(todo.get("action", ""), rank)
        flags = torch.tensor(stop.stop_flags())
        group.sum(flags)
        record.update(step=step)
        if reason := agreed_stop_reason(flags.tolist()):
            return reason
        while step == WAITING_STEP and "until" in todo:
            if Path(todo["until"]).exists():
                break
            time.sleep(0.02)
        time.sleep(todo.get("pause", 0.0))
    group.close()
    return "finished"


def act(action: str, rank: int) -> None:
    """Fail in one of the ways that ranks fail."""
    if action == "raise":
        raise ValueError(f"line {7 + rank} of the data is wrong")
    if action == "exit":
        sys.exit(0)
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action == "sigterm":
        os.kill(os.getpid(), signal.SIGTERM)
    if action == "hang":
        time.sleep(600)


def stuck(job: Job, store: str, record: RankRecord, stop: StopRequest) -> str:
    """Never meet the others."""
    record.update(phase="meeting")
    time.sleep(600)
    return "finished"
