"""A tokenizer of bytes with chat tokens, and a model that has learnt some texts."""

from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.1,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """ChatML's tokens, the bytes and a few words: 280 entries at most."""
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


def make_model(tokenizer: Any, **fields: Any) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    config = MiniMindConfig(**{**SHAPE, "vocab_size": len(tokenizer), **fields})
    return MiniMindForCausalLM(config)


def teach(tokenizer: Any, *texts: str, steps: int = 60) -> MiniMindForCausalLM:
    """A model that goes on with the texts, special tokens included, by heart."""
    model = make_model(tokenizer)
    rows = [torch.tensor([tokenizer(text)["input_ids"]]) for text in texts]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        optimizer.zero_grad()
        for ids in rows:
            model(ids, labels=ids).loss.backward()
        optimizer.step()
    return model.eval()
