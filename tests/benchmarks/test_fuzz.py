"""The random inputs: some of every reader, and how what they show is counted."""

import os
import signal
import time
from collections import Counter

import fuzz
import pytest
from fuzz_inputs import READERS, Finding, Reader

from minimind_nb import TrainConfig

CASES = 20


@pytest.fixture(scope="module")
def campaign(tmp_path_factory: pytest.TempPathFactory) -> fuzz.Campaign:
    return fuzz.Campaign(tmp_path_factory.mktemp("fuzz"), seed=0)


def test_no_reader_loses_hangs_or_takes_damage_for_something_else(
    campaign: fuzz.Campaign,
):
    counts: Counter[str] = Counter()
    for reader in READERS:
        results = campaign.run(reader, CASES)
        assert [one.case for one in results] == [*range(CASES)]
        assert not [one for one in results if one.outcome in fuzz.WRONG]
        counts.update(one.outcome for one in results)
    assert counts["fine"] > CASES and counts["refused"] > CASES


def test_each_outcome_is_counted_and_the_cases_after_it_run(
    campaign: fuzz.Campaign, monkeypatch: pytest.MonkeyPatch
):
    def refuse():
        TrainConfig(epochs=0)

    def hang():
        time.sleep(30)

    def crash():
        os.kill(os.getpid(), signal.SIGKILL)

    def lose():
        raise Finding("loss", "step 8: not found")

    acts = [
        lambda: None,
        refuse,
        lambda: {}[1],
        hang,
        crash,
        lambda: b"x" * (4 << 30),
        lose,
    ]
    feed = Reader(len(acts), lambda draw, _: int(draw.random() * 0), lambda *_: None)
    monkeypatch.setattr(fuzz, "SECONDS", 1.0)
    monkeypatch.setitem(READERS, "acts", feed)
    monkeypatch.setattr(campaign, "_draw", lambda _, case: case)
    monkeypatch.setattr(campaign, "_feed", lambda _, case: acts[case]())
    results = campaign.run("acts")
    expected = "fine, refused, raw error, hang, crash, crash, loss"
    assert ", ".join(one.outcome for one in results) == expected
    assert results[3].cause.startswith("test_fuzz.py")
    table = "\n".join(fuzz.tabulate({"acts": results}, 0))
    assert "| acts | 7 | 1 | 1 | 1 | 0 | 0 | 1 | 2 | 1 |" in table
    assert "acts, loss, 1 times: step 8\n" in table and "--only acts:6" in table
