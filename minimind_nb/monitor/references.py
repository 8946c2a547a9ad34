"""Final losses of reference runs, to compare other runs with.

`benchmarks/learning.py --reference` writes references.json from its trials.
"""

import json
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ..config import count_parameters
from ..data.demo import DEMO

_TEXT = "mixed Chinese and English text; other text ends elsewhere"
_NEAR = 1.25  # how far sizes and numbers of tokens may be apart


def expected_loss(settings: Mapping[str, Any], tokens: int) -> str:
    """Return the mean validation loss that reference runs of these settings end at, and
    on what text; empty without any of about this size and length."""
    demo = settings["data_path"] == DEMO
    own = {"parameters": count_parameters(settings)["active"], "tokens": tokens}
    losses = []
    file = resources.files("minimind_nb.monitor") / "references.json"
    for one in json.loads(file.read_bytes()):
        near = all(own[name] / _NEAR < one[name] < own[name] * _NEAR for name in own)
        names = ("stage", "recipe", "optimizer")
        same = all(one[name] == settings[name] for name in names)
        if near and same and demo == (one["corpus"] == DEMO):
            losses.append(one["loss"])
    text = "the demo corpus" if demo else _TEXT
    return f"{sum(losses) / len(losses):.2f} on {text}" if losses else ""
