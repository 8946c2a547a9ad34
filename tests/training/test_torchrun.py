"""Under torchrun rank 0 does what a call does without it; the others leave."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from support.runs import Settings, metric_rows, state_hashes

import minimind_nb as mm
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.storage.run_folder import RunFolder

TIMED = {"seconds", "tokens_per_second", "peak_memory_gib", "machine_flops"}
SECONDS = 240.0
# As long as nobody ends it.
MORE = {"max_steps": 100_000, "epochs": 20_000, "save_interval": 50_000}
MORE |= {"eval_interval": 50_000, "log_interval": 20}
SCRIPT = """
import json, os, sys
from pathlib import Path
import minimind_nb as mm

def main(settings, root, rank):
    told = {}
    for name in ("trained", "again"):
        told[name] = mm.train(mm.TrainConfig(**settings, out_dir=str(root / "straight"))).status
    told["scores"] = dict(mm.evaluate(root / "straight" / "run", settings["data_path"], max_seq_len=32, eval_tokens=300))
    (root / f"told{rank}.json").write_text(json.dumps(told))
    print("ENDLESS", flush=True)
    mm.train(mm.TrainConfig(**settings | MORE, out_dir=str(root / "ended")))

if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]), int(os.environ["RANK"]))
""".replace("MORE", repr(MORE))
KILLED_ONCE = """
import json, sys
import pytest
import minimind_nb as mm
from support.injection import Fault, inject

settings, fault = map(json.loads, sys.argv[1:])
inject(pytest.MonkeyPatch(), Fault(**fault))
mm.train(mm.TrainConfig(**settings))
"""


@pytest.fixture(scope="module")
def two(twelve_steps: Settings) -> Settings:
    """For two processes, wherever they come from."""
    rows = {"batch_size": 2, "num_hidden_layers": 1, "dropout": 0.1, "sample_tokens": 0}
    return {**twelve_steps, **rows, "run_name": "run"}


@pytest.fixture(scope="module")
def straight(two: Settings, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run without torchrun that the other must equal."""
    place = {"num_processes": 2, "out_dir": str(tmp_path_factory.mktemp("spawned"))}
    cfg = mm.TrainConfig(**{**two, **place})
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


def rows_of(folder: RunFolder) -> list[dict[str, Any]]:
    """All of the metrics but time, speed and memory."""
    lines = folder.metrics_file.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [{k: v for k, v in row.items() if k not in TIMED} for row in rows]


@pytest.fixture(scope="module")
def torchruns(
    two: Settings, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """Where two ranks have done what SCRIPT says, and what was printed.

    The endless run gets SIGTERM.
    """
    root = tmp_path_factory.mktemp("torchrun")
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


def test_two_ranks_of_torchrun_train_as_a_call_without_it(
    straight: RunFolder, torchruns: tuple[Path, str]
) -> None:
    root, output = torchruns
    assert (root / "told0.json").exists(), output
    told = json.loads((root / "told0.json").read_text())
    assert told["trained"] == told["again"] == "finished"
    assert told["scores"]["documents"] > 0
    assert not (root / "told1.json").exists()
    assert output.count("rank 1 leaves, since rank 0 starts the workers") == 1
    here = RunFolder(root / "straight" / "run")
    assert rows_of(here) == rows_of(straight)
    assert state_hashes(here) == state_hashes(straight)
    shown = output.count("\nFinished. ")
    assert shown == 2, "trained and again, by rank 0 only"
    assert {"loss.png", "summary.md"} < {path.name for path in here.root.iterdir()}


@pytest.mark.slow
def test_a_worker_that_is_killed_is_made_good_by_max_restarts(
    two: Settings, straight: RunFolder, tmp_path: Path
) -> None:
    script = tmp_path / "script.py"
    script.write_text(KILLED_ONCE)
    fault = {"point": "batch", "action": "kill", "marker": str(tmp_path / "killed")}
    given = ({**two, "out_dir": str(tmp_path)}, {**fault, "rank": 1, "step": 6})
    place = ("--standalone", "--nproc_per_node=2", "--max_restarts=1", str(script))
    tests = str(Path(__file__).parents[1])
    paths = f"{tests}:{os.environ.get('PYTHONPATH', '')}"
    process = torchrun(*place, *map(json.dumps, given), PYTHONPATH=paths)
    (output,) = finish(process)
    assert process.returncode == 0, output
    assert "rank 1 was killed by SIGKILL at step 6 of 12" in output
    run = RunFolder(tmp_path / "run")
    assert ("resume", 4) in metric_rows(run, "event", "event", "step")
    assert state_hashes(run) == state_hashes(straight)


def test_torchrun_fails_if_rank_0_of_the_command_line_does(tmp_path: Path) -> None:
    command = ["-m", "minimind_nb", "pretrain", "--data_path", "nowhere.jsonl"]
    place = ["--standalone", "--nproc_per_node=2", *command]
    failing = torchrun(*place, "--out_dir", str(tmp_path))
    (output,) = finish(failing)
    assert failing.returncode
    assert output.count("minimind-nb: nowhere.jsonl does not exist") == 1, output
    assert "rank      : 0 " in output.partition("Root Cause")[2], output


def test_sigterm_to_torchrun_saves(torchruns: tuple[Path, str]) -> None:
    folder = RunFolder(torchruns[0] / "ended" / "run")
    records = [RankRecord.read(folder.record_file(rank)) for rank in range(2)]
    assert [record.status for record in records if record] == ["terminated"] * 2
    assert {record.step for record in records if record} == {state_hashes(folder)[0]}
