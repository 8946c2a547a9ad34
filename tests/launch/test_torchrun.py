"""Processes of torchrun: all but rank 0 leave."""

import os

import pytest

from minimind_nb.launch import spawn

ENVIRON = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}


@pytest.fixture(autouse=True)
def _nothing_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spawn, "enter_torchrun", spawn.enter_torchrun.__wrapped__)
    monkeypatch.setattr(spawn, "die_with_parent", lambda _: None)


def test_rank_0_stays_and_knows_the_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", ENVIRON | {"RANK": "0"})
    assert spawn.enter_torchrun() == 2
    for missing in ENVIRON:
        monkeypatch.setattr(os, "environ", ENVIRON | {missing: ""})
        assert spawn.enter_torchrun() is None


def test_the_others_end_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "environ", ENVIRON)
    with pytest.raises(SystemExit) as left:
        spawn.enter_torchrun()
    assert left.value.code == 0
    text = "minimind_nb: rank 1 leaves, since rank 0 starts the workers\n"
    assert capsys.readouterr().out == text


def test_several_machines_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", ENVIRON | {"WORLD_SIZE": "4"})
    with pytest.raises(
        RuntimeError, match="4 processes, of which 2 are here: training"
    ):
        spawn.enter_torchrun()
