"""The benchmarks of speed: how turns are taken and counted, and that the command runs."""

import itertools
import json
import os

import pytest
import speed
import torch


def test_turns_rotate_and_disturbed_ones_are_left_out(monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []
    values = {"one": iter([6, 8, 10, 60, 80]), "other": iter([2, 2, 2, 2, 2])}
    # We work in half of the time, and others take two cores in the last two turns.
    own, clock = itertools.count(), itertools.count(step=2)
    others = iter([0, 0, 0, 0, 0, 0, 0, 20, 0, 20])
    ends = itertools.cycle([0, 5])  # each turn asks six times what we have worked
    monkeypatch.setattr(speed, "busy_seconds", lambda: next(others) + next(ends))
    monkeypatch.setattr(speed, "own_seconds", own.__next__)
    monkeypatch.setattr(speed.time, "perf_counter", clock.__next__)

    def way(name: str) -> float:
        calls.append(name)
        return next(values[name])

    ways = {name: lambda name=name: way(name) for name in values}
    race = speed.Race(ways, turns=5, warm_up=False)
    assert calls == ["one", "other", "other", "one"] * 2 + ["one", "other"]
    row = race.row("x", "what", "tokens/s", "one", "other")
    assert row["ratio"] == row["cpu_ratio"] == 4 and row["sides"] == {
        "one": 8,
        "other": 2,
    }
    assert row["spread"] == [3, 5]
    assert (row["turns"], row["disturbed"], row["others"]) == (5, 2, 0)


def test_command_appends_a_row_with_the_ratio_of_its_sides(
    tmp_path, monkeypatch, capsys
):
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, os.environ.get(name, "1"))  # to be restored
    out, threads = tmp_path / "rows.jsonl", torch.get_num_threads()
    small = "--preset demo --rows 1 --width 64 --turns 1 --threads 1"
    monkeypatch.setattr(speed, "LETTERS", {"e": speed.measure_loader})
    speed.main([*small.split(), "--out", str(out)])  # all letters there are
    with pytest.raises(SystemExit):
        speed.main(["z"])
    assert "z is not one of e" in capsys.readouterr().err
    torch.set_num_threads(threads)
    (row,) = map(json.loads, out.read_text().splitlines())
    loader, training = row["sides"].values()
    assert row["letter"] == "e" and row["unit"] == "batches/s"
    assert row["ratio"] == pytest.approx(loader / training)
    assert row["threads"] == 1 and row["dtype"] == "float32"
