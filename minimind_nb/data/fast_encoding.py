"""Encode texts in bulk: tiktoken's speed with the ids of `tokenizers`.

Vocabularies with other settings than the shipped one's, and texts that tiktoken cannot
take, go to `tokenizers`.
"""

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import tiktoken
from tokenizers import Tokenizer, pre_tokenizers

from .tokenizer import TokenizerSpec, read_tokenizer

Ids = np.ndarray[tuple[int], np.dtype[np.uint32]]

# GPT-2's split. All that needs no look-ahead stands in one group, which then runs as one
# automaton: encoding takes 0.8 of the time of the flat alternation.
_SPLIT = (
    r"(?:'(?:s|t|re|ve|m|ll|d)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+)"
    r"|\s+(?!\S)|\s+"
)
# tiktoken panics (a BaseException) on a million blanks before a word, and before 0.13
# takes 2 s for a run of 20,000 letters, four times that for twice as many.
_LONGEST_RUN = 10_000
_CLASSES = (r"\s", r"[^\W\d_]", r"\d", r"[^\w\s]")
_LONG_RUN = re.compile(
    "|".join(f"(?<!{kind}){kind}{{{_LONGEST_RUN}}}" for kind in _CLASSES)
)

_PROBE = """\
Hello world, it's a test: they'll say we've 3.14 and I'd don't.  two blanks,\ttabs\t\t\r
\r
  lines \u3000\u00a0 自然语言处理，是人工智能的一个方向。鄭國夫人挽歌詞；２０２６年１１月
naïve Straße e\u0301 Ελλάδα Россия עברית العربية हिन्दी ไทย 日本語 한국어 👩‍👩‍👧 🇨🇳 ½ ² Ⅳ ٣ 𝒳 𠀀
\u200b\ufeff\ufffd\x00\x1c\x1f\x7f\x85 for i in range(10):\n    print(f'{i:>4}')  # 注释\n\n\n"""

# GPT-2's alphabet (Radford et al., 2019, and its released encoder): printable bytes are
# their letters in Latin-1, the others follow from U+0100 on.
BYTES = dict(enumerate([*range(33), *range(127, 161), 173], 0x100))


class BulkEncoder:
    """Encode many texts into ids that equal those of `tokenizers`.

    `backend` is "tiktoken" or, for a vocabulary that tiktoken cannot express,
    "tokenizers". Nothing is added to a text, truncated or padded. Texts must not hold
    lone surrogates. On one thread, 15 MB of Chinese and English took 1/3.2 of the time
    of `encode_batch_fast` on two cores.
    """

    def __init__(self, spec: TokenizerSpec) -> None:
        self.spec = spec
        self._tokenizer = Tokenizer.from_str(spec.json)
        # As tokenizers writes it, so that no setting is missing.
        content = json.loads(self._tokenizer.to_str())
        self._never_ordinary = frozenset(
            one["content"] for one in content["added_tokens"] if not one["special"]
        )
        self._tiktoken = _build_tiktoken(content, self._tokenizer)
        if self._tiktoken and not self._agrees_on_probe():
            self._tiktoken = None
        self.backend = "tiktoken" if self._tiktoken else "tokenizers"
        self._sizes: np.ndarray | None = None  # bytes of each token
        if self._tiktoken:
            ids = sorted(self._tokenizer.get_vocab().values())
            spelled = self._tiktoken.decode_tokens_bytes(ids)
            self._sizes = np.zeros(ids[-1] + 1, np.int64)
            self._sizes[ids] = [len(one) for one in spelled]

    def encode(self, texts: Sequence[str], ordinary: bool = False) -> list[Ids]:
        """Return the ids of each text; special strings in it become special ids.

        If `ordinary`, they stay ordinary text. As in `tokenizers`, added tokens that are
        not marked special (`<think>` in some vocabularies) keep their ids all the same.
        """
        if self._tiktoken is None:
            return self._encode_slowly(texts, ordinary)
        encode = self._tiktoken.encode_to_numpy
        allowed = self._never_ordinary if ordinary else "all"
        return [
            self._encode_slowly([text], ordinary)[0]
            if len(text) > _LONGEST_RUN and _LONG_RUN.search(text)
            else encode(text, allowed_special=allowed, disallowed_special=())
            for text in texts
        ]

    def encode_parts(self, parts: Sequence[str]) -> list[Ids]:
        """Return the ids of a text, apart for each of the parts that it is given in.

        They are those of the text as a whole; a token that spells the end of a part and
        the beginning of the next goes to the next.
        """
        text = "".join(parts)
        if self._sizes is None:
            self._tokenizer.encode_special_tokens = False
            whole = self._tokenizer.encode(text, add_special_tokens=False)
            ids = np.array(whole.ids, np.uint32)
            ends = np.maximum.accumulate([0, *(end for _, end in whole.offsets)])[1:]
            sizes = [len(part) for part in parts]
        else:
            (ids,) = self.encode([text])
            ends = np.cumsum(self._sizes[ids])
            sizes = [len(part.encode()) for part in parts]
        cuts = np.cumsum(sizes[:-1])
        return np.split(ids, np.searchsorted(ends, cuts, side="right"))

    def _encode_slowly(self, texts: Sequence[str], ordinary: bool) -> list[Ids]:
        self._tokenizer.encode_special_tokens = ordinary
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def _agrees_on_probe(self) -> bool:
        added = self._tokenizer.get_added_tokens_decoder().values()
        probe = [_PROBE, " a ".join(["", *(one.content for one in added), ""])]
        return all(
            [ids.tolist() for ids in self.encode(probe, ordinary)]
            == [ids.tolist() for ids in self._encode_slowly(probe, ordinary)]
            for ordinary in (False, True)
        )


def _build_tiktoken(
    content: dict[str, Any], tokenizer: Tokenizer
) -> tiktoken.Encoding | None:
    """Return a tokenizer's content as tiktoken's ranks, or None if ids could differ.

    tiktoken merges any two neighbours that make an entry, lowest id first; a list of
    merges allows certain pairs. They agree if the entries are the bytes and then one for
    each merge, in its order, and each entry alone comes out as itself. Added tokens that
    overlap are found differently.
    """
    vocab = content["model"]["vocab"]
    special = {one["content"]: one["id"] for one in content["added_tokens"]}
    starts = {name[0] for name in special}
    letters = pre_tokenizers.ByteLevel.alphabet()
    if (
        _settings(content) != _settings(json.loads(read_tokenizer().json))
        or any(starts & set(name[1:]) for name in special)
        or not vocab.keys() >= set(letters)
    ):
        return None
    merged = ["".join(pair) for pair in content["model"]["merges"]]
    entries = vocab.keys() - {*letters, *special}
    if sorted(entries, key=vocab.__getitem__) != merged or not all(
        [token.value for token in tokenizer.model.tokenize(entry)] == [entry]
        for entry in merged
    ):
        return None
    spelled = {one: one.translate(BYTES).encode("latin-1") for one in letters + merged}
    ranks = {spelled[entry]: vocab[entry] for entry in spelled}
    return tiktoken.Encoding(
        "minimind_nb", pat_str=_SPLIT, mergeable_ranks=ranks, special_tokens=special
    )


def _settings(content: dict[str, Any]) -> list[Any]:
    """Return all that decides about ids but the entries, merges and added tokens."""
    model = dict(content["model"], vocab=None, merges=None)
    split = dict(content["pre_tokenizer"] or {}, trim_offsets=None)
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    added = {tuple(one[flag] for flag in flags) for one in content["added_tokens"]}
    model = {name: value or None for name, value in model.items()}
    return [content["normalizer"], split, model, added]
