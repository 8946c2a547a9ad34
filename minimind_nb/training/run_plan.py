"""The plan of a run: everything that a rank needs to know, in one file."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config import ResolvedConfig, TrainConfig, shorten_home
from ..data.corpus import Corpus
from ..data.demo import DEMO, locate
from ..data.token_cache import names_before_version_3
from ..data.tokenizer import TokenizerSpec, read_tokenizer, write_tokenizer
from ..session import current_session
from ..storage import verified
from ..storage.run_folder import RunFolder

BATCH = ("global_batch", "batch_size", "accumulation_steps")
"""Settings that make up the global batch."""


@dataclass(frozen=True)
class RunPlan:
    """A run that can start; the ranks read it from `plan.json` in the run folder.

    `config` is the content of config.json. `initial` is the file with the initial
    weights (None for a random initialisation, or if a checkpoint makes them needless),
    `checkpoint` the folder to resume from. `total_steps` is the horizon; `complete` says
    that nothing is left to do. `deadline` is on the monotonic clock, in seconds, which
    all processes of a machine share.
    """

    cfg: ResolvedConfig
    folder: RunFolder
    tokenizer: TokenizerSpec
    corpus: Corpus
    config: dict[str, Any] = field(default_factory=dict)
    initial: Path | None = None
    checkpoint: Path | None = None
    total_steps: int = 0
    complete: bool = False
    deadline: float | None = None

    @property
    def weights_file(self) -> Path:
        """The bare weights beside the run folder."""
        return self.folder.root.parent / self.cfg.weights_name

    @property
    def input_paths(self) -> list[Path]:
        """What the ranks read outside of the run folder."""
        caches = [Path(cache["folder"]) for cache in self.corpus.describe()]
        return [*caches, *([self.initial] if self.initial else [])]

    def write(self) -> None:
        """Write `plan.json`, and the tokenizer beside it."""
        write_tokenizer(self.tokenizer, self.folder.tokenizer)
        plan = {
            "settings": self.cfg.portable(),
            "caches": [
                {**cache, "folder": shorten_home(cache["folder"])}
                for cache in self.corpus.describe()
            ],
            "config": self.config,
            "initial": shorten_home(self.initial and str(self.initial)),
            "checkpoint": self.checkpoint and self.checkpoint.name,
            "total_steps": self.total_steps,
            "deadline": self.deadline,
        }
        text = json.dumps(plan, indent=2, ensure_ascii=False)
        verified.write_text(self.folder.plan_file, f"{text}\n")

    @classmethod
    def read(cls, folder: RunFolder) -> RunPlan:
        """Read the plan that the preparing process wrote."""
        plan = json.loads(folder.plan_file.read_bytes())
        cfg = ResolvedConfig(**plan["settings"])
        caches = [
            {**cache, "folder": os.path.expanduser(cache["folder"])}  # noqa: PTH111
            for cache in plan["caches"]
        ]
        checkpoint = plan["checkpoint"]
        return cls(
            cfg=cfg,
            folder=folder,
            tokenizer=read_tokenizer(folder.tokenizer),
            corpus=Corpus.reopen(caches, cfg),
            config=plan["config"],
            initial=plan["initial"] and Path(plan["initial"]).expanduser(),
            checkpoint=checkpoint and folder.checkpoints / checkpoint,
            total_steps=plan["total_steps"],
            deadline=plan["deadline"],
        )

    def changed(self, **fields: Any) -> RunPlan:
        """Return the plan with other values in some fields."""
        return dataclasses.replace(self, **fields)


def cache_root(cfg: TrainConfig) -> Path:
    """Return the folder for token caches."""
    return current_session().cache_folder(cfg.out_dir)


def open_corpus(
    cfg: ResolvedConfig,
    tokenizer: TokenizerSpec,
    cores: int,
    max_dropped: float | None = None,
) -> Corpus:
    """Return the tokenised documents of a run. Raises `DataError` and its like.

    `max_dropped` is the largest share of conversations too long for a row, by default
    `max_bad_fraction`.
    """
    if cfg.data_path == DEMO:
        cfg = dataclasses.replace(cfg, data_path=str(locate(DEMO, cfg.stage)))
    if max_dropped is None:
        max_dropped = cfg.max_bad_fraction
    return Corpus.prepare(cfg, tokenizer, cache_root(cfg), cores, max_dropped)


def describe_truncated(corpus: Corpus, cfg: ResolvedConfig) -> list[str]:
    """Say how many conversations are longer than a row, and what becomes of them."""
    noun = "pairs" if cfg.stage == "dpo" else "conversations"
    told = []
    for what, documents in (
        (noun, corpus.truncated),
        (f"held-out {noun}", corpus.val_truncated),
    ):
        if documents.cut or documents.dropped:
            told.append(
                f"of the {what} longer than max_seq_len={cfg.max_seq_len}, "
                f"{documents.cut:,} are truncated at a turn and {documents.dropped:,} "
                "dropped because no whole answer fits"
            )
    return told


def asked_batch(config: Mapping[str, Any]) -> dict[str, int]:
    """Return the settings of the batch that were explicit when a run was started."""
    if "asked_batch" in config:
        return config["asked_batch"]
    settings = config.get("settings", {})
    old = {**settings, "accumulation_steps": config.get("accumulation_asked")}
    return {name: old[name] for name in config.get("explicit", ()) if name in BATCH}


def renew_hashes(
    before: Mapping[str, Any], now: Mapping[str, Any], cfg: TrainConfig
) -> dict[str, Any]:
    """Return the hashes of a run, replacing those that an earlier state wrote of data.

    They were names of token caches. Those of other data stay, and so differ.
    """
    renewed = {**before}
    files = {"data": cfg.data_path, "validation": cfg.val_path or cfg.data_path}
    for key, file in files.items():
        if str(before.get(key)).startswith("tokens-") and file and Path(file).is_file():
            how = (cfg.stage, str(now["tokenizer"]), cfg.on_bad_line or "error")
            if before[key] in names_before_version_3(file, *how):
                renewed[key] = now[key]
    return renewed
