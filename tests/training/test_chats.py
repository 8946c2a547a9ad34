"""Conversations and pairs through the loop: resumed, sampled, refused, of mixtures."""

import contextlib
import json
import math
import types
from pathlib import Path
from typing import Any

import pytest
from support.runs import (
    Settings,
    metric_rows,
    notes_of,
    prepare_here,
    state_hashes,
    train_here,
)

from minimind_nb.data.jsonl import DataError
from minimind_nb.data.tokenizer import load_tokenizer, read_tokenizer
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import evaluation
from minimind_nb.training.loop import Trainer

LOGGED = ("step", "samples", "tokens", "loss", "aux_loss", "learning_rate")


@pytest.fixture
def stages(sft_settings: Settings, dpo_settings: Settings) -> dict[str, Settings]:
    return {"sft": sft_settings, "dpo": dpo_settings}


def rows_of(folder: RunFolder, kind: str) -> list[dict[str, Any]]:
    lines = folder.metrics_file.read_text(encoding="utf-8").splitlines()
    return [row for line in lines if (row := json.loads(line))["kind"] == kind]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_lowers_its_loss_and_leaves_its_files(
    stages: dict[str, Settings], stage: str
) -> None:
    rows: list[int] = []

    def look(trainer: Trainer) -> None:
        rows.append(trainer.stream.rows)

    ending, folder = train_here(stages[stage], change=look)
    assert ending == "finished"
    assert folder.root.name == f"{stage}_32"
    name = {"sft": "full_sft_32.pth", "dpo": "dpo_32.pth"}[stage]
    assert (folder.root.parent / name).is_file()
    assert rows[0] % 4 and rows[0] < 12 * 4, "an epoch ends within a step"
    losses = [loss for (loss,) in metric_rows(folder, "train", "loss")]
    assert losses[-1] < losses[0]
    start = rows_of(folder, "event")[0]
    assert (start["event"], start["stage"]) == ("start", stage)
    assert (start["cut"], start["dropped"]) == (0, 0)
    assert all("expert_load" not in row for row in rows_of(folder, "train"))


def test_answers_have_a_perplexity_and_bits_per_byte(sft_settings: Settings) -> None:
    _, folder = train_here({**sft_settings, "max_steps": 1})
    row = rows_of(folder, "eval")[0]
    assert row["loss"] == pytest.approx(math.log(6400), abs=0.3)
    assert row["perplexity"] == pytest.approx(math.exp(row["loss"]))
    assert 2 < row["bits_per_byte"] < 40


