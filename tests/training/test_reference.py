"""The reference of preferences: the initial weights, kept with the run."""

import shutil
from pathlib import Path

import pytest
from support.runs import (
    Settings,
    metric_rows,
    prepare_here,
    state_hashes,
    train_here,
    tree,
)

from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import evaluation


def test_the_reference_computes_validation_pairs_once(
    dpo_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = evaluation.with_reference, []

    def counted(batch, reference):
        calls.append(batch.samples)
        return real(batch, reference)

    monkeypatch.setattr(evaluation, "with_reference", counted)
    _, folder = train_here({**dpo_settings, "eval_interval": 1, "max_steps": 3})
    held_out = sum(calls) - metric_rows(folder, "train", "samples")[-1][0]
    assert 0 < held_out < 10, "four validations, whose pairs are looked at once"


def test_preferences_begin_where_the_reference_stands(dpo_settings: Settings) -> None:
    """Also if the reference is the weights of the previous stage."""
    sft = {**dpo_settings, "stage": "sft"}
    rows = Path(dpo_settings["data_path"]).read_text(encoding="utf-8")
    file = Path(dpo_settings["out_dir"]).with_name("chats.jsonl")
    file.write_text(rows.replace('"chosen"', '"conversations"'), encoding="utf-8")
    train_here({**sft, "data_path": str(file), "max_steps": 3})
    _, folder = train_here({**dpo_settings, "init_from": "auto", "max_steps": 1})
    assert "sft_32" in folder.read_config()["began_from"]
    ((margin, accuracy),) = metric_rows(folder, "eval", "reward_margin", "accuracy")[:1]
    assert (margin, accuracy) == (pytest.approx(0, abs=1e-5), 0.5)
    assert (folder.root.parent / "dpo_32.pth").is_file()


@pytest.fixture
def tuned(dpo_settings: Settings, chat_file: Path) -> Settings:
    """Preferences that start from a run of fine-tuning."""
    sft = {**dpo_settings, "stage": "sft", "data_path": str(chat_file)}
    train_here({**sft, "max_steps": 2})
    return {**dpo_settings, "init_from": "auto"}


def remove_initial_weights(settings: Settings) -> None:
    shutil.rmtree(Path(settings["out_dir"]) / "sft_32")
    (Path(settings["out_dir"]) / "full_sft_32.pth").unlink()


@pytest.mark.parametrize("initial", ["gone", "changed"])
def test_a_resumed_run_keeps_its_reference(
    initial: str, tuned: Settings, chat_file: Path, tmp_path: Path
) -> None:
    straight = tmp_path / "straight"
    shutil.copytree(tuned["out_dir"], straight)
    train_here({**tuned, "out_dir": str(straight)})
    _, folder = train_here(tuned, stop_at=2)
    if initial == "gone":
        remove_initial_weights(tuned)
    else:
        sft = {**tuned, "stage": "sft", "data_path": str(chat_file)}
        train_here({**sft, "init_from": "none", "max_steps": 3})
    train_here(tuned)
    assert state_hashes(folder) == state_hashes(RunFolder(straight / "dpo_32"))


@pytest.mark.parametrize("kept", ["gone", "damaged"])
def test_a_lost_reference_is_restored_from_the_initial_weights_or_refused(
    kept: str, tuned: Settings
) -> None:
    _, folder = train_here(tuned, stop_at=2)
    (file,) = folder.root.glob("reference.*")
    before = file.read_bytes()
    if kept == "gone":
        file.unlink()
    else:
        file.write_bytes(before[:-1])
    prepare_here(tuned)
    assert file.read_bytes() == before
    file.unlink()
    remove_initial_weights(tuned)
    with pytest.raises(RuntimeError, match="initial weights .* changed or are missing"):
        prepare_here(tuned)


def test_a_copy_of_a_run_keeps_the_reference(tuned: Settings, tmp_path: Path) -> None:
    straight = tmp_path / "straight"
    shutil.copytree(tuned["out_dir"], straight)
    train_here({**tuned, "out_dir": str(straight)})
    _, source = train_here(tuned, stop_at=3)
    remove_initial_weights(tuned)
    before = tree(source.root)
    elsewhere = {"out_dir": str(tmp_path / "elsewhere"), "resume": str(source.root)}
    _, folder = train_here({**tuned, **elsewhere})
    assert tree(source.root) == before
    assert state_hashes(folder) == state_hashes(RunFolder(straight / "dpo_32"))
