"""The loop over tokens: equal to recomputing everything, to transformers, to itself."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from minimind_nb.model.decoding import Sampling, choose, decode
from minimind_nb.model.generation import continue_ids

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"use_moe": True},
    "qk_norm": {"qk_norm": True, "rms_norm_eps": 1e-6},
    "eager": {"attn_implementation": "eager"},
    "stretched": {
        "inference_rope_scaling": True,
        "rope_scaling": {"original_max_position_embeddings": 16},
    },
    "untied": {"tie_word_embeddings": False, "hidden_act": "gelu", "head_dim": 24},
}
EOS, PAD = 2, 0
GREEDY: dict[str, Any] = {"ends": {EOS}, "temperature": 0}
ROWS = [[5], [7, 8, 9, 10, 11], list(range(3, 20)), list(range(40, 73))]


def recompute(model, row: list[int], new: int) -> list[int]:
    """Greedy, everything anew for each token, no cache, no batch."""
    ids = list(row)
    with torch.no_grad():
        for _ in range(new):
            token = int(model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == EOS:
                break
            ids.append(token)
    return ids[len(row) :]


@pytest.mark.parametrize("kind", KINDS)
def test_cached_batch_equals_recomputing_each_row(tiny, kind):
    model = tiny(**KINDS[kind])
    found = continue_ids(model, ROWS, max_new_tokens=24, **GREEDY)
    assert found == [recompute(model, row, 24) for row in ROWS]


@pytest.mark.parametrize("penalty", [1.0, 1.5])
def test_greedy_equals_transformers_generate(tiny, penalty):
    model = tiny()
    row = ROWS[2]
    theirs: Tensor = model.generate(
        torch.tensor([row]),
        attention_mask=torch.ones(1, len(row), dtype=torch.long),
        generation_config=GenerationConfig(
            max_new_tokens=20,
            do_sample=False,
            repetition_penalty=penalty,
            eos_token_id=-1,
            pad_token_id=PAD,
        ),
    )
    found = continue_ids(
        model,
        [row],
        max_new_tokens=20,
        **{**GREEDY, "ends": ()},
        repetition_penalty=penalty,
    )
    assert found == [theirs[0, len(row) :].tolist()]


def test_padding_is_neither_seen_nor_counted_as_repeated(tiny):
    settings: dict[str, Any] = {"max_new_tokens": 12, "repetition_penalty": 3.0}
    model = tiny()
    alone = [continue_ids(model, [row], **settings, **GREEDY)[0] for row in ROWS]
    assert continue_ids(model, ROWS, **settings, **GREEDY) == alone


@pytest.mark.parametrize("narrow", [{"top_k": 1}, {"top_p": 1e-6}])
def test_the_narrowest_choice_is_the_likeliest_token(tiny, narrow):
    model = tiny()
    hot = {**GREEDY, "temperature": 5.0, **narrow}
    greedy = continue_ids(model, ROWS, max_new_tokens=9, **GREEDY)
    assert continue_ids(model, ROWS, max_new_tokens=9, **hot) == greedy


@pytest.mark.parametrize("width", [1.0, 30.0])  # of 256 tokens: not enough, enough
@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 0.9), (0, 1.0), (7, 0.5), (7, 1.0), (4000, 0.9)]
)
def test_the_draw_is_that_of_transformers(width, top_k, top_p):
    torch.manual_seed(1)
    logits = torch.randn(1, 2000) * width
    expected = logits / 0.7
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)  # pyright: ignore
    expected = TopPLogitsWarper(top_p)(None, expected).softmax(-1)[0]  # pyright: ignore
    many = logits.expand(4000, -1)
    sampling = Sampling(temperature=0.7, top_k=top_k, top_p=top_p)
    drawn = choose(many, torch.zeros_like(many, dtype=torch.bool), sampling, None)
    counts = torch.bincount(drawn[:, 0], minlength=2000)
    assert not counts[expected == 0].any()
    assert (counts / 4000 - expected).abs().max() < 0.04


@pytest.mark.parametrize("kind", KINDS)
def test_each_step_gives_the_logits_of_the_model_in_lower_precision(tiny, kind):
    model, told = tiny(**KINDS[kind]), []
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        steps = decode(model, ROWS[2:3], ends=(), sampling=Sampling(temperature=0))
        for _ in range(6):
            told += next(steps)
        logits = model(torch.tensor([ROWS[2] + told[:-1]])).logits[0, -6:].float()
    best = logits.max(-1).values
    assert (best - logits[torch.arange(6), told] < 0.02 * logits.std()).all()


def test_a_layer_that_was_replaced_is_used(tiny):
    model = tiny()

    class Doubled(torch.nn.Module):
        def __init__(self, layer: torch.nn.Linear) -> None:
            super().__init__()
            self.layer, self.weight = layer, layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return 2 * self.layer(x)

    before = continue_ids(model, ROWS, max_new_tokens=12, **GREEDY)
    for layer in model.model.layers:
        layer.self_attn.v_proj = Doubled(layer.self_attn.v_proj)
    found = continue_ids(model, ROWS, max_new_tokens=12, **GREEDY)
    assert found == [recompute(model, row, 12) for row in ROWS] != before


def test_rows_may_be_arrays_as_an_encoder_gives_them(tiny):
    arrays: Any = [np.array(row, np.uint32) for row in ROWS]
    found = continue_ids(tiny(), arrays, max_new_tokens=5, **GREEDY)
    assert found == continue_ids(tiny(), ROWS, max_new_tokens=5, **GREEDY)


def test_a_row_ends_at_its_first_end_token_and_the_loop_with_the_last_row(tiny):
    model = tiny()
    free = continue_ids(model, ROWS, max_new_tokens=12, **{**GREEDY, "ends": ()})
    end = free[0][3]
    ended = continue_ids(model, ROWS, max_new_tokens=12, **{**GREEDY, "ends": {end}})
    assert ended == [row[: row.index(end)] if end in row else row for row in free]
    sampling = Sampling(temperature=0, max_new_tokens=12)
    steps = list(decode(model, ROWS[:1], ends={end}, sampling=sampling))
    assert len(steps) == free[0].index(end) + 1


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_also_when_a_loop_is_left(tiny, training):
    model = tiny(dropout=0.5).train(training)
    sampling = Sampling(temperature=0)
    loop = decode(model, ROWS, ends={EOS}, sampling=sampling)
    next(loop)
    assert not model.training
    assert torch.is_grad_enabled(), "between two tokens the caller's setting holds"
    loop.close()
    assert model.training is training


def test_an_unknown_setting_is_refused(tiny):
    with pytest.raises(TypeError, match="temprature"):
        continue_ids(tiny(), ROWS, ends={EOS}, temprature=1)


@pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 20),
    reason="transformers before 5.20 does not switch our attention to its pages",
)
@pytest.mark.parametrize("kind", ["dense", "moe", "qk_norm"])
def test_continuous_batching_of_transformers_gives_the_same_greedy_ids(tiny, kind):
    model: Any = tiny(**KINDS[kind])
    found = model.generate_batch(
        ROWS,
        generation_config=GenerationConfig(
            max_new_tokens=24, do_sample=False, eos_token_id=-1
        ),
        continuous_batching_config=transformers.ContinuousBatchingConfig(
            num_blocks=20, max_batch_tokens=40
        ),
        progress_bar=False,
    )
    expected = continue_ids(model, ROWS, max_new_tokens=24, **{**GREEDY, "ends": ()})
    assert [one.generated_tokens for one in found.values()] == expected
