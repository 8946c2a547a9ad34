"""The weights a stage starts from, and the errors if there are none."""

import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.runs import (
    Settings,
    logged,
    metric_rows,
    prepare_here,
    state_hashes,
    train_here,
)

from minimind_nb.config import TrainConfig
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.data.tokenizer_training import train_tokenizer
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.model.export import export
from minimind_nb.model.loading import find_weights, load
from minimind_nb.model.state_dict import read_tensors
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training.initial_weights import find_initial_weights, find_runs
from minimind_nb.training.preparation import draft, locate_run
from minimind_nb.training.run_plan import RunPlan

EMBEDDING = "model.embed_tokens.weight"
_AGES = itertools.count()


@pytest.fixture(scope="module")
def pretrained(
    tmp_path_factory: pytest.TempPathFactory, corpus_file: Path
) -> tuple[Path, Settings]:
    """An out_dir with a finished run of one step, and its settings."""
    out_dir = tmp_path_factory.mktemp("pretrained") / "out"
    settings = {
        "data_path": str(corpus_file),
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "rope_theta": 1e5,
        "max_seq_len": 32,
        "batch_size": 4,
        "max_steps": 1,
        "eval_tokens": 100,
        "sample_tokens": 0,
        "device": "cpu",
        "num_processes": 1,
    }
    train_here({**settings, "out_dir": str(out_dir)})
    return out_dir, settings


@pytest.fixture
def out_dir(pretrained: tuple[Path, Settings], tmp_path: Path) -> Path:
    """A copy of the run; the weights file is not there."""
    there = tmp_path / "out"
    shutil.copytree(pretrained[0] / "pretrain_32", there / "pretrain_32")
    make_newest(there / "pretrain_32")
    return there


@pytest.fixture
def weights_file(pretrained: tuple[Path, Settings]) -> Path:
    return pretrained[0] / "pretrain_32.pth"


@pytest.fixture
def sft(out_dir: Path, chat_file: Path) -> Settings:
    """Fine-tuning with nothing said of the shape."""
    return {
        "stage": "sft",
        "data_path": str(chat_file),
        "out_dir": str(out_dir),
        "max_seq_len": 64,
        "batch_size": 4,
        "max_steps": 4,
        "eval_tokens": 100,
        "sample_tokens": 0,
        "device": "cpu",
        "num_processes": 1,
    }


def make_newest(run: Path) -> None:
    when = 1_700_000_000 + 10 * next(_AGES)
    os.utime(run / "checkpoints", (when, when))


def copy_run(out_dir: Path, name: str, status: str = "finished", **shape: Any) -> Path:
    """A run beside the one that is there, with another status or shape stated."""
    run = out_dir / name
    shutil.copytree(out_dir / "pretrain_32", run)
    record = RankRecord(RunFolder(run).record_file(0), 0)
    record.update(status=status)
    config = RunFolder(run).read_config()
    config["settings"] |= shape
    RunFolder(run).write_config(config)
    make_newest(run)
    return run


def leave_only_files(out_dir: Path, weights_file: Path, *names: str) -> None:
    """Put bare weights in the place of the run."""
    shutil.rmtree(out_dir / "pretrain_32")
    for name in names:
        shutil.copy(weights_file, out_dir / name)


def begin(settings: Settings) -> tuple[RunPlan, list[str]]:
    with logged() as notes:
        return prepare_here(settings), notes


def source_of(settings: Settings) -> Path:
    with logged() as notes:
        began_from = draft(TrainConfig(**settings)).config["began_from"]
    assert not notes
    return Path(began_from)


def refusal(error: type[Exception], settings: Settings) -> str:
    """The text of the error; nothing was made."""
    before = sorted(Path(settings["out_dir"]).glob("*"))
    with pytest.raises(error) as caught:
        begin(settings)
    after = sorted(Path(settings["out_dir"]).glob("*"))
    left = [p for p in after if p.name != "cache" and p not in before]
    assert all(p.suffix == ".lock" for p in left)
    return str(caught.value)


