"""Data before it trains: samples, a report on the rows, and a file without some."""

import itertools
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .config import STAGES, TrainConfig, describe_unknown
from .data.containers import find_files
from .data.corpus import detect_format
from .data.demo import DEMO, locate, require_data
from .data.jsonl import DataError
from .data.quality import IDENTITIES, KINDS, find_faults, name_place, read_lines
from .data.tokenizer import load_tokenizer
from .monitor.data_report import DataReport, Preview
from .monitor.tables import Facts
from .planning import draft_alone
from .session import current_session
from .storage import verified
from .training.run_plan import RunPlan, describe_rows

_BARS = 16
_ALL_BUT_ONE = 1 - 1e-9  # of the rows may be bad


def preview(cfg: TrainConfig, rows: int = 2) -> Preview:
    """Return the first samples of the first epoch as text, as the model gets them.

    Each document begins a line; special tokens are shown, and one that is cut continues
    in another row. In the chat stages, tokens that count in the loss are between ⟦ and
    ⟧, in a cell on a tint; the chosen answer of a pair comes first. Without a run to
    start from the shipped tokenizer is used, unless one is set.
    """
    return _show_samples(draft_alone(cfg)[1], rows)


def _show_samples(plan: RunPlan, rows: int) -> Preview:
    cfg, tokenizer = plan.cfg, load_tokenizer(plan.tokenizer)
    stream = plan.corpus.training_stream(cfg, plan.tokenizer.pad_id)

    def text(ids: np.ndarray, loss_mask: np.ndarray) -> str:
        cuts = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1), len(ids)]
        cuts = [0, len(ids)] if cfg.stage == "pretrain" else cuts
        parts = ((tokenizer.decode(ids[a:b]), a) for a, b in itertools.pairwise(cuts))
        return "".join(f"⟦{part}⟧" if loss_mask[a] else f"{part}" for part, a in parts)

    shown = range(min(rows, stream.rows))
    samples = [[text(*piece) for piece in stream.pieces(n)] for n in shown]
    if cfg.stage == "dpo":
        samples = [[f"chosen: {yes}", f"rejected: {no}"] for yes, no in samples]
    title = describe_rows(plan.corpus, cfg)
    return Preview(title, samples, tokenizer.all_special_tokens)


