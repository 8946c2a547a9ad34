"""The points at which faults are injected are functions of the package."""

import importlib
from operator import attrgetter

import pytest
from support.injection import POINTS


@pytest.mark.parametrize("point", POINTS)
def test_every_point_is_a_function(point: str) -> None:
    module, path, _ = POINTS[point]
    assert callable(attrgetter(path)(importlib.import_module(f"minimind_nb.{module}")))
