"""Training inside a real Jupyter kernel: interrupted, resumed, and one output left."""

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import papermill
import pytest
from jupyter_client.blocking.client import BlockingKernelClient
from jupyter_client.manager import KernelManager, start_new_kernel
from support.processes import is_alive
from support.runs import state_hashes

import minimind_nb as mm
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.storage.run_folder import RunFolder

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


def run_cell(
    client: BlockingKernelClient, code: str, **how: Any
) -> tuple[str, list[dict]]:
    """The status of a cell, and its outputs as the front end would keep them."""
    outputs: list[dict] = []

    def keep(message: dict) -> None:
        content = message["content"]
        if message["msg_type"] == "update_display_data":
            outputs[-1] = content
        elif message["msg_type"] in ("stream", "display_data", "error"):
            outputs.append(content)

    reply = client.execute_interactive(
        code, timeout=SECONDS, output_hook=keep, stop_on_error=False, **how
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

    def interrupt() -> None:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            record = RankRecord.read(record_file)
            if record and record.step >= 10:
                break
            time.sleep(0.1)
        manager.interrupt_kernel()

    threading.Thread(target=interrupt).start()
    status, (*_, output) = run_cell(
        client,
        f"run = mm.train(mm.TrainConfig(max_steps=100_000, epochs=1_000, {SETTINGS}))",
    )
    assert status == "ok"
    status, outputs = run_cell(client, "print(run.status, threading.active_count())")
    assert outputs[-1]["text"].startswith("interrupted")
    record = RankRecord.read(record_file)
    assert record is not None
    checkpoint = record_file.parent / "checkpoints" / f"step_{record.step:08d}"
    assert (checkpoint / "manifest.json").is_file(), "no step was lost"
    at = f"Saved at step {record.step:,} of 100,000; run this cell again to resume."
    for kind in ("text/html", "text/plain"):
        assert f"Stopped: interrupted. {at}" in output["data"][kind]
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
    assert len(outputs) == 1
    assert outputs[0]["data"].keys() == {"text/html", "text/plain", "image/png"}
    assert "data:image/png;base64,iVBORw0KGgo" in outputs[0]["data"]["text/html"]
    status, outputs = run_cell(
        client,
        "print(run.status, threading.active_count(), "
        "signal.getsignal(signal.SIGINT) is signal.default_int_handler)",
    )
    assert outputs[-1]["text"].startswith("finished")
    assert outputs[-1]["text"].strip().endswith("True"), "the handler is as before"


def test_a_mistake_has_a_traceback_only_where_nobody_looks(
    kernel: tuple[KernelManager, BlockingKernelClient],
) -> None:
    _, client = kernel
    code = "import minimind_nb as mm\nmm.TrainConfig(epoch=3)"
    _, (watched,) = run_cell(client, code)
    assert watched["ename"] == "ValueError" and "did you mean" in watched["evalue"]
    assert watched["traceback"][0] == f"ValueError: {watched['evalue']}"
    assert watched["traceback"][1:] == ["", "Type %tb for the full traceback."]
    _, (batch,) = run_cell(client, code, allow_stdin=False)
    assert "Traceback" in batch["traceback"][1]


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """Two ranks, 300 steps, a save every 5."""
    corpus_file = tmp_path / "corpus.jsonl"
    texts = (" ".join(str(n * k % 97) for k in range(n % 25 + 5)) for n in range(70))
    corpus_file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return {
        **{"data_path": str(corpus_file), "out_dir": str(tmp_path / "out")},
        **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
        **{"max_seq_len": 32, "batch_size": 1, "accumulation_steps": 1, "seed": 7},
        **{"max_steps": 300, "epochs": 1000, "save_interval": 5, "sample_tokens": 0},
        **{"eval_interval": 100, "num_processes": 2, "device": "cpu", "dropout": 0.1},
    }


def wait_for_step(folder: RunFolder, step: int) -> list[RankRecord]:
    """The ranks' records once all have made so many steps."""
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        found = [RankRecord.read(folder.record_file(rank)) for rank in range(2)]
        records = [record for record in found if record and record.step >= step]
        if len(records) == len(found):
            return records
        time.sleep(0.05)
    pytest.fail(f"no rank has come to step {step}")


def seconds_to_die(records: list[RankRecord]) -> float:
    began = time.monotonic()
    while any(is_alive(r.pid) for r in records):
        assert time.monotonic() - began < 60, "a rank lives on"
        time.sleep(0.02)
    return time.monotonic() - began


def check_it_goes_on(settings: dict[str, Any], tmp_path: Path) -> None:
    """The same call ends as a run that nothing befell."""
    folders = []
    for out in (settings["out_dir"], str(tmp_path / "straight")):
        cfg = mm.TrainConfig(**{**settings, "out_dir": out})
        run = mm.train(cfg, view=False)
        assert run.status == "finished"
        folders.append(RunFolder(Path(run.folder)))
    assert state_hashes(folders[0]) == state_hashes(folders[1])


@pytest.mark.fault("F14")
@pytest.mark.slow
def test_a_killed_kernel_takes_its_ranks_along(
    kernel: tuple[KernelManager, BlockingKernelClient],
    settings: dict[str, Any],
    tmp_path: Path,
) -> None:
    manager, client = kernel
    code = f"import minimind_nb as mm\nmm.train(mm.TrainConfig(**{settings!r}))"
    client.execute(code)
    folder = RunFolder(tmp_path / "out" / "pretrain_32")
    records = wait_for_step(folder, 12)
    manager.restart_kernel(now=True)
    assert seconds_to_die(records) < 3
    assert not folder.is_locked()
    check_it_goes_on(settings, tmp_path)


def write_notebook(file: Path, code: str) -> Path:
    cell = nbformat.v4.new_code_cell(code)
    about = {
        "kernelspec": {"name": "python3", "display_name": "", "language": "python"}
    }
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=about), file)
    return file


