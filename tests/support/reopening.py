"""Exports compared without a process of their own, where a test is of something else."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from minimind_nb.model import export, reopening


@contextmanager
def reopened_here() -> Iterator[None]:
    """The comparison as it is, but in this process: most of its time are imports."""

    def run_here(_: str, *arguments: object, failed: str) -> None:
        reopening.main(*map(str, arguments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(export, "run_fresh", run_here)
        yield
