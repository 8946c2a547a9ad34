"""What a run says before it starts: what is cut or left out, and how far it is to go."""

from __future__ import annotations

from collections.abc import Callable

from ..config import TrainConfig
from ..data.corpus import Corpus
from ..storage import verified
from ..storage.run_folder import RunFolder

_Note = Callable[[str], None]


def describe_cuts(corpus: Corpus, cfg: TrainConfig) -> list[str]:
    """What of the conversations is longer than a row, in words."""
    noun = "pairs" if cfg.stage == "dpo" else "conversations"
    told = []
    for what, truncated in (
        (noun, corpus.truncated),
        (f"held-out {noun}", corpus.val_truncated),
    ):
        if truncated.cut or truncated.dropped:
            told.append(
                f"of the {what} longer than max_seq_len={cfg.max_seq_len}, "
                f"{truncated.cut:,} are cut at a turn and {truncated.dropped:,} left out, "
                "for no whole answer fits"
            )
    return told


def tell_rejected(corpus: Corpus, folder: RunFolder, on_note: _Note) -> None:
    """Keep the list of rows left out with the run, and say how many they are."""
    file = corpus.cache.rejected_file
    if file is None:
        return
    folder.root.mkdir(parents=True, exist_ok=True)
    target = folder.root / file.name
    verified.write_bytes(target, file.read_bytes())
    count = sum(corpus.cache.facts["bad_rows"].values())
    on_note(f"{count:,} malformed rows are left out; {target} lists them")


def tell_horizon(
    done: int, total: int, folder: RunFolder, cfg: TrainConfig, on_note: _Note
) -> None:
    """Say from where a run goes on to where."""
    on_note(f"{folder.root} goes on from step {done:,} of {total:,}")
    before = folder.read_config()["settings"]
    longer = any(before[name] != getattr(cfg, name) for name in ("epochs", "max_steps"))
    if longer and folder.status() == "finished" and done < total:
        on_note(
            f"the run was finished at step {done:,} with epochs={before['epochs']}; the "
            "schedule is recomputed for the new total, which differs from a run planned "
            "that long from the start"
        )
