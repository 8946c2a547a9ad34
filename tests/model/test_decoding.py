"""The loop over tokens: equal to recomputing everything, to transformers, to itself."""

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig

from minimind_nb.model.generation import Sampling, continue_ids, continue_paged, decode

KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "moe": {"use_moe": True},
    "qk_norm": {"qk_norm": True, "rms_norm_eps": 1e-6},
    "eager": {"flash_attn": False},
}
EOS, PAD = 2, 0
GREEDY: dict[str, Any] = {"eos_id": EOS, "temperature": 0}
ROWS = [[5], [7, 8, 9, 10, 11], list(range(3, 20)), list(range(40, 73))]

needs_paging = pytest.mark.skipif(
    tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 9),
    reason="transformers before 5.9 has no continuous batching that works",
)


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
        **{**GREEDY, "eos_id": -1},
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


def test_rows_may_be_arrays_as_an_encoder_gives_them(tiny):
    arrays: Any = [np.array(row, np.uint32) for row in ROWS]
    found = continue_ids(tiny(), arrays, max_new_tokens=5, **GREEDY)
    assert found == continue_ids(tiny(), ROWS, max_new_tokens=5, **GREEDY)


def test_a_row_ends_at_its_first_end_token_and_the_loop_with_the_last_row(tiny):
    model = tiny()
    free = continue_ids(model, ROWS, max_new_tokens=12, **{**GREEDY, "eos_id": -1})
    end = free[0][3]
    ended = continue_ids(model, ROWS, max_new_tokens=12, **{**GREEDY, "eos_id": end})
    assert ended == [row[: row.index(end)] if end in row else row for row in free]
    sampling = Sampling(temperature=0, max_new_tokens=12)
    steps = list(decode(model, ROWS[:1], eos_id=end, sampling=sampling))
    assert len(steps) == free[0].index(end) + 1


def test_a_seed_touches_no_global_generator_and_needs_none(tiny):
    settings: dict[str, Any] = {"max_new_tokens": 20, "temperature": 5.0}
    settings |= {"eos_id": EOS, "seed": 2**64 - 1}
    model = tiny()
    first = continue_ids(model, ROWS, **settings)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    assert continue_ids(model, ROWS, **settings) == first
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_restored_also_when_a_loop_is_left(tiny, training):
    model = tiny(dropout=0.5).train(training)
    sampling = Sampling(temperature=0)
    loop = decode(model, ROWS, eos_id=EOS, sampling=sampling)
    next(loop)
    assert not model.training
    assert torch.is_grad_enabled(), "between two tokens the caller's setting holds"
    loop.close()
    assert model.training is training


def test_an_unknown_setting_is_refused(tiny):
    with pytest.raises(TypeError, match="temprature"):
        continue_ids(tiny(), ROWS, eos_id=EOS, temprature=1)


@needs_paging
@pytest.mark.parametrize("kind", KINDS)
def test_paged_equals_plain_greedy_and_leaves_the_model_as_it_was(tiny, kind):
    model = tiny(**KINDS[kind]).train()
    attention = model.config._attn_implementation
    sampling = Sampling(temperature=0, max_new_tokens=24)
    paged = continue_paged(model, ROWS, eos_id=EOS, sampling=sampling)
    assert paged == continue_ids(model, ROWS, max_new_tokens=24, **GREEDY)
    assert model.training
    assert model.config._attn_implementation == attention


@needs_paging
def test_each_prompt_gets_the_pages_that_it_fills(tiny, monkeypatch):
    model, seen = tiny(), {}
    keep = type(model).generate_batch

    def watch(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen["config"] = kwargs["continuous_batching_config"]
        return keep(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "generate_batch", watch)
    sampling = Sampling(temperature=0, max_new_tokens=15)
    continue_paged(model, ROWS, eos_id=EOS, sampling=sampling)
    assert seen["config"].num_blocks == 1 + 2 + 2 + 3  # 16, 20, 32 and 48 positions
    assert seen["config"].max_batch_tokens == 33


@needs_paging
def test_paging_that_fails_is_told_and_leaves_the_model_as_it_was(tiny, monkeypatch):
    model = tiny().train()
    sampling = Sampling(temperature=0)

    def nothing(self: Any, *_: Any, **__: Any) -> Any:
        self.eval()
        return {}

    def fail(self: Any, *_: Any, **__: Any) -> Any:
        self.eval()
        raise MemoryError("no room")

    for broken, error in ((nothing, RuntimeError), (fail, MemoryError)):
        monkeypatch.setattr(type(model), "generate_batch", broken)
        with pytest.raises(error, match=r"unanswered \(\[\]\): leave|no room"):
            continue_paged(model, ROWS, eos_id=EOS, sampling=sampling)
        assert model.training
        assert model.config._attn_implementation == "sdpa"


@needs_paging
def test_paging_says_that_its_thread_failed(tiny):
    model = tiny()
    del model.model.layers[1].self_attn.layer_idx
    with pytest.raises(RuntimeError, match=r"left prompts unanswered .+ leave out"):
        sampling = Sampling(temperature=0)
        continue_paged(model, ROWS, eos_id=EOS, sampling=sampling)


@pytest.mark.parametrize("settings", [{}, {"temperature": 0, "repetition_penalty": 2}])
def test_paging_refuses_what_is_not_greedy(tiny, settings, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.9.0")
    with pytest.raises(ValueError, match=r"decodes greedily.*set temperature=0"):
        continue_paged(tiny(), ROWS, eos_id=EOS, sampling=Sampling(**settings))


def test_paging_refuses_an_old_transformers(tiny, monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "5.8.1")
    with pytest.raises(RuntimeError, match=r"needs transformers 5\.9.*5\.8\.1"):
        sampling = Sampling(temperature=0)
        continue_paged(tiny(), ROWS, eos_id=EOS, sampling=sampling)
