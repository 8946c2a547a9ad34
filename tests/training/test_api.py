"""`train` as a user calls it: spawned ranks, one and several."""

import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.chats import chat
from support.runs import (
    HeldStop,
    Settings,
    metric_rows,
    run_here,
    state_hashes,
    train_here,
    tree,
)

import minimind_nb as mm
from minimind_nb import diagnosis
from minimind_nb.data.chat_template import ChatEncoder
from minimind_nb.data.conversations import IN_LOSS
from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.launch import spawn
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.launch.spawn import Job
from minimind_nb.monitor.metrics import History
from minimind_nb.storage.run_folder import RunFolder, RunLocked
from minimind_nb.training import launching, worker

REPORTED = ("step", "samples", "tokens", "loss", "aux_loss", "learning_rate")


def train(settings: Settings, **changes: object) -> RunFolder:
    run = mm.train(mm.TrainConfig(**{**settings, **changes}), view=False)
    assert run.status == "finished"
    return RunFolder(run.folder)


def test_two_ranks_equal_one_over_20_steps(settings: Settings, tmp_path: Path) -> None:
    settings = {**settings, "max_steps": 20, "epochs": 5}
    one = train(settings, out_dir=str(tmp_path / "one"))
    two = train(settings, num_processes=2, batch_size=2, out_dir=str(tmp_path / "two"))
    losses = [
        [loss for (loss,) in metric_rows(folder, "train", "loss")]
        for folder in (one, two)
    ]
    assert len(losses[0]) == 20
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    counts = ("samples", "tokens", "step")
    assert metric_rows(one, "train", *counts) == metric_rows(two, "train", *counts)
    memory = metric_rows(two, "train", "peak_memory_gib")[-1][0]
    assert len(memory) == 2


@pytest.mark.usefixtures("forked")
@pytest.mark.fault("F01")
def test_three_ranks_killed_and_resumed_equal_an_unbroken_run(
    settings: Settings, tmp_path: Path
) -> None:
    """Two ranks could not show an order of additions that changes: two terms commute."""
    settings = {**settings, "num_processes": 3, "batch_size": 1, "dropout": 0.1}
    settings |= {"max_steps": 24, "save_interval": 3, "epochs": 2}
    straight = train(settings, out_dir=str(tmp_path / "straight"))
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    killed: list[int] = []

    def kill_rank_1(history: History) -> None:
        last = history.last("train")
        record = RankRecord.read(folder.record_file(1))
        if last and last["step"] >= 4 and record and not killed:
            killed.append(record.pid)
            os.kill(record.pid, signal.SIGKILL)

    with pytest.raises(mm.TrainingFailed, match="rank 1 was killed by SIGKILL at step"):
        mm.train(mm.TrainConfig(**settings), view=kill_rank_1)
    assert mm.Run(folder.root).status in ("failed", "killed")
    step = state_hashes(folder)[0]
    assert 3 <= step < 24
    train(settings)
    assert state_hashes(folder) == state_hashes(straight)
    rows = {row[0]: row for row in metric_rows(folder, "train", *REPORTED)}
    expected = {row[0]: row for row in metric_rows(straight, "train", *REPORTED)}
    assert rows == expected, "the same samples and losses, step by step"


@pytest.mark.usefixtures("forked")
@pytest.mark.fault("F06")
def test_a_failure_in_one_rank_is_the_error_in_the_cell(settings: Settings) -> None:
    settings["schedule"] = "cosine"  # resumed from the newest checkpoint
    cfg = mm.TrainConfig(**{**settings, "max_steps": 3})
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    train(settings, max_steps=2)
    state = folder.checkpoint_folder(2) / "state.json"
    assert json.loads(state.read_text())["progress"]["step"] == 2
    weights = Path(settings["out_dir"]) / "pretrain_32.pth"
    weights.unlink()
    weights.mkdir()
    (weights / "in_the_way").touch()
    with pytest.raises(mm.TrainingFailed) as failure:
        mm.train(cfg, view=False)
    text = str(failure.value)
    assert text.startswith("rank 0 failed at step 3 of 3: OSError: saving at step 3")
    assert "Traceback (most recent call last)" in text
    assert "resumes from the newest checkpoint that verifies" in text
    assert mm.Run(folder.root).status == "failed"