def test_fine_tuning_begins_from_the_pretrained_run(
    sft: Settings, out_dir: Path
) -> None:
    seen: dict[str, torch.Tensor] = {}

    def look(trainer) -> None:
        for name, parameter in trainer.model.named_parameters():
            seen[name] = parameter.detach().clone()

    ending, folder = train_here(sft, change=look)
    assert ending == "finished"
    assert folder.root == out_dir / "sft_32"
    checkpoint = RunFolder(out_dir / "pretrain_32").checkpoint_folder(1)
    expected = load_file(checkpoint / "model.safetensors")
    assert seen.keys() == expected.keys()
    assert all(torch.equal(seen[name], expected[name]) for name in seen)
    assert (out_dir / "full_sft_32.pth").is_file()
    config = folder.read_config()
    assert config["began_from"] == str(out_dir / "pretrain_32")
    assert config["settings"]["init_from"] == "auto"


def test_the_shape_comes_with_the_weights(sft: Settings) -> None:
    prepared, notes = begin(sft)
    cfg = prepared.cfg
    assert (cfg.hidden_size, cfg.num_hidden_layers, cfg.rope_theta) == (32, 1, 1e5)
    assert cfg.num_attention_heads == 4
    assert prepared.weights_file.name == "full_sft_32.pth"
    assert any(note.startswith("starting from ") for note in notes)


def test_settings_that_equal_the_weights_may_be_given(sft: Settings) -> None:
    assert begin({**sft, "hidden_size": 32, "rope_theta": 1e5})[0].cfg.hidden_size == 32


def test_dropout_and_the_longest_context_may_be_others(sft: Settings) -> None:
    cfg = begin({**sft, "dropout": 0.2, "max_position_embeddings": 512})[0].cfg
    assert (cfg.dropout, cfg.max_position_embeddings) == (0.2, 512)


def test_the_newest_finished_run_is_taken(sft: Settings, out_dir: Path) -> None:
    newer = copy_run(out_dir, "another")
    copy_run(out_dir, "newest_but_broken_off", status="interrupted")
    copy_run(out_dir, "of_another_stage", stage="sft")
    assert source_of(sft) == newer
    make_newest(out_dir / "pretrain_32")
    assert source_of(sft) == out_dir / "pretrain_32"


def test_preferences_begin_from_fine_tuning(
    sft: Settings, out_dir: Path, pair_file: Path
) -> None:
    tuned = copy_run(out_dir, "sft_32", stage="sft")
    make_newest(out_dir / "pretrain_32")
    dpo = {**sft, "stage": "dpo", "data_path": str(pair_file)}
    assert source_of(dpo) == tuned
    prepared, _ = begin(dpo)
    assert prepared.folder.root == out_dir / "dpo_32"
    assert prepared.weights_file.name == "dpo_32.pth"


def test_an_unfinished_run_is_taken_where_none_is_finished_and_said(
    sft: Settings, out_dir: Path
) -> None:
    run = RunFolder(out_dir / "pretrain_32")
    RankRecord(run.record_file(0), 0).update(status="interrupted")
    prepared, notes = begin(sft)
    assert notes[0] == (
        f"{run.root} is not finished (interrupted); starting from its newest checkpoint"
    )
    assert prepared.config["began_from"] == str(run.root)


