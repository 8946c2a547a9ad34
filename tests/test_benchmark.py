import re
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from support.runs import train_here

from minimind_nb import benchmark
from minimind_nb.benchmark import bench
from minimind_nb.config import TrainConfig
from minimind_nb.hardware import detect_hardware

SETTINGS = {"preset": "demo", "max_seq_len": 64, "batch_size": 2, "device": "cpu"}


@pytest.fixture
def brief(monkeypatch, tmp_path) -> None:
    """Few steps and short products, in a folder of temporary files of its own."""
    monkeypatch.setattr(benchmark, "_STEP_SECONDS", 0.01)
    monkeypatch.setattr(benchmark, "_PRODUCT_SECONDS", 0.01)
    threads = lambda size, _: ThreadPoolExecutor(size)  # noqa: E731
    monkeypatch.setattr(benchmark, "ProcessPoolExecutor", threads)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def test_a_benchmark_measures_the_real_step_and_leaves_nothing(brief, tmp_path):
    cfg = TrainConfig(**SETTINGS, dtype="float32", num_processes=1, run_name="mine")
    facts = bench(cfg)
    found = re.fullmatch(
        r"([\d,]+) text tokens/s in steps of 2 × 64, fill ([\d.]+)", facts["training"]
    )
    assert found and float(found[2]) > 0.9 and found[1] != "0"
    assert re.fullmatch(r"[\d.]+ TFLOP/s in float32", facts["products"])
    assert facts["model"].endswith("of products, MFU unknown")
    assert list(facts)[-1] == "to send in"
    line = facts["to send in"]
    assert re.match(r"minimind_nb [\d.]+, torch \S+, ", line)
    shape = "pretrain of preset demo, 1.6 M parameters, 2 × 64"
    assert f"float32 on 1 × cpu, {shape}, {found[1]} text" in line
    assert str(tmp_path) not in str(facts) and "mine" not in str(facts)
    assert [p.name for p in tmp_path.rglob("*")][:2] == ["out", "cache"]
    assert not [p for p in tmp_path.rglob("*") if "mine" in p.name]


def test_chats_are_measured_in_the_shape_of_the_weights_they_start_from(tmp_path):
    place = {"out_dir": tmp_path, "hidden_size": 64, "preset": "demo", "max_steps": 1}
    train_here({"data_path": "demo", "max_seq_len": 64, "batch_size": 1, **place})
    chats = TrainConfig(stage="sft", out_dir=str(tmp_path))
    found = benchmark._with_new_weights(chats, detect_hardware())
    assert (found.hidden_size, found.num_hidden_layers) == (64, 4)
    assert found.init_from == "none"


def test_an_interrupt_is_passed_on(brief, monkeypatch, tmp_path):
    class Stopped:
        status = "interrupted"

        class history:  # noqa: N801
            select = staticmethod(lambda kind: [])

    monkeypatch.setattr(benchmark, "train", lambda *_, **__: Stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(TrainConfig(**SETTINGS))
    assert not list(tmp_path.glob("minimind_nb_*"))