@pytest.mark.usefixtures("forked")
@pytest.mark.fault("F58")
def test_a_second_call_is_refused_from_preparation_to_end(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = mm.TrainConfig(**settings)
    refused: list[float] = []

    def call_again() -> None:
        began = time.monotonic()
        with pytest.raises(RunLocked, match=f"is in use by pid {os.getpid()} on"):
            mm.train(cfg, view=False)
        refused.append(time.monotonic() - began)

    real = launching.run_processes

    def run_processes(job: Job, on_poll: Callable[[], None]) -> str:
        call_again()
        ending = real(job, on_poll)
        call_again()
        return ending

    monkeypatch.setattr(launching, "run_processes", run_processes)
    assert mm.train(cfg, view=False).status == "finished"
    assert len(refused) == 2 and max(refused) < 10.0, "at once"
    assert not RunFolder(Path(settings["out_dir"]) / "pretrain_32").is_locked()


@pytest.mark.usefixtures("forked")
@pytest.mark.fault("F118")
def test_metrics_that_cannot_be_read_for_a_moment_end_nothing(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, failed = History.refresh, []

    def refresh(history: History) -> None:
        if history.rows and len(failed) < 2:
            failed.append(1)
            raise OSError(24, "Too many open files")
        real(history)

    monkeypatch.setattr(History, "refresh", refresh)
    monkeypatch.setattr(spawn, "POLL_SECONDS", 0.01)  # many looks, however fast it is
    shown: list[int] = []
    longer = {"max_steps": 150, "epochs": 99, "eval_interval": 99, "save_interval": 99}
    cfg = mm.TrainConfig(**{**settings, **longer})
    assert mm.train(cfg, view=lambda h: shown.append(h.rows[-1]["step"])).status
    assert len(failed) == 2
    assert shown[-1] == 150


@pytest.mark.usefixtures("forked")
def test_a_change_of_the_directory_meanwhile_loses_no_run(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    cfg = mm.TrainConfig(**{**settings, "out_dir": "out", "max_steps": 2})
    run = mm.train(cfg, view=lambda _: os.chdir(tmp_path / "elsewhere"))
    assert run.status == "finished"
    assert run.folder == tmp_path / "out" / "pretrain_32"
    assert (run.folder / "summary.md").is_file()
    assert run.config["settings"]["out_dir"] == "out", "as it was given"


@pytest.mark.usefixtures("forked")
def test_rows_that_a_damaged_checkpoint_lost_are_not_shown(settings: Settings) -> None:
    folder = train(settings, max_steps=8)
    (folder.checkpoint_folder(8) / "model.safetensors").write_bytes(b"damaged")
    shown: list[int] = []
    cfg = mm.TrainConfig(**{**settings, "max_steps": 9})
    mm.train(cfg, view=lambda history: shown.append(history.rows[-1]["step"]))
    assert (shown[0], shown[-1]) == (6, 9)


@pytest.mark.slow
@pytest.mark.fault("F119", "F03")
def test_a_script_without_outputs_trains_and_is_imported_once(
    settings: Settings, tmp_path: Path
) -> None:
    """Its imports may take long, and no rank makes them again."""
    script, seen = tmp_path / "script.py", tmp_path / "seen"
    script.write_text(
        f"open({str(seen)!r}, 'a').write('imported ')\n"
        "import minimind_nb as mm\n"
        "if __name__ == '__main__':\n"
        f"    mm.train(mm.TrainConfig(**{settings!r}))\n"
    )
    command = f"exec {sys.executable} {script} <&- >&- 2>&-"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    assert folder.status() == "finished"
    assert seen.read_text() == "imported "


def test_a_tracker_that_is_not_there_is_told_before_anything_is_written(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match="use_wandb=True needs wandb"):
        mm.train(mm.TrainConfig(**settings, use_wandb=True))
    assert not Path(settings["out_dir"]).exists()


@pytest.mark.fault("F10")
def test_sigterm_saves_and_the_command_line_exits_with_143(settings: Settings) -> None:
    settings = {**settings, "max_steps": 100_000, "epochs": 20_000}
    settings |= {"save_interval": 50_000, "eval_interval": 50_000, "log_interval": 50}
    options = [part for k, v in settings.items() for part in (f"--{k}", str(v))]
    folder = RunFolder(Path(settings["out_dir"]) / "pretrain_32")
    process = subprocess.Popen(
        [sys.executable, "-m", "minimind_nb", "pretrain", *options],
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step "):
            process.terminate()
            break
    process.stderr.read()
    assert process.wait(timeout=60) == 143
    record = RankRecord.read(folder.record_file(0))
    assert record is not None
    assert record.status == "terminated"
    assert state_hashes(folder)[0] == record.step, "no step was lost"


@pytest.mark.parametrize(
    ("phase", "starts"), [("meeting", 2), ("training", 1), ("startup", 1)]
)
def test_only_ranks_that_did_not_meet_are_started_once_more(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, phase: str, starts: int
) -> None:
    jobs: list[Job] = []

    def fail(job: Job, on_poll: object) -> str:
        jobs.append(job)
        raise mm.TrainingFailed("no answer", 0, phase)

    monkeypatch.setattr(launching, "run_processes", fail)
    with pytest.raises(mm.TrainingFailed, match="no answer"):
        mm.train(mm.TrainConfig(**settings), view=False)
    assert len(jobs) == starts


def test_gpus_that_do_not_meet_are_tried_without_p2p_and_then_without_shm() -> None:
    assert launching._RETRIES["cuda"] == [
        {"NCCL_P2P_DISABLE": "1"},
        {"NCCL_SHM_DISABLE": "1"},
    ]


@pytest.mark.usefixtures("forked")
def test_ranks_time_a_sum_of_gradients(tmp_path: Path) -> None:
    job = Job(diagnosis._TIME_SUMS, RunFolder(tmp_path), 2)
    assert launching.connect(job, "cpu", lambda: None) == "finished"
    found = (tmp_path / "all_reduce").read_text()
    assert re.fullmatch(r"[1-9]\d* ms for 25 M gradients, no P2P", found)


def losses_of(folder: RunFolder) -> list[float]:
    return [loss for (loss,) in metric_rows(folder, "train", "loss")]


@pytest.mark.usefixtures("forked")
@pytest.mark.parametrize("seq_aux", [True, False])
def test_two_ranks_of_a_mixture_equal_one(
    settings: Settings, tmp_path: Path, seq_aux: bool
) -> None:
    """The loss that balances over the batch is no sum over ranks; it is 0 here."""
    alpha = 0.1 if seq_aux else 0.0
    moe = {"use_moe": True, "seq_aux": seq_aux, "aux_loss_alpha": alpha}
    settings = {**settings, **moe, "max_steps": 10}
    _, one = train_here({**settings, "out_dir": str(tmp_path / "one")})
    two = train(settings, num_processes=2, batch_size=2)
    assert len(losses_of(one)) == 10
    assert losses_of(one) == pytest.approx(losses_of(two), abs=1e-5)
    apart = [metric_rows(folder, "train", "aux_loss") for folder in (one, two)]
    assert [x for (x,) in apart[0]] == pytest.approx([x for (x,) in apart[1]], abs=1e-5)
    assert (apart[0][0][0] > 0.1) is seq_aux
    loads = [metric_rows(folder, "train", "expert_load") for folder in (one, two)]
    for (a,), (b,) in zip(*loads, strict=True):
        assert a == [pytest.approx(layer, abs=0.02) for layer in b]
        assert [sum(layer) for layer in b] == pytest.approx([1, 1])


@pytest.mark.usefixtures("forked")
def test_two_ranks_with_an_expert_that_gets_no_token_end_together(
    sft_settings: Settings, tmp_path: Path
) -> None:
    """A rank that gets no row at the end of the data has none for any expert."""
    moe = {"use_moe": True, "n_routed_experts": 8, "num_experts_per_tok": 1}
    few = {"batch_size": 2, "max_steps": None, "epochs": 1, "max_seq_len": 62}
    settings = {**sft_settings, **moe, **few}
    _, one = train_here({**settings, "out_dir": str(tmp_path / "one")})
    two = train(settings, num_processes=2, batch_size=1)
    assert losses_of(one) == pytest.approx(losses_of(two), abs=1e-5)
    shares = [
        layer for (load,) in metric_rows(two, "train", "expert_load") for layer in load
    ]
    assert any(0.0 in layer for layer in shares)
    assert metric_rows(two, "train", "samples")[-1][0] % 2 == 1


@pytest.mark.usefixtures("forked")
def test_two_ranks_of_preferences_equal_one(
    dpo_settings: Settings, tmp_path: Path
) -> None:
    """They share the reference's work, too."""
    _, one = train_here({**dpo_settings, "out_dir": str(tmp_path / "one")})
    two = train(dpo_settings, num_processes=2, batch_size=2)
    for kind in ("train", "eval"):
        names = ("loss", "reward_margin", "kl")
        for name in names:
            rows = [metric_rows(folder, kind, name) for folder in (one, two)]
            found = [[value for (value,) in row] for row in rows]
            assert found[0] == pytest.approx(found[1], abs=1e-5)
    counts = ("step", "samples", "tokens")
    assert metric_rows(one, "train", *counts) == metric_rows(two, "train", *counts)


def score_by_hand(
    run: RunFolder, texts: list[tuple[list[int], list[bool]]], text_bytes: int
) -> dict[str, float]:
    """Loss of the learned tokens of each text alone, and what follows from it."""
    model, _ = mm.load(run.root)
    total, count = 0.0, 0
    for ids, learned in texts:
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0].double()
        chances = logits.log_softmax(-1)
        for t, target in enumerate(ids[1:]):
            if learned[t + 1]:
                total -= float(chances[t, target])
                count += 1
    loss = total / count
    bits = total / math.log(2) / text_bytes
    return {"loss": loss, "perplexity": math.exp(loss), "bits_per_byte": bits}


def rank_settings(count: int) -> Settings:
    return {"num_processes": count, "device": "cpu", "dtype": "float32"}


@pytest.mark.usefixtures("forked")
def test_a_file_of_text_is_measured_by_two_processes_as_by_hand(
    settings: Settings, tmp_path: Path
) -> None:
    _, run = train_here({**settings, "max_steps": 3, "document_mask": True})
    before = tree(run.root)
    spec = read_tokenizer()
    texts = [f"text {n} 猫 " * n for n in range(1, 8)]
    file = tmp_path / "texts.jsonl"
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    file.write_text("\n".join(lines), encoding="utf-8")
    encoded = BulkEncoder(spec).encode(texts)
    ids = [[spec.bos_id, *each.tolist(), spec.eos_id] for each in encoded]
    size = sum(len(text.encode()) for text in texts)
    expected = score_by_hand(run, [(one, [True] * len(one)) for one in ids], size)
    mask = {"max_seq_len": 200, "document_mask": True, "batch_size": 1}
    scores = mm.evaluate(run.root, file, **mask, **rank_settings(2))
    assert {name: scores[name] for name in expected} == pytest.approx(
        expected, rel=1e-5
    )
    assert scores["documents"] == 7
    assert "perplexity" in repr(scores) and "<table" in scores._repr_html_()
    after = tree(run.root)
    assert before.items() <= after.items(), "nothing of the run is changed"


def test_the_answers_of_chats_are_measured_as_by_hand(
    sft_settings: Settings, chat_file: Path, measured_here: None
) -> None:
    _, run = train_here({**sft_settings, "max_steps": 3})
    chats = [json.loads(line)["conversations"] for line in chat_file.open()]
    encoder = ChatEncoder(read_tokenizer())
    texts = []
    for ids, marks in (encoder.encode(chat(one)) for one in chats):
        texts.append((ids.tolist(), [bool(mark & IN_LOSS) for mark in marks]))
    size = sum(
        len(message["content"].encode())
        for chat in chats
        for message in chat
        if message["role"] == "assistant"
    )
    expected = score_by_hand(run, texts, size)
    scores = mm.evaluate(run.root, chat_file, batch_size=3, **rank_settings(1))
    assert {name: scores[name] for name in expected} == pytest.approx(
        expected, rel=1e-5
    )
    assert (scores["documents"], scores["cut"], scores["dropped"]) == (50, 0, 0)


def test_what_does_not_fit_is_counted_by_evaluate(
    sft_settings: Settings, tmp_path: Path, measured_here: None
) -> None:
    _, run = train_here({**sft_settings, "max_steps": 1})
    ask = {"role": "user", "content": "a"}
    said = [{"role": "assistant", "content": "word " * n} for n in (1, 1, 99)]
    chats = [[ask, said[0]], [ask, said[1], ask, said[2]], [ask, said[2]]]
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"conversations": c}) + "\n" for c in chats))
    scores = mm.evaluate(run.root, file, max_seq_len=64, **rank_settings(1))
    assert (scores["documents"], scores["cut"], scores["dropped"]) == (2, 1, 1)


