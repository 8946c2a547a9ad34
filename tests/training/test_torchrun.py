"""Ranks that torchrun starts do what spawned ones do, bit for bit."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.runs import Settings, state_hashes

import minimind_nb as mm
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.storage.run_folder import RunFolder

TIMED = {"seconds", "tokens_per_second", "peak_memory_gib"}
SECONDS = 240.0
# Stops after its first step, as if the session ended.
STOPPED = {"max_session_hours": 1e-6}
# As long as nobody ends it.
MORE = {"max_steps": 100_000, "epochs": 20_000, "save_interval": 50_000}
MORE |= {"eval_interval": 50_000, "log_interval": 20}
SCRIPT = """
import json, os, sys
from pathlib import Path
import minimind_nb as mm
from minimind_nb.training import worker

def fail(trainer):
    raise ValueError(f"rank {trainer.group.rank} trips")

def main(settings, root, rank):
    told = {}
    try:
        mm.train(mm.TrainConfig(**settings | {"num_processes": 3}))
    except (ValueError, RuntimeError) as error:
        told["refused"] = str(error)
    for name, more in (("straight", {}), ("resumed", {}), ("stopped", STOPPED)):
        cfg = mm.TrainConfig(**settings | more, out_dir=str(root / name))
        told[name] = mm.train(cfg).status
    told["again"] = mm.train(mm.TrainConfig(**settings, out_dir=str(root / "straight"))).status
    told["scores"] = dict(mm.evaluate(root / "straight" / "run", settings["data_path"], max_seq_len=32, eval_tokens=300))
    fit = worker.fit
    if rank == 1:
        worker.fit = fail
    try:
        mm.train(mm.TrainConfig(**settings, out_dir=str(root / "failed")))
    except mm.TrainingFailed as error:
        told["failed"] = str(error)
    (root / f"told{rank}.json").write_text(json.dumps(told))
    worker.fit = fit
    if rank == 0:
        print("ENDLESS", flush=True)
    mm.train(mm.TrainConfig(**settings | MORE, out_dir=str(root / "ended")))

if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"]))
""".replace("STOPPED", repr(STOPPED)).replace("MORE", repr(MORE))


@pytest.fixture(scope="module")
def two(twelve_steps: Settings) -> Settings:
    """For two processes, wherever they come from."""
    rows = {"batch_size": 2, "num_hidden_layers": 1, "dropout": 0.1, "sample_tokens": 0}
    return {**twelve_steps, **rows, "run_name": "run"}


@pytest.fixture(scope="module")
def straight(two: Settings, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run of two spawned processes that the others must equal."""
    return spawn(two, tmp_path_factory.mktemp("spawned"))


def spawn(two: Settings, out_dir: Path, **more: Any) -> RunFolder:
    cfg = mm.TrainConfig(**{**two, **more, "num_processes": 2, "out_dir": str(out_dir)})
    return RunFolder(mm.train(cfg, view=False).folder)


