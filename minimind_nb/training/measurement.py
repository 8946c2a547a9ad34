"""`evaluate`: the loss of any model on any file, by all processes."""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..config import SHAPE_FIELDS, TrainConfig, resolve
from ..data.corpus import detect_format
from ..data.demo import locate
from ..data.tokenizer import read_tokenizer
from ..launch.spawn import enter_torchrun
from ..model.loading import find_weights
from ..monitor.tables import Facts
from ..progress_bar import open_bar
from ..session import current_session
from ..storage.run_folder import RunFolder
from .launching import launch
from .machine import machine_defaults
from .run_plan import RunPlan, open_corpus


def evaluate(
    source: str | os.PathLike[str],
    data_path: str | os.PathLike[str],
    which: str = "last",
    rope_scaling: float | Mapping[str, Any] | None = None,
    **settings: Any,
) -> Facts:
    """Measure the loss of a model on a file: the mean over tokens, by all processes.

    `source`, `which` and `rope_scaling` are those of `load`. `data_path` has one
    {"text": "…"} per line, or {"conversations": […]}, of which the answers are predicted.
    `settings` are `TrainConfig`'s: max_seq_len (default: what the run trained with, or
    what the stretched model reads), batch_size, num_processes, device, dtype, … (with
    `eval_tokens` only so many tokens are looked at).

    Returns loss (nats per token), perplexity, and bits_per_byte of the text or answers,
    which is comparable across tokenizers; the number of `documents`, of those that are
    `cut` to fit a row, and of those `dropped` because no whole answer fits. Raises what
    `train` raises.
    """
    enter_torchrun()
    if given := {"stage", "data_path", "val_path", "init_from"} & settings.keys():
        raise ValueError(f"{', '.join(given)}: source and data_path say this already")
    title = f"{os.fspath(source)} on {os.fspath(data_path)}"
    source = Path(source).expanduser()
    open_shape = SHAPE_FIELDS if source.is_file() else ()  # a .pth does not record all
    shape = {name: settings[name] for name in open_shape if name in settings}
    tokenizer = settings.get("tokenizer")
    weights = find_weights(source, which, tokenizer, rope_scaling, **shape)
    stage = detect_format(data_path, weights.stage or "pretrain")
    home = source.absolute().parent
    out_dir = home if os.access(home, os.W_OK) else "out"
    choices = {"out_dir": out_dir, "eval_tokens": 1 << 62}
    length, config = weights.trained_length, weights.config
    if rope_scaling is not None or (config.inference_rope_scaling and not length):
        length, choices["batch_size"] = config.max_position_embeddings, 1
    if length:
        choices["max_seq_len"] = length
    asked = TrainConfig(stage=stage, **choices | settings)
    caches = current_session().cache_folder(asked.out_dir)
    file = str(locate(data_path, caches, stage))
    asked = replace(asked, data_path=file, val_path=file, compile=False)
    cfg = resolve(asked, **machine_defaults(asked), **weights.shape())
    tokenizer = read_tokenizer(weights.tokenizer)
    corpus = open_corpus(cfg, tokenizer)
    with tempfile.TemporaryDirectory(prefix="minimind_nb_") as folder:
        rope, place = weights.config.rope_parameters, RunFolder(folder)
        config = {"settings": cfg.portable(), "rope_scaling": rope}
        plan = RunPlan(config, place, tokenizer, corpus, weights.file)
        plan.write()
        with open_bar(f"Evaluating {source.name} on {Path(file).name}") as bar:
            launch("measure", plan, lambda: bar.update(0))
        scores = json.loads((place.root / "scores.json").read_bytes())
    cut = {"cut": corpus.truncated.cut, "dropped": corpus.truncated.dropped}
    return Facts(title, scores | cut)