def test_a_weights_file_is_taken_where_there_is_no_run(
    sft: Settings, out_dir: Path, weights_file: Path
) -> None:
    shutil.rmtree(out_dir / "pretrain_32")
    shutil.copy(weights_file, out_dir)
    heads = {"num_attention_heads": 4, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
    with pytest.warns(match="comes without a tokenizer: using the shipped one"):
        began_from = draft(TrainConfig(**sft, **heads)).config["began_from"]
    assert Path(began_from) == out_dir / "pretrain_32.pth"
    ending, folder = train_here({**sft, **heads})
    assert ending == "finished"
    assert folder.read_config()["settings"]["num_attention_heads"] == 4


def test_a_run_goes_before_a_weights_file(
    sft: Settings, out_dir: Path, weights_file: Path
) -> None:
    shutil.copy(weights_file, out_dir / "pretrain_64.pth")
    assert source_of(sft) == out_dir / "pretrain_32"


@pytest.mark.parametrize("kind", ["run", "checkpoint", "pth", "saved"])
def test_weights_may_be_named(
    kind: str, sft: Settings, out_dir: Path, weights_file: Path, tmp_path: Path
) -> None:
    run = out_dir / "pretrain_32"
    checkpoint = run / "checkpoints" / "step_00000001"
    saved = tmp_path / "saved"
    if kind == "saved":
        model, tokenizer = load(run)
        model.save_pretrained(saved)
        tokenizer.save_pretrained(saved)
    places = {"run": run, "checkpoint": checkpoint, "pth": weights_file, "saved": saved}
    shape = {"num_attention_heads": 4, "rope_theta": 1e5} if kind == "pth" else {}
    elsewhere = {"out_dir": str(tmp_path / "elsewhere"), "init_from": places[kind]}
    prepared, notes = begin({**sft, **shape, **elsewhere})
    assert f"starting from {places[kind]}" in notes
    expected = load_file(checkpoint / "model.safetensors")[EMBEDDING]
    assert prepared.initial is not None
    found = read_tensors(prepared.initial)[EMBEDDING]
    close = 0.0 if kind != "pth" else 1e-3
    assert torch.allclose(found.float(), expected, atol=close, rtol=close)
    cfg = prepared.cfg
    assert (cfg.num_attention_heads, cfg.rope_theta) == (4, 1e5)


def test_none_begins_with_new_weights(sft: Settings) -> None:
    none = {**sft, "init_from": "none", "preset": "demo"}
    plan = draft(TrainConfig(**none))
    assert plan.initial is None
    assert plan.cfg.hidden_size == 128


def test_pretraining_may_go_on_from_weights(
    pretrained: tuple[Path, Settings], out_dir: Path
) -> None:
    run = out_dir / "pretrain_32"
    named = {"out_dir": str(out_dir), "run_name": "more", "init_from": str(run)}
    assert source_of({**pretrained[1], **named}) == run
    new = {**pretrained[1], "out_dir": str(out_dir), "run_name": "new"}
    assert draft(TrainConfig(**new)).initial is None


def test_where_there_is_nothing_the_runs_there_are_listed(
    sft: Settings, out_dir: Path
) -> None:
    (out_dir / "pretrain_32").rename(out_dir / "my_chat")
    config = RunFolder(out_dir / "my_chat").read_config()
    config["settings"]["stage"] = "dpo"
    RunFolder(out_dir / "my_chat").write_config(config)
    text = refusal(FileNotFoundError, sft)
    assert text == (
        f"stage='sft' starts from a trained model, and out_dir={str(out_dir)!r} has no "
        "run of stage='pretrain' and no pretrain_*.pth (runs found: my_chat). Train one "
        'first, name the weights with init_from="…", or set init_from="none" for a '
        "random initialisation"
    )
    shutil.rmtree(out_dir / "my_chat")
    assert "(runs found: none)" in refusal(FileNotFoundError, sft)


def test_a_run_without_a_checkpoint_is_nothing_to_begin_from(
    sft: Settings, out_dir: Path
) -> None:
    shutil.rmtree(out_dir / "pretrain_32" / "checkpoints")
    text = refusal(FileNotFoundError, sft)
    assert "has no run of stage='pretrain'" in text
    assert "(runs found: pretrain_32)" in text


def test_several_shapes_are_listed_to_choose_from(sft: Settings, out_dir: Path) -> None:
    copy_run(out_dir, "wide", hidden_size=64)
    text = refusal(ValueError, sft)
    assert text == (
        "stage='sft' can start from several weights, or none of the shape in the "
        f'settings; choose one:\n  init_from="{out_dir}/pretrain_32"  (32 × 1, finished)\n'
        f'  init_from="{out_dir}/wide"  (64 × 1, finished)'
    )
    assert source_of({**sft, "hidden_size": 32}) == out_dir / "pretrain_32"


def test_an_unfinished_run_of_another_shape_does_not_count(
    sft: Settings, out_dir: Path
) -> None:
    copy_run(out_dir, "wide", status="interrupted", hidden_size=64)
    assert source_of(sft) == out_dir / "pretrain_32"


def test_of_a_dense_run_and_a_mixture_of_one_width_the_dense_one_is_taken(
    sft: Settings, out_dir: Path
) -> None:
    mixture = {"use_moe": True, "n_routed_experts": 4}
    other = copy_run(out_dir, "pretrain_32_moe", **mixture)
    with logged() as notes:
        began_from = draft(TrainConfig(**sft)).config["began_from"]
    assert began_from == str(out_dir / "pretrain_32")
    assert notes == [f"{other}, a mixture, is left out: use_moe=True takes it"]
    (asked,) = find_runs(TrainConfig(**sft, use_moe=True), "pretrain")
    assert asked.root == other
    named = draft(TrainConfig(**sft, init_from=str(other)))
    assert named.config["began_from"] == str(other)


@pytest.mark.parametrize("asked", [True, False])
def test_a_fine_tuned_mixture_is_resumed_unless_it_was_asked_for(
    sft: Settings, out_dir: Path, asked: bool
) -> None:
    mixture = {"use_moe": True, "n_routed_experts": 4}
    run = RunFolder(copy_run(out_dir, "sft_32_moe", stage="sft", **mixture))
    config = run.read_config()
    config["explicit"] += ["use_moe"] * asked
    run.write_config(config)
    folder, _ = locate_run(TrainConfig(**sft))
    assert folder.root.name == ("sft_32" if asked else "sft_32_moe")
    folder, _ = locate_run(TrainConfig(**sft, use_moe=True, run_name="sft_32_moe"))
    assert folder.root == run.root


def test_a_dense_run_of_another_stage_hides_no_mixture(
    sft: Settings, out_dir: Path
) -> None:
    config = RunFolder(out_dir / "pretrain_32").read_config()
    config["settings"] |= {"use_moe": True, "n_routed_experts": 4}
    RunFolder(out_dir / "pretrain_32").write_config(config)
    copy_run(out_dir, "dpo_32", stage="dpo", use_moe=False)
    assert source_of(sft) == out_dir / "pretrain_32"


def test_of_weights_files_of_one_width_the_dense_one_is_taken(
    sft: Settings, out_dir: Path, weights_file: Path
) -> None:
    leave_only_files(out_dir, weights_file, "pretrain_32.pth", "pretrain_32_moe.pth")
    heads = {"num_attention_heads": 4, "rope_theta": 1e5, "rms_norm_eps": 1e-5}
    found = find_initial_weights(TrainConfig(**sft, **heads))
    assert found is not None
    assert found.file == out_dir / "pretrain_32.pth"


def test_runs_that_do_not_fit_the_shape_that_is_set_are_listed(
    sft: Settings, out_dir: Path
) -> None:
    text = refusal(ValueError, {**sft, "hidden_size": 64})
    assert "none of the shape in the settings; choose one:" in text
    assert f'init_from="{out_dir}/pretrain_32"  (32 × 1, finished)' in text


def test_several_weights_files_are_listed(
    sft: Settings, out_dir: Path, weights_file: Path
) -> None:
    leave_only_files(out_dir, weights_file, "pretrain_32.pth", "pretrain_64_moe.pth")
    text = refusal(ValueError, sft)
    assert f'init_from="{out_dir}/pretrain_32.pth"' in text
    assert "pretrain_64_moe.pth" in text


def test_weights_exported_with_rope_scaling_are_not_trained(
    sft: Settings, out_dir: Path, tmp_path: Path
) -> None:
    folder = export(out_dir / "pretrain_32", tmp_path / "hf", rope_scaling=2)
    text = refusal(ValueError, {**sft, "init_from": str(folder)})
    assert f"{folder} was exported with rope_scaling: start from" in text


@pytest.mark.parametrize(
    ("setting", "line"),
    [
        (
            {"num_hidden_layers": 3},
            "num_hidden_layers: 1 in the weights, 3 in the settings",
        ),
        ({"preset": "demo"}, "hidden_size: 32 in the weights, 128 in the settings"),
        (
            {"rope_theta": 1e6},
            "rope_theta: 100000.0 in the weights, 1000000.0 in the settings",
        ),
        ({"use_moe": True}, "use_moe: False in the weights, True in the settings"),
    ],
)
def test_a_shape_that_differs_shows_both_values(
    setting: Settings, line: str, sft: Settings, out_dir: Path
) -> None:
    run = out_dir / "pretrain_32"
    text = refusal(ValueError, {**sft, "init_from": str(run), **setting})
    assert f"the weights in {run} have another shape than the settings:" in text
    assert f"\n  {line}\n" in text
    assert text.endswith('or to "none".')


@pytest.mark.fault("F46")
def test_another_tokenizer_than_the_weights_is_refused(
    sft: Settings, corpus_file: Path, tmp_path: Path
) -> None:
    other = train_tokenizer([str(corpus_file)], tmp_path / "own", vocab_size=300)
    text = refusal(ValueError, {**sft, "tokenizer": str(other)})
    assert "were trained with another tokenizer: leave " in text


def test_the_tokenizer_comes_with_the_weights(
    sft: Settings, pretrained: tuple[Path, Settings], tmp_path: Path
) -> None:
    own = train_tokenizer([sft["data_path"]], tmp_path / "own", vocab_size=300)
    there = {"out_dir": str(tmp_path / "other"), "tokenizer": str(own)}
    train_here({**pretrained[1], **there})
    plan = draft(TrainConfig(**{**sft, "out_dir": there["out_dir"]}))
    assert plan.tokenizer.fingerprint == read_tokenizer(own).fingerprint
    assert plan.cfg.vocab_size == 300
    assert begin({**sft, **there})[0].cfg.vocab_size == 300, "and may be named"


@pytest.mark.fault("F51")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_name_the_tensor(
    value: float, sft: Settings, weights_file: Path, tmp_path: Path
) -> None:
    state = torch.load(weights_file, weights_only=True)
    state["model.norm.weight"][3] = value
    file = tmp_path / "bad.pth"
    torch.save(state, file)
    named = {"init_from": str(file), "num_attention_heads": 4}
    with pytest.raises(ValueError) as caught:
        train_here({**sft, **named})
    told = f"{file} holds values that are not finite, in model.norm.weight"
    assert str(caught.value) == told


def test_a_damaged_weights_file_is_refused(
    sft: Settings, weights_file: Path, tmp_path: Path
) -> None:
    file = tmp_path / "bad.pth"
    file.write_bytes(weights_file.read_bytes()[:5000])
    text = refusal(ValueError, {**sft, "init_from": str(file)})
    assert text.startswith(f"{file} is damaged or not a weights file: ")
    shutil.copy(file, Path(sft["out_dir"]) / "pretrain_32.pth")
    shutil.rmtree(Path(sft["out_dir"]) / "pretrain_32")
    assert "pretrain_32.pth is damaged or not a weights file: " in refusal(
        ValueError, sft
    )


def test_a_place_without_weights_is_refused(sft: Settings, tmp_path: Path) -> None:
    text = refusal(FileNotFoundError, {**sft, "init_from": str(tmp_path / "nowhere")})
    assert text.startswith(f"{tmp_path / 'nowhere'} does not exist: a run folder, ")


def test_a_damaged_checkpoint_that_is_named_is_refused(
    sft: Settings, out_dir: Path
) -> None:
    checkpoint = out_dir / "pretrain_32" / "checkpoints" / "step_00000001"
    damage(checkpoint / "model.safetensors")
    text = refusal(ValueError, {**sft, "init_from": str(checkpoint)})
    assert text.startswith(f"the checkpoint {checkpoint} is damaged: ")


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def test_a_run_goes_on_though_the_weights_it_began_from_are_gone(
    sft: Settings, out_dir: Path, tmp_path: Path
) -> None:
    kept = tmp_path / "kept"
    shutil.copytree(out_dir, kept)
    train_here(sft, stop_at=2)
    straight = train_here({**sft, "out_dir": str(kept)})[1]
    shutil.rmtree(out_dir / "pretrain_32")
    ending, folder = train_here(sft)
    assert ending == "finished"
    assert state_hashes(folder) == state_hashes(straight)
    assert begin(sft)[0].complete
    renamed = {**sft, "run_name": "another"}
    assert "has no run of stage='pretrain'" in refusal(FileNotFoundError, renamed)
    anew = {**sft, "resume": False}
    assert "has no run of stage='pretrain'" in refusal(FileNotFoundError, anew)


def test_a_run_goes_on_though_the_weights_it_began_from_have_changed(
    pretrained: tuple[Path, Settings], sft: Settings, out_dir: Path
) -> None:
    _, folder = train_here(sft, stop_at=2)
    longer = {**pretrained[1], "out_dir": str(out_dir), "max_steps": 2}
    run = train_here(longer)[1].root
    assert begin(sft)[0].checkpoint == folder.checkpoint_folder(2)
    named = {**sft, "init_from": str(run)}
    with pytest.raises(
        RuntimeError, match="content of init_from: .* in the run, .* now"
    ):
        begin(named)
    allowed = {**named, "allow_change": ("init_from",)}
    assert begin(allowed)[0].checkpoint is not None


def test_a_mixture_fine_tunes_under_its_own_name(
    pretrained: tuple[Path, Settings], sft: Settings, tmp_path: Path
) -> None:
    out = {"out_dir": str(tmp_path / "mixture")}
    train_here({**pretrained[1], **out, "use_moe": True, "n_routed_experts": 3})
    _, folder = train_here({**sft, **out})
    assert folder.root.name == "sft_32_moe"
    assert (tmp_path / "mixture" / "full_sft_32_moe.pth").is_file()
    assert folder.read_config()["settings"]["n_routed_experts"] == 3
    load = json.loads(json.dumps(metric_rows(folder, "train", "expert_load")[0][0]))
    assert [len(layer) for layer in load] == [3]


def test_where_the_weights_are_is_found_without_reading_a_model(out_dir: Path) -> None:
    run = out_dir / "pretrain_32"
    found = find_weights(run)
    assert found.file == run / "checkpoints" / "step_00000001" / "model.safetensors"
    assert (found.stage, found.config.hidden_size) == ("pretrain", 32)
    assert "n_routed_experts" not in found.shape()


def test_a_run_copied_elsewhere_needs_no_run_to_begin_from(
    sft: Settings, tmp_path: Path
) -> None:
    _, source = train_here(sft, stop_at=2)
    straight = train_here({**sft, "run_name": "straight"})[1]
    copied = {"out_dir": str(tmp_path / "elsewhere"), "resume": str(source.root)}
    ending, folder = train_here({**sft, **copied})
    assert (ending, folder.root.parent) == ("finished", tmp_path / "elsewhere")
    assert state_hashes(folder) == state_hashes(straight)


def test_a_new_run_may_begin_from_the_one_it_replaces(
    pretrained: tuple[Path, Settings], out_dir: Path
) -> None:
    run = out_dir / "pretrain_32"
    before = find_weights(run).read().state_dict()[EMBEDDING]
    anew = {"out_dir": str(out_dir), "init_from": str(run), "resume": False}
    seen: list[torch.Tensor] = []

    def look(trainer) -> None:
        seen.append(trainer.model.state_dict()[EMBEDDING].clone())

    assert train_here({**pretrained[1], **anew}, change=look)[0] == "finished"
    assert torch.equal(seen[0], before)
    assert (out_dir / "pretrain_32.old1").is_dir()


def test_a_new_run_may_begin_from_the_weights_file_it_replaces(
    pretrained: tuple[Path, Settings], tmp_path: Path, weights_file: Path
) -> None:
    file = tmp_path / "pretrain_32.pth"
    shutil.copy(weights_file, file)
    settings = {**pretrained[1], "out_dir": str(tmp_path), "init_from": str(file)}
    assert train_here(settings)[0] == "finished"
    assert (tmp_path / "pretrain_32.pth.old1").read_bytes() == weights_file.read_bytes()


def test_the_record_of_what_a_run_began_from_stays(
    sft: Settings, out_dir: Path
) -> None:
    _, folder = train_here(sft, stop_at=2)
    before = folder.read_config()
    copy_run(out_dir, "newer")
    begin(sft)
    shutil.rmtree(out_dir / "newer")
    shutil.rmtree(out_dir / "pretrain_32")
    begin(sft)
    after = folder.read_config()
    assert after["hashes"] == before["hashes"]
    assert after["began_from"] == before["began_from"]


def test_a_pretrained_run_without_an_intact_checkpoint_is_refused(
    sft: Settings, out_dir: Path
) -> None:
    checkpoint = out_dir / "pretrain_32" / "checkpoints" / "step_00000001"
    damage(checkpoint / "model.safetensors")
    assert "no checkpoint in " in refusal(RuntimeError, sft)


def test_no_weights_are_other_ones_than_those_a_run_began_from(sft: Settings) -> None:
    train_here(sft, stop_at=2)
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    none = {**sft, **shape, "rope_theta": 1e5, "init_from": "none"}
    text = refusal(RuntimeError, none)
    assert re.search(
        r"content of init_from: \w{12} in the run, None now\nOptions", text
    )
    prepared, notes = begin({**none, "allow_change": ("init_from",)})
    assert prepared.checkpoint is not None
    assert not [note for note in notes if "None" in note]


def test_a_run_goes_on_though_the_file_it_began_from_is_gone(
    sft: Settings, out_dir: Path, weights_file: Path, tmp_path: Path
) -> None:
    named = tmp_path / "named.pth"
    shutil.copy(weights_file, named)
    shape = {"num_attention_heads": 4, "rope_theta": 1e5}
    sft = {**sft, **shape, "init_from": str(named)}
    train_here(sft, stop_at=2)
    named.unlink()
    ending, folder = train_here(sft)
    assert ending == "finished"
    assert folder.read_config()["began_from"] == str(named)
    with pytest.raises(FileNotFoundError, match=r"named\.pth does not exist: a run"):
        begin({**sft, "run_name": "another"})


def test_what_a_run_began_from_stays_in_its_settings(
    sft: Settings, out_dir: Path
) -> None:
    train_here(sft, stop_at=2)
    shape = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4)
    none = {**shape, "rope_theta": 1e5, "init_from": "none"}
    prepared, _ = begin({**sft, **none, "allow_change": ("init_from",)})
    config = prepared.folder.read_config()
    assert config["settings"]["init_from"] == "auto"
    assert config["began_from"] == str(out_dir / "pretrain_32")


