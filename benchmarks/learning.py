"""What a model learns from a corpus with some settings; one row a trial into a file.

    python benchmarks/learning.py CORPUS.jsonl --tokens 600000 --out trials.jsonl \
        [--name NAME] [SETTING=VALUE ...]
    python benchmarks/learning.py --plot docs/learning.png --out trials.jsonl
    python benchmarks/learning.py CORPUS.jsonl --out trials.jsonl \
        --reference minimind_nb/monitor/references.json

Trains the demo's shape (1.6 M parameters, rows of 256) on documents of so many text
tokens, drawn from the corpus by `--draw`, and measures the loss on others, the same for
all trials. The row has the settings, the steps, the final loss and the curve. The
second form draws the mean curve of each name, and prints the share of tokens and time
after which the first name reaches the final loss of each other one. The third adds the
trials to the reference results, in place of those of the same name, corpus, size and
tokens. With "demo" as CORPUS the embedded corpus is trained on as it is.
"""

import argparse
import ast
import itertools
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import minimind_nb as mm
from minimind_nb.config import count_parameters, resolve
from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.tokenizer import read_tokenizer

HELD_OUT_TOKENS = 65_536
SHAPE = {"preset": "demo", "max_seq_len": 256}
PLACE = {"device": "cpu", "num_processes": 1, "dtype": "float32"}
QUIET = {"sample_tokens": 0, "save_interval": 10**6, "eval_tokens": HELD_OUT_TOKENS}


def split(corpus: Path, tokens: int, draw: int, folder: Path) -> tuple[Path, Path]:
    """Write documents of so many tokens, and others to validate with, to two files."""
    lines = corpus.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(lines)
    encoder = BulkEncoder(read_tokenizer())
    sizes = [len(ids) for ids in encoder.encode([json.loads(x)["text"] for x in lines])]

    def write(name: str, order: list[int], most: int) -> Path:
        taken = 0
        path = folder / name
        with path.open("w", encoding="utf-8") as file:
            while taken < most and order:
                number = order.pop()
                file.write(f"{lines[number]}\n")
                taken += sizes[number]
        return path

    order = list(range(len(lines)))
    held_out = write("held_out.jsonl", order, HELD_OUT_TOKENS)
    random.Random(draw).shuffle(order)
    return write("corpus.jsonl", order, tokens), held_out


def summarise(trials: Path, picture: Path) -> None:
    """Draw the mean curves, and print what the first name needs for the others' ends."""
    from matplotlib.figure import Figure

    groups: dict[str, list[Any]] = {}
    for line in trials.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        groups.setdefault(row["name"], []).append(row)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, rows in groups.items():
        tokens = np.linspace(0, min(row["tokens"] for row in rows), 200)
        curves = [np.interp(tokens, *np.array(row["curve"]).T) for row in rows]
        axes.plot(tokens / 1e6, np.mean(curves, 0), label=name)
        ends = [row["loss"] for row in rows]
        print(f"{name}: ends at {np.mean(ends):.3f} ({', '.join(map(str, ends))})")
    axes.set(xlabel="text tokens (million)", ylabel="validation loss")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)
    first, *others = groups.values()
    own_of = {row["draw"]: row for row in first}
    for other in itertools.chain(*others):
        if own := own_of.get(other["draw"]):
            tokens, losses = map(np.array, zip(*own["curve"], strict=True))
            reached = np.flatnonzero(losses <= other["loss"])[0]
            after = np.interp(
                -other["loss"],
                -losses[reached - 1 : reached + 1],
                tokens[reached - 1 :][:2],
            )
            share = after / other["tokens"]
            seconds = own["seconds"] * after / own["tokens"] / other["seconds"]
            print(
                f"{own['name']} reaches the {other['loss']:.3f} of {other['name']} after "
                f"{share:.3f} of its tokens and {seconds:.3f} of its time"
            )


def describe(row: dict[str, Any], corpus: Path) -> dict[str, Any]:
    """Return a trial as a reference result; older trials do not know their version."""
    cfg = resolve(mm.TrainConfig(**(SHAPE | PLACE | row["asked"])))
    kept = {
        name: getattr(cfg, name) for name in ("stage", "recipe", "optimizer", "dtype")
    }
    kept["parameters"] = count_parameters(cfg.shape())["active"]
    kept |= {"corpus": corpus.name, "version": row.get("version", mm.__version__)}
    names = ("name", "draw", "steps", "tokens", "loss", "curve")
    return kept | {name: row[name] for name in names}


def write_references(trials: Path, corpus: Path, file: Path) -> None:
    """Add trials to a file of reference results, a line each."""
    lines = trials.read_text(encoding="utf-8").splitlines()
    results = json.loads(file.read_bytes()) if file.exists() else []
    results += [describe(json.loads(line), corpus) for line in lines]
    keys = ("corpus", "name", "parameters", "draw", "tokens")
    last = {tuple(one[key] for key in keys): one for one in results}
    rows = [json.dumps(last[key], ensure_ascii=False) for key in sorted(last)]
    file.write_text("[\n" + ",\n".join(rows) + "\n]\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path, nargs="?")
    parser.add_argument("--plot", type=Path, help="draw the trials instead")
    parser.add_argument("--reference", type=Path, help="add the trials to this file")
    parser.add_argument("--tokens", type=int, default=600_000)
    parser.add_argument("--draw", type=int, default=1, help="which documents")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--name", default="")
    parser.add_argument("settings", nargs="*", metavar="SETTING=VALUE")
    options = parser.parse_intermixed_args()
    if options.plot:
        summarise(options.out, options.plot)
        return
    if options.reference:
        write_references(options.out, options.corpus, options.reference)
        return
    asked: dict[str, Any] = {}
    for pair in options.settings:
        name, _, value = pair.partition("=")
        try:
            asked[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            asked[name] = value
    with tempfile.TemporaryDirectory() as folder:
        data: dict[str, Any] = {"data_path": "demo", "eval_tokens": None}
        if str(options.corpus) != "demo":
            paths = split(options.corpus, options.tokens, options.draw, Path(folder))
            data = dict(zip(("data_path", "val_path"), map(str, paths), strict=True))
        settings: dict[str, Any] = (
            SHAPE | PLACE | QUIET | data | {"out_dir": folder} | asked
        )
        run = mm.train(mm.TrainConfig(**settings), view=False)
        history = run.history
        last, evals = history.last("train") or {}, history.select("eval")
        row = {
            **{"name": options.name, "asked": asked, "draw": options.draw},
            "version": mm.__version__,
            **{"steps": last["step"], "tokens": last["tokens"]},
            **{"seconds": round(last["seconds"], 1), "loss": evals[-1]["loss"]},
            "curve": [(one["tokens"], round(one["loss"], 4)) for one in evals],
        }
    with options.out.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps({k: v for k, v in row.items() if k != "curve"}))


if __name__ == "__main__":
    main()
