"""Several data files: as one corpus, or mixed by weights."""

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from support.runs import (
    Settings,
    logged,
    metric_rows,
    prepare_here,
    state_hashes,
    train_here,
)

from minimind_nb.config import TrainConfig
from minimind_nb.data.jsonl import DataError
from minimind_nb.training.run_plan import RunPlan


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Files of 60, 45 and 30 different rows, of several kinds."""
    folder = tmp_path / "data"
    folder.mkdir()
    rows = {
        letter: [
            {"text": f"{letter}{n} " + f"{letter} {n} " * (n % 7 + 1)} for n in range(m)
        ]
        for letter, m in (("a", 60), ("b", 45), ("c", 30))
    }
    lines = (f"{json.dumps(row)}\n" for row in rows["a"])
    (folder / "a.jsonl").write_text("".join(lines))
    (folder / "b.json").write_text(json.dumps(rows["b"], indent=1))
    (folder / "c.txt").write_text("\n\n".join(row["text"] for row in rows["c"]))
    (folder / ".hidden.jsonl").write_text("no data")
    (folder / "README").write_text("no data")
    return sorted(map(str, folder.glob("[abc].*")))


@pytest.fixture
def mixed(settings: Settings, files: list[str]) -> Settings:
    return settings | {
        "data_path": files,
        "data_weights": (5, 3, 2),
        "epochs": 2,
        "val_fraction": 0.1,
        "max_steps": None,
    }


def sources(plan: RunPlan, samples: int, **changes: int) -> list[int]:
    """The file of each sample, as ranks take them together."""
    cfg = dataclasses.replace(plan.cfg, **changes)
    stream = plan.corpus.training_stream(cfg, 0)
    found = []
    for n in range(samples):
        documents = [piece[0] for piece in stream._row(n)]
        (file,) = set(plan.corpus.cache.file_of(documents).tolist())
        found.append(file)
    return found


def test_samples_follow_the_weights(mixed: Settings) -> None:
    plan = prepare_here(mixed)
    stream = plan.corpus.training_stream(plan.cfg, 0)
    epochs = np.split(np.array(sources(plan, 2 * stream.rows)), 2)
    for epoch in epochs:
        taken = np.cumsum(np.eye(3)[epoch], 0)
        wanted = np.outer(np.arange(1, len(epoch) + 1), [0.5, 0.3, 0.2])
        assert np.abs(taken - wanted).max() < 1
    pieces = [stream.arrange(epoch).pieces.tolist() for epoch in (0, 1)]
    assert pieces[0] != pieces[1]
    # Every row of the file that is used up first is taken once an epoch.
    rows = [stream.arrange(0).row(n) for n in range(stream.rows)]
    targets = Counter(
        int(plan.corpus.cache.file_of(d))
        for row in rows
        for d, _, n in row
        for _ in range(n)
    )
    sizes = Counter[int]()
    for d, _, n in plan.corpus.truncated.pieces.tolist():
        sizes[int(plan.corpus.cache.file_of(d))] += n
    assert any(targets[file] == sizes[file] for file in range(3))
    assert stream.tokens == targets.total()


def test_a_stopped_mixture_resumes_on_the_same_samples(
    mixed: Settings, tmp_path: Path
) -> None:
    _, whole = train_here(mixed)
    again = mixed | {"out_dir": str(tmp_path / "again")}
    train_here(again, stop_at=3)
    status, resumed = train_here(
        again | {"data_path": str(Path(mixed["data_path"][0]).parent)}
    )
    assert status == "finished"
    assert state_hashes(resumed) == state_hashes(whole)
    loss, by_file = metric_rows(whole, "eval", "loss", "loss_by_file")[-1]
    assert len(by_file) == 3
    assert min(by_file) < loss < max(by_file)


def test_without_weights_every_token_is_trained_on_once(
    mixed: Settings, files: list[str]
) -> None:
    settings = mixed | {"data_weights": None}
    plans = [
        prepare_here(settings | {"data_path": path, "run_name": f"run{n}"})
        for n, path in enumerate(
            (
                files,
                ",".join(files),
                json.dumps(files),
                f"{Path(files[0]).parent}/[abc].*",
            )
        )
    ]
    for plan in plans:
        stream = plan.corpus.training_stream(plan.cfg, 0)
        assert stream.tokens == plan.corpus.truncated.pieces[:, 2].sum()
        assert plan.config["hashes"] == plans[0].config["hashes"]
        assert len(plan.corpus.documents) + len(plan.corpus.val_documents) == 135


def test_rows_that_are_left_out_name_their_file(
    mixed: Settings, files: list[str]
) -> None:
    with Path(files[0]).open("a") as file:
        file.write("no row\n")
    with pytest.raises(DataError, match=r"a\.jsonl:61:1: the line begins with"):
        prepare_here(mixed)
    lax = mixed | {"on_bad_line": "skip", "max_bad_fraction": 0.1}
    with logged() as texts:
        plan = prepare_here(lax)
    (row,) = map(
        json.loads, (plan.folder.root / "rejected.jsonl").read_text().splitlines()
    )
    assert (row["file"], row["line"]) == (files[0], 61)
    assert any(
        "135 rows of" in text and "c.txt are read as text" in text for text in texts
    )
    stream = plan.corpus.training_stream(plan.cfg, 0)
    assert {place.split(":")[0] for place in stream.lines(range(20))} == {*files}


@pytest.mark.parametrize(
    ("change", "error", "reason"),
    [
        ({"data_weights": (5, 3)}, ValueError, "has 2 numbers for 3 files"),
        ({"data_weights": (5, 3, 0)}, ValueError, "must be above 0; leave a file out"),
        ({"data_weights": ("a",)}, ValueError, "expected tuple of numbers or None"),
        (
            {"data_weights": "5, nan, 1"},
            ValueError,
            "must be above 0; leave a file out",
        ),
        (
            {"data_path": "{empty}"},
            FileNotFoundError,
            "has no .jsonl, .json, .parquet or .txt file",
        ),
        ({"data_path": "{empty}/*.x"}, FileNotFoundError, r"has no .jsonl"),
    ],
)
def test_what_cannot_be_mixed_is_refused(
    mixed: Settings, tmp_path: Path, change: Settings, error: type, reason: str
) -> None:
    (tmp_path / "empty").mkdir()
    if "data_path" in change:
        path = change["data_path"].format(empty=tmp_path / "empty")
        change = {"data_path": path, "data_weights": None}
    with pytest.raises(error, match=reason):
        prepare_here(mixed | change)


def test_weights_change_a_run(mixed: Settings) -> None:
    train_here(mixed, stop_at=1)
    with pytest.raises(
        RuntimeError, match=r"data_weights: \(5.0, 3.0, 2.0\) in the run"
    ):
        prepare_here(mixed | {"data_weights": (5, 3, 1)})
    assert TrainConfig(**mixed).portable()["data_path"] == tuple(mixed["data_path"])
