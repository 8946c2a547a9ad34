"""The plan of a run: everything that a rank needs to know, in the run folder."""

import dataclasses
import importlib.metadata
import json
import uuid
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..config import ResolvedConfig, TrainConfig, resolve_batch, shorten_home
from ..data.containers import find_files
from ..data.corpus import Corpus
from ..data.demo import DEMO, locate
from ..data.token_cache import TokenCache
from ..data.tokenizer import TokenizerSpec, read_tokenizer, write_tokenizer
from ..hardware import count_cores
from ..model.loading import FoundWeights
from ..session import current_session
from ..storage import verified
from ..storage.run_folder import RunFolder, step_of

_VERSIONED = ("minimind_nb", "torch", "transformers", "tokenizers", "numpy")


@dataclass
class RunPlan:
    """A run that can start; the ranks read it from the run folder.

    `config` is the content of config.json, `initial` the file with the initial weights,
    if any, `checkpoint` the folder to resume from. If `complete`, nothing is left to do.
    `deadline` is on the monotonic clock, in seconds; `machine_flops` are those of matrix
    products in the run's precision, over all processes, or 0.
    """

    config: dict[str, Any]
    folder: RunFolder
    tokenizer: TokenizerSpec
    corpus: Corpus
    initial: Path | None = None
    checkpoint: Path | None = None
    complete: bool = False
    deadline: float | None = None
    machine_flops: float = 0.0

    @cached_property
    def cfg(self) -> ResolvedConfig:
        """The settings in `config`."""
        return ResolvedConfig(**self.config["settings"])

    @property
    def total_steps(self) -> int:
        """The optimizer steps of the whole run."""
        return self.config["total_steps"]

    @property
    def decay_start(self) -> int:
        """The step after which a linear schedule decays; for a cosine the last one."""
        return self.config["decay_start"]

    @property
    def done(self) -> int:
        """The steps made before this session."""
        return step_of(self.checkpoint) if self.checkpoint else 0

    @property
    def weights_file(self) -> Path:
        """The bare weights beside the run folder."""
        return self.folder.root.parent / self.cfg.weights_name

    def write(self) -> None:
        """Write config.json, the tokenizer, and the rest of the plan to plan.json."""
        self.folder.write_config(self.config)
        write_tokenizer(self.tokenizer, self.folder.tokenizer)
        plan = {
            "caches": [
                {"folder": shorten_home(str(cache.folder)), "facts": cache.facts}
                for cache in self.corpus.caches
            ],
            "initial": shorten_home(self.initial and str(self.initial)),
            "checkpoint": self.checkpoint and self.checkpoint.name,
            "deadline": self.deadline,
            "machine_flops": self.machine_flops,
        }
        text = json.dumps(plan, indent=2, ensure_ascii=False)
        verified.write_text(self.folder.plan_file, f"{text}\n")

    def halve_batch(self) -> "RunPlan":
        """Return this plan, written, with the next smaller micro-batches, and the newest
        checkpoint to resume from. Raises `NoGoodCheckpoint` if all are damaged."""
        config = {**self.config, "too_large_batch_size": self.cfg.batch_size}
        half = {**vars(self.cfg), "batch_size": max(1, self.cfg.batch_size // 2)}
        config["settings"] = {**config["settings"], **resolve_batch(half, ())}
        found = self.folder.newest_good_checkpoint(repair=True)
        plan = dataclasses.replace(self, config=config, checkpoint=found)
        plan.write()
        return plan

    @classmethod
    def read(cls, folder: RunFolder) -> "RunPlan":
        """Read the plan that the preparing process wrote."""
        plan, config = json.loads(folder.plan_file.read_bytes()), folder.read_config()
        caches = [
            TokenCache(Path(cache["folder"]).expanduser(), cache["facts"])
            for cache in plan["caches"]
        ]
        checkpoint = plan["checkpoint"]
        return cls(
            config=config,
            folder=folder,
            tokenizer=read_tokenizer(folder.tokenizer),
            corpus=Corpus(caches, ResolvedConfig(**config["settings"])),
            initial=plan["initial"] and Path(plan["initial"]).expanduser(),
            checkpoint=checkpoint and folder.checkpoints / checkpoint,
            deadline=plan["deadline"],
            machine_flops=plan["machine_flops"],
        )


def describe_run(
    cfg: TrainConfig,
    resolved: ResolvedConfig,
    tokenizer: TokenizerSpec,
    corpus: Corpus,
    initial: FoundWeights | None,
) -> dict[str, Any]:
    """Return the content of config.json for a new run, `cfg` being what was asked."""
    return {
        "run": uuid.uuid4().hex,
        "settings": resolved.portable(),
        "explicit": sorted(cfg.explicit()),
        "caches": [cache.folder.name for cache in corpus.caches],
        "hashes": {
            "data": corpus.cache.facts["content"],
            "validation": corpus.val_cache.facts["content"],
            "tokenizer": tokenizer.fingerprint,
            "initial": verified.hash_file(initial.file) if initial else None,
        },
        "began_from": shorten_home(initial.source) if initial else None,
        "rejected_rows": corpus.cache.facts["bad_rows"],
        "versions": {name: importlib.metadata.version(name) for name in _VERSIONED},
    }


def open_corpus(cfg: ResolvedConfig, tokenizer: TokenizerSpec) -> Corpus:
    """Return the tokenised documents of a run. Raises `DataError` and its like."""
    root = current_session().cache_folder(cfg.out_dir)
    if cfg.data_path == DEMO:
        cfg = dataclasses.replace(cfg, data_path=str(locate(DEMO, root, cfg.stage)))
    return Corpus.prepare(cfg, tokenizer, root, count_cores())


def describe_rows(corpus: Corpus, cfg: ResolvedConfig) -> str:
    """Say how the rows of the data were understood, and what of them is ignored."""
    facts, files = corpus.cache.facts, find_files(cfg.data_path)
    text = f"{facts['rows']:,} rows of {', '.join(map(shorten_home, files))}"
    if form := facts.get("form"):
        text += f" are read as {form}"
    ignored = (f'"{key}" in {n:,} rows' for key, n in facts.get("ignored", {}).items())
    return "; ignored: ".join(filter(None, [text, ", ".join(ignored)]))


def describe_truncated(corpus: Corpus, cfg: ResolvedConfig) -> list[str]:
    """Say how many conversations are longer than a row, and what becomes of them."""
    noun = "pairs" if cfg.stage == "dpo" else "conversations"
    parts = {noun: corpus.truncated, f"held-out {noun}": corpus.val_truncated}
    return [
        f"of the {what} longer than max_seq_len={cfg.max_seq_len}, "
        f"{documents.cut:,} are truncated at a turn and {documents.dropped:,} "
        "dropped because no whole answer fits"
        for what, documents in parts.items()
        if documents.cut or documents.dropped
    ]
