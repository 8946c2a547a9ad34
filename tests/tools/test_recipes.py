"""The tables of recipes are what their script makes."""

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = runpy.run_path(str(ROOT / "tools" / "recipes.py"))


@pytest.mark.parametrize(("document", "made"), SCRIPT["tables"]().items())
def test_a_table_is_as_the_script_makes_it(document, made):
    text = (ROOT / document).read_text(encoding="utf-8")
    assert "minimind2-small" in made and made in text
    assert SCRIPT["fill"](text, made) == text


def test_the_numbers_of_a_row_follow_from_each_other():
    row = SCRIPT["recipe"]("minimind2-small", "pretrain")
    assert row.tokens == 4 * SCRIPT["tokens_of"]("pretrain")
    assert row.hours == pytest.approx(row.tokens / row.speed / 3600)
    large = SCRIPT["recipe"]("minimind2", "pretrain")
    assert large.epochs == 4 and large.memory < 14.6
    assert (large.measured, large.loss) == (False, "not measured")
