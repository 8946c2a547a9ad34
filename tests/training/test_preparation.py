"""What is refused before anything dear runs, and leaves what was there untouched."""

import errno
import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
from support.runs import Settings, logged, notes_of, prepare_here, train_here, tree

from minimind_nb.config import ResolvedConfig, TrainConfig
from minimind_nb.data import token_cache
from minimind_nb.data.jsonl import DataError
from minimind_nb.hardware import Gpu, Hardware
from minimind_nb.training import machine as machine_module
from minimind_nb.training import preparation
from minimind_nb.training.preparation import draft


def refuse(settings: Settings, error: type[Exception], text: str) -> None:
    """Preparing raises that error, and leaves no run behind."""
    with pytest.raises(error, match=text):
        prepare_here(settings)
    assert not list(Path(settings["out_dir"]).glob("pretrain*"))


def test_what_is_no_configuration_is_refused() -> None:
    config: Any = {"data_path": "demo"}
    with pytest.raises(TypeError, match="expected a TrainConfig, found dict"):
        draft(config)


def test_data_must_be_named(settings: Settings) -> None:
    refuse({**settings, "data_path": None}, ValueError, "data_path is not set")


def test_a_missing_file_is_named(settings: Settings) -> None:
    missing = settings["data_path"] + "x"
    refuse({**settings, "data_path": missing}, FileNotFoundError, "did you mean")
    del settings["val_fraction"]
    refuse({**settings, "val_path": missing}, FileNotFoundError, "does not exist")


def test_weights_to_begin_from_that_are_not_there_are_named(settings: Settings) -> None:
    refuse({**settings, "init_from": "no.pth"}, FileNotFoundError, "no.pth does not ex")


@pytest.mark.fault("F39")
def test_a_malformed_row_is_named_by_line(settings: Settings, tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"text": "good"}\n{"text": 3}\n')
    refuse({**settings, "data_path": str(data)}, DataError, r"bad\.jsonl:2:")


def test_a_file_of_empty_texts_has_nothing_to_train_on(
    settings: Settings, tmp_path: Path
) -> None:
    data = tmp_path / "empty.jsonl"
    data.write_text('{"text": ""}\n')
    refuse({**settings, "data_path": str(data)}, ValueError, "has no text to use")


@pytest.mark.fault("F47")
def test_one_document_trains_without_validation(
    settings: Settings, tmp_path: Path
) -> None:
    data = tmp_path / "one.jsonl"
    data.write_text(json.dumps({"text": "only one document"}) + "\n")
    with logged() as notes:
        prepared = prepare_here({**settings, "data_path": str(data)})
    assert prepared.total_steps == 1
    assert any("can be held out, so there is no validation" in n for n in notes)


@pytest.mark.parametrize(
    ("max_steps", "told"),
    [
        (1000, r"epochs=1 end after \d+ steps, before max_steps=1,000: raise epochs"),
        (None, r"only \d+ steps, .* raise epochs=1, or lower global_batch=8"),
    ],
)
def test_a_run_that_ends_early_is_told_before_it_starts(
    max_steps: int | None, told: str, settings: Settings
) -> None:
    notes, _ = notes_of({**settings, "epochs": 1, "max_steps": max_steps})
    assert len([note for note in notes if re.search(told, note)]) == 1


def test_a_vocabulary_smaller_than_the_tokenizer_is_refused(settings: Settings) -> None:
    refuse({**settings, "vocab_size": 100}, ValueError, "too small for the tokenizer")


def test_a_tokenizer_that_is_not_there_is_refused(settings: Settings) -> None:
    refuse({**settings, "tokenizer": "nowhere"}, FileNotFoundError, "no tokenizer at")