def test_a_new_run_replaces_no_weights(sft: Settings, out_dir: Path) -> None:
    published = out_dir / "full_sft_32.pth"
    published.write_bytes(b"my only copy")
    train_here({**sft, "max_steps": 1})
    assert (out_dir / "full_sft_32.pth.old1").read_bytes() == b"my only copy"
    first = published.read_bytes()
    train_here({**sft, "max_steps": 1, "learning_rate": 1e-2, "run_name": "trial"})
    assert published.read_bytes() == first
    assert (out_dir / "trial.pth").is_file()


@pytest.mark.parametrize("text", ["[]", "{", '{"settings": [1]}'])
def test_an_odd_folder_beside_the_runs_is_passed_over(
    text: str, sft: Settings, out_dir: Path
) -> None:
    odd = out_dir / "odd"
    (odd / "checkpoints" / "step_00000001").mkdir(parents=True)
    (odd / "config.json").write_text(text)
    assert source_of(sft) == out_dir / "pretrain_32"


def test_a_width_that_is_set_does_not_hide_that_the_weights_are_a_mixture(
    pretrained: tuple[Path, Settings], sft: Settings, tmp_path: Path
) -> None:
    out = {"out_dir": str(tmp_path / "mixture")}
    train_here({**pretrained[1], **out, "use_moe": True, "n_routed_experts": 3})
    for _ in range(2):
        plan, _ = begin({**sft, **out, "hidden_size": 32})
        assert plan.folder.root.name == plan.cfg.run_name == "sft_32_moe"


def test_of_several_runs_of_a_stage_one_must_be_named(
    sft: Settings, out_dir: Path
) -> None:
    for width in (32, 64):
        copy_run(out_dir, f"sft_{width}", stage="sft", hidden_size=width)
    with pytest.raises(ValueError, match="several runs of stage='sft': sft_32, sft_64"):
        draft(TrainConfig(**sft))


def test_a_run_that_saved_nothing_starts_over_with_other_settings(
    sft: Settings, weights_file: Path
) -> None:
    begin(sft)
    shape = {"num_attention_heads": 4, "rope_theta": 1e5}
    other = {"init_from": str(weights_file), "learning_rate": 1e-2, "batch_size": 2}
    plan, _ = begin({**sft, **shape, **other})
    assert plan.initial == weights_file
    assert plan.config["began_from"] == str(weights_file)
    assert (plan.cfg.learning_rate, plan.cfg.batch_size) == (1e-2, 2)
