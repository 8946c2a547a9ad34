"""Each test's rows of the list of faults, into the report that `make faults` counts."""

import pytest
from support.rows import ROWS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for mark in item.iter_markers("fault"):
            assert {*mark.args} <= ROWS.keys(), f"{item.nodeid}: {mark.args}"
            item.user_properties += [("fault", row) for row in mark.args]
