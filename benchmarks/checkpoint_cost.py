"""What a save costs: seconds and bytes, and its share of a run at the default interval.

    python benchmarks/checkpoint_cost.py [PRESET …] [--device cuda]

A step of the default size is timed by one row of it, so the share is of this machine.
"""

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch

from minimind_nb import TrainConfig
from minimind_nb.launch.cancellation import StopRequest
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.launch.process_group import Group
from minimind_nb.model.state_dict import write_pth
from minimind_nb.storage import verified
from minimind_nb.training.checkpoint import save_checkpoint
from minimind_nb.training.loop import train_step
from minimind_nb.training.preparation import draft, prepare
from minimind_nb.training.trainer import Trainer

TIMES = 3


def main() -> None:
    """A row for each preset."""
    parser = argparse.ArgumentParser(description=__doc__)
    presets = ["minimind2-small", "minimind2"]
    parser.add_argument("presets", nargs="*", default=presets)
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    print("| preset | save | of it verified | MB | a step | interval | share |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for preset in given.presets:
        with tempfile.TemporaryDirectory() as folder:
            print(measure(preset, given.device, folder), flush=True)


def measure(preset: str, device: str, out_dir: str) -> str:
    """One row of the table."""
    common: dict[str, Any] = {"data_path": "demo", "out_dir": out_dir, "device": device}
    default = draft(TrainConfig(**common, preset=preset)).cfg
    one: dict[str, Any] = {"batch_size": 1, "accumulation_steps": 1, "num_processes": 1}
    cfg = TrainConfig(**common, **one, preset=preset, max_steps=50, sample_tokens=0)
    with prepare(cfg) as (plan, _):
        pass
    record = RankRecord(plan.folder.record_file(0), 0)
    stop = StopRequest()
    place = torch.device(device)
    trainer = Trainer(plan, Group(0, 1, "", device), place, record, stop)
    parts = trainer.model, trainer.optimizer, trainer.scaler
    steps, saves, verifying, size = [], [], [], 0
    for _ in range(TIMES):
        began = time.perf_counter()
        train_step(trainer)
        steps.append(time.perf_counter() - began)
        began = time.perf_counter()
        folder = save_checkpoint(plan, trainer.progress, *parts)
        write_pth(trainer.model.state_dict(), plan.weights_file)
        saves.append(time.perf_counter() - began)
        began = time.perf_counter()
        verified.verify(folder)
        verifying.append(time.perf_counter() - began)
        files = [*folder.iterdir(), plan.weights_file]
        size = sum(file.stat().st_size for file in files)
    stop.restore()
    rows = default.batch_size * default.accumulation_steps
    step, save = statistics.median(steps) * rows, statistics.median(saves)
    share = save / (save + step * default.save_interval)
    return (
        f"| {preset} | {save:.2f} s | {statistics.median(verifying):.2f} s | "
        f"{size / 1e6:.0f} | {step:.1f} s ({rows} rows) | {default.save_interval} steps "
        f"| {share:.4%} |"
    )


if __name__ == "__main__":
    main()
