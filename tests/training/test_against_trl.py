"""Preferences are trained on as TRL's `DPOTrainer` does it, where TRL is installed."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import minimind_nb as mm
from minimind_nb.config import TrainConfig, resolve
from minimind_nb.data.batches import MicroBatch, read_samples
from minimind_nb.data.conversations import IN_LOSS
from minimind_nb.data.packing import Piece, make_rows, truncate_documents
from minimind_nb.data.token_cache import Source, TokenCache, open_cache
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.training.stages import preference_loss, with_reference

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

WIDTH = 256


def messages(*contents: str, system: str | None = None) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    turns = list(zip(roles, contents, strict=False))
    if system is not None:
        turns.insert(0, ("system", system))
    return [{"role": role, "content": content} for role, content in turns]


def make_pair(*prompt: str, good: str, bad: str, system: str | None = None) -> Any:
    return {
        "chosen": messages(*prompt, good, system=system),
        "rejected": messages(*prompt, bad, system=system),
    }


PAIRS = [
    make_pair("How much do 3 and 4 make?", good="7", bad="Something like 8, I think."),
    make_pair(
        "今天是星期一，2 天以后是星期几？", good="星期三。", bad="星期", system="请简短地回答。"
    ),
    make_pair("Hello!", "Hello.", "What is a cow in Chinese?", good="牛", bad="马"),
    make_pair(
        "1, 2, 3?", "4", "And then?", "5", "Then?", good="6\nand 7\n", bad="five, or 5"
    ),
    make_pair("Write `if x:`", good="if x:\n    pass", bad="No."),
]  # fmt: skip
"""Of different lengths, some of several turns; only the last answer differs."""


@pytest.fixture(scope="module")
def models() -> tuple[Any, Any]:
    """A tiny model, and the one it began from, which it has moved away from."""
    torch.manual_seed(0)
    shape = mm.MiniMindConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        initializer_range=0.06,
    )
    reference = mm.MiniMindForCausalLM(shape).eval()
    model = copy.deepcopy(reference)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model, reference


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> TokenCache:
    folder = tmp_path_factory.mktemp("pairs")
    file = folder / "pairs.jsonl"
    rows = (json.dumps(pair, ensure_ascii=False) for pair in PAIRS)
    file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    source = Source(str(file), "dpo", read_tokenizer())
    return open_cache(source, folder / "cache")


def read(cache: TokenCache, samples: list[list[Piece]]) -> MicroBatch:
    cfg = resolve(TrainConfig(stage="dpo", data_path="demo", max_seq_len=WIDTH))
    return read_samples(cache, cfg, read_tokenizer().pad_id, samples)


def our_samples(cache: TokenCache) -> list[list[Piece]]:
    """All pairs."""
    truncated = truncate_documents(cache, np.arange(2 * len(PAIRS)), WIDTH)
    rows = make_rows(truncated.pieces, "dpo", WIDTH)
    return [rows.row(number) for number in range(len(rows))]


def their_trainer(model: Any, reference: Any, folder: Path, beta: float) -> Any:
    return trl.DPOTrainer(
        model=copy.deepcopy(model),
        ref_model=copy.deepcopy(reference),
        args=trl.DPOConfig(
            output_dir=str(folder),
            beta=beta,
            max_length=WIDTH,
            per_device_train_batch_size=len(PAIRS),
            gradient_checkpointing=False,
            bf16=False,
            use_cpu=True,
            report_to="none",
        ),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=mm.load_tokenizer(),
    )


@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_losses_gradient_and_margin_of_pairs_are_those_of_trl(
    models: tuple[Any, Any], cache: TokenCache, tmp_path: Path, beta: float
) -> None:
    ours, reference = models
    trainer = their_trainer(ours, reference, tmp_path, beta)
    theirs, rows = trainer.model.eval(), list(trainer.train_dataset)
    samples = our_samples(cache)
    cfg = resolve(TrainConfig(stage="dpo", dpo_beta=beta))
    for sample, row in zip(samples, rows, strict=True):
        with torch.no_grad():
            loss = float(
                preference_loss(
                    ours, with_reference(read(cache, [sample]), reference), cfg
                ).loss
            )
            expected = float(trainer.compute_loss(theirs, trainer.data_collator([row])))
        assert abs(loss - math.log(2)) > 1e-3, "the model has moved"
        assert loss == pytest.approx(expected, abs=1e-5)

    ours.zero_grad()
    losses = preference_loss(ours, with_reference(read(cache, samples), reference), cfg)
    mean = losses.loss / len(PAIRS)
    mean.backward()
    their_mean = trainer.compute_loss(theirs, trainer.data_collator(rows))
    their_mean.backward()
    assert mean.item() == pytest.approx(their_mean.item(), abs=1e-5)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    logged = trainer._metrics["eval"]
    margin, accuracy = (losses.metrics[:2] / len(PAIRS)).tolist()
    assert margin == pytest.approx(logged["rewards/margins"][-1], abs=1e-5)
    assert accuracy == pytest.approx(logged["rewards/accuracies"][-1], abs=1e-6)


def test_trl_reads_the_same_ids_from_the_same_pairs(
    models: tuple[Any, Any], cache: TokenCache, tmp_path: Path
) -> None:
    trainer = their_trainer(*models, tmp_path, 0.1)
    for number, row in enumerate(trainer.train_dataset):
        for document, answer in enumerate(("chosen", "rejected"), 2 * number):
            ids = cache.document(document).tolist()
            marks = cache.marks_of(document)
            assert ids == row["prompt_ids"] + row[f"{answer}_ids"]
            loss_mask = (marks & IN_LOSS).tolist()
            begin = len(row["prompt_ids"])
            assert loss_mask == [0] * begin + [1] * (len(ids) - begin)
