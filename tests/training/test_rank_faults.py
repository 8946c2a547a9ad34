"""Two ranks meet faults: told at once, nothing left, resumed bit for bit."""

import dataclasses
import json
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.injection import SAVING, VALIDATING, Fault, inject
from support.processes import is_alive
from support.runs import Settings, state_hashes

import minimind_nb as mm
from minimind_nb.launch import spawn
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.storage.run_folder import RunFolder

row = pytest.mark.fault
slow = pytest.mark.slow
spawned = pytest.mark.spawned
HANG_SECONDS = 5.0


@pytest.fixture
def two(settings: Settings) -> Settings:
    """Two ranks, 12 steps, a save every 4."""
    changes = {"num_processes": 2, "batch_size": 1, "dropout": 0.1, "max_steps": 12}
    saving = {"save_interval": 4, "hang_timeout_seconds": HANG_SECONDS}
    return {**settings, **changes, **saving}


@pytest.fixture(scope="module")
def unbroken(
    corpus_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, str, str]]:
    """What the run that nothing befalls ends with, once it was made."""
    return {}


class Witness:
    """Runs `two`, and says how long a failure took to be told and what is left."""

    def __init__(
        self,
        two: Settings,
        unbroken: dict,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        self.cfg = mm.TrainConfig(**two)
        self._monkeypatch = monkeypatch
        self.folder = RunFolder(Path(two["out_dir"]) / "pretrain_32")
        self.marker = str(tmp_path / "happened")
        if not unbroken:
            straight = {**two, "out_dir": str(tmp_path / "straight")}
            with monkeypatch.context() as patch:
                fork = multiprocessing.get_context("fork")
                patch.setattr(spawn, "_SPAWN", fork)
                mm.train(mm.TrainConfig(**straight), view=False)
            there = RunFolder(tmp_path / "straight" / "pretrain_32")
            unbroken["state"] = state_hashes(there)
        self.expected = unbroken["state"]

    def fault(self, point: str, action: str, rank: int = 1, step: int = 5) -> Fault:
        return Fault(point, action, self.marker, rank, step)

    def inject(self, point: str, action: str, rank: int = 1, step: int = 5) -> None:
        inject(self._monkeypatch, self.fault(point, action, rank, step))

    def records(self) -> list[RankRecord]:
        found = [RankRecord.read(self.folder.record_file(rank)) for rank in range(2)]
        return [record for record in found if record]

    def seconds_since_fault(self) -> float:
        return time.time() - json.loads(Path(self.marker).read_text())

    def living(self) -> list[int]:
        """The ranks that still run."""
        records = self.records()
        return [r.pid for r in records if is_alive(r.pid)]

    def resume(self) -> None:
        """The same call once more ends as if nothing had been."""
        assert not self.living()
        assert not self.folder.is_locked()
        run = mm.train(self.cfg, view=False)
        assert run.status == "finished"
        assert state_hashes(self.folder) == self.expected


@pytest.fixture
def witness(
    two: Settings,
    unbroken: dict,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Witness:
    """Ranks are spawned where it is said, or time is no matter; else forked."""
    if not {"spawned", "slow"} & {mark.name for mark in request.node.iter_markers()}:
        request.getfixturevalue("forked")
    return Witness(two, unbroken, tmp_path, monkeypatch)


def dies(
    point: str, action: str, rank: int, text: str, id: str, *marks: pytest.MarkDecorator
) -> object:
    return pytest.param((point, action, rank), text, id=id, marks=(row(id), *marks))


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        dies("after_backward", "kill", 1, "rank 1 was killed by SIGKILL", "F01", slow),
        dies(
            "after_backward", "kill", 0, "rank 0 was killed by SIGKILL", "F02", spawned
        ),
        dies("before_step", "raise", 1, "rank 1 failed", "F06", slow),
        dies("batch", "leave", 1, "rank 1 left", "F08"),
        dies("batch", "exit", 1, "rank 1 failed", "F08", slow),
    ],
)
def test_a_rank_that_dies_is_named_and_the_run_goes_on(
    fault: tuple[str, str, int],
    text: str,
    witness: Witness,
    record_property: Callable[[str, object], None],
) -> None:
    point, action, rank = fault
    witness.inject(point, action, rank)
    with pytest.raises(mm.TrainingFailed, match=f"^{text} at step 5 of 12") as failure:
        mm.train(witness.cfg, view=False)
    seconds = witness.seconds_since_fault()
    record_property("death_to_exception_seconds", seconds)
    assert seconds < 10
    assert failure.value.rank == rank
    text = str(failure.value)
    assert ("injected on purpose" in text) == (action == "raise")
    blamed = re.search(r"in step 6, rank 1, with the lines \[\d.* of the data", text)
    assert bool(blamed) == (action == "raise")
    assert state_hashes(witness.folder)[0] == 4
    witness.resume()


