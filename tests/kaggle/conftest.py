"""What is built for Kaggle, once for all tests."""

import json

import building
import kernels
import pytest
from support.kaggle import STEPS, TINY


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    """What is built of all notebooks, wheel and data."""
    folder = tmp_path_factory.mktemp("built")
    corpus = folder / "corpus.jsonl"
    texts = (f"In year {n} there were {n * n} ships in the bay." for n in range(300))
    corpus.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    settings = (TINY | {"max_steps": STEPS}).items()
    parameters = [word for name, value in settings for word in ("-p", name, str(value))]
    kernels.main(
        ["build", "--user", "Ann", "--data", str(corpus), "--out", str(folder / "out")]
        + ["--notebook", *building.SOURCES, *parameters]
    )
    return folder / "out"