def torchrun(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    environ = {k: v for k, v in os.environ.items() if not k.startswith("OMP_")}
    return subprocess.Popen(
        command,
        env={**environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> list[str]:
    """Wait for processes, none of which outlives the test, and return their output."""
    try:
        return [process.communicate(timeout=SECONDS)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def options(settings: Settings) -> list[str]:
    return [part for k, v in settings.items() for part in (f"--{k}", str(v))]


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    """All of the metrics but time, speed and memory."""
    lines = folder.metrics_file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


@pytest.fixture(scope="module")
def torchruns(
    two: Settings, straight: RunFolder, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Where two ranks have done what SCRIPT says, and what was printed.

    There lies a spawned run that lost its last steps; the endless one gets SIGTERM.
    """
    root = tmp_path_factory.mktemp("torchrun")
    shutil.copytree(straight.root, root / "resumed" / "run")
    shutil.rmtree(RunFolder(root / "resumed" / "run").checkpoint_folder(12))
    script = root / "script.py"
    script.write_text(SCRIPT)
    place = ("--standalone", "--nproc_per_node=2", str(script))
    process = torchrun(*place, json.dumps(two), str(root))
    assert process.stdout is not None
    bound = threading.Timer(SECONDS, process.kill)
    bound.start()
    output = ""
    try:
        for line in process.stdout:
            output += line
            if "ENDLESS" in output and re.match("step [1-9]", line):
                process.send_signal(signal.SIGTERM)
                break
        return root, output + finish(process)[0]
    finally:
        bound.cancel()


def test_two_ranks_of_torchrun_equal_two_spawned_ones(
    two: Settings, straight: RunFolder, torchruns: tuple[Path, str]
) -> None:
    """Straight, begun by the one and resumed by the other; and a failure."""
    root, output = torchruns
    assert (root / "told1.json").exists(), output
    told = [json.loads((root / f"told{r}.json").read_text()) for r in range(2)]
    assert "num_processes=3, but torchrun started 2" in told[0]["refused"]
    assert told[0]["failed"].startswith(
        "rank 1 failed before its first step: ValueError: rank 1 trips\nTraceback"
    )
    assert told[0]["failed"].partition("\n")[0] == told[1]["failed"].partition("\n")[0]
    quoted = f"rank 0 failed: ValueError: {told[0]['refused']}"
    assert told[1]["refused"] == quoted
    for one in told:
        del one["failed"], one["refused"]
    assert told[0] == told[1], "all ranks make the same of it"
    endings = [told[0][name] for name in ("straight", "resumed", "stopped", "again")]
    assert endings == ["finished", "finished", "time_budget", "finished"]
    assert told[0]["scores"]["documents"] > 0
    names = ("straight", "resumed", "stopped")
    here = {name: RunFolder(root / name / "run") for name in names}
    assert rows_of(here["straight"]) == rows_of(straight)
    assert state_hashes(here["straight"]) == state_hashes(straight)
    began = [r["step"] for r in rows_of(here["resumed"]) if r.get("event") == "resume"]
    assert began == [8]
    assert state_hashes(here["resumed"]) == state_hashes(straight)
    assert state_hashes(here["stopped"])[0] == 1
    assert state_hashes(spawn(two, root / "stopped")) == state_hashes(straight)
    shown = output.count("\nfinished · step 12 of 12 ·")
    assert shown == 3, "straight, resumed and again, by rank 0 only"
    assert not (here["straight"].log_file(0)).exists()
    files = {path.name for path in here["straight"].root.iterdir()}
    assert {"loss.png", "summary.md"} < files


def test_torchrun_prints_what_rank_0_of_the_command_line_raised(tmp_path: Path) -> None:
    command = ["-m", "minimind_nb", "pretrain", "--data_path", "nowhere.jsonl"]
    place = ["--standalone", "--nproc_per_node=2", *command]
    failing = torchrun(*place, "--out_dir", str(tmp_path))
    (output,) = finish(failing)
    assert failing.returncode
    assert "\nminimind-nb: " in output, output
    cause = output.partition("Root Cause")[2]
    assert "rank      : 0 " in cause, output
    assert "FileNotFoundError: nowhere.jsonl" in cause, output


def test_two_machines_train_what_one_does(
    two: Settings, straight: RunFolder, tmp_path: Path
) -> None:
    """Two agents, each with a core of its own, so that a rank has one thread."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}"]
    place = ["--nnodes=2", "--nproc_per_node=1", "--local_addr=127.0.0.1", *meeting]
    out = ["--out_dir", str(tmp_path)]
    what = ["-m", "minimind_nb", "pretrain", *options(two), *out]
    allowed = sorted(os.sched_getaffinity(0))
    agents = []
    try:
        for core in (allowed[0], allowed[-1]):
            os.sched_setaffinity(0, {core})
            agents.append(torchrun(*place, *what, GLOO_SOCKET_IFNAME="lo"))
    finally:
        os.sched_setaffinity(0, allowed)
    outputs = finish(*agents)
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert state_hashes(RunFolder(tmp_path / "run")) == state_hashes(straight)
    assert rows_of(RunFolder(tmp_path / "run")) == rows_of(straight)


def test_sigterm_to_torchrun_saves(torchruns: tuple[Path, str]) -> None:
    folder = RunFolder(torchruns[0] / "ended" / "run")
    records = [RankRecord.read(folder.record_file(rank)) for rank in range(2)]
    assert [record.status for record in records if record] == ["terminated"] * 2
    assert {record.step for record in records if record} == {state_hashes(folder)[0]}
