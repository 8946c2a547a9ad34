"""Compiled steps: when, of what, equal to eager ones, exact on a resume, and failing."""

import functools
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo
from support.runs import (
    Settings,
    metric_rows,
    prepare_here,
    state_hashes,
    train_here,
)
from torch._inductor import config as inductor
from torch._inductor.exc import InductorError

import minimind_nb as mm
from minimind_nb import hardware
from minimind_nb.config import TrainConfig, resolve
from minimind_nb.data.batches import MicroBatch
from minimind_nb.hardware import has_compiler, pays_to_compile
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import preparation, stages
from minimind_nb.training.initial_weights import new_model
from minimind_nb.training.launching import compile_cache
from minimind_nb.training.loop import Trainer
from minimind_nb.training.resuming import upgraded_config
from minimind_nb.training.stages import OBJECTIVES, Losses, compile_objective

SMALL = {"preset": "minimind2-small", "max_seq_len": 512, "global_batch": 32}


@pytest.fixture(scope="module")
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("inductor")


@pytest.fixture(autouse=True)
def fresh_compiler(
    shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """No graph of a test before, and one cache; what is set here is taken back."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(shared_cache))
    monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", "1")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain = inductor.patch({"cpp.simdlen": 1})  # g++ takes half the time
    with plain, torch._dynamo.config.patch(capture_scalar_outputs=False):
        yield
    torch._dynamo.reset()


@pytest.fixture
def tiny(settings: Settings) -> Settings:
    """One layer, with dropout."""
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return {**settings, **shape, "dropout": 0.1, "compile": True, "sample_tokens": 0}


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("steps", "changes", "cores", "pays"),
    [
        # 167 MFLOP a token, 2.7 TFLOP a step; a core makes 96 TFLOP in 20 minutes.
        (34, {}, 1, False),
        (36, {}, 1, True),
        (36, {}, 2, False),
        (70, {}, 2, True),
        (36, {"num_processes": 2}, 2, False),
        (5_000, {"device": "cuda"}, 2, False),
        (5_400, {"device": "cuda"}, 2, True),
        (5_400, {"device": "cuda", "num_processes": 2}, 2, False),
        (100, {"use_moe": True}, 1, False),
        (200, {"use_moe": True}, 1, True),
    ],
)
def test_a_long_run_pays_for_compiling(
    steps: int,
    changes: dict[str, Any],
    cores: int,
    pays: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cfg = resolve(TrainConfig(**SMALL, **changes))
    assert pays_to_compile(cfg, steps, cores) is pays


def test_a_compiler_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert not has_compiler(None)
    monkeypatch.setenv("CXX", "sh")
    assert has_compiler(None)
    for triton, found in ((None, False), ("a spec", True)):
        monkeypatch.setattr(hardware, "find_spec", lambda _, spec=triton: spec)
        assert [has_compiler(of) for of in ((6, 1), (7, 5))] == [False, found]


@pytest.mark.parametrize("compiler", [True, False])
@pytest.mark.parametrize("long", [True, False])
@pytest.mark.parametrize("asked", ["auto", True, False])
def test_it_is_decided_once_by_the_length_of_the_run(
    asked: Any,
    long: bool,
    compiler: bool,
    settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CXX", "sh" if compiler else "no-such-compiler")
    monkeypatch.setattr(preparation, "pays_to_compile", lambda *_: long)
    decided = (long and compiler) if asked == "auto" else asked
    plan = prepare_here({**settings, "compile": asked})
    assert plan.cfg.compile is decided
    assert plan.config["settings"]["compile"] is decided
    shown = mm.plan(TrainConfig(**{**settings, "compile": asked}))
    assert shown["precision"].endswith(", compiled") is decided


def test_a_resumed_run_keeps_it_unless_asked_and_old_runs_are_eager(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "pays_to_compile", lambda *_: False)
    _, folder = train_here({**settings, "max_steps": 2})
    monkeypatch.setattr(preparation, "pays_to_compile", lambda *_: True)
    assert not prepare_here({**settings, "max_steps": 4}).cfg.compile
    on = prepare_here({**settings, "max_steps": 4, "compile": True})
    assert on.cfg.compile
    assert prepare_here({**settings, "max_steps": 4}).cfg.compile
    old = folder.read_config()
    del old["settings"]["compile"]
    folder.write_config(old)
    assert upgraded_config(folder)["settings"]["compile"] is False


def test_preferences_are_never_compiled(
    dpo_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "pays_to_compile", lambda *_: True)
    assert not prepare_here(dpo_settings).cfg.compile
    with pytest.raises(ValueError, match="compile=True is not for dpo"):
        TrainConfig(stage="dpo", data_path="demo", compile=True)
    with pytest.raises(ValueError, match="compile='on' is not one of auto"):
        TrainConfig(data_path="demo", compile="on")


MIXTURES = [{}, {"use_moe": True}, {"use_moe": True, "seq_aux": False}]


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
@pytest.mark.parametrize("mixture", MIXTURES, ids=str)
def test_empty_rows_change_neither_losses_nor_gradients(
    mixture: dict[str, Any], stage: str, settings: Settings, sft_settings: Settings
) -> None:
    base = {**(settings if stage == "pretrain" else sft_settings), **mixture}
    found = []
    for compiled in (False, True):
        plan = prepare_here({**base, "compile": compiled, "resume": False})
        torch.manual_seed(1)
        model = new_model(plan).train()
        cfg = plan.cfg
        stream = plan.corpus.training_stream(cfg, plan.tokenizer.pad_id)
        stream.samples = stream.total_samples - 3
        (batch,) = stream.next_step().micro_batches
        assert batch.inputs.shape == (4 if compiled else 3, cfg.max_seq_len)
        assert batch.samples == 3
        losses = OBJECTIVES[stage].objective(model, batch, cfg)
        (losses.loss + losses.aux_loss).backward()
        grads = [p.grad for p in model.parameters()]
        found.append([losses.loss, losses.aux_loss, *grads])
        load = model.expert_load()
        found[-1].append(torch.tensor(load, dtype=torch.float))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"stage": "sft", "dtype": "bfloat16"},
        {"stage": "sft", "use_moe": True},
        {"document_mask": True, "dtype": "bfloat16", "use_moe": True},
    ],
    ids=str,
)
def test_every_step_is_the_same_one_graph(
    changes: dict[str, Any],
    settings: Settings,
    sft_settings: Settings,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Across a validation, with another number of targets, and with a row missing."""
    base = sft_settings if changes.get("stage") else settings
    compile_ = functools.partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(stages.torch, "compile", compile_)
    plan = prepare_here({**base, "num_hidden_layers": 1, "compile": True, **changes})
    dtype = plan.cfg.dtype
    torch.manual_seed(1)
    model, cfg = new_model(plan).train(), plan.cfg
    stream = plan.corpus.training_stream(cfg, plan.tokenizer.pad_id)
    batches = [stream.next_step().micro_batches[0] for _ in range(2)]
    stream.samples = stream.total_samples - 3
    batches += stream.next_step().micro_batches
    compiled, eager = compile_objective(model, cfg), OBJECTIVES[cfg.stage].objective

    def compute(objective: Any, batch: MicroBatch) -> list[torch.Tensor | None]:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
            losses: Losses = objective(model, batch, cfg)
        (losses.loss + losses.aux_loss).backward()
        return [losses.loss, losses.aux_loss, *(p.grad for p in model.parameters())]

    bound = 1e-4 if dtype == "float32" else 0.2
    for batch in batches:
        expected = compute(eager, batch)
        model.eval()
        compute(eager, batch)
        model.train()
        found = compute(compiled, batch)
        torch.testing.assert_close(found, expected, rtol=bound, atol=bound)
        load = torch.tensor(model.expert_load())
        compute(eager, batch)
        assert (load - torch.tensor(model.expert_load())).abs().sum() <= 2
    assert graphs() == 1


def test_a_device_is_asked_for_its_kernels_outside_the_graph(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU the capability is looked up, which no graph can hold."""
    from minimind_nb.model import architecture

    asked = []

    @torch.compiler.assume_constant_result
    def lacks_fast_gqa(device: torch.device) -> bool:
        asked.append(device)
        return json.loads("true")

    assert architecture.lacks_fast_gqa._dynamo_marked_constant  # pyright: ignore
    monkeypatch.setattr(architecture, "lacks_fast_gqa", lacks_fast_gqa)
    compile_ = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(stages.torch, "compile", compile_)
    plan = prepare_here({**settings, "compile": True})
    model = new_model(plan)
    stream = plan.corpus.training_stream(plan.cfg, plan.tokenizer.pad_id)
    batch = stream.next_step().micro_batches[0]
    compile_objective(model, plan.cfg)(model, batch, plan.cfg)
    assert {device.type for device in asked} == {"cpu"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_compiled_run_that_is_resumed_equals_an_unbroken_one(
    ranks: int, tiny: Settings, tmp_path: Path, forked: None
) -> None:
    """With dropout, validations in between, and a row missing at the end."""
    tiny |= {"num_processes": ranks, "accumulation_steps": 2 // ranks, "epochs": 1}

    def train(out: str, max_steps: int) -> RunFolder:
        place = {**tiny, "out_dir": str(tmp_path / out), "max_steps": max_steps}
        torch._dynamo.reset()
        if ranks == 1:
            with torch._dynamo.config.patch(error_on_recompile=True):
                return train_here(place)[1]
        return RunFolder(mm.train(TrainConfig(**place), view=False).folder)

    whole = train("whole", 99)
    train("parts", 5)
    parts = train("parts", 99)
    assert state_hashes(parts) == state_hashes(whole)
    for kind in ("train", "eval"):
        of_parts, of_whole = (
            dict(metric_rows(folder, kind, "step", "loss")) for folder in (parts, whole)
        )
        assert {step: of_parts[step] for step in of_whole} == of_whole
    total = metric_rows(whole, "train", "samples")[-1][0]
    assert total % 4, "the last micro-batch lacks rows"
    events = [name for (name,) in metric_rows(parts, "event", "event")]
    assert "resume" in events and "compile_failed" not in events
    assert graphs() == (3 if ranks == 1 else 0), "one a run"


def test_without_a_compiler_the_run_is_eager_from_its_first_step(
    tiny: Settings, tmp_path: Path
) -> None:
    tiny |= {"max_steps": 2}
    _, eager = train_here({**tiny, "compile": False})
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        _, run = train_here({**tiny, "out_dir": str(tmp_path / "other")})
    assert state_hashes(run) == state_hashes(eager)
    failed = [
        row
        for row in map(json.loads, run.metrics_file.read_text().splitlines())
        if row.get("event") == "compile_failed"
    ]
    assert [row["step"] for row in failed] == [0]
    assert "No working C++ compiler" in failed[0]["error"]
    assert len(failed[0]["error"]) <= 300


@pytest.mark.parametrize("error", [ValueError("data"), MemoryError("out of memory")])
def test_an_ordinary_error_of_a_step_is_none_of_the_compiler(
    error: Exception, tiny: Settings
) -> None:
    def fail(*_: Any) -> Losses:
        raise error

    def change(trainer: Trainer) -> None:
        trainer.compiled = fail

    with pytest.raises(type(error), match=str(error)):
        train_here(tiny, change=change)


def test_a_failure_in_the_backward_pass_begins_the_step_again(
    tiny: Settings, tmp_path: Path
) -> None:
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
            raise InductorError(RuntimeError("no kernel"), None)

    calls = []

    def change(trainer: Trainer) -> None:
        def second_fails(*given: Any) -> Losses:
            calls.append(trainer.progress.step)
            losses = OBJECTIVES["pretrain"].objective(*given)
            fails = len(calls) == 2
            return losses._replace(loss=Failing.apply(losses.loss)) if fails else losses

        trainer.compiled = second_fails

    tiny |= {"max_steps": 2}
    _, eager = train_here({**tiny, "compile": False})
    _, run = train_here({**tiny, "out_dir": str(tmp_path / "other")}, change=change)
    assert calls == [0, 0]
    assert state_hashes(run) == state_hashes(eager)


def test_the_cache_is_the_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "TORCHINDUCTOR_CACHE_DIR"
    monkeypatch.setenv(name, "/mine")
    assert compile_cache() == "/mine", "what the user set is kept"
    monkeypatch.setenv(name, f"{tempfile.gettempdir()}/torchinductor_me")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_cache() == str(tmp_path / "minimind_nb/inductor")
    monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert compile_cache() == str(tmp_path / ".cache/minimind_nb/inductor")
