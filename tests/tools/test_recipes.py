"""The tables of recipes are what their script makes."""

import pytest
import recipes


@pytest.mark.parametrize(("document", "made"), recipes.tables().items())
def test_a_table_is_as_the_script_makes_it(document, made):
    text = (recipes.ROOT / document).read_text(encoding="utf-8")
    assert "minimind2-small" in made and made in text
    assert recipes.fill(text, made) == text


def test_pretraining_gets_four_epochs_and_fits_a_t4():
    row = recipes.recipe("minimind2", "pretrain")
    assert row.epochs == 4 and row.memory < 14.6
    assert (row.measured, row.loss) == (False, "not measured")
