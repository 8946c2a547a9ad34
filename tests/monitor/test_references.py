"""What reference runs say of other runs, and where they say nothing."""

import json
from typing import Any

import pytest

from minimind_nb.config import TrainConfig, count_parameters, resolve
from minimind_nb.monitor import references
from minimind_nb.monitor.references import expected_loss

DEMO: dict[str, Any] = {"preset": "demo", "max_seq_len": 256}


def settings(**changes: Any) -> dict[str, Any]:
    asked: Any = DEMO | {"data_path": "mine.jsonl"} | changes
    return vars(resolve(TrainConfig(**asked)))


def test_the_demo_recipe_has_a_reference_of_its_own() -> None:
    recipe = settings(data_path="demo", recipe="demo")
    assert expected_loss(recipe, 491_520).endswith(" on the demo corpus")
    assert not expected_loss(settings(data_path="demo"), 491_520)
    assert not expected_loss(settings(recipe="demo"), 491_520)


@pytest.mark.parametrize(
    ("tokens", "loss"),
    [
        (900, "5.00"),
        (1_000, "5.00"),
        (10_000, "4.50"),
        (100_000, "4.00"),
        (120_000, "4.00"),
    ],
)
def test_ends_are_interpolated_over_the_logarithm_of_tokens(
    tmp_path, monkeypatch, tokens: int, loss: str
) -> None:
    rows = [(1_000, 4.9), (1_000, 5.1), (100_000, 4.0)]
    base: dict[str, Any] = {
        "stage": "pretrain",
        "recipe": None,
        "optimizer": "muon",
        "corpus": "c",
    }
    base |= {"parameters": count_parameters(settings())["active"]}
    ends = [{**base, "tokens": count, "loss": end} for count, end in rows]
    (tmp_path / "references.json").write_text(json.dumps(ends))
    monkeypatch.setattr(references.resources, "files", lambda _: tmp_path)
    assert expected_loss(settings(), tokens).startswith(f"{loss} on mixed Chinese")
    for changes in (
        {"optimizer": "adamw"},
        {"num_hidden_layers": 12},
        {"stage": "sft"},
    ):
        assert not expected_loss(settings(**changes), tokens)
    assert not expected_loss(settings(), 700)
    assert not expected_loss(settings(), 130_000)
