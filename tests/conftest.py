"""How tests are counted, left out and shared among workers; see the Makefile."""

import multiprocessing.util
import sys
from collections.abc import Iterator
from typing import Any

import pytest
from support.rows import ROWS

# Audit events of processes that start; multiprocessing's spawn raises none.
STARTS = {"os.fork", "os.forkpty", "os.posix_spawn", "os.system", "subprocess.Popen"}

_no_processes: list[bool] = []  # not empty while a test runs that may start none


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--no-processes",
        action="store_true",
        help="skip each test at the moment when it would start a process",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--no-processes"):
        spawn: Any = multiprocessing.util.spawnv_passfds

        def spawn_or_skip(*given: Any) -> int:
            _skip_at_start("os.fork")
            return spawn(*given)

        multiprocessing.util.spawnv_passfds = spawn_or_skip
        sys.addaudithook(_skip_at_start)


def _skip_at_start(event: str, *_: Any) -> None:
    if _no_processes and event in STARTS:
        pytest.skip("it starts a process")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if item.config.getoption("--no-processes"):
        _no_processes.append(True)
    try:
        return (yield)
    finally:
        _no_processes.clear()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put each test's rows of the list of faults into the report that is counted."""
    for item in items:
        for mark in item.iter_markers("fault"):
            assert {*mark.args} <= ROWS.keys(), f"{item.nodeid}: {mark.args}"
            item.user_properties += [("fault", row) for row in mark.args]


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Share files among workers; the notebooks share a folder, so one runs them all."""
    from xdist.scheduler import LoadFileScheduling  # pyright: ignore

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return "notebooks" if file.endswith(".ipynb") else file

    return Scheduling(config, log)
