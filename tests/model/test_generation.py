"""Continuations: what comes back, when it stops, and what a seed promises."""

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.model.generation import generate


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["one two three four five six"], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<|endoftext|>",
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
    )


@pytest.fixture(scope="module")
def counter(tokenizer) -> MiniMindForCausalLM:
    """Has learnt one document: one two three four five six."""
    torch.manual_seed(0)
    shape: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    model = MiniMindForCausalLM(
        MiniMindConfig(**shape, vocab_size=len(tokenizer), initializer_range=0.1)
    )
    document = "<|im_start|>one two three four five six<|im_end|>"
    ids = torch.tensor([tokenizer(document)["input_ids"]])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model


def test_continuation_ends_at_eos_and_leaves_out_the_prompt(counter, tokenizer):
    assert generate(counter, tokenizer, "one two", temperature=0) == (
        " three four five six"
    )


def test_each_prompt_of_a_batch_is_continued_as_it_is_alone(counter, tokenizer):
    prompts = ["one", "one two three four", ""]
    texts = generate(counter, tokenizer, prompts, temperature=0)
    assert texts == [generate(counter, tokenizer, p, temperature=0) for p in prompts]
    assert texts[1:] == [" five six", "one two three four five six"]


def test_a_begin_token_in_the_prompt_is_not_doubled(counter, tokenizer):
    begun = generate(counter, tokenizer, "<|im_start|>one two", temperature=0, seed=1)
    assert begun == " three four five six"
    room = counter.config.max_position_embeddings
    with pytest.raises(ValueError, match="The longest prompt has 1 tokens"):
        generate(counter, tokenizer, "<|im_start|>", max_new_tokens=room)


def test_no_prompts_give_no_texts(counter, tokenizer):
    assert generate(counter, tokenizer, []) == []


def test_max_new_tokens_limits_the_continuation(counter, tokenizer):
    text = generate(counter, tokenizer, "one", max_new_tokens=2, temperature=0)
    assert len(tokenizer(text)["input_ids"]) == 2


def test_seed_gives_the_same_text_and_leaves_the_global_generator(counter, tokenizer):
    state = torch.get_rng_state()
    options: dict[str, Any] = {"temperature": 3.0, "top_p": 1.0, "max_new_tokens": 20}
    texts = [generate(counter, tokenizer, "one", seed=s, **options) for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    assert torch.equal(torch.get_rng_state(), state)
    generate(counter, tokenizer, "one", **options)
    assert not torch.equal(torch.get_rng_state(), state)


def test_each_sampling_setting_changes_the_text(counter, tokenizer):
    hot: dict[str, Any] = {"temperature": 8.0, "top_p": 1.0, "seed": 5}
    changes = [{}, {"temperature": 4.0}, {"top_p": 0.7}, {"top_k": 30}]
    changes.append({"repetition_penalty": 5.0})
    texts = [generate(counter, tokenizer, ["one"], **{**hot, **c})[0] for c in changes]
    assert len(set(texts)) == 5


def test_model_keeps_its_training_mode(counter, tokenizer):
    counter.train()
    generate(counter, tokenizer, "one", max_new_tokens=1)
    assert counter.training
    counter.eval()
    generate(counter, tokenizer, "one", max_new_tokens=1)
    assert not counter.training


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0: use 1 or more"),
        ({"temperature": -1}, "temperature is -1: use 0"),
        ({"top_p": 0}, "top_p is 0: use more than 0"),
        ({"top_k": -1}, "top_k is -1: use 0"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0: use more than 0"),
    ],
)
def test_settings_out_of_range_are_refused(counter, tokenizer, settings, message):
    with pytest.raises(ValueError, match=message):
        generate(counter, tokenizer, "one", **settings)


def test_a_foreign_tokenizer_is_refused(tokenizer):
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 100,
    }
    model = MiniMindForCausalLM(MiniMindConfig(**small))
    with pytest.raises(ValueError, match=r"has \d+ tokens and the model 100.*mm\.load"):
        generate(model, tokenizer, "one")


def test_a_prompt_without_room_is_refused(tokenizer):
    small: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "vocab_size": 280,
    }
    model = MiniMindForCausalLM(MiniMindConfig(**small, max_position_embeddings=10))
    with pytest.raises(ValueError, match="has 3 tokens.*max_new_tokens=7"):
        generate(model, tokenizer, "one two", max_new_tokens=8)
