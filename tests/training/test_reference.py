"""The reference of preferences: computed once, kept, and never another one."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from support.runs import Settings, metric_rows, state_hashes, train_here, tree

from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import reference

NAMES = ("step", "samples", "tokens", "loss", "reward_margin", "accuracy", "kl")


class Counted:
    """Stands for `_compute`: counts how often it is called."""

    def __init__(self) -> None:
        self.real = reference._compute
        self.calls = 0

    def __call__(self, *arguments):
        self.calls += 1
        return self.real(*arguments)


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Counted:
    counted = Counted()
    monkeypatch.setattr(reference, "_compute", counted)
    return counted


def values_of(folder: RunFolder) -> dict[str, list[float]]:
    names = ("training", "validation")
    return {name: np.fromfile(folder.reference / name).tolist() for name in names}


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[0] ^= 1
    file.write_bytes(data)


def test_the_pass_tells_how_far_it_is(
    dpo_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reference, "_TELL_SECONDS", 0.0)
    _, folder = train_here({**dpo_settings, "batch_size": 1}, stop_at=1)
    text = folder.metrics_file.read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    told = [row for row in rows if row.get("event") == "reference"]
    trained_on = [row["pairs"] for row in told if row["total_pairs"] > 25]
    assert trained_on == sorted(trained_on)
    assert len(trained_on) > 2
    assert trained_on[-1] == told[0]["total_pairs"]


def test_the_second_start_reads_what_the_first_computed(
    dpo_settings: Settings, computed: Counted
) -> None:
    _, folder = train_here(dpo_settings, stop_at=2)
    assert computed.calls == 2, "training and validation"
    before = tree(folder.reference)
    values = values_of(folder)
    assert len(values["training"]) == 100, "one a document of the cache"
    both = np.array(list(values.values()))
    assert ((both < 0).sum(0) == 1).all(), "each is trained on or held out"
    train_here(dpo_settings)
    assert computed.calls == 2
    assert tree(folder.reference) == before


def test_the_values_depend_on_neither_batch_nor_rows(
    dpo_settings: Settings, tmp_path: Path
) -> None:
    _, folder = train_here({**dpo_settings, "max_steps": 1})
    other = {"batch_size": 7, "out_dir": str(tmp_path / "other"), "max_steps": 1}
    _, again = train_here({**dpo_settings, **other})
    for name, values in values_of(folder).items():
        assert values_of(again)[name] == pytest.approx(values, rel=1e-5)


@pytest.mark.fault("F108")
@pytest.mark.parametrize("how", ["damaged", "incomplete", "gone"])
def test_what_is_damaged_is_computed_again_with_equal_values(
    how: str, dpo_settings: Settings, tmp_path: Path, computed: Counted
) -> None:
    straight = train_here({**dpo_settings, "out_dir": str(tmp_path / "straight")})[1]
    _, folder = train_here(dpo_settings, stop_at=2)
    before = values_of(folder)
    if how == "damaged":
        damage(folder.reference / "training")
    elif how == "incomplete":
        (folder.reference / "validation").unlink()
    else:
        shutil.rmtree(folder.reference)
    train_here(dpo_settings)
    assert computed.calls == 6
    assert values_of(folder) == before
    assert state_hashes(folder) == state_hashes(straight)


def test_other_data_and_other_first_weights_are_another_reference(
    dpo_settings: Settings, computed: Counted
) -> None:
    short = {**dpo_settings, "max_steps": 1}
    _, other = train_here({**short, "run_name": "other", "seed": 8})
    _, folder = train_here(short)
    first = values_of(folder)
    file = Path(dpo_settings["out_dir"]).with_name("more.jsonl")
    shutil.copy(dpo_settings["data_path"], file)
    with file.open("a", encoding="utf-8") as more:
        more.write(file.read_text(encoding="utf-8").splitlines()[0] + "\n")
    allowed = {"allow_change": ("data_path", "val_path"), "max_steps": 2}
    train_here({**short, "data_path": str(file), **allowed})
    assert len(values_of(folder)["training"]) == 102
    assert values_of(folder)["training"][:100] == pytest.approx(
        first["training"], rel=1e-5
    )
    train_here({**short, "init_from": str(other.root), "resume": False})
    assert values_of(folder)["training"] != first["training"]
    assert computed.calls == 8


def test_preferences_begin_where_the_reference_stands(dpo_settings: Settings) -> None:
    """Also where weights of the stage before, and so others than new ones, are it."""
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
    """Preferences that begin from a run of fine-tuning."""
    sft = {**dpo_settings, "stage": "sft", "data_path": str(chat_file)}
    train_here({**sft, "max_steps": 2})
    return {**dpo_settings, "init_from": "auto"}


def test_a_run_keeps_its_reference_though_the_weights_it_began_from_changed(
    tuned: Settings, chat_file: Path, tmp_path: Path
) -> None:
    straight = tmp_path / "straight"
    shutil.copytree(tuned["out_dir"], straight)
    train_here({**tuned, "out_dir": str(straight)})
    _, folder = train_here(tuned, stop_at=2)
    before = values_of(folder)
    sft = {**tuned, "stage": "sft", "data_path": str(chat_file), "init_from": "none"}
    train_here({**sft, "max_steps": 3})
    train_here(tuned)
    assert values_of(folder) == before
    assert state_hashes(folder) == state_hashes(RunFolder(straight / "dpo_32"))


def test_a_run_goes_on_with_its_reference_though_the_weights_are_gone(
    tuned: Settings, tmp_path: Path, computed: Counted
) -> None:
    straight = tmp_path / "straight"
    shutil.copytree(tuned["out_dir"], straight)
    train_here({**tuned, "out_dir": str(straight)})
    _, folder = train_here(tuned, stop_at=2)
    shutil.rmtree(Path(tuned["out_dir"]) / "sft_32")
    (Path(tuned["out_dir"]) / "full_sft_32.pth").unlink()
    train_here(tuned)
    assert computed.calls == 4
    assert state_hashes(folder) == state_hashes(RunFolder(straight / "dpo_32"))


@pytest.mark.parametrize("weights", ["gone", "changed"])
def test_a_reference_that_cannot_be_computed_again_is_not_made_up(
    weights: str, tuned: Settings, chat_file: Path
) -> None:
    _, folder = train_here(tuned, stop_at=2)
    before = values_of(folder)
    shutil.rmtree(folder.reference)
    if weights == "gone":
        shutil.rmtree(Path(tuned["out_dir"]) / "sft_32")
        (Path(tuned["out_dir"]) / "full_sft_32.pth").unlink()
    else:
        sft = {**tuned, "stage": "sft", "data_path": str(chat_file)}
        train_here({**sft, "init_from": "none", "max_steps": 3})
    try:
        train_here(tuned)
    except (ValueError, OSError, RuntimeError) as error:
        print(error)
        return
    assert values_of(folder) == before


def test_a_copy_of_a_run_keeps_the_reference(
    dpo_settings: Settings, tmp_path: Path, computed: Counted
) -> None:
    _, source = train_here(dpo_settings, stop_at=3)
    straight = train_here({**dpo_settings, "out_dir": str(tmp_path / "straight")})[1]
    assert computed.calls == 4
    before = tree(source.root)
    elsewhere = {"out_dir": str(tmp_path / "elsewhere"), "resume": str(source.root)}
    _, folder = train_here({**dpo_settings, **elsewhere})
    assert computed.calls == 4
    assert tree(folder.reference) == tree(source.reference)
    assert tree(source.root) == before
    assert state_hashes(folder) == state_hashes(straight)


@pytest.mark.fault("F108")
@pytest.mark.parametrize("reason", ["interrupted", "time_budget"])
def test_computing_the_reference_can_be_stopped(
    reason: str, dpo_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = reference.answer_log_probabilities
    asked = []

    def wish(t, build):
        t.stop.reason = reason
        return prepare(t, build)

    def counted(model, batch):
        asked.append(batch.samples)
        return real(model, batch)

    from minimind_nb.training import worker

    prepare = worker.prepare_reference
    with monkeypatch.context() as patch:
        patch.setattr(worker, "prepare_reference", wish)
        patch.setattr(reference, "answer_log_probabilities", counted)
        ending, folder = train_here(dpo_settings)
    assert ending == reason
    assert sum(asked) == 32, "a few batches between two looks"
    assert not folder.reference.exists()
    assert train_here({**dpo_settings, "max_steps": 1})[0] == "finished"
