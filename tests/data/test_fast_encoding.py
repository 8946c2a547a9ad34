"""Bulk ids equal those of ``tokenizers``, whichever of the two makes them."""

import json
import unicodedata
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.tokenizer import read_tokenizer

WORDS = "low lower lowest, new newer newest " * 9
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SHIPPED = read_tokenizer()
FAST = BulkEncoder(SHIPPED)
SLOW = Tokenizer.from_str(SHIPPED.json)

# Pieces that meet at the seams of the split, beside arbitrary characters.
pieces = st.sampled_from(
    [*SPECIAL, "  ", "'s", "'ll", "中文", "the", *" \n\t'１3…\u3000"]
)
texts = st.lists(
    st.one_of(pieces, st.text(st.characters(exclude_categories=["Cs"]), max_size=8)),
    max_size=12,
).map("".join)


def train(text: str) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def slow_ids(text: str, ordinary: bool = False) -> list[int]:
    SLOW.encode_special_tokens = ordinary
    return SLOW.encode(text, add_special_tokens=False).ids


@settings(deadline=None, max_examples=200)
@given(st.lists(texts, max_size=4))
def test_ids_equal_those_of_tokenizers(batch: list[str]):
    assert FAST.backend == "tiktoken"
    assert [ids.tolist() for ids in FAST.encode(batch)] == [
        slow_ids(text) for text in batch
    ]
    assert [ids.tolist() for ids in FAST.encode(batch, ordinary=True)] == [
        slow_ids(text, ordinary=True) for text in batch
    ]


@settings(deadline=None)
@given(texts)
def test_ids_decode_to_the_text(text: str):
    (ids,) = FAST.encode([text])
    assert SLOW.decode(ids.tolist(), skip_special_tokens=False) == text


def test_every_character_is_split_alike():
    characters = [chr(n) for n in range(0x110000) if not 0xD800 <= n < 0xE000]
    # Of each unassigned or private block one in a hundred is enough.
    rare = ("Cn", "Co")
    kept = [
        c for c in characters if unicodedata.category(c) not in rare or not ord(c) % 97
    ]
    lines = ["".join(kept[n : n + 500]) for n in range(0, len(kept), 500)]
    spaced = [" ".join(line) for line in lines]
    for batch in (lines, spaced):
        expected = SLOW.encode_batch_fast(batch, add_special_tokens=False)
        for ids, encoding in zip(FAST.encode(batch), expected, strict=True):
            assert ids.tolist() == encoding.ids


def test_special_strings_become_ids_or_stay_text():
    text = "a<|im_end|>\n<|im_start|>user"
    (special,) = FAST.encode([text])
    (ordinary,) = FAST.encode([text], ordinary=True)
    assert special.tolist().count(2) == 1
    assert special.tolist().count(1) == 1
    assert ordinary.min() > 2
    assert SLOW.decode(ordinary.tolist()) == text


def test_ids_are_arrays_ready_to_concatenate():
    batch = FAST.encode(["你好", "", "x"])
    assert [ids.dtype for ids in batch] == [np.uint32] * 3
    assert len(batch[1]) == 0
    assert np.concatenate(batch).dtype == np.uint32
    assert FAST.encode([]) == []


@pytest.mark.parametrize(
    ("run", "times"),
    [(" ", 1_000_000), ("\n", 600_000), ("中", 200_000), ("a", 200_000)],
)
def test_a_million_equal_characters_pass(run: str, times: int):
    text = run * times + "x"
    (ids,) = FAST.encode([text])
    assert ids.tolist() == slow_ids(text)


def test_long_text_with_short_blanks_stays_with_tiktoken():
    encoder = BulkEncoder(SHIPPED)
    text = "word  \n" * 30_000
    del encoder._tokenizer
    with pytest.raises(AttributeError):
        encoder.encode([" " * 200_000])
    encoder._tokenizer = SLOW
    (ids,) = encoder.encode([text])
    assert ids.tolist() == slow_ids(text)


def test_added_tokens_that_are_not_special_keep_their_ids_always():
    tokenizer = train("think hard " * 20)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, special=False)])
    encoder = BulkEncoder(read_tokenizer(tokenizer))
    assert encoder.backend == "tiktoken"
    (ids,) = encoder.encode(["<think><|im_end|>"], ordinary=True)
    assert ids[0] == tokenizer.token_to_id("<think>")
    assert 2 not in ids