@pytest.mark.parametrize("stop_at", [2, 11])
@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_resumed_chats_equal_uninterrupted_ones(
    stages: dict[str, Settings], stage: str, stop_at: int, tmp_path: Path
) -> None:
    settings = {**stages[stage], "dropout": 0.1, "max_steps": 14}
    _, straight = train_here({**settings, "out_dir": str(tmp_path / "straight")})
    ending, folder = train_here(settings, stop_at=stop_at)
    assert ending == "interrupted"
    assert state_hashes(folder)[0] == stop_at
    assert train_here(settings)[0] == "finished"
    assert state_hashes(folder) == state_hashes(straight)
    timed = {"seconds", "tokens_per_second", "peak_memory_gib"}
    for kind in ("train", "eval", "sample"):
        rows = [
            [
                {k: v for k, v in row.items() if k not in timed}
                for row in rows_of(f, kind)
            ]
            for f in (folder, straight)
        ]
        assert rows[0] == rows[1]
        assert rows[0]


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_accumulation_cannot_change_the_loss(
    stages: dict[str, Settings], stage: str, tmp_path: Path
) -> None:
    runs = []
    for batch_size, steps in ((1, 8), (8, 1)):
        cut = {"batch_size": batch_size, "accumulation_steps": steps, "max_steps": 4}
        out = {"out_dir": str(tmp_path / str(steps))}
        runs.append(train_here({**stages[stage], **cut, **out})[1])
    losses = [metric_rows(folder, "train", "loss") for folder in runs]
    assert [row[0] for row in losses[0]] == pytest.approx(
        [row[0] for row in losses[1]], abs=1e-5
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_mixture_logs_the_load_of_its_experts_and_its_loss_apart(
    stages: dict[str, Settings], stage: str
) -> None:
    moe = {"use_moe": True, "n_routed_experts": 4, "num_experts_per_tok": 2}
    settings = {**stages[stage], **moe, "max_steps": 4, "accumulation_steps": 2}
    _, folder = train_here({**settings, "log_interval": 2})
    rows = rows_of(folder, "train")
    assert len(rows) == 2
    for row in rows:
        assert [len(layer) for layer in row["expert_load"]] == [4, 4]
        assert [sum(layer) for layer in row["expert_load"]] == pytest.approx([1, 1])
        assert 0.005 < row["aux_loss"] < 0.1, "0.01 a layer where the load is even"
    first = metric_rows(folder, "eval", "loss")[0][0]
    expected = math.log(6400) if stage == "sft" else math.log(2)
    assert first == pytest.approx(expected, abs=0.3 if stage == "sft" else 1e-5)


def test_a_mixture_resumed_equals_the_uninterrupted_one(
    sft_settings: Settings, tmp_path: Path
) -> None:
    settings = {**sft_settings, "use_moe": True, "seq_aux": False, "max_steps": 5}
    _, straight = train_here({**settings, "out_dir": str(tmp_path / "straight")})
    train_here(settings, stop_at=2)
    _, folder = train_here(settings)
    assert folder.root.name == "sft_32_moe"
    assert state_hashes(folder) == state_hashes(straight)
    load = metric_rows(straight, "train", "expert_load")
    assert metric_rows(folder, "train", "expert_load") == load


def test_an_expert_without_tokens_has_no_share_and_no_gradient(
    sft_settings: Settings,
) -> None:
    before: dict[str, Any] = {}

    def starve(trainer: Trainer) -> None:
        """Send every token to the first two of four experts."""
        for name, parameter in trainer.model.named_parameters():
            if name.endswith("mlp.gate.weight"):
                parameter.data.zero_()
            if ".experts.3." in name or ".experts.0." in name:
                before[name] = parameter
                before[f"{name} was"] = parameter.detach().clone()

    moe = {"use_moe": True, "num_experts_per_tok": 2, "aux_loss_alpha": 0.0}
    fixed = {"learning_rate": 1e-3, "weight_decay": 0.0, "max_steps": 1}
    _, folder = train_here({**sft_settings, **moe, **fixed}, change=starve)
    for layer in rows_of(folder, "train")[0]["expert_load"]:
        assert sorted(layer) == [0, 0, 0.5, 0.5]
    unchanged = [
        name
        for name, parameter in before.items()
        if not name.endswith(" was") and parameter.equal(before[f"{name} was"])
    ]
    idle = {name.split(".experts.")[1][0] for name in unchanged}
    assert idle in ({"0"}, {"3"})


def test_samples_are_rows_at_every_validation(sft_settings: Settings) -> None:
    asked = {"sample_prompts": ("What is 3, 4?", "猫"), "sample_tokens": 5}
    _, folder = train_here({**sft_settings, **asked})
    rows = metric_rows(folder, "sample", "step", "number", "prompt")
    expected = [
        (step, number, prompt)
        for step in (0, 4, 8, 12)
        for number, prompt in enumerate(asked["sample_prompts"])
    ]
    assert rows == expected
    assert all(isinstance(a, str) for (a,) in metric_rows(folder, "sample", "answer"))
    answers = metric_rows(folder, "sample", "answer")
    assert len(set(answers)) > 2, "they change"
    for row in rows_of(folder, "sample"):
        assert row.keys() >= {"samples", "tokens", "seconds"}


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_prompt_that_is_rendered_already_gets_no_second_begin_token(
    stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []

    def generate(_: Any, __: Any, prompts: list[Any], **___: Any) -> list[str]:
        asked.extend(prompts)
        return [""] * len(prompts)

    monkeypatch.setattr(evaluation, "generate", generate)
    evaluator: Any = types.SimpleNamespace(
        cfg=types.SimpleNamespace(stage=stage, sample_tokens=1),
        model=None,
        tokenizer=load_tokenizer(read_tokenizer()),
        autocast=contextlib.nullcontext(),
    )
    rendered = "<|im_start|>user\n猫<|im_end|>\n<|im_start|>assistant\n"
    evaluation.answer_prompts(evaluator, [rendered, "猫"], seed=0)
    turn = [{"role": "user", "content": "猫"}]
    assert asked == [rendered, "猫" if stage == "pretrain" else turn]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_two_held_out_prompts_are_asked_unless_some_are_given(
    stage: str, stages: dict[str, Settings], settings: Settings
) -> None:
    chosen = {**stages, "pretrain": settings}[stage]
    _, folder = train_here({**chosen, "max_steps": 1, "val_fraction": 0.2})
    prompts = [prompt for (prompt,) in metric_rows(folder, "sample", "prompt")[:2]]
    assert len(set(prompts)) == 2
    word = "第" if stage == "pretrain" else "问?"
    assert all(word in prompt for prompt in prompts)
    held_out = prepare_here({**chosen, "val_fraction": 0.2})
    assert len(held_out.corpus.val_documents) >= 2


def test_the_same_seed_gives_the_same_answers_and_another_others(
    sft_settings: Settings, tmp_path: Path
) -> None:
    settings = {**sft_settings, "max_steps": 1, "sample_tokens": 8}
    found = []
    for number, seed in enumerate((7, 7, 8)):
        out_dir = str(tmp_path / str(number))
        _, folder = train_here({**settings, "seed": seed, "out_dir": out_dir})
        found.append(metric_rows(folder, "sample", "answer"))
    assert found[0] == found[1] != found[2]


@pytest.mark.parametrize("stage", ["pretrain", "sft", "dpo"])
def test_asking_changes_nothing_of_the_training(
    stage: str, stages: dict[str, Settings], settings: Settings, tmp_path: Path
) -> None:
    chosen = {**{**stages, "pretrain": settings}[stage], "max_steps": 4, "dropout": 0.2}
    runs = []
    for count in (0, 6):
        out = {"out_dir": str(tmp_path / str(count)), "sample_tokens": count}
        runs.append(train_here({**chosen, "eval_interval": 1, **out})[1])
    assert state_hashes(runs[0]) == state_hashes(runs[1])
    assert metric_rows(runs[0], "train", *LOGGED) == metric_rows(
        runs[1], "train", *LOGGED
    )
    assert metric_rows(runs[0], "sample", "step") == []
    assert metric_rows(runs[1], "sample", "step")


def test_prompts_are_asked_without_held_out_text_too(settings: Settings) -> None:
    none = {**settings, "val_fraction": 0.0, "max_steps": 1, "sample_prompts": ("第",)}
    _, folder = train_here(none)
    assert metric_rows(folder, "sample", "step", "prompt") == [(0, "第"), (1, "第")]
    assert metric_rows(folder, "eval", "step") == []


def chats_of(path: Path, short: int, long: int) -> str:
    """Conversations whose answer is far longer than a row, after those that fit."""
    said = ["ok"] * short + ["many words " * 60] * long
    with path.open("w", encoding="utf-8") as file:
        for number, text in enumerate(said):
            question = {"role": "user", "content": f"question {number}"}
            row = [question, {"role": "assistant", "content": text}]
            file.write(json.dumps({"conversations": row}) + "\n")
    return str(path)


@pytest.mark.fault("F44")
def test_conversations_whose_answers_are_all_cut_away_are_refused(
    sft_settings: Settings, tmp_path: Path
) -> None:
    path = chats_of(tmp_path / "long.jsonl", 0, 20)
    settings = {**sft_settings, "data_path": path, "val_fraction": 0.0}
    with pytest.raises(ValueError) as caught:
        prepare_here(settings)
    text = str(caught.value)
    assert text.startswith(
        f"{path}: none of 20 conversations has a whole answer within max_seq_len=64 "
        "tokens; raise it (the longest has "
    )
    assert not (Path(settings["out_dir"]) / "sft_32").exists()


@pytest.mark.fault("F44")
def test_conversations_without_an_answer_that_fits_are_left_out_and_counted(
    sft_settings: Settings, tmp_path: Path
) -> None:
    path = chats_of(tmp_path / "long.jsonl", 10, 90)
    settings = {**sft_settings, "data_path": path, "val_fraction": 0.0, "max_steps": 1}
    notes, _ = notes_of(settings)
    told = (
        "of the conversations longer than max_seq_len=64, 0 are truncated at a turn "
        "and 90 dropped because no whole answer fits"
    )
    assert told in notes
    _, folder = train_here(settings)
    start = rows_of(folder, "event")[0]
    assert (start["cut"], start["dropped"]) == (0, 90)


def test_cut_conversations_are_counted(sft_settings: Settings, tmp_path: Path) -> None:
    path = Path(chats_of(tmp_path / "cut.jsonl", 40, 0))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[:7]:
        row["conversations"] += [
            {"role": "user", "content": "more"},
            {"role": "assistant", "content": "many words " * 60},
        ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {**sft_settings, "data_path": str(path), "val_fraction": 0.0}
    notes, _ = notes_of(settings)
    told = (
        "of the conversations longer than max_seq_len=64, 7 are truncated at a turn "
        "and 0 dropped because no whole answer fits"
    )
    assert told in notes
    _, folder = train_here({**settings, "max_steps": 1})
    assert rows_of(folder, "event")[0]["cut"] == 7


def test_a_stage_refuses_rows_of_another(
    stages: dict[str, Settings], settings: Settings
) -> None:
    with pytest.raises(DataError, match='these rows are for stage="pretrain"'):
        prepare_here({**stages["sft"], "data_path": settings["data_path"]})
    with pytest.raises(DataError, match='these rows are for stage="sft"'):
        prepare_here({**stages["dpo"], "data_path": stages["sft"]["data_path"]})
    with pytest.raises(ValueError, match=r"data_path is not set: .*\"chosen\""):
        prepare_here({**stages["dpo"], "data_path": None})


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_validation_file_of_chats_replaces_the_held_out_part(
    stage: str, stages: dict[str, Settings], tmp_path: Path
) -> None:
    settings = {**stages[stage], "max_steps": 1, "sample_tokens": 0}
    lines = Path(settings["data_path"]).read_text(encoding="utf-8").splitlines()
    val_path = tmp_path / "validation.jsonl"
    val_path.write_text("\n".join(lines[:4]).replace("问", "題"), encoding="utf-8")
    del settings["val_fraction"]
    _, folder = train_here({**settings, "val_path": str(val_path)})
    assert len(metric_rows(folder, "eval", "loss")) == 2
    assert (
        folder.read_config()["hashes"]["data"]
        != folder.read_config()["hashes"]["validation"]
    )


@pytest.mark.parametrize("stage", ["sft", "dpo"])
def test_a_stage_trains_in_bfloat16(stage: str, stages: dict[str, Settings]) -> None:
    ending, folder = train_here({**stages[stage], "dtype": "bfloat16", "max_steps": 6})
    assert ending == "finished"
    losses = [loss for (loss,) in metric_rows(folder, "train", "loss")]
    assert losses[-1] < losses[0]
    assert metric_rows(folder, "train", "skipped_steps")[-1] == (0,)
