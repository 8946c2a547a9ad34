"""Training inside a real Jupyter kernel: interrupted, resumed, and one output left."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel

from minimind_nb.launch.verdict import RankRecord

SECONDS = 120
SETTINGS = (
    'data_path="demo", out_dir="out", hidden_size=32, num_hidden_layers=1, '
    "num_attention_heads=4, max_seq_len=64, batch_size=2, accumulation_steps=1, "
    "num_processes=2, eval_tokens=1000, log_interval=5, save_interval=100_000"
)


@pytest.fixture
def kernel(tmp_path: Path) -> Iterator[tuple[KernelManager, BlockingKernelClient]]:
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    manager, client = start_new_kernel(
        kernel_name="python3", cwd=str(tmp_path), env=environ, startup_timeout=SECONDS
    )
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run_cell(client: BlockingKernelClient, code: str) -> tuple[str, list[dict]]:
    """The status of a cell, and its outputs as the front end would keep them."""
    outputs: list[dict] = []

    def keep(message: dict) -> None:
        content = message["content"]
        if message["msg_type"] == "update_display_data":
            outputs[-1] = content
        elif message["msg_type"] in ("stream", "display_data", "error"):
            outputs.append(content)

    reply = client.execute_interactive(
        code, timeout=SECONDS, output_hook=keep, stop_on_error=False
    )
    return reply["content"]["status"], outputs


@pytest.mark.fault("F12")
def test_an_interrupted_cell_saves_and_the_next_one_goes_on(
    kernel: tuple[KernelManager, BlockingKernelClient], tmp_path: Path
) -> None:
    manager, client = kernel
    status, _ = run_cell(client, "import minimind_nb as mm, threading, os, signal")
    assert status == "ok"
    record_file = tmp_path / "out" / "pretrain_32" / "rank0.json"
    client.execute(
        f"run = mm.train(mm.TrainConfig(max_steps=100_000, epochs=1_000, {SETTINGS}))"
    )
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        record = RankRecord.read(record_file)
        if record and record.step >= 10:
            break
        time.sleep(0.1)
    manager.interrupt_kernel()
    status, outputs = run_cell(client, "print(run.status, threading.active_count())")
    assert status == "ok"
    assert outputs[-1]["text"].startswith("interrupted")
    record = RankRecord.read(record_file)
    assert record is not None
    checkpoint = record_file.parent / "checkpoints" / f"step_{record.step:08d}"
    assert (checkpoint / "manifest.json").is_file(), "no step was lost"
    for rank in range(2):
        rank_record = RankRecord.read(record_file.with_name(f"rank{rank}.json"))
        assert rank_record is not None
        assert not Path(f"/proc/{rank_record.pid}").exists()
    more = record.step + 5
    status, outputs = run_cell(
        client,
        f"run = mm.train(mm.TrainConfig(max_steps={more}, epochs=1_000, {SETTINGS}))",
    )
    assert status == "ok"
    assert len(outputs) == 1, "one output, with a picture"
    assert outputs[0]["data"].keys() == {"image/png", "text/plain"}
    status, outputs = run_cell(
        client,
        "print(run.status, threading.active_count(), "
        "signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
    )
    assert outputs[-1]["text"].startswith("finished")
    assert outputs[-1]["text"].strip().endswith("True"), "the handler is as before"