@pytest.mark.parametrize("normalizer", [None, normalizers.NFC()])
def test_settings_of_the_file_do_not_cut_or_pad(normalizer: normalizers.NFC | None):
    tokenizer = train(WORDS)
    tokenizer.enable_truncation(2)
    tokenizer.enable_padding(length=9)
    if normalizer:
        tokenizer.normalizer = normalizer
    (ids,) = BulkEncoder(read_tokenizer(tokenizer)).encode(["q.e.d."])
    assert len(ids) == 6


def added(content: str, number: int, **changes: bool) -> dict[str, Any]:
    """An added token as ``tokenizer.json`` writes it."""
    names = ("single_word", "lstrip", "rstrip", "normalized", "special")
    flags = dict.fromkeys(names, False)
    return {"id": number, "content": content, **flags, **changes}


def bytes_and(*entries: str, merges: list[tuple[str, str]]) -> dict[str, Any]:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*SPECIAL, *letters, *entries]
    return {"vocab": {name: n for n, name in enumerate(names)}, "merges": merges}


END = added("<|im_end|>", 2)
CHANGES = [
    ({"normalizer": {"type": "NFC"}}, "tokenizers"),
    ({"pre_tokenizer": {"type": "Whitespace"}}, "tokenizers"),
    ({"pre_tokenizer": None}, "tokenizers"),
    ({"model": {"ignore_merges": True}}, "tokenizers"),
    ({"model": {"dropout": 0.5}}, "tokenizers"),
    ({"added_tokens": []}, "tokenizers"),
    ({"added_tokens": [END | {"rstrip": True}]}, "tokenizers"),
    ({"added_tokens": [END, added("<x>", 300, normalized=True)]}, "tokenizers"),
    ({"added_tokens": [END, added("x<", 300)]}, "tokenizers"),
    ({"model": bytes_and("cd", "ab", merges=[("a", "b"), ("c", "d")])}, "tokenizers"),
    ({"model": bytes_and("ab", merges=[])}, "tokenizers"),
    (
        {
            "model": bytes_and(
                "ab", "bc", "abbc", merges=[("a", "b"), ("b", "c"), ("ab", "bc")]
            )
        },
        "tiktoken",
    ),
    (
        {
            "model": bytes_and(
                "bc", "ab", "abc", merges=[("b", "c"), ("a", "b"), ("ab", "c")]
            )
        },
        "tokenizers",
    ),
]


def encoder_of(changes: dict[str, Any]) -> tuple[BulkEncoder, Tokenizer]:
    content = json.loads(train(WORDS).to_str())
    content["model"] |= changes.get("model", {})
    content |= {name: value for name, value in changes.items() if name != "model"}
    spec = read_tokenizer(Tokenizer.from_str(json.dumps(content)))
    return BulkEncoder(spec), Tokenizer.from_str(spec.json)


@pytest.mark.parametrize(("changes", "backend"), CHANGES)
def test_only_what_tiktoken_can_express_goes_to_tiktoken(
    changes: dict[str, Any], backend: str
):
    encoder, slow = encoder_of(changes)
    assert encoder.backend == backend
    texts = ["Low lowest, abc abbc<|im_end|> new", ""]
    if "dropout" not in changes.get("model", {}):
        assert [ids.tolist() for ids in encoder.encode(texts)] == [
            slow.encode(text, add_special_tokens=False).ids for text in texts
        ]


def test_a_special_string_that_begins_another_keeps_its_id():
    encoder, slow = encoder_of({"added_tokens": [END, added("<|im_end|>>", 300)]})
    text = "a<|im_end|>>b<|im_end|>"
    expected = slow.encode(text, add_special_tokens=False).ids
    assert len(expected) == 4
    assert encoder.encode([text])[0].tolist() == expected


def test_vocabulary_of_words_goes_to_tokenizers():
    vocab = {"</s>": 0, "low": 1, "[UNK]": 2}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(["</s>"])
    encoder = BulkEncoder(read_tokenizer(tokenizer))
    assert encoder.backend == "tokenizers"
    assert [ids.tolist() for ids in encoder.encode(["low</s>", "x"])] == [[1, 0], [2]]
    assert encoder.encode(["low"], ordinary=True)[0].dtype == np.uint32


def test_differing_probe_decides_for_tokenizers(monkeypatch: pytest.MonkeyPatch):
    split = r" ?\p{L}| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    monkeypatch.setattr("minimind_nb.data.fast_encoding._SPLIT", split)
    encoder = BulkEncoder(SHIPPED)
    assert encoder.backend == "tokenizers"
    assert encoder.encode(["hello"])[0].tolist() == slow_ids("hello")
