"""The loss of each token: its figures, what a cell shows, and how far back it looks."""

import dataclasses
import html
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from support.small_models import make_model, make_tokenizer, teach

from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.monitor.surprise import surprise

TEXT = "one two three <b>\n你"


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return teach(tokenizer, "<|im_start|>one two three four<|im_end|>", steps=20)


def titles(result):
    text = result.above.partition("</div>")[0]  # without the scale behind it
    notes = re.findall(r'<span[^>]* title="([^"]*)">', text)
    return [*map(html.unescape, notes)]


def test_losses_are_those_of_the_model(model, tokenizer):
    ids = torch.tensor([[1, *tokenizer(TEXT)["input_ids"]]])
    expected = model(ids, labels=ids).loss.item()
    result = surprise(model, tokenizer, TEXT)
    assert math.isnan(result.losses[0]) and len(result.losses) == ids.shape[1]
    assert result.loss == pytest.approx(expected, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    bits = expected * (ids.shape[1] - 1) / math.log(2) / len(TEXT.encode())
    assert result.bits_per_byte == pytest.approx(bits, rel=1e-5)


def test_the_likeliest_say_what_was_expected(model, tokenizer):
    result = surprise(model, tokenizer, "one two five")
    two = next(n for n, token in enumerate(result.tokens) if token.startswith(" t"))
    token, chance = result.top[two][0]
    assert token == result.tokens[two]
    assert chance == pytest.approx(math.exp(-result.losses[two]), rel=1e-4)
    assert {len(five) for five in result.top} == {5}
    worst = np.nanargmax(result.losses)
    assert result.rows[0][0].startswith(f"“{result.tokens[worst]}” ")
    assert " · ".join(result.rows[0]).replace(" · ", "\n") == titles(result)[worst]
    assert repr(result).startswith(f"{len(result.tokens)} tokens, loss ")


def test_a_text_is_shown_whole_and_escaped(model, tokenizer):
    result = surprise(model, tokenizer, TEXT)
    spans = re.search(r'<div class="tokens">(.*?)</div>', result._repr_html_(), re.S)
    assert spans
    text = re.sub("<[^>]*>", "", spans[1])
    assert text == "&lt;|im_start|&gt;one two three &lt;b&gt;↵\n你"
    assert result.tokens[-3:] == ["‹E4›", "‹BD›", "‹A0›"]
    assert all(f"“{byte}” " in titles(result)[-1] for byte in result.tokens[-3:])


def test_a_character_has_the_tint_of_all_its_bytes(model, tokenizer):
    result = surprise(model, tokenizer, "你")
    assert sum(result.losses[1:]) > 8
    tint = "rgba(221,107,31,0.70)"
    assert f'<span style="background:{tint}" title="“‹E4›”' in result._repr_html_()


def test_a_long_text_is_read_in_windows_that_overlap(model, tokenizer):
    text = "one two three four " * 8
    whole = surprise(model, tokenizer, text).losses
    parts = surprise(model, tokenizer, text, max_seq_len=8).losses
    assert len(parts) == len(whole)
    np.testing.assert_allclose(parts[1:9], whole[1:9], rtol=1e-4)
    ids = torch.tensor([[1, *tokenizer(text)["input_ids"]]])
    window = model(ids[:, 4:12]).logits[0, 4].log_softmax(-1)
    assert parts[9] == pytest.approx(-window[ids[0, 9]].item(), rel=1e-4)
    short = make_model(tokenizer, max_position_embeddings=8)
    assert np.isfinite(surprise(short, tokenizer, text).losses[1:]).all()


def test_a_conversation_is_rendered_by_the_chat_template(model, tokenizer, monkeypatch):
    messages = [{"role": "user", "content": "one"}]
    messages += [{"role": "assistant", "content": "two"}]
    read = "".join(surprise(model, tokenizer, messages).tokens)
    asked = "<|im_start|>user↵one<|im_end|>↵"
    assert read == f"{asked}<|im_start|>assistant↵two<|im_end|>↵"
    with pytest.raises(ValueError, match="message 1 .* the user's and empty"):
        surprise(model, tokenizer, [{"role": "user", "content": ""}])
    spec = dataclasses.replace(read_tokenizer(tokenizer), chat_template=None)
    monkeypatch.setattr("minimind_nb.monitor.surprise.read_tokenizer", lambda _: spec)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        surprise(model, tokenizer, messages)


@pytest.mark.parametrize(("text", "tokens"), [("", 1), ("o", 2), ("<|im_start|>o", 2)])
def test_short_texts_begin_with_one_begin_token(model, tokenizer, text, tokens):
    result = surprise(model, tokenizer, text)
    assert len(result.losses) == tokens and len(result.rows) == tokens - 1
    assert result.title.startswith(f"{tokens} tokens, loss ")
    assert titles(result)[0] == "“<|im_start|>” is the first"


def test_dropout_is_off_and_the_mode_is_kept(tokenizer):
    model = make_model(tokenizer, dropout=0.5).train()
    first, second = (surprise(model, tokenizer, TEXT).losses for _ in range(2))
    np.testing.assert_array_equal(first, second)
    assert model.training


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lower_precision_is_measured_in_float32(model, tokenizer, dtype):
    lower = make_model(tokenizer).to(dtype)
    lower.load_state_dict(model.state_dict())
    result = surprise(lower, tokenizer, TEXT)
    assert result.loss == pytest.approx(surprise(model, tokenizer, TEXT).loss, rel=0.05)


def test_logits_that_are_no_numbers_show(tokenizer):
    model = make_model(tokenizer)
    torch.nn.init.constant_(model.model.norm.weight, math.nan)
    result = surprise(model, tokenizer, "one")
    assert "loss nan (perplexity nan), nan bits per byte" in repr(result)
    assert "nan nats" in titles(result)[1]


def test_routes_of_a_mixture(tokenizer):
    model = make_model(tokenizer, use_moe=True, n_routed_experts=3)
    result = surprise(model, tokenizer, TEXT, max_seq_len=12)
    assert np.shape(result.routes) == (len(result.tokens), 2, 2)
    first: Any = model.model.layers[0].mlp
    model(torch.tensor([[1, *tokenizer(TEXT)["input_ids"]]])[:, :6])
    chosen = [expert for layers in result.routes[:6] for expert in layers[0]]
    assert [chosen.count(expert) for expert in range(3)] == first.expert_load
    assert not first.gate._forward_hooks
    layers = ["+".join(map(str, layer)) for layer in result.routes[1]]
    assert titles(result)[1].endswith(f"experts {' '.join(layers)}")


def test_a_dense_model_has_no_experts(model, tokenizer):
    result = surprise(model, tokenizer, "one")
    assert not any(result.routes)
    assert "expert" not in result._repr_html_()


def test_a_page_shows_a_thousand_tokens(model, tokenizer):
    page = surprise(model, tokenizer, "xyz" * 1000)._repr_html_()
    assert len(page.encode()) < 300_000
    assert page.count('<i title="">') == 1_000 + 9 and "</span>…</div>" in page


def test_a_foreign_tokenizer_is_refused(tokenizer):
    with pytest.raises(ValueError, match="load both from one run"):
        surprise(make_model(tokenizer, vocab_size=100), tokenizer, "one")
