"""Data before it trains: samples, a report on the rows, and a file without some."""

import contextlib
import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .config import STAGES, TrainConfig, describe_unknown
from .data.containers import find_files
from .data.corpus import detect_format
from .data.demo import DEMO, locate, require_data
from .data.jsonl import DataError
from .data.quality import ALIKE, IDENTITIES, Rows, find_faults, measure, read_chunks
from .data.token_cache import REJECTED
from .data.tokenizer import load_tokenizer
from .monitor.data_report import END, LEARNED, DataReport, Finding, Preview
from .monitor.tables import Facts, shorten
from .session import current_session
from .storage import verified
from .training.initial_weights import NoInitialWeights
from .training.preparation import draft
from .training.run_plan import RunPlan, describe_rows

_KINDS = {
    "bad_rows": "cannot be read",
    "empty": "no letter and no digit",
    "duplicates": "equal to an earlier row",
    "near_duplicates": f"alike to an earlier row, to {ALIKE:g} or more",
    "overlap": "equal or alike to a row of the validation file",
    "identity": "speaks as another model",
    "repeated_answers": "an earlier row's answer to another question",
    "long": "longer than max_seq_len, loses turns or is left out",
}
_DROPPED = tuple(_KINDS)[:6]
_TRAITS = "system", "tool", "tools", "tool_calls", "reasoning_content", "<think>"
_BARS, _EXAMPLE, _LISTED = 16, 400, 6
_ANY_BUT_ALL = 1 - 1e-9
_Source = TrainConfig | str | os.PathLike[str] | Sequence[str]


def preview(cfg: TrainConfig, rows: int = 2) -> Preview:
    """Return the first samples of the first epoch as text, as the model gets them.

    Documents follow each other within a row, each with its end; special tokens are
    shown. A document that is cut continues in another row. In the chat stages, tokens
    that count in the loss are between ⟦ and ⟧, in a cell on a tint; the chosen answer of
    a pair comes first. Without a run to start from the shipped tokenizer is used, unless
    one is set.
    """
    return _show_samples(_draft(cfg), rows)


def _draft(cfg: TrainConfig) -> RunPlan:
    with contextlib.suppress(NoInitialWeights):
        return draft(cfg)
    return draft(replace(cfg, init_from="none"))


def _show_samples(plan: RunPlan, rows: int) -> Preview:
    cfg, tokenizer = plan.cfg, load_tokenizer(plan.tokenizer)
    stream = plan.corpus.training_stream(cfg, plan.tokenizer.pad_id)
    names = ["chosen: ", "\nrejected: "] if cfg.stage == "dpo" else itertools.repeat("")

    def text(ids: np.ndarray, loss_mask: np.ndarray) -> str:
        cuts = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1), len(ids)]
        cuts = [0, len(ids)] if cfg.stage == "pretrain" else cuts
        parts = ((tokenizer.decode(ids[a:b]), a) for a, b in itertools.pairwise(cuts))
        return "".join(
            f"{LEARNED}{part}{END}" if loss_mask[a] else str(part) for part, a in parts
        )

    samples = [
        [
            name + text(*piece)
            for piece, name in zip(stream.pieces(n), names, strict=False)
        ]
        for n in range(min(rows, stream.rows))
    ]
    title = describe_rows(plan.corpus, cfg)
    return Preview(title, samples, tokenizer.all_special_tokens)