@pytest.mark.fault("F15")
@pytest.mark.slow
def test_a_cell_that_takes_too_long_leaves_no_ranks(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    endless = {**settings, "max_steps": 100_000}
    code = f"import minimind_nb as mm\nmm.train(mm.TrainConfig(**{endless!r}))"
    notebook = write_notebook(tmp_path / "a.ipynb", code)
    with pytest.raises(Exception, match="(?i)timed? ?out"):
        papermill.execute_notebook(
            notebook, tmp_path / "b.ipynb", execution_timeout=40, progress_bar=False
        )
    folder = RunFolder(tmp_path / "out" / "pretrain_32")
    records = wait_for_step(folder, 5)
    assert seconds_to_die(records) < 3
    assert folder.newest_good_checkpoint()


@pytest.mark.fault("F16")
@pytest.mark.slow
def test_a_killed_papermill_takes_kernel_and_ranks_along(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    code = f"import minimind_nb as mm\nmm.train(mm.TrainConfig(**{settings!r}))"
    notebook = write_notebook(tmp_path / "a.ipynb", code)
    command = [
        sys.executable,
        "-m",
        "papermill",
        str(notebook),
        str(tmp_path / "b.ipynb"),
    ]
    papermill_itself = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    folder = RunFolder(tmp_path / "out" / "pretrain_32")
    records = wait_for_step(folder, 12)
    papermill_itself.kill()
    papermill_itself.wait()
    assert seconds_to_die(records) < 5  # the kernel has 2 s, the ranks 3
    check_it_goes_on(settings, tmp_path)


@pytest.mark.fault("F65", "F66")
@pytest.mark.slow
def test_one_kernel_trains_again_and_again_and_leaks_nothing(
    kernel: tuple[KernelManager, BlockingKernelClient], settings: dict[str, Any]
) -> None:
    _, client = kernel
    few = {**settings, "max_steps": 4}
    run_cell(
        client,
        "import minimind_nb as mm, threading, os, signal\n"
        "def state():\n"
        "    handlers = [signal.getsignal(n) for n in (2, 15)]\n"
        "    fds = len(os.listdir('/proc/self/fd'))\n"
        "    return fds, threading.active_count(), dict(os.environ), handlers\n"
        f"def train(**more): return mm.train(mm.TrainConfig(**{{**{few!r}, **more}}))\n"
        "first = train(run_name='a')\nbefore = state()\n",
    )
    status, outputs = run_cell(
        client,
        "try: train(run_name='b', hidden_size=30)\n"
        "except ValueError as error: print('refused', error)\n"
        "class Odd: pass\n"
        "try: train(run_name='c', epochs=Odd())\n"
        "except Exception as error: print('epochs' in str(error))",
    )
    assert status == "ok" and outputs[-1]["text"].endswith("True\n")
    status, outputs = run_cell(
        client,
        "async def later(): return train(run_name='d')\nsecond = await later()\n",
    )
    status, outputs = run_cell(
        client,
        "import json\n"
        "def strike(number, of_rank_1=False):\n"
        "    def view(history):\n"
        "        if history.last('train') and not struck:\n"
        "            file = history.path.with_name('rank1.json')\n"
        "            pid = json.loads(file.read_text())['pid']\n"
        "            if not os.path.exists(f'/proc/{pid}'): return  # of the run before\n"
        "            struck.append(os.kill(pid if of_rank_1 else os.getpid(), number))\n"
        "    struck = []\n"
        "    return view\n"
        f"cfg = mm.TrainConfig(**{ {**settings, 'run_name': 'f'}!r})\n"
        "try: mm.train(cfg, view=strike(9, of_rank_1=True))\n"
        "except mm.TrainingFailed as error: print(error.rank)\n"
        "print(mm.train(cfg, view=strike(2)).status)\n",
    )
    assert status == "ok", outputs
    assert "".join(one.get("text", "") for one in outputs).endswith("1\ninterrupted\n")
    status, outputs = run_cell(
        client,
        "third = train(run_name='e')\n"
        "after = state()\n"
        "print(second.status, third.status, after[0] - before[0], "
        "{k: v for k, v in after[2].items() if before[2].get(k) != v}, "
        "after[1] - before[1], after[3] == before[3])",
    )
    assert status == "ok"
    assert outputs[-1]["text"] == "finished finished 0 {} 0 True\n"
