import re
import tempfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from minimind_nb import benchmark
from minimind_nb.benchmark import bench
from minimind_nb.config import TrainConfig
from minimind_nb.planning import measure_products

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
    assert float(facts["start-up"].removesuffix(" s")) > 0.5
    assert facts["model"].endswith("of products, MFU unknown")
    assert list(facts)[-1] == "to send in"
    line = facts["to send in"]
    assert re.match(r"minimind_nb [\d.]+, torch \S+, ", line)
    assert f"float32 on 1 × cpu, 1.6 M parameters, 2 × 64, {found[1]} text" in line
    assert str(tmp_path) not in str(facts) and "mine" not in str(facts)
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_passed_on(brief, monkeypatch, tmp_path):
    class Stopped:
        class history:  # noqa: N801
            select = staticmethod(lambda kind: [])

    monkeypatch.setattr(benchmark, "train", lambda *_, **__: Stopped)
    with pytest.raises(KeyboardInterrupt):
        bench(TrainConfig(**SETTINGS))
    assert not list(tmp_path.iterdir())


def test_products_are_counted_in_their_precision():
    rates = [measure_products("cpu", kind, 0.01) for kind in ("float32", "bfloat16")]
    assert all(1e8 < rate < 1e16 for rate in rates)
