"""Resuming: what continues, what is refused, what is never touched."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from support.runs import (
    Settings,
    logged,
    metric_rows,
    notes_of,
    prepare_here,
    state_hashes,
    train_here,
    tree,
)

from minimind_nb.data.tokenizer import read_tokenizer, write_tokenizer
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.model.loading import load
from minimind_nb.storage.run_folder import NoGoodCheckpoint, RunFolder
from minimind_nb.training import preparation


@pytest.mark.fault("F37")
def test_a_finished_run_is_complete(settings: Settings) -> None:
    _, folder = train_here({**settings, "max_steps": 2})
    before = tree(folder.root)
    assert notes_of({**settings, "max_steps": 2}) == ([], True)
    after = tree(folder.root)
    assert after == before


@pytest.mark.fault("F32")
def test_another_setting_is_refused_with_three_ways_on(settings: Settings) -> None:
    _, folder = train_here({**settings, "max_steps": 2})
    before = tree(folder.root)
    with pytest.raises(RuntimeError) as error:
        changed = {"learning_rate": 1e-3, "min_learning_rate": 1e-4}
        changed |= {"global_batch": 16, "accumulation_steps": None}
        notes_of({**settings, **changed})
    text = str(error.value)
    assert "global_batch: 8 in the run, 16 now" in text
    assert "learning_rate: 0.003 in the run, 0.001 now" in text
    assert 'run_name="…"' in text
    assert "resume=False" in text
    assert 'allow_change=["global_batch", "learning_rate", "min_learning_rate"]' in text
    assert tree(folder.root) == before


def test_allow_change_goes_on_with_the_new_value(settings: Settings) -> None:
    train_here({**settings, "max_steps": 4})
    changed = {
        "global_batch": 4,
        "accumulation_steps": None,
        "allow_change": ("global_batch",),
        "max_steps": 8,
    }
    ending, folder = train_here({**settings, **changed})
    assert ending == "finished"
    samples = [row[0] for row in metric_rows(folder, "train", "samples")]
    assert samples == [8, 16, 24, 32, 36, 40, 44, 48], "none repeated, none skipped"


@pytest.mark.fault("F114")
@pytest.mark.parametrize("place", ["gone", "a link to nowhere"])
def test_a_run_whose_checkpoints_are_gone_does_not_start_again(
    place: str, settings: Settings, tmp_path: Path
) -> None:
    _, folder = train_here(settings)
    folder.lock_file.unlink()
    before = tree(folder.root.parent)
    folder.checkpoints.rename(tmp_path / "elsewhere")
    if place != "gone":
        folder.checkpoints.symlink_to(tmp_path / "nowhere")
    told = r"records a checkpoint at step 12, which is missing in .* resume=False"
    with pytest.raises(NoGoodCheckpoint, match=told):
        prepare_here(settings)
    folder.checkpoints.unlink(missing_ok=True)
    (tmp_path / "elsewhere").rename(folder.checkpoints)
    folder.lock_file.unlink()  # it tells who held it last
    assert tree(folder.root.parent) == before
    assert prepare_here(settings).complete


@pytest.mark.fault("F115")
def test_a_checkpoint_of_another_run_is_set_aside(
    settings: Settings, tmp_path: Path
) -> None:
    settings["schedule"] = "cosine"
    _, other = train_here({**settings, "seed": 8, "out_dir": str(tmp_path / "other")})
    _, folder = train_here({**settings, "max_steps": 8})
    whole = state_hashes(folder)
    shutil.copytree(other.checkpoint_folder(12), folder.checkpoint_folder(12))
    notes, _ = notes_of(settings)
    assert f"{folder.root} is resumed from step 8 of 12" in notes
    reason = folder.checkpoints / "step_00000012.corrupt.txt"
    assert reason.read_text() == "it is of another run\n"
    assert state_hashes(folder) == whole


@pytest.mark.parametrize(
    "change",
    [{"settings": {}}, {"hashes": None}, {"settings": {"hidden_size": "x"}}],
    ids=str,
)
def test_a_configuration_that_was_spoiled_is_named(
    change: dict, settings: Settings
) -> None:
    _, folder = train_here({**settings, "max_steps": 1})
    config = json.loads(folder.config_file.read_bytes())
    folder.config_file.write_text(json.dumps(config | change))
    with pytest.raises(ValueError, match=r"pretrain_32/config\.json"):
        prepare_here(settings)


@pytest.mark.fault("F103")
def test_a_finished_run_that_lost_its_last_checkpoint_makes_it_again(
    settings: Settings,
) -> None:
    _, folder = train_here(settings)
    whole = state_hashes(folder)
    shutil.rmtree(folder.checkpoint_folder(12))
    notes, _ = notes_of(settings)
    assert notes == [f"{folder.root} is resumed from step 8 of 12"]
    train_here(settings)
    assert state_hashes(folder) == whole


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"max_seq_len": 64}, "changes from 32 to 64: documents are packed into other"),
        ({"val_fraction": 0.1}, "from 0.05 to 0.1: other documents are held out; if"),
    ],
    ids=str,
)
def test_what_changes_with_a_setting_is_told(
    changed: Settings, told: str, settings: Settings
) -> None:
    train_here({**settings, "max_steps": 2})
    notes, _ = notes_of({**settings, **changed, "allow_change": (*changed,)})
    assert told in notes[0]


@pytest.mark.fault("F37")
def test_more_steps_continue_a_cosine_and_say_so(settings: Settings) -> None:
    settings["schedule"] = "cosine"
    train_here({**settings, "max_steps": 4})
    notes, complete = notes_of({**settings, "max_steps": 8})
    assert not complete
    assert "is resumed from step 4 of 8" in notes[0]
    assert "differs from a run planned that long" in notes[1]
    _, folder = train_here({**settings, "max_steps": 8})
    steps = [row[0] for row in metric_rows(folder, "train", "step")]
    assert steps == [1, 2, 3, 4, 5, 6, 7, 8]


def test_resume_false_keeps_the_old_folder_under_another_name(
    settings: Settings,
) -> None:
    _, folder = train_here({**settings, "max_steps": 2})
    before = tree(folder.root)
    train_here({**settings, "max_steps": 1, "resume": False})
    kept = tree(folder.root.with_name("pretrain_32.old1"))
    assert before.items() <= kept.items()
    assert state_hashes(folder)[0] == 1


def test_a_read_only_run_is_copied_and_goes_on(
    settings: Settings, tmp_path: Path
) -> None:
    _, source = train_here(settings, stop_at=3)
    straight = train_here({**settings, "out_dir": str(tmp_path / "straight")})[1]
    before = tree(source.root)
    elsewhere = {"out_dir": str(tmp_path / "elsewhere"), "resume": str(source.root)}
    _, folder = train_here({**settings, **elsewhere})
    assert state_hashes(folder) == state_hashes(straight)
    assert tree(source.root) == before
    notes, complete = notes_of({**settings, **elsewhere})
    assert complete, "the copy stands further than the source and is left as it is"
    assert "was copied before" in notes[0]


def test_a_copy_of_a_finished_run_can_be_opened(
    settings: Settings, tmp_path: Path
) -> None:
    _, source = train_here({**settings, "max_steps": 2})
    elsewhere = {"out_dir": str(tmp_path / "elsewhere"), "resume": str(source.root)}
    prepared = prepare_here({**settings, **elsewhere, "max_steps": 2})
    assert prepared.complete
    assert tree(prepared.folder.tokenizer) == tree(source.tokenizer)
    assert load(prepared.folder.root)[0].config.hidden_size == 32


def test_a_copy_never_lands_on_a_run_that_stands_behind(
    settings: Settings, tmp_path: Path
) -> None:
    _, source = train_here({**settings, "max_steps": 4})
    there = {"out_dir": str(tmp_path / "there"), "max_steps": 1}
    train_here({**settings, **there})
    with pytest.raises(
        FileExistsError, match="is at step_00000001, .* at step_00000004"
    ):
        notes_of({**settings, **there, "resume": str(source.root)})


@pytest.mark.parametrize("part", ["tokenizer", "checkpoints"])
def test_a_copied_run_follows_no_link_to_a_folder(
    settings: Settings, tmp_path: Path, part: str
) -> None:
    _, source = train_here({**settings, "max_steps": 2})
    secret = tmp_path / "secret"
    (source.root / part).rename(secret)
    (source.root / part).symlink_to(secret)
    elsewhere = {"out_dir": str(tmp_path / "elsewhere"), "resume": str(source.root)}
    with pytest.raises(ValueError, match=f"{part}/.* is behind a link that leads out"):
        notes_of({**settings, **elsewhere})
    assert not (tmp_path / "elsewhere" / "pretrain_32").exists()


def test_files_of_a_desktop_in_checkpoints_damage_none(settings: Settings) -> None:
    _, folder = train_here(settings, stop_at=6)
    for checkpoint in folder.checkpoint_folders():
        (checkpoint / ".DS_Store").touch()
        (checkpoint / ".ipynb_checkpoints").mkdir()
    assert "is resumed from step 6 of 12" in notes_of(settings)[0][0]
    assert not [*folder.checkpoints.glob("*.corrupt*")]


@pytest.mark.fault("F38")
def test_a_weights_file_is_nothing_to_go_on_from(settings: Settings) -> None:
    train_here({**settings, "max_steps": 2})
    file = str(Path(settings["out_dir"]) / "pretrain_32.pth")
    with pytest.raises(ValueError, match="rounded weights .* with init_from="):
        train_here({**settings, "resume": file, "run_name": "other"})
    assert not (Path(settings["out_dir"]) / "other").exists()


@pytest.mark.fault("F36")
def test_a_run_of_an_earlier_version_goes_on(settings: Settings) -> None:
    _, folder = train_here({**settings, "max_steps": 2})
    config = folder.read_config()
    del config["settings"]["wandb_project"], config["settings"]["sample_tokens"]
    config["settings"]["gone_since"] = 7
    config["versions"] |= {"torch": "2.5.0", "minimind_nb": "0.0.1"}
    folder.write_config(config)
    ending, _ = train_here({**settings, "max_steps": 4})
    assert (ending, state_hashes(folder)[0]) == ("finished", 4)


@pytest.mark.fault("F38")
def test_resume_from_a_path_that_is_no_run(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="is not a run folder"):
        notes_of({**settings, "resume": str(tmp_path)})


def test_other_data_under_the_same_name_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    shutil.copy(settings["data_path"], data)
    settings["data_path"] = str(data)
    train_here({**settings, "max_steps": 2})
    with data.open("a") as file:
        file.write(json.dumps({"text": "one more document"}) + "\n")
    with pytest.raises(
        RuntimeError,
        match=r"content of data_path: \w{12} in the run, \w{12} now\nOptions",
    ):
        notes_of(settings)
    data.rename(tmp_path / "moved.jsonl")
    shutil.copy(tmp_path / "moved.jsonl", data)
    settings["allow_change"] = ("data_path", "val_path")
    assert notes_of(settings)[0]


def test_the_same_content_under_another_name_goes_on(
    settings: Settings, tmp_path: Path
) -> None:
    train_here({**settings, "max_steps": 2})
    moved = tmp_path / "moved.jsonl"
    shutil.copy(settings["data_path"], moved)
    settings["data_path"] = str(moved)
    assert "is resumed from step 1 of 12" in notes_of(settings)[0][0]


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_chat_template_counts_for_chats_only(
    stage: str, settings: Settings, sft_settings: Settings, tmp_path: Path
) -> None:
    settings = sft_settings if stage == "sft" else settings
    folder, spec = tmp_path / "tokenizer", read_tokenizer()
    write_tokenizer(spec, folder)
    settings = {**settings, "tokenizer": str(folder)}
    train_here({**settings, "max_steps": 2})
    commented = f"{{# a comment #}}{spec.chat_template}"
    write_tokenizer(dataclasses.replace(spec, chat_template=commented), folder)
    if stage == "sft":
        with pytest.raises(RuntimeError, match="content of tokenizer: "):
            prepare_here(settings)
        return
    plan = prepare_here(settings)
    assert plan.done == 1, "the checkpoint from before the decay"
    assert plan.tokenizer == spec, "the run and its token cache keep their own"
    assert load(plan.folder.root)[1].chat_template == spec.chat_template
    other = dataclasses.replace(spec, eos_token=spec.pad_token)
    write_tokenizer(other, folder)
    with pytest.raises(RuntimeError, match="content of tokenizer: "):
        prepare_here(settings)


@pytest.mark.fault("F31")
def test_more_processes_keep_the_global_batch(settings: Settings) -> None:
    train_here({**settings, "max_steps": 2})
    two = {**settings, "num_processes": 2, "accumulation_steps": 2}
    prepared = prepare_here(two)
    assert prepared.cfg.accumulation_steps == 1
    assert prepared.cfg.global_batch == 8


def test_processes_that_cannot_keep_the_global_batch_are_refused(
    settings: Settings,
) -> None:
    train_here({**settings, "max_steps": 2})
    with pytest.raises(
        RuntimeError, match="global_batch=8 cannot be split among num_processes=3"
    ):
        notes_of({**settings, "num_processes": 3})


@pytest.mark.fault("F22")
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(
    settings: Settings, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, straight = train_here({**settings, "out_dir": str(tmp_path / "straight")})
    _, folder = train_here(settings, stop_at=9)
    weights = folder.checkpoint_folder(9) / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    train_here(settings)
    assert "step_00000009 is not used: model.safetensors has the wrong" in caplog.text
    assert (folder.checkpoints / "step_00000009.corrupt").is_dir()
    assert state_hashes(folder) == state_hashes(straight)


@pytest.mark.fault("F35")
def test_a_checkpoint_of_another_shape_is_refused(settings: Settings) -> None:
    _, folder = train_here({**settings, "max_steps": 2})
    other = {**settings, "hidden_size": 48, "run_name": "pretrain_32"}
    weights, config = state_hashes(folder), folder.read_config()
    with pytest.raises(
        RuntimeError, match="hidden_size: 32 in the run, 48 now"
    ) as error:
        train_here(other)
    assert "allow_change" not in str(error.value), "no run can change its shape"
    with pytest.raises(ValueError, match="hidden_size is part of the weights. shape"):
        train_here({**other, "allow_change": ("hidden_size", "intermediate_size")})
    assert (state_hashes(folder), folder.read_config()) == (weights, config)


@pytest.mark.fault("F58")
def test_a_run_in_use_is_refused_before_anything_is_tokenised(
    settings: Settings,
) -> None:
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    with folder.lock(), pytest.raises(RuntimeError, match="is in use by pid"):
        notes_of(settings)
    assert not (Path(settings["out_dir"]) / "cache").exists()


@pytest.mark.fault("F32")
@pytest.mark.parametrize("accumulation_steps", [2, 3])
def test_a_batch_that_is_set_splits_the_global_batch_and_is_told_if_it_cannot(
    settings: Settings, accumulation_steps: int
) -> None:
    train_here({**settings, "max_steps": 2})  # 4 rows, twice
    two = {"num_processes": 2, "accumulation_steps": accumulation_steps}
    with logged() as notes:
        cfg = prepare_here({**settings, **two}).cfg
    split = (cfg.batch_size, cfg.accumulation_steps, cfg.global_batch)
    assert split == (4, 1, 8)
    assert notes[0] == (
        "batch_size=4 × accumulation_steps=1 on num_processes=2 keeps the global batch "
        "of 8"
    )


@pytest.mark.fault("F32")
@pytest.mark.parametrize("global_batch", [4, 12])
def test_another_global_batch_takes_every_sample_once(
    settings: Settings, global_batch: int
) -> None:
    settings = {**settings, "max_steps": None, "epochs": 1, "log_interval": 100}
    train_here(settings, stop_at=2)
    other = {"global_batch": global_batch, "allow_change": ("global_batch",)}
    ending, folder = train_here({**settings, **other, "accumulation_steps": None})
    assert ending == "finished"
    straight = train_here({**settings, "run_name": "straight"})[1]
    columns = ("train", "samples", "tokens")
    assert metric_rows(folder, *columns)[-1] == metric_rows(straight, *columns)[-1]


@pytest.mark.fault("F37")
def test_more_epochs_take_every_sample_of_them(settings: Settings) -> None:
    settings = {**settings, "max_steps": None, "log_interval": 100}
    _, folder = train_here({**settings, "epochs": 1})
    (rows,) = metric_rows(folder, "train", "samples")[-1]
    assert rows % 8, "the first epoch must end within a step for this test"
    train_here({**settings, "epochs": 2})
    assert metric_rows(folder, "train", "samples")[-1] == (2 * rows,)


@pytest.mark.fault("F104")
def test_weights_that_were_not_written_at_the_end_are_written_by_the_next_call(
    settings: Settings,
) -> None:
    _, folder = train_here({**settings, "max_steps": 2})
    weights = folder.root.parent / "pretrain_32.pth"
    weights.unlink()
    RankRecord(folder.record_file(0), 0).fail(OSError("the disk is full"))
    assert train_here({**settings, "max_steps": 2})[0] == "finished"
    assert weights.is_file()


@pytest.mark.fault("F120")
def test_a_run_is_found_again_though_its_configuration_is_gone(
    settings: Settings,
) -> None:
    straight = state_hashes(train_here({**settings, "run_name": "straight"})[1])
    train_here(settings, stop_at=6)
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    folder.config_file.unlink()
    shutil.rmtree(folder.tokenizer)
    ending, folder = train_here(settings)
    assert ending == "finished"
    assert state_hashes(folder)[1:] == straight[1:]


def test_a_run_with_other_settings_is_not_copied(
    settings: Settings, tmp_path: Path
) -> None:
    _, source = train_here({**settings, "max_steps": 1})
    elsewhere = {"out_dir": str(tmp_path / "elsewhere"), "resume": str(source.root)}
    with pytest.raises(RuntimeError, match="seed: 7 in the run, 8 now"):
        notes_of({**settings, **elsewhere, "seed": 8})
    assert not (tmp_path / "elsewhere" / "pretrain_32").exists()


def test_another_precision_is_told(settings: Settings) -> None:
    train_here({**settings, "max_steps": 2})
    notes, _ = notes_of({**settings, "dtype": "bfloat16"})
    assert notes[0].startswith("dtype changes from 'float32' to 'bfloat16': results")


def test_a_precision_that_was_set_is_kept_by_every_later_call(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = {"device": "cpu", "num_processes": 1, "dtype": "bfloat16"}
    monkeypatch.setattr(preparation, "machine_defaults", lambda *_: machine)
    train_here(settings, stop_at=2)
    bare = {name: value for name, value in settings.items() if name != "dtype"}
    for step in (4, 6):
        _, folder = train_here(bare, stop_at=step)
        assert folder.settings()["dtype"] == "float32"


def test_a_validation_that_a_stop_left_out_is_made_on_resume(
    settings: Settings,
) -> None:
    _, folder = train_here(settings, stop_at=settings["eval_interval"])
    assert metric_rows(folder, "eval", "step") == [(0,)]
    train_here(settings)
    steps = [step for (step,) in metric_rows(folder, "eval", "step")]
    assert steps == [0, 4, 8, 12]


def test_what_is_asked_may_change_and_what_is_learned_may_not(
    dpo_settings: Settings,
) -> None:
    train_here({**dpo_settings, "max_steps": 1})
    asked = {"sample_prompts": ("猫?",), "sample_tokens": 3, "max_steps": 2}
    _, folder = train_here({**dpo_settings, **asked})
    assert metric_rows(folder, "sample", "step", "prompt")[-1] == (2, "猫?")
    with pytest.raises(RuntimeError, match=r"dpo_beta: 0\.1 in the run, 0\.2 now"):
        notes_of({**dpo_settings, "dpo_beta": 0.2})
    with pytest.raises(RuntimeError, match="stage: 'dpo' in the run, 'sft' now"):
        notes_of({**dpo_settings, "stage": "sft", "run_name": "dpo_32"})