def test_ranks_whose_weights_drift_apart_end_the_run(witness: Witness) -> None:
    witness.inject("after_step", "drift")
    text = "the weights of the ranks have drifted apart by step 6: they sum up to"
    with pytest.raises(mm.TrainingFailed, match=text):
        mm.train(witness.cfg, view=False)
    witness.resume()


@row("F07")
@slow
def test_two_errors_are_both_told_the_first_first(
    witness: Witness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    other = Fault("batch", "raise", str(tmp_path / "other"), rank=0)
    inject(monkeypatch, witness.fault("batch", "raise"), other)
    both = "(?s)^rank . failed.*failed too: Val"
    with pytest.raises(mm.TrainingFailed, match=both) as failure:
        mm.train(witness.cfg, view=False)
    first = min(witness.records(), key=lambda record: record.time)
    assert first.status == "failed"
    assert failure.value.rank == first.rank
    witness.resume()


@pytest.mark.parametrize(
    ("point", "action"),
    [
        pytest.param("after_backward", "stop", id="F17", marks=row("F17")),
        pytest.param("batch", "hang", id="F18", marks=(row("F18"), slow)),
    ],
)
def test_a_rank_that_hangs_is_ended_and_all_say_where_they_were(
    point: str,
    action: str,
    witness: Witness,
    record_property: Callable[[str, object], None],
) -> None:
    witness.inject(point, action)
    told = "rank 1 was ended at step 5 of 12: no step was made for 5 s"
    with pytest.raises(mm.TrainingFailed, match=told) as failure:
        mm.train(witness.cfg, view=False)
    seconds = witness.seconds_since_fault()
    record_property("hang_to_exit_seconds", seconds)
    assert seconds < HANG_SECONDS + 10
    text = str(failure.value)
    assert re.search(
        "rank 0 was in:\n(  File .*\n)*  File .*process_group.*in sum", text
    )
    place = "no line of Python: it is stopped" if action == "stop" else ".* in _hang"
    assert re.search(f"rank 1 was in:\n  {place}", text)
    witness.resume()


@pytest.mark.parametrize(
    ("action", "rank"),
    [
        pytest.param("sigterm_to_parent", 1, id="F10", marks=(row("F10"), slow)),
        pytest.param("sigterm", 1, id="F11", marks=(row("F11"), slow)),
    ],
)
def test_sigterm_loses_no_step(action: str, rank: int, witness: Witness) -> None:
    witness.inject("batch", action, rank)
    run = mm.train(witness.cfg, view=False)
    assert run.status == "terminated"
    first, second = witness.records()
    assert first.step == second.step < 12
    assert state_hashes(witness.folder)[0] == first.step
    witness.resume()


@pytest.mark.parametrize(
    "point",
    [
        pytest.param(point, marks=(row("F20"), *([slow] * (point != "half_a_file"))))
        for point in SAVING
    ],
)
def test_a_save_that_is_killed_leaves_the_checkpoint_before(
    point: str, witness: Witness
) -> None:
    witness.inject(point, "kill", rank=0, step=8)
    with pytest.raises(mm.TrainingFailed, match="rank 0 was killed by SIGKILL at step"):
        mm.train(witness.cfg, view=False)
    whole = SAVING.index(point) >= SAVING.index("after_rename")
    assert state_hashes(witness.folder)[0] == (8 if whole else 4)
    witness.resume()
    assert not [*witness.folder.checkpoints.glob(".*")], "half a save is removed"


@row("F23")
@slow
def test_a_checkpoint_that_decays_is_set_aside_and_the_one_before_it_used(
    witness: Witness, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    decays = witness.fault("after_rename", "corrupt", rank=0, step=8)
    killed = Fault("batch", "kill", str(tmp_path / "killed"), rank=1, step=9)
    inject(monkeypatch, decays, killed)
    with pytest.raises(mm.TrainingFailed, match="rank 1 was killed by SIGKILL at step"):
        mm.train(witness.cfg, view=False)
    assert state_hashes(witness.folder)[0] == 4
    witness.resume()
    aside = [path.name for path in witness.folder.checkpoints.glob("*.corrupt")]
    assert aside == ["step_00000008.corrupt"]


@row("F112")
@slow
@pytest.mark.parametrize("point", VALIDATING)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_during_a_validation_loses_nothing(
    point: str, rank: int, witness: Witness
) -> None:
    witness.inject(point, "kill", rank=rank, step=8)
    with pytest.raises(mm.TrainingFailed, match=f"rank {rank} was killed by SIGKILL"):
        mm.train(witness.cfg, view=False)
    witness.resume()


@row("F108")
@slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_kill_while_the_reference_is_computed_loses_nothing(
    rank: int, dpo_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(out: str) -> RunFolder:
        where = {"out_dir": str(tmp_path / out), "num_processes": 2, "batch_size": 2}
        cfg = mm.TrainConfig(**{**dpo_settings, **where, "max_steps": 4})
        return RunFolder(mm.train(cfg, view=False).folder)

    straight = state_hashes(train("straight"))
    inject(monkeypatch, Fault("reference", "kill", str(tmp_path / "m"), rank, step=0))
    with pytest.raises(mm.TrainingFailed, match=f"rank {rank} was killed by SIGKILL"):
        train("killed")
    assert state_hashes(train("killed")) == straight


@row("F48")
@slow
def test_a_gradient_of_one_rank_that_is_not_finite_is_skipped_by_both(
    witness: Witness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever rank has it, both leave the step out and end alike."""
    found = []
    for rank in range(2):
        Path(witness.marker).unlink(missing_ok=True)
        cfg = dataclasses.replace(witness.cfg, out_dir=str(tmp_path / f"nan_{rank}"))
        with monkeypatch.context() as patch:
            inject(patch, witness.fault("after_backward", "nan", rank=rank))
            run = mm.train(cfg, view=False)
        assert run.status == "finished"
        last = run.history.last("train")
        assert last and last["skipped_steps"] == 1
        found.append(state_hashes(RunFolder(run.folder)))
    assert found[0] == found[1]
    assert found[0][1:] != witness.expected[1:]


@pytest.mark.parametrize(
    "action",
    [
        pytest.param("kill_parent", id="F03", marks=(row("F03"), slow)),
        pytest.param("sleep_deaf", id="F04", marks=(row("F04"), slow)),
    ],
)
def test_no_rank_outlives_its_parent(
    action: str, witness: Witness, record_property: Callable[[str, object], None]
) -> None:
    fault = witness.fault("batch", action)
    code = (
        "import json, sys, pytest, minimind_nb as mm\n"
        "from support.injection import Fault, inject\n"
        "settings, fault = map(json.loads, sys.argv[1:])\n"
        "inject(pytest.MonkeyPatch(), Fault(**fault))\n"
        "mm.train(mm.TrainConfig(**settings), view=False)\n"
    )
    script = Path(witness.marker).with_name("script.py")
    script.write_text(code)
    given = [{**vars(witness.cfg)}, vars(fault)]
    parent = subprocess.Popen(
        [sys.executable, str(script), *map(json.dumps, given)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
        stderr=subprocess.DEVNULL,
    )
    end = time.monotonic() + 60
    while not Path(witness.marker).exists() and time.monotonic() < end:
        time.sleep(0.05)
    assert Path(witness.marker).exists()
    assert len(witness.records()) == 2
    died = json.loads(Path(witness.marker).read_text())
    if action == "sleep_deaf":
        time.sleep(0.5)
        died = time.time()
        parent.kill()
    assert parent.wait(60) == -signal.SIGKILL
    while witness.living() and time.time() < died + 10:
        time.sleep(0.01)
    seconds = time.time() - died
    record_property("parent_death_to_last_rank_seconds", seconds)
    assert seconds < 3
    time.sleep(0.5)  # threads of a killed rank hold the lock for some 0.1 s more
    witness.resume()


@row("F54")
@slow
@pytest.mark.parametrize(("rank", "status"), [(1, "finished"), (0, "time_budget")])
def test_ranks_whose_clocks_differ_by_an_hour_end_together(
    rank: int, status: str, witness: Witness
) -> None:
    """Rank 0's clock decides for both."""
    witness.inject("batch", "skew", rank=rank, step=1)
    cfg = dataclasses.replace(witness.cfg, max_session_hours=0.5)
    assert mm.train(cfg, view=False).status == status
    first, second = witness.records()
    assert first.step == second.step
    assert (first.step < 12) == (rank == 0)
    witness.resume()


@row("F56")
@slow
def test_a_port_that_is_taken_is_no_matter(witness: Witness) -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.bind(("127.0.0.1", 29500))
        witness.resume()


@row("F47")
@slow
def test_less_data_than_a_global_batch_trains(two: Settings, tmp_path: Path) -> None:
    file = tmp_path / "one.jsonl"
    file.write_text('{"text": "only one"}\n')
    run = mm.train(mm.TrainConfig(**{**two, "data_path": str(file)}), view=False)
    assert run.status == "finished"


@row("F31")
@slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_ranks_goes_on_with_the_same_samples(
    before: int, after: int, two: Settings, witness: Witness, tmp_path: Path
) -> None:
    def train(out: str, ranks: int) -> mm.Run:
        size = {"num_processes": ranks, "accumulation_steps": 4 // ranks}
        settings = {**two, **size, "dropout": 0.0, "out_dir": str(tmp_path / out)}
        return mm.train(mm.TrainConfig(**settings), view=False)

    def rows(run: mm.Run) -> list[tuple[float, ...]]:
        assert run.status == "finished"
        rows = run.history.select("train")
        return [(row["step"], row["samples"], row["loss"]) for row in rows]

    straight = rows(train("unchanged", before))
    witness.inject("batch", "sigterm", rank=0, step=6)
    assert train("changed", before).status == "terminated"
    changed = rows(train("changed", after))
    assert [row[:2] for row in changed] == [row[:2] for row in straight]
    assert np.allclose(changed, straight, atol=1e-5, rtol=0)
