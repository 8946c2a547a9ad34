"""Final losses of reference runs, to compare other runs with.

`benchmarks/learning.py --reference` writes references.json from its trials.
"""

import json
import math
from collections.abc import Mapping
from importlib import resources
from typing import Any

from ..config import count_parameters
from ..data.demo import DEMO

_TEXT = "mixed Chinese and English text; other text ends elsewhere"
_NEAR = 1.25  # how far sizes and numbers of tokens may be apart


def expected_loss(settings: Mapping[str, Any], tokens: int) -> str:
    """Return the validation loss that reference runs of these settings end at after so
    many text tokens, and on what text; empty without any of about that size."""
    import numpy as np  # a live view starts faster without it

    demo = settings["data_path"] == DEMO
    active = count_parameters(settings)["active"]
    ends: dict[int, list[float]] = {}
    file = resources.files("minimind_nb.monitor") / "references.json"
    for one in json.loads(file.read_bytes()):
        near = abs(math.log(one["parameters"] / active)) < math.log(_NEAR)
        names = ("stage", "recipe", "optimizer")
        same = all(one[name] == settings[name] for name in names)
        if near and same and demo == (one["corpus"] == DEMO):
            ends.setdefault(one["tokens"], []).append(one["loss"])
    if not ends or not min(ends) / _NEAR < tokens < max(ends) * _NEAR:
        return ""
    known = sorted(ends)
    losses = [float(np.mean(ends[count])) for count in known]
    loss = np.interp(math.log(tokens), np.log(known), losses)
    return f"{loss:.2f} on {'the demo corpus' if demo else _TEXT}"
