import math

import pytest

from minimind_nb.monitor.metrics import History, MetricsLog


def at(step):
    return {
        "step": step,
        "samples": 8 * step,
        "tokens": 4000 * step,
        "seconds": 2.0 * step,
    }


@pytest.fixture
def add_rows():
    """A function that logs a training row for each step and reads them."""

    def add(history, *steps, loss=3.0, **fields):
        with MetricsLog(history.path) as log:
            for step in steps:
                row = {
                    "loss": loss,
                    "tokens_per_second": 2000.4,
                    "peak_memory_gib": [0.5, 0.25],
                    "skipped_steps": 0,
                }
                log.append("train", **(at(step) | row | fields))
        history.refresh()

    return add


@pytest.fixture
def make_history(tmp_path, add_rows):
    """A function that writes a run's metrics and opens them."""

    def make(losses=(), validation=(), total=100, resume=None):
        history = History(tmp_path / "out" / "pretrain_64" / "metrics.jsonl")
        history.path.parent.mkdir(parents=True, exist_ok=True)
        plan = {"total_steps": total}
        with MetricsLog(history.path) as log:
            log.append("event", event="start", **at(0), **plan)
        for step, loss in enumerate(losses, start=1):
            add_rows(history, step, loss=loss)
            if step == resume:
                with MetricsLog(history.path) as log:
                    log.append("event", event="resume", **at(step), **plan)
        with MetricsLog(history.path) as log:
            for step, loss in validation:
                scores = {"perplexity": math.exp(loss), "bits_per_byte": 1.25}
                log.append("eval", **at(step), loss=loss, **scores)
        history.refresh()
        return history

    return make
