"""Objectives: what a stage's loss is, whatever the rows look like."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.runs import Settings, metric_rows, train_here

from minimind_nb.config import TrainConfig, resolve
from minimind_nb.data.batches import IGNORED, MicroBatch, read_samples
from minimind_nb.data.packing import Piece, TruncatedDocuments, pack, truncate_documents
from minimind_nb.data.token_cache import Source, TokenCache, open_cache
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.training.stages import OBJECTIVES, next_token_loss, preference_loss

MEASURES = ("reward_margin", "accuracy", "kl")


def tiny_model(seed: int = 0, **shape: Any) -> MiniMindForCausalLM:
    torch.manual_seed(seed)
    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MiniMindConfig(**{**small, "initializer_range": 0.1, **shape})
    return MiniMindForCausalLM(config).train()


@pytest.fixture
def open_rows(tmp_path: Path):
    def open_rows(file: Path, stage: str) -> tuple[TokenCache, TruncatedDocuments]:
        cache = open_cache(Source(str(file), stage, read_tokenizer()), tmp_path)
        return cache, truncate_documents(cache, np.arange(len(cache)), 64)

    return open_rows


def read(
    cache: TokenCache, samples: list[list[Piece]], stage: str = "sft", width: int = 64
) -> MicroBatch:
    cfg = resolve(TrainConfig(stage=stage, max_seq_len=width))
    return read_samples(cache, cfg, 0, samples)


def pieces_of(truncated: TruncatedDocuments) -> list[Piece]:
    return [(d, start, n) for d, start, n in truncated.pieces.tolist()]


def loss_and_gradient(
    model: MiniMindForCausalLM, batches: list[MicroBatch]
) -> tuple[float, torch.Tensor]:
    """Sums over the batches."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        loss = next_token_loss(model, batch, resolve(TrainConfig(stage="sft"))).loss
        loss.backward()
        total += float(loss.detach())
    grads = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return total, torch.cat(grads)


def assert_same(a: tuple[float, torch.Tensor], b: tuple[float, torch.Tensor]) -> None:
    assert a[0] == pytest.approx(b[0], rel=1e-5)
    assert torch.allclose(a[1], b[1], rtol=1e-5, atol=1e-5 * float(b[1].abs().max()))


def test_conversations_packed_equal_one_at_a_time(chat_file: Path, open_rows) -> None:
    model = tiny_model()
    cache, truncated = open_rows(chat_file, "sft")
    pieces, rows = pieces_of(truncated), pack(truncated.pieces, 64, split=False)
    packed = read(cache, [rows.row(number) for number in range(len(rows))])
    assert len(packed.inputs) < 0.8 * len(pieces), "several share a row"
    alone = []
    for piece in pieces:
        ids = torch.from_numpy(cache.piece(*piece).astype(np.int64))[None]
        in_loss = torch.from_numpy(cache.loss_mask(*piece))
        targets = torch.where(in_loss, ids[:, 1:], IGNORED)
        alone.append(MicroBatch(ids[:, :-1], targets, None, 1))
    separate = loss_and_gradient(model, alone)
    assert_same(loss_and_gradient(model, [packed]), separate)
    unmasked = MicroBatch(packed.inputs, packed.targets, None, packed.samples)
    assert abs(loss_and_gradient(model, [unmasked])[0] - separate[0]) > 1e-2


def test_the_loss_of_answers_is_independent_of_padding(
    chat_file: Path, open_rows
) -> None:
    model = tiny_model()
    cache, truncated = open_rows(chat_file, "sft")
    pieces = [[piece] for piece in pieces_of(truncated)[:9]]
    tight, wide = (
        loss_and_gradient(model, [read(cache, pieces, width=width)])
        for width in (64, 200)
    )
    assert_same(tight, wide)


def test_the_loss_is_the_mean_over_all_answers_tokens(sft_settings: Settings) -> None:
    seen: list[tuple[float, int, int]] = []

    def spy(trainer) -> None:
        objective = trainer.stage.objective

        def counted(model, batch, cfg):
            found = objective(model, batch, cfg)
            there = batch.documents >= 0
            in_loss = batch.targets != IGNORED
            assert int(in_loss.sum()) < int(there.sum())
            loss = float(found.loss.detach())
            seen.append((loss, int(in_loss.sum()), int(there.sum())))
            return found

        trainer.stage = type(OBJECTIVES["sft"])(counted)
        trainer.validation = None

    steps = {"max_steps": 2, "log_interval": 2, "accumulation_steps": 2}
    _, folder = train_here({**sft_settings, **steps, "batch_size": 3}, change=spy)
    assert len(seen) == 4
    mean = sum(loss for loss, _, _ in seen) / sum(count for _, count, _ in seen)
    ((loss, tokens),) = metric_rows(folder, "train", "loss", "tokens")
    assert loss == pytest.approx(mean, rel=1e-6)
    assert tokens == sum(there for _, _, there in seen), (
        "text, whether in the loss or not"
    )