def data_report(
    cfg: _Source,
    *,
    samples: int = 12,
    identities: Sequence[str] = IDENTITIES,
    **settings: Any,
) -> DataReport:
    """Return figures of data, the rows in it that need a look, and samples.

    `cfg` is a configuration or a data path, and `settings` are more of them, such as
    `val_path` to find rows that are in it, too. Of a path the stage is recognised. All
    is counted as training would do it, and the tokens are kept for that. `identities`
    are the models as which no answer should speak. Memory takes 0.7 kB a row, the packing
    of samples included.

    Raises what `train` raises for the data, but for single bad rows.
    """
    plan, files = _open(cfg, settings)
    rows, faults = _examine(plan, files, identities)
    call = "cfg" if isinstance(cfg, TrainConfig) else repr(plan.cfg.data_path)
    more = "".join(f", {name}={value!r}" for name, value in settings.items())
    faults = {kind: found for kind, found in faults.items() if len(found)}
    firsts = {(*found[0, :2].tolist(),) for found in faults.values()}
    texts = {place: raw for place, raw in _raw_rows(files) if place in firsts}
    name, findings = functools.partial(_name, plan, files), {}
    for kind, found in faults.items():
        pairs = [(name(*row[:2]), name(*row[2:])) for row in found[:_LISTED].tolist()]
        lines = [f"{line} (as {same})" if same else f"{line}" for line, same in pairs]
        where = "line " + ", ".join(lines + ["…"] * (len(found) > _LISTED))
        example = texts[*found[0, :2].tolist()][:_EXAMPLE].decode("utf-8", "ignore")
        if kind == "identity":
            example = next(iter(rows.claims.values()))
        code = f"mm.filter_data({call}, 'clean.jsonl', drop=['{kind}']{more})"
        findings[kind] = Finding(
            _KINDS[kind], found, where, shorten(example, 160), code
        )
    facts, charts = _count(plan, rows)
    facts["bytes"] = sum(Path(file).stat().st_size for file in files)
    facts |= {kind: len(faults.get(kind, ())) for kind in _KINDS}
    return DataReport(facts, findings, charts, _show_samples(plan, samples))