def test_a_weights_file_is_measured_with_the_shape_of_its_run_or_what_is_given(
    settings: Settings, measured_here: None
) -> None:
    _, run = train_here({**settings, "max_steps": 1})
    data = {"data_path": settings["data_path"], "max_seq_len": 64}
    of_run = mm.evaluate(run.root, **data, **rank_settings(1))
    file = run.root.parent / "pretrain_32.pth"
    alone = file.parent / "alone.pth"
    shutil.copy(file, alone)
    heads = {"num_attention_heads": 4}
    for source, shape in ((file, {}), (alone, heads)):
        of_file = mm.evaluate(source, **data, **shape, **rank_settings(1))
        assert of_file["loss"] == pytest.approx(of_run["loss"], abs=1e-3)
    few = mm.evaluate(run.root, eval_tokens=50, **data, **rank_settings(1))
    assert few["documents"] < of_run["documents"] == 70


def test_stretched_weights_are_measured_on_longer_rows(
    settings: Settings, tmp_path: Path, measured_here: None
) -> None:
    _, run = train_here({**settings, "max_steps": 1})
    length = run.settings()["max_seq_len"]
    text = "many words 猫 " * 100
    file = tmp_path / "long.jsonl"
    file.write_text(json.dumps({"text": text}) + "\n")
    spec = read_tokenizer()
    ids = [spec.bos_id, *BulkEncoder(spec).encode([text])[0].tolist(), spec.eos_id]
    scaling = {"factor": 16, "attention_factor": 5}
    model, _ = mm.load(run.root, rope_scaling=scaling)
    assert length < len(ids) <= 16 * length
    row = torch.tensor([ids])
    with torch.no_grad():
        expected = model(row, labels=row).loss.item()
    scores = mm.evaluate(run.root, file, rope_scaling=scaling, **rank_settings(1))
    assert scores["loss"] == pytest.approx(expected, abs=3e-5)
    plain = mm.evaluate(run.root, file, max_seq_len=16 * length, **rank_settings(1))
    assert abs(plain["loss"] - expected) > 1e-4