def sum_by_hand(model: MiniMindForCausalLM, ids: np.ndarray, loss_mask: np.ndarray):
    """The sum of log-probabilities of the tokens in the loss of one text, and their number."""
    with torch.no_grad():
        logits = model(torch.from_numpy(ids[None, :-1].astype(np.int64))).logits[0]
    total, count = 0.0, 0
    for t, (target, there) in enumerate(zip(ids[1:], loss_mask[1:], strict=True)):
        if there:
            weights = logits[t].double().exp()
            total += math.log(float(weights[int(target)] / weights.sum()))
            count += 1
    return total, count


def test_the_preference_loss_is_its_formula(pair_file: Path, open_rows) -> None:
    model, draw = tiny_model(), np.random.default_rng(0)
    cache, truncated = open_rows(pair_file, "dpo")
    pieces = pieces_of(truncated)[:12]
    sums = []
    for piece in pieces:
        loss_mask = np.append(False, cache.loss_mask(*piece))
        ids = cache.piece(*piece)
        policy, count = sum_by_hand(model, ids, loss_mask)
        sums.append((policy, policy + draw.normal(0, 3), count))
    beta, losses, margins, kl = 0.7, [], [], []
    for (pc, rc, nc), (pr, rr, nr) in zip(sums[::2], sums[1::2], strict=True):
        margin = beta * ((pc - rc) - (pr - rr))
        losses.append(math.log(1 + math.exp(-margin)))
        margins.append(margin)
        kl.append((rc - pc + rr - pr) / (nc + nr))
    batch = read(cache, [pieces[n : n + 2] for n in range(0, 12, 2)], "dpo")
    batch = replace(batch, reference=torch.tensor([r for _, r, _ in sums]))
    cfg = resolve(TrainConfig(stage="dpo", data_path="demo", dpo_beta=beta))
    found = preference_loss(model, batch, cfg)
    assert float(found.loss.detach()) == pytest.approx(sum(losses), rel=1e-5)
    right = sum(margin > 0 for margin in margins)
    assert 0 < right < 6, "both kinds are there"
    expected = [sum(margins), right, sum(kl)]
    assert found.metrics.tolist() == pytest.approx(expected, rel=1e-4)
    assert not found.metrics.requires_grad
    assert found.loss.requires_grad


def test_preference_at_its_start_is_ln_2_and_rises(dpo_settings: Settings) -> None:
    _, folder = train_here(dpo_settings)
    rows = metric_rows(folder, "eval", "step", "loss", *MEASURES)
    assert [row[0] for row in rows] == [0, 4, 8, 12]
    step, loss, margin, accuracy, kl = rows[0]
    assert (margin, accuracy, kl) == (
        pytest.approx(0, abs=1e-5),
        0.5,
        pytest.approx(0, abs=1e-6),
    )
    assert loss == pytest.approx(math.log(2), abs=1e-6)
    train = metric_rows(folder, "train", "loss", *MEASURES)
    assert train[0][:2] == (
        pytest.approx(math.log(2), abs=1e-6),
        pytest.approx(0, abs=1e-5),
    )
    assert train[0][2] == 0.5
    margins = [row[2] for row in rows]
    assert margins == sorted(margins)
    assert margins[-1] > 0.01
    assert rows[-1][1] < math.log(2)
    assert rows[-1][3] > 0.5
    lines = folder.metrics_file.read_text(encoding="utf-8")
    assert "perplexity" not in lines and "bits_per_byte" not in lines


def test_a_larger_beta_weighs_the_same_step_more(
    dpo_settings: Settings, tmp_path: Path
) -> None:
    margins = []
    for beta in (0.1, 1.0):
        own = {"dpo_beta": beta, "out_dir": str(tmp_path / str(beta)), "max_steps": 2}
        _, folder = train_here({**dpo_settings, **own})
        margins.append(metric_rows(folder, "eval", "reward_margin")[-1][0])
    assert margins[1] > 3 * margins[0] > 0