def _count(
    plan: RunPlan, rows: Rows
) -> tuple[dict[str, Any], dict[str, tuple[np.ndarray, int]]]:
    """Return figures of the rows and their tokens, and bars by title."""
    cfg, corpus, cache = plan.cfg, plan.corpus, plan.corpus.cache
    stream, lengths = corpus.training_stream(cfg, 0), np.diff(cache.offsets)
    left, width = corpus.truncated.pieces[:, 2].sum(), cfg.max_seq_len
    facts = {
        "rows": cache.facts["rows"],
        "tokens": int(lengths.sum()),
        "median_tokens": float(np.median(lengths)),
        "longest": int(lengths.max()),
        "max_seq_len": width,
        "longer": int((cache.targets > width).sum()),
        "share_cut": round(1 - left / cache.targets[corpus.documents].sum(), 4),
        "packed_rows": stream.rows,
        "fill": round(stream.tokens / (stream.rows * width), 4),
    }
    bins = np.minimum(lengths * _BARS // (2 * width), _BARS - 1)
    title, half = f"by tokens, to {2 * width:,}; orange: over max_seq_len", _BARS // 2
    charts = {f"rows {title}": (np.bincount(bins, None, _BARS), half)}
    if cfg.stage == "pretrain":
        return facts, charts | {
            "all tokens so": (np.bincount(bins, lengths, _BARS), half)
        }
    turns = np.bincount(rows.table[:, 3], None, _BARS)
    for trait in _TRAITS:
        facts[f"with_{trait}"] = round(rows.traits[trait] / len(rows.table), 4)
    return facts, charts | {f"rows by turns, to {len(turns) - 1}": (turns, len(turns))}


def _open(source: _Source, settings: dict[str, Any]) -> tuple[RunPlan, list[str]]:
    """Return the plan of a new run on some data, without bad rows, and its files."""
    path: Any = source  # which TrainConfig checks
    cfg = source if isinstance(source, TrainConfig) else TrainConfig(data_path=path)
    require_data(cfg)
    files = find_files(cfg.data_path or "")
    if cfg is not source:
        settings = {"stage": detect_format(files[0], expected=[*STAGES]), **settings}
    cfg = replace(cfg, resume=False, **settings)
    if cfg.data_path == DEMO:
        root = current_session().cache_folder(cfg.out_dir)
        files = [str(locate(DEMO, root, cfg.stage))]
    with contextlib.suppress(DataError):
        return _draft(cfg), files
    lenient: Any = {"on_bad_line": "skip", "max_bad_fraction": _ANY_BUT_ALL}
    return _draft(replace(cfg, **lenient)), files


def _examine(
    plan: RunPlan, files: Sequence[str], identities: Sequence[str]
) -> tuple[Rows, dict[str, np.ndarray]]:
    """Return what is known of the rows, and those to look at by kind."""
    cfg, cache = plan.cfg, plan.corpus.cache
    rows = measure(files, cfg.stage, identities)
    validation = measure([cfg.val_path], cfg.stage, ()) if cfg.val_path else None
    faults = find_faults(rows, validation)
    (long,) = np.nonzero((cache.targets > cfg.max_seq_len) & (cfg.stage != "pretrain"))
    places = np.stack([cache.file_of(long), cache.lines[long]], 1)
    bad: list[tuple[int, int]] = []
    for file, own in zip(range(len(files)), plan.corpus.caches, strict=False):
        listed = own.folder / REJECTED
        for line in listed.read_bytes().splitlines() if listed.exists() else ():
            bad.append((file, json.loads(line)["line"]))
    for kind, found in ("long", np.unique(places, axis=0)), ("bad_rows", np.array(bad)):
        faults[kind] = np.pad(
            found.reshape(-1, 2), ((0, 0), (0, 2)), constant_values=-1
        )
    return rows, {kind: faults[kind] for kind in _KINDS if kind in faults}


def _raw_rows(files: Sequence[str]) -> Iterator[tuple[tuple[int, int], bytes]]:
    """Yield each row that is not blank: number of its file and line, and its bytes."""
    for file, chunk in read_chunks(files, "reading rows"):
        numbers = chunk.numbers or itertools.count(chunk.first_line)
        data = chunk.data.removesuffix(b"\n").split(b"\n")
        for line, raw in zip(numbers, data, strict=False):
            if raw.strip():
                yield (file, line), raw


def _name(plan: RunPlan, files: Sequence[str], file: int, line: int) -> Any:
    """Return a line, of several files "b.txt:4", or None for no row."""
    name = Path([*files, str(plan.cfg.val_path)][file]).name
    return None if line < 0 else f"{name}:{line}" if files[1:] else line


def filter_data(
    cfg: _Source,
    out: str | os.PathLike[str],
    *,
    drop: Sequence[str] = _DROPPED,
    overwrite: bool = False,
    identities: Sequence[str] = IDENTITIES,
    **settings: Any,
) -> Facts:
    """Write the rows of some data without those that `data_report` finds.

    `drop` are kinds of these: "bad_rows", "empty", "duplicates", "near_duplicates",
    "overlap" and "identity" (the default), "repeated_answers" and "long". `out` gets JSON
    Lines, byte by byte as they were in such, and `{out}.log` beside it the line of each
    row that was left out, why, and the line it repeats. The first of rows that repeat
    each other stays.

    Raises what `data_report` raises, `ValueError` for an unknown kind, and
    `FileExistsError` for an existing file, unless `overwrite` and it is no source.
    """
    if unknown := [kind for kind in drop if kind not in _KINDS]:
        raise ValueError(describe_unknown(unknown[0], _KINDS, "kind of rows"))
    plan, files = _open(cfg, settings)
    out, sources = Path(out), [*files, *filter(None, [plan.cfg.val_path])]
    if out.exists() and (not overwrite or any(map(out.samefile, sources))):
        raise FileExistsError(
            f"{out} exists: name a new file, or set overwrite=True, but never a source"
        )
    _, faults = _examine(plan, files, identities)
    name = functools.partial(_name, plan, files)
    reasons = {
        (file, line): {
            "line": name(file, line),
            "reason": kind,
            "repeats": name(*other),
        }
        for kind in reversed([kind for kind in drop if kind in faults])
        for file, line, *other in faults[kind].tolist()
    }
    counts = Counter[str]()
    with verified.beside(out) as aside:
        with (aside / "rows").open("wb") as kept, (aside / "log").open("w") as log:
            for place, raw in _raw_rows(files):
                if why := reasons.get(place):
                    log.write(f"{json.dumps(why)}\n")
                else:
                    kept.write(raw + b"\n")
                counts[why["reason"] if why else "kept"] += 1
        verified.rename_flushed(aside / "log", out.with_name(f"{out.name}.log"))
        verified.rename_flushed(aside / "rows", out)
    return Facts(f"Rows in {out}, and those in {out.name}.log", dict(counts))