@pytest.mark.fault("F29")
def test_a_file_in_the_place_of_out_dir(settings: Settings, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    with pytest.raises(OSError, match="file cannot be written .* out_dir=…"):
        prepare_here({**settings, "out_dir": str(file)})
    assert file.read_text() == "mine"


@pytest.mark.parametrize("data_path", [None, "demo"])
def test_a_file_in_the_place_of_the_cache(
    settings: Settings, data_path: str | None
) -> None:
    file = Path(settings["out_dir"]) / "cache"
    file.parent.mkdir()
    file.write_text("mine")
    settings["data_path"] = data_path or settings["data_path"]
    text = (
        r"^.*cache cannot be written \(File exists\): .* move away a file of that name"
    )
    with pytest.raises(FileExistsError, match=text):
        draft(TrainConfig(**settings))
    assert file.read_text() == "mine"


@pytest.mark.fault("F29")
def test_a_read_only_out_dir(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(**_: Any) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryFile", refused)
    refuse(settings, OSError, r"cannot be written \(Read-only file system\)")


@pytest.mark.fault("F28")
def test_a_disk_too_small_is_refused_before_the_run(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage:
        free, total = 1000, 10_000

    prepare_here({**settings, "run_name": "tokenised"})
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    refuse(settings, OSError, "MiB free, but 3 checkpoints of")


@pytest.mark.fault("F28")
def test_a_disk_too_small_for_the_tokens_is_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_cache, "_CACHE_SHARE", 1 << 50)
    refuse(settings, OSError, r"the disk is full: tokens-.* needs at least \d+\.\d MiB")


def test_a_resumed_run_needs_no_room_for_checkpoints_that_exist(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_here({**settings, "keep_checkpoints": 3}, stop_at=10)

    class Usage:
        free, total = 1000, 10_000

    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage)
    with pytest.raises(OSError, match="MiB free, but 1 checkpoint of"):
        prepare_here({**settings, "keep_checkpoints": 3})


def machine(monkeypatch: pytest.MonkeyPatch, *gpus: Gpu) -> None:
    hardware = Hardware(gpus, cpu_cores=4, cpu_native_bf16=False, memory_gib=29.0)
    for module in (machine_module, preparation):
        monkeypatch.setattr(module, "detect_hardware", lambda: hardware)


T4 = Gpu("Tesla T4", (7, 5), 14.6)


def test_two_t4_become_two_processes_in_fp16(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, T4, T4)
    for name in ("device", "num_processes", "dtype"):
        settings.pop(name)
    cfg = draft(TrainConfig(**settings)).cfg
    assert (cfg.device, cfg.num_processes, cfg.dtype) == ("cuda", 2, "float16")


def test_the_cpu_can_be_chosen_where_there_are_gpus(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch, T4, T4)
    for name in ("num_processes", "dtype"):
        settings.pop(name)
    cfg = draft(TrainConfig(**settings)).cfg
    assert (cfg.device, cfg.num_processes, cfg.dtype) == ("cpu", 1, "float32")


def test_gpus_that_are_not_there_are_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    refuse({**settings, "device": "cuda"}, ValueError, "no GPU was found")
    machine(monkeypatch, T4)
    two = {**settings, "device": "cuda", "num_processes": 2, "dtype": None}
    refuse(two, ValueError, "num_processes=2 is too many for 1 GPUs")


def test_a_gpu_that_torch_was_not_built_for_is_refused_with_the_remedy(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    p100 = Gpu("Tesla P100-PCIE-16GB", (6, 0), 15.9)
    hardware = Hardware((p100,), 4, False, 29.0, architectures="sm_70 sm_75")
    monkeypatch.setattr(preparation, "detect_hardware", lambda: hardware)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    words = 'P100.* too old .*; use device="cpu" or .*Accelerator → GPU T4 x2'
    refuse({**settings, "device": None}, ValueError, words)


def test_processes_without_number_are_refused(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(monkeypatch)
    many = {**settings, "num_processes": 17}
    refuse(many, ValueError, "num_processes=17 is too many for 4 CPU cores")


def test_an_empty_out_dir_is_the_working_folder(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    prepared = prepare_here({**settings, "out_dir": ""})
    assert prepared.folder.exists()


def test_elsewhere_than_on_linux_one_process_trains(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine_module.sys, "platform", "darwin")
    assert draft(TrainConfig(**settings)).cfg.num_processes == 1
    refuse(
        {**settings, "num_processes": 2},
        ValueError,
        "too many for .* on darwin; use at most 1",
    )


@pytest.mark.fault("F109")
def test_a_refused_run_leaves_the_run_that_is_there_untouched(
    settings: Settings, tmp_path: Path
) -> None:
    prepare_here(settings)
    before = tree(Path(settings["out_dir"]))
    bad = tmp_path / "bad.jsonl"
    bad.write_text("[]\n{}\n")
    with pytest.raises(DataError):
        prepare_here({**settings, "data_path": str(bad)})
    after = tree(Path(settings["out_dir"]))
    others = ("cache", ".pretrain_32.lock")  # which tells who held it last
    assert {k: v for k, v in after.items() if not k.startswith(others)} == {
        k: v for k, v in before.items() if not k.startswith(others)
    }


def test_rows_left_out_are_listed_in_the_run_folder_and_counted(
    settings: Settings, tmp_path: Path
) -> None:
    data = tmp_path / "some.jsonl"
    good = [json.dumps({"text": f"document {n} is good"}) for n in range(9)]
    data.write_text("\n".join([*good, '{"text": 3}']) + "\n")
    skip = {"on_bad_line": "skip", "max_bad_fraction": 0.2, "data_path": str(data)}
    with logged() as notes:
        prepared = prepare_here({**settings, **skip})
    rejected = (prepared.folder.root / "rejected.jsonl").read_text().splitlines()
    assert [json.loads(line)["line"] for line in rejected] == [10]
    assert any("1 malformed rows are skipped" in note for note in notes)
    assert sum(prepared.folder.read_config()["rejected_rows"].values()) == 1


def test_the_configuration_tells_what_was_set_from_what_was_resolved(
    settings: Settings,
) -> None:
    prepared = prepare_here(settings)
    config = prepared.folder.read_config()
    assert "hidden_size" in config["explicit"]
    assert "rope_theta" not in config["explicit"]
    assert config["settings"]["rope_theta"] == 1e6
    assert ResolvedConfig(**config["settings"]) == prepared.cfg
