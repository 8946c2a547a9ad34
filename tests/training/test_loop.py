"""The loop: exact resume, invariances of the loss, steps that must be skipped."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.runs import (
    Settings,
    metric_rows,
    state_hashes,
    train_here,
)

import minimind_nb as mm
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.monitor.metrics import History
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import loop
from minimind_nb.training.evaluation import seed_of
from minimind_nb.training.loop import Trainer
from minimind_nb.training.stages import Stage

MEASURED = {"seconds", "tokens_per_second", "peak_memory_gib"}


def losses(folder: RunFolder) -> list[float]:
    return [loss for (loss,) in metric_rows(folder, "train", "loss")]


def test_a_run_lowers_the_loss_and_leaves_its_files(settings: Settings) -> None:
    ending, folder = train_here({**settings, "learning_rate": 1e-2})
    assert ending == "finished"
    first, *_, last = losses(folder)
    assert first == pytest.approx(math.log(6400), abs=0.3)
    assert last < first - 0.5
    assert 1e8 < History(folder.metrics_file).session[0]["machine_flops"] < 1e16
    evals = metric_rows(folder, "eval", "step", "loss", "perplexity")
    assert [step for step, _, _ in evals] == [0, 4, 8, 12]
    assert evals[-1][2] == pytest.approx(math.exp(evals[-1][1]))
    assert (folder.root.parent / "pretrain_32.pth").is_file()


def test_a_rank_records_what_it_does_besides_steps(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    real = RankRecord.update

    def update(record: RankRecord, **changes: Any) -> None:
        real(record, **changes)
        told.append(record.doing)

    monkeypatch.setattr(RankRecord, "update", update)
    train_here({**settings, "max_steps": 1})
    assert [doing for doing, _ in itertools.groupby(told) if doing] == [
        "validating",
        "validating",
        "saving",
    ]
    assert told[-1] == ""


def test_the_exported_weights_are_fp16_with_both_tied_keys(settings: Settings) -> None:
    _, folder = train_here({**settings, "max_steps": 1})
    file = folder.root.parent / "pretrain_32.pth"
    state = torch.load(file, weights_only=True)
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize("stop_at", [2, 9])
def test_resumed_run_equals_uninterrupted_run(
    settings: Settings, tmp_path: Path, stop_at: int, use_moe: bool
) -> None:
    settings = {**settings, "dropout": 0.1, "use_moe": use_moe}
    if use_moe and stop_at == 2:
        settings["seq_aux"] = False
    _, straight = train_here(settings)
    broken = {**settings, "out_dir": str(tmp_path / "broken")}
    ending, folder = train_here(broken, stop_at=stop_at)
    assert ending == "interrupted"
    assert state_hashes(folder)[0] == stop_at
    ending, folder = train_here(broken)
    assert ending == "finished"
    assert state_hashes(folder) == state_hashes(straight)
    for kind, names in (
        ("train", ("step", "samples", "tokens", "loss", "aux_loss", "learning_rate")),
        ("eval", ("step", "loss")),
    ):
        assert metric_rows(folder, kind, *names) == metric_rows(straight, kind, *names)


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_after_a_stop_covers_the_steps_before_it(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    settings |= {"use_moe": True, "num_processes": ranks, "batch_size": 4 // ranks}
    settings |= {"log_interval": 5, "max_steps": 13, "epochs": 4}
    real = Trainer.stop_flags

    def stop_at_7_and_8(trainer: Trainer) -> list[float]:
        if trainer.progress.step in (6, 7) and "broken" in trainer.cfg.out_dir:
            trainer.stop.reason = "interrupted"
        return real(trainer)

    monkeypatch.setattr(Trainer, "stop_flags", stop_at_7_and_8)
    found = []
    for name in ("straight", "broken", "broken", "broken"):
        cfg = mm.TrainConfig(**{**settings, "out_dir": str(tmp_path / name)})
        rows = mm.train(cfg, view=False).history.select("train")
        found.append([{n: row[n] for n in row.keys() - MEASURED} for row in rows])
    steps = [[row["step"] for row in rows] for rows in found]
    assert steps == [[5, 10, 13], [5, 7], [5, 8], [5, 10, 13]]
    assert found[3] == found[0]
    assert found[0][2]["partial"], "more steps would join this row"


def test_a_run_killed_after_its_last_checkpoint_ends_with_its_last_row(
    settings: Settings,
) -> None:
    settings |= {"log_interval": 5, "max_steps": 7}
    _, folder = train_here(settings)
    before = History(folder.metrics_file).select("train")
    folder.record_file(0).unlink()
    assert train_here(settings)[0] == "finished"
    after = History(folder.metrics_file).select("train")
    assert [row["step"] for row in after] == [5, 7]
    memory = "peak_memory_gib"
    assert after[1] | {memory: 0} == before[1] | {memory: 0}


def test_three_epochs_cross_an_epochs_end_within_a_step(settings: Settings) -> None:
    rows: list[int] = []

    def look(trainer: Trainer) -> None:
        rows.append(trainer.stream.rows)

    train_here({**settings, "max_steps": 1}, change=look)
    assert rows[0] % 8, "the epoch's end must fall into a step for these tests"
    assert rows[0] < 12 * 8, "and be reached"


def test_accumulation_1x8_equals_8x1(settings: Settings, tmp_path: Path) -> None:
    runs = []
    for batch_size, steps in ((1, 8), (8, 1)):
        out_dir = str(tmp_path / f"{batch_size}x{steps}")
        cut = {"batch_size": batch_size, "accumulation_steps": steps}
        runs.append(train_here({**settings, **cut, "out_dir": out_dir})[1])
    assert losses(runs[0]) == pytest.approx(losses(runs[1]), abs=1e-5)


def test_the_loss_is_the_mean_over_the_global_targets(settings: Settings) -> None:
    seen: list[tuple[float, int]] = []

    def spy(trainer: Trainer) -> None:
        objective = trainer.stage.objective

        def counted(model, batch, cfg):
            found = objective(model, batch, cfg)
            seen.append((float(found.loss.detach()), int((batch.targets >= 0).sum())))
            return found

        trainer.stage = Stage(counted)
        trainer.validation = None

    _, folder = train_here({**settings, "max_steps": 2, "log_interval": 2}, change=spy)
    mean = sum(loss for loss, _ in seen) / sum(count for _, count in seen)
    assert losses(folder) == [pytest.approx(mean, rel=1e-6)]
    assert metric_rows(folder, "train", "tokens")[-1][0] == sum(n for _, n in seen)


def poison(steps: set[int], factor: float = math.nan):
    """Multiply the loss of some steps (1-based), by default by what is no number."""

    def change(trainer: Trainer) -> None:
        objective = trainer.stage.objective

        def poisoned(model, batch, cfg):
            found = objective(model, batch, cfg)
            bad = model.training and trainer.progress.step + 1 in steps
            return found._replace(loss=found.loss * (factor if bad else 1.0))

        trainer.stage = Stage(poisoned)

    return change


@pytest.mark.fault("F48")
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(
    settings: Settings,
) -> None:
    states = []

    def spy(trainer: Trainer) -> None:
        poison({3})(trainer)
        real = trainer.record.update

        def update(**changes: object) -> None:
            real(**changes)
            if "step" not in changes:
                return
            weights = [p.detach().clone() for p in trainer.model.parameters()]
            moments = [
                value.clone()
                for state in trainer.optimizer.state.values()
                for value in state.values()
            ]
            states.append((weights, moments))

        trainer.record.update = update  # pyright: ignore[reportAttributeAccessIssue]

    _, folder = train_here({**settings, "max_steps": 4}, change=spy)
    for before, after in zip(states[1], states[2], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not torch.equal(states[2][0][0], states[3][0][0])
    assert metric_rows(folder, "train", "skipped_steps") == [(0,), (0,), (1,), (1,)]
    assert [rate for (rate,) in metric_rows(folder, "train", "loss")][2] == "nan"
    skipped = [e for e in History(folder.metrics_file).select("event") if "lines" in e]
    assert [(row["event"], row["step"]) for row in skipped] == [("skipped_step", 3)]
    assert math.isnan(skipped[0]["loss"])
    assert len(skipped[0]["lines"]) > 1
    assert {*skipped[0]["lines"]} <= set(range(1, 71))


@pytest.mark.fault("F49")
def test_too_many_such_steps_end_the_run_and_name_the_lines(settings: Settings) -> None:
    settings = {**settings, "max_skipped_steps": 2}
    with pytest.raises(FloatingPointError) as error:
        train_here(settings, change=poison({6, 7}))
    assert "the gradient was not finite in 2 steps in a row" in str(error.value)
    assert "in the last one with the lines [" in str(error.value)
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    assert state_hashes(folder)[0] == 4, "the last good checkpoint is kept"


def test_a_run_that_ends_in_skipped_steps_has_failed(settings: Settings) -> None:
    settings = {**settings, "max_steps": 6}
    with pytest.raises(
        FloatingPointError, match="2 steps .* Lower learning_rate=0.003"
    ):
        train_here(settings, change=poison({5, 6}))
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    assert state_hashes(folder)[0] == 4, "the last good checkpoint is kept"
    assert train_here(settings, change=poison({6}))[0] == "finished", (
        "one may be fp16's"
    )


def test_a_run_that_went_nowhere_is_not_finished(settings: Settings) -> None:
    lost = {**settings, "learning_rate": 1e9, "warmup_iters": 0}
    lost |= {"optimizer": "adamw", "schedule": "cosine"}
    with pytest.raises(FloatingPointError, match=r"Lower learning_rate=1e\+09"):
        train_here(lost)
    with pytest.raises(
        FloatingPointError, match=r"final validation loss is .* lower learning"
    ):
        train_here({**lost, "run_name": "short", "max_steps": 1})
    assert not [*Path(settings["out_dir"]).glob("short.pth")]


@pytest.mark.fault("F52")
def test_a_spike_of_the_loss_is_shown_and_changes_no_plan(
    settings: Settings, tmp_path: Path
) -> None:
    def rows(out: str, factor: float) -> list[tuple[float, ...]]:
        changed = {**settings, "out_dir": str(tmp_path / out)}
        _, folder = train_here(changed, change=poison({5}, factor))
        names = ("step", "samples", "learning_rate", "skipped_steps", "loss")
        return metric_rows(folder, "train", *names)

    calm, spiky = rows("calm", 1.0), rows("spiky", 10.0)
    assert [row[:4] for row in spiky] == [row[:4] for row in calm]
    assert spiky[4][4] == pytest.approx(10 * calm[4][4])
    assert spiky[5][4] < 2 * calm[5][4]


@pytest.mark.fault("F50")
def test_an_fp16_overflow_halves_the_scale_and_skips(settings: Settings) -> None:
    def scale(trainer: Trainer) -> None:
        objective = trainer.stage.objective

        def steep(model, batch, cfg):
            found = objective(model, batch, cfg)
            return found._replace(loss=found.loss * 1e6)

        trainer.stage = Stage(steep)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)

    _, folder = train_here({**settings, "max_steps": 3}, change=scale)
    rows = metric_rows(folder, "train", "loss_scale", "skipped_steps")
    assert rows[0] == (2.0**126, 1)


@pytest.mark.fault("F121")
@pytest.mark.parametrize("what", ["weight", "moment"])
def test_what_is_not_finite_is_never_saved(what: str, settings: Settings) -> None:
    """The checkpoint before stays, and the run goes on from it bit for bit."""
    straight = train_here({**settings, "run_name": "straight"})[1]

    def spoil_at_step_6(trainer: Trainer) -> None:
        objective = trainer.stage.objective

        def spoiled(model, batch, cfg):
            if trainer.progress.step == 6:
                first = next(iter(trainer.optimizer.state))
                value = first if what == "weight" else trainer.optimizer.state[first]
                moments = isinstance(value, dict)
                tensor = [*value.values()][-1] if moments else value.data
                tensor.view(-1)[7] = float("nan")
            return objective(model, batch, cfg)

        trainer.stage = Stage(spoiled)

    with pytest.raises(FloatingPointError, match="is not finite after step 8, so not"):
        train_here(settings, change=spoil_at_step_6)
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    assert state_hashes(folder)[0] == 4
    assert train_here(settings)[0] == "finished"
    assert state_hashes(folder) == state_hashes(straight)


def test_an_answer_that_fails_ends_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("probability tensor contains nan")

    monkeypatch.setattr(loop, "answer_prompts", fail)
    ending, folder = train_here({**settings, "max_steps": 4})
    assert ending == "finished"
    events = [row[0] for row in metric_rows(folder, "event", "event")]
    assert events.count("answers_failed") == 2


@pytest.mark.fault("F50")
def test_a_loss_scale_below_1_ends_the_run(settings: Settings) -> None:
    def scale(trainer: Trainer) -> None:
        poison({1})(trainer)
        trainer.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)

    with pytest.raises(FloatingPointError, match=r"loss scale 0\.5"):
        train_here(settings, change=scale)


@pytest.mark.fault("F53")
def test_a_deadline_saves_and_stops(settings: Settings, tmp_path: Path) -> None:
    ending, folder = train_here({**settings, "max_session_hours": 1e-6})
    assert ending == "time_budget"
    assert state_hashes(folder)[0] == 1
    ending, folder = train_here(settings)
    straight = train_here({**settings, "out_dir": str(tmp_path / "straight")})[1]
    assert state_hashes(folder) == state_hashes(straight)


def test_dropout_differs_between_ranks_and_steps() -> None:
    keys = ((1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (10, 0), (1, 0))
    assert len({seed_of(*key) for key in keys}) == len(keys)
    assert seed_of(1, 0, 0) == seed_of(1, 0, 0)
    assert all(0 <= seed_of(n) < 1 << 64 for n in range(100))


def test_a_run_without_held_out_text_makes_no_eval_rows(settings: Settings) -> None:
    _, folder = train_here({**settings, "val_fraction": 0.0, "max_steps": 2})
    assert metric_rows(folder, "eval", "step") == []