def data_report(
    cfg: TrainConfig | str | Sequence[str],
    tokenizer: str | None = None,
    *,
    samples: int = 12,
    identities: Sequence[str] = IDENTITIES,
    **settings: Any,
) -> DataReport:
    """Return figures of data, the rows in it that need a look, and samples.

    `cfg` is a configuration or a data path; `tokenizer` is that of `TrainConfig`, as are
    `settings`, such as `val_path` to find rows that are in it, too. All is counted as
    training would do it, and the tokens are kept for that. `identities` are the models
    as which no answer should speak. Memory takes 1.2 kB a row.

    Raises what `train` raises for the data, but for single bad rows.
    """
    settings |= {"tokenizer": tokenizer} if tokenizer else {}
    identities = [identities] if isinstance(identities, str) else identities
    plan = _open(cfg, settings)
    corpus, cache, width = plan.corpus, plan.corpus.cache, plan.cfg.max_seq_len
    files, stage = find_files(plan.cfg.data_path), plan.cfg.stage
    faults, traits = find_faults(files, stage, identities, plan.cfg.val_path)
    for n in np.flatnonzero(cache.targets > width) if stage != "pretrain" else ():
        place = name_place(files, int(cache.file_of(n)), int(cache.lines[n]))
        faults["long"][place] = f"{cache.targets[n] + 1:,} tokens"
    stream, lengths = corpus.training_stream(plan.cfg, 0), np.diff(cache.offsets)
    left, targets = corpus.truncated.pieces[:, 2], cache.targets[corpus.documents]
    bins = np.minimum((lengths - 2) * _BARS // (2 * width), _BARS - 1)
    bins = np.maximum(bins, 0)  # a row of width targets is the last before orange
    title = f"by length in tokens; orange: over max_seq_len={width:,}"
    charts = {
        f"rows {title}": np.bincount(bins, None, _BARS),
        f"tokens {title}": np.bincount(bins, lengths, _BARS),
    }
    facts: dict[str, Any] = {
        "rows": cache.facts["rows"],
        "bytes": sum(Path(file).stat().st_size for file in files),
        "tokens": int(lengths.sum()),
        "longest": int(lengths.max()),
        "max_seq_len": width,
        "cut": f"{1 - left.sum() / targets.sum():.2%}",
        "fill": f"{stream.tokens / (stream.rows * width):.2%}",
    }
    if cache.answers is not None:
        facts |= {"turns": round(float(np.mean(cache.answers)), 2), **traits}
    faults = {kind: found for kind, found in faults.items() if found}
    source = "cfg" if isinstance(cfg, TrainConfig) else repr(cfg)
    more = "".join(f", {name}={value!r}" for name, value in settings.items())
    code = f"mm.filter_data({source}, 'clean.jsonl', drop={[*faults]}{more})"
    note = f"Without them: {code}" if faults else "Nothing to leave out was found."
    preview = _show_samples(plan, samples)
    return DataReport(Facts(preview.title, facts, note), files, faults, charts, preview)


def _open(source: Any, settings: dict[str, Any]) -> RunPlan:
    """Return the plan of a new run on some data, without the bad rows."""
    cfg = source if isinstance(source, TrainConfig) else TrainConfig(data_path=source)
    require_data(cfg)
    if cfg is not source:
        first = find_files(cfg.data_path or "")[0]
        settings = {"stage": detect_format(first, expected=[*STAGES]), **settings}
    cfg = replace(cfg, resume=False, **settings)
    if cfg.data_path == DEMO:
        root = current_session().cache_folder(cfg.out_dir)
        cfg = replace(cfg, data_path=str(locate(DEMO, root, cfg.stage)))
    try:
        return draft_alone(cfg)[1]
    except DataError:
        skipping = {"on_bad_line": "skip", "max_bad_fraction": _ALL_BUT_ONE}
        return draft_alone(replace(cfg, **skipping))[1]


def filter_data(
    cfg: TrainConfig | str | Sequence[str],
    out: str | os.PathLike[str],
    *,
    drop: Sequence[str] = tuple(KINDS[:6]),
    **settings: Any,
) -> Facts:
    """Write the rows of some data without those that `data_report` finds.

    `drop` are kinds as it names them, all but "repeated_answers" and "long" if it is not
    set. `out` gets JSON Lines, byte by byte as they were in such, and `{out}.log` each
    line that was left out and why. The first of rows that repeat each other stays.

    Takes and raises what `data_report` does; `ValueError` for an unknown kind, and
    `FileExistsError` for an existing file without such a log.
    """
    drop = [drop] if isinstance(drop, str) else drop
    if unknown := [kind for kind in drop if kind not in KINDS]:
        raise ValueError(describe_unknown(unknown[0], KINDS, "kind of rows"))
    report = data_report(cfg, samples=0, **settings)
    out, log = Path(out), Path(f"{os.fspath(out)}.log")
    held_out = settings.get("val_path", getattr(cfg, "val_path", None)) or ()
    held_out = [held_out] if isinstance(held_out, str | os.PathLike) else held_out
    sources = {Path(file).resolve() for file in (*report.files, *held_out)}
    for file, other in (out, log), (log, out):  # an earlier call has written both
        if file.resolve() in sources or (file.exists() and not other.is_file()):
            raise FileExistsError(f"{file} exists: name a new file for what stays")
    gone = {
        place: {"line": place, "kind": kind, "why": why}
        for kind in reversed(drop)
        for place, why in report.findings.get(kind, {}).items()
    }
    counts = Counter(row["kind"] for row in gone.values())
    with verified.beside(out) as aside:
        with (aside / "rows").open("wb") as file:
            for place, raw in read_lines(report.files, "Writing rows"):
                if place not in gone:
                    counts["kept"] += bool(file.write(raw + b"\n"))
        lines = (f"{json.dumps(row, ensure_ascii=False)}\n" for row in gone.values())
        verified.write_text(log, "".join(lines))
        verified.rename_flushed(aside / "rows", out)
    return Facts(f"Rows in {out}, and those in {log.name}", dict(counts))