def test_a_file_that_is_neither_text_nor_chats_is_refused(
    settings: Settings, tmp_path: Path
) -> None:
    _, run = train_here({**settings, "max_steps": 1})
    file = tmp_path / "pairs.jsonl"
    file.write_text('{"chosen": [], "rejected": []}\n')
    text = (
        r"pairs\.jsonl has neither texts nor conversations, its first row the keys "
        r"\['chosen', 'rejected'\]: expected is one"
    )
    with pytest.raises(mm.DataError, match=text):
        mm.evaluate(run.root, file)
    file.write_text("nothing of JSON\n")
    with pytest.raises(mm.DataError, match=r"pairs\.jsonl:1:1: the line begins"):
        mm.evaluate(run.root, file)
    with pytest.raises(FileNotFoundError, match="nowhere does not exist: a run"):
        mm.evaluate(tmp_path / "nowhere", settings["data_path"])
    with pytest.raises(FileNotFoundError, match=r"gone\.jsonl does not exist"):
        mm.evaluate(run.root, tmp_path / "gone.jsonl")


@pytest.fixture
def measured_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one process would do is done in this one."""

    def measure_here(job: Job, on_poll: object) -> str:
        record = RankRecord(job.folder.record_file(0), 0)
        return run_here(worker.measure, job.folder, record, HeldStop())

    monkeypatch.setattr(launching, "run_processes", measure_here)


def test_a_run_is_measured_by_its_handle_and_its_best_checkpoint(
    settings: Settings, measured_here: None
) -> None:
    every = {"save_interval": 1, "eval_interval": 1, "max_steps": 40, "epochs": 12}
    _, folder = train_here({**settings, **every, "learning_rate": 1.0}, stop_at=4)
    best, last = folder.best_checkpoint(), folder.newest_good_checkpoint()
    assert best is not None and last is not None
    assert best < last, "so steep that it must get worse"
    run, path = mm.Run(folder.root), settings["data_path"]
    ask = {"max_seq_len": 32, "eval_tokens": 300, **rank_settings(1)}
    scores = [mm.evaluate(run, path, which, **ask) for which in ("best", "last")]
    assert scores[0]["loss"] < scores[1]["loss"]
    again = mm.evaluate(best, path, **ask)
    assert again["loss"] == scores[0]["loss"]
