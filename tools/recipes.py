"""Write the tables of recipes on two T4 into docs/recipes.md and the README.

Tokens follow from the sizes in docs/data.md and the bytes a token in docs/vocabulary.md,
all else from the package's own estimates. MEASURED holds text tokens/s that
`minimind-nb bench` has printed on two T4, by preset and stage; all others are expected.
"""

import re
from dataclasses import dataclass, replace
from pathlib import Path

from minimind_nb.config import PRESETS, TrainConfig, resolve
from minimind_nb.config.presets import fit_batch, resolve_batch
from minimind_nb.hardware import Gpu, Hardware
from minimind_nb.monitor.references import expected_loss
from minimind_nb.planning import (
    MOST_EPOCHS,
    expected_speed,
    memory_gib,
)

ROOT = Path(__file__).resolve().parents[1]
T4 = Gpu("Tesla T4", (7, 5), 14.6)
TWO_T4 = Hardware((T4, T4), cpu_cores=4, cpu_native_bf16=False, memory_gib=30.0)
QUOTA_HOURS = 30
MEASURED: dict[tuple[str, str], float] = {}
# The data of a stage, and the row of docs/vocabulary.md that comes nearest to it.
DATA = {
    "pretrain": ("pretrain_t2t_mini.jsonl", "Chinese, held out and unseen"),
    "sft": ("sft_t2t_mini.jsonl", "Chinese chat (Alpaca)"),
    "dpo": ("dpo.jsonl", "Chinese preference data (LLaMA-Factory)"),
}
COLUMNS = "preset|stage|text tokens|epochs|text tokens/s|hours|of 30 h|GiB a T4|loss"
README_COLUMNS = "preset|hours: pretrain, sft, dpo|of 30 h|GiB a T4"


@dataclass
class Recipe:
    """One stage of a preset on two T4: a row of the table."""

    preset: str
    stage: str
    tokens: float
    epochs: float
    speed: float
    measured: bool
    memory: float
    loss: str

    @property
    def hours(self) -> float:
        """Return the hours that the tokens take."""
        return self.tokens / self.speed / 3600


def recipe(preset: str, stage: str) -> Recipe:
    """Return what a stage of a preset takes: pretraining the epochs that are nearly as
    good as new text, as a plan for hours does, the others those of their defaults."""
    asked = TrainConfig(stage=stage, preset=preset, init_from="none")
    machine = {"device": "cuda", "num_processes": len(TWO_T4.gpus), "dtype": "float16"}
    cfg, epoch = resolve(asked, **machine), tokens_of(stage)
    tokens = epoch * (MOST_EPOCHS if stage == "pretrain" else cfg.epochs)
    cfg = replace(cfg, **fit_batch(vars(cfg), asked.explicit(), int(epoch)))
    while memory_gib(cfg) > T4.memory_gib and cfg.batch_size > 1:
        half = {**vars(cfg), "batch_size": cfg.batch_size // 2}
        cfg = replace(cfg, **resolve_batch(half, ()))
    known = MEASURED.get((preset, stage))
    return Recipe(
        preset,
        stage,
        tokens,
        tokens / epoch,
        known or expected_speed(cfg, TWO_T4),
        known is not None,
        memory_gib(cfg),
        expected_loss(vars(cfg), int(tokens)) or "not measured",
    )


def tokens_of(stage: str) -> float:
    """Return about how many tokens the data of a stage has."""
    file, text = DATA[stage]
    size, unit = found("data", rf"\| `{file}` \| ([\d.]+) ([MG])B")
    (each,) = found("vocabulary", rf"\| {re.escape(text)} \| ([\d.]+) ")
    return float(size) * {"M": 1e6, "G": 1e9}[unit] / float(each)


def found(document: str, pattern: str) -> tuple[str, ...]:
    """Return what the groups of a pattern match in a document."""
    match = re.search(pattern, (ROOT / f"docs/{document}.md").read_text("utf-8"))
    assert match, (document, pattern)
    return match.groups()


def table(columns: str, rows: list[list[str]]) -> str:
    """Return a table in Markdown."""
    names = columns.split("|")
    lines = [names, ["---"] * len(names), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def tables() -> dict[str, str]:
    """Return the tables by the files that hold them."""
    recipes = [[recipe(preset, stage) for stage in DATA] for preset in PRESETS]
    long = [
        [
            f"`{one.preset}`",
            f"`{one.stage}`",
            f"{one.tokens / 1e6:,.0f} M",
            f"{one.epochs:.2g}",
            f"{one.speed:,.0f}{'' if one.measured else ' expected'}",
            f"{one.hours:.2g}",
            f"{one.hours / QUOTA_HOURS:.1%}",
            f"{one.memory:.1f}",
            one.loss,
        ]
        for stages in recipes
        for one in stages
    ]
    short = [
        [
            f"`{stages[0].preset}`",
            ", ".join(f"{one.hours:.2g}" for one in stages),
            f"{sum(one.hours for one in stages) / QUOTA_HOURS:.0%}",
            f"{max(one.memory for one in stages):.1f}",
        ]
        for stages in recipes
    ]
    texts = {
        "docs/recipes.md": table(COLUMNS, long),
        "README.md": table(README_COLUMNS, short),
    }
    return {name: f"\n{text}\n" for name, text in texts.items()}


def fill(text: str, made: str) -> str:
    """Return a document with what was made between its markers."""
    between = re.compile(r"(<!-- recipes -->\n).*?(<!-- /recipes -->)", re.DOTALL)
    return between.sub(lambda match: match[1] + made + match[2], text)


def main() -> None:
    """Bring the documents up to date."""
    for name, made in tables().items():
        path = ROOT / name
        path.write_text(fill(path.read_text("utf-8"), made), encoding="utf-8")


if __name__ == "__main__":
    main()
