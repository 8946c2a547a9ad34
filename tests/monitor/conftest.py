import json
import math

import pytest

from minimind_nb.config import TrainConfig, resolve
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

    def make(
        losses=(),
        validation=(),
        total=100,
        resume=None,
        name="out/pretrain_64",
        **begin,
    ):
        history = History(tmp_path / name / "metrics.jsonl")
        history.path.parent.mkdir(parents=True, exist_ok=True)
        plan = {"total_steps": total} | begin
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


@pytest.fixture
def preferences(make_history, add_rows):
    """The history of three steps of preference optimisation."""
    history = make_history(name="out/dpo_64", stage="dpo", cut=12, dropped=3)
    for step, margin in enumerate((0.1, 0.3, 0.5), start=1):
        scores = {"reward_margin": margin, "accuracy": margin + 0.2, "kl": margin / 10}
        add_rows(history, step, loss=0.7 - margin / 5, **scores)
    with MetricsLog(history.path) as log:
        scores = {"reward_margin": 0.434, "accuracy": 0.71, "kl": -0.0123}
        log.append("eval", **at(3), loss=0.612, **scores)
    history.refresh()
    return history


@pytest.fixture
def mixture(make_history, add_rows):
    """The history of a mixture of two layers of four experts, of two steps."""
    history = make_history(name="out/pretrain_64_moe")
    even, uneven = [0.25] * 4, [0.1, 0.2, 0.3, 0.4]
    add_rows(history, 1, expert_load=[even, even], aux_loss=0.01)
    add_rows(history, 2, expert_load=[even, uneven], aux_loss=0.0123)
    return history


@pytest.fixture
def add_answers():
    """A function that logs the answers of a step, "A0" to the prompt "Q0" and so on."""

    def add(history, *steps, answer="A{number}, {step}", prompts=("Q0", "Q1")):
        with MetricsLog(history.path) as log:
            for step in steps:
                for number, prompt in enumerate(prompts):
                    text = answer.format(number=number, step=step)
                    row = {"number": number, "prompt": prompt, "answer": text}
                    log.append("sample", **at(step), **row)
        history.refresh()

    return add


@pytest.fixture
def write_config():
    """A function that writes the config.json of a history's run, returning its settings."""

    def write(history, **settings):
        shape = json.loads(json.dumps(vars(resolve(TrainConfig(**settings)))))
        config = {"settings": shape, "explicit": [*settings]}
        (history.path.parent / "config.json").write_text(json.dumps(config))
        return shape

    return write
