import math

import pytest

from minimind_nb.monitor.metrics import History, MetricsLog


@pytest.fixture
def make_history(tmp_path):
    """A function that writes a run's metrics and opens them."""

    def make(losses=(), validation=(), name="pretrain_64", total=100, resume=None):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True, exist_ok=True)
        plan = {"total_steps": total, "total_samples": 8 * (total or 0)}
        with MetricsLog(folder / "metrics.jsonl") as log:
            log.append("event", event="start", step=0, seconds=0.0, **plan)
            for step, loss in enumerate(losses, start=1):
                log.append(
                    "train",
                    step=step,
                    samples=8 * step,
                    tokens=4000 * step,
                    seconds=2.0 * step,
                    loss=loss,
                    learning_rate=5e-4,
                    tokens_per_second=2000.4,
                    peak_memory_gib=[0.5, 0.25],
                    skipped_steps=0,
                )
                if step == resume:
                    log.append(
                        "event", event="resume", step=step, seconds=2.0 * step, **plan
                    )
            for step, loss in validation:
                log.append(
                    "eval",
                    step=step,
                    samples=8 * step,
                    tokens=4000 * step,
                    seconds=2.0 * step,
                    loss=loss,
                    perplexity=math.exp(loss),
                    bits_per_byte=1.25,
                )
        return History.load(folder)

    return make
