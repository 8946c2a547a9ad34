"""One process is a group that sums nothing; the most urgent stop reason wins."""

import os
import signal

import pytest
import torch

from minimind_nb.launch import cancellation
from minimind_nb.launch.cancellation import (
    STOP_REASONS,
    StopRequest,
    agreed_stop_reason,
)
from minimind_nb.launch.process_group import Group


def test_one_process_sums_nothing_and_needs_no_store() -> None:
    group = Group(0, 1, "nowhere", "cpu")
    tensor = torch.tensor([1.0, 2.0])
    group.sum(tensor)
    assert tensor.tolist() == [1.0, 2.0]
    group.meet()
    group.close()


def test_ranks_that_do_not_add_up_are_refused() -> None:
    group = Group(0, 1, "nowhere", "cpu")
    group.size = 3
    group.sum = lambda tensor: None  # noqa: ARG005
    with pytest.raises(RuntimeError, match="3 ranks summed ones to 1"):
        group.meet()


def test_the_most_urgent_reason_wins() -> None:
    assert STOP_REASONS == ("terminated", "interrupted", "time_budget")
    assert agreed_stop_reason([0.0, 0.0, 0.0]) is None
    assert agreed_stop_reason([0.0, 0.0, 2.0]) == "time_budget"
    assert agreed_stop_reason([0.0, 1.0, 1.0]) == "interrupted"
    assert agreed_stop_reason([1.0, 1.0, 1.0]) == "terminated"


def test_a_stop_request_restores_the_handlers() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    stop = StopRequest()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.reason == "terminated"
    stop.restore()
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    assert after == before


def test_only_an_interrupt_that_comes_later_means_to_kill(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ctrl-C is pressed twice out of habit."""
    stop, kills = StopRequest(), []
    for now in (100.0, 100.3, 102.0, 102.1):
        monkeypatch.setattr(cancellation.time, "monotonic", lambda now=now: now)
        os.kill(os.getpid(), signal.SIGINT)
        kills.append(stop.kill)
    stop.restore()
    assert (stop.reason, kills) == ("interrupted", [False, False, False, True])
