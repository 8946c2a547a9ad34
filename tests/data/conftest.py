import json

import pytest
from hypothesis import settings
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from minimind_nb.data.token_cache import Source, open_cache
from minimind_nb.data.tokenizer import read_tokenizer

# An example takes a millisecond, or seconds where other work holds the processors.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")


@pytest.fixture(scope="session")
def byte_spec():
    """A tokenizer of single bytes: "A" is 35, "a" 67; pad, begin and end 0, 1, 2."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate([*special, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in special])
    return read_tokenizer(tokenizer)


@pytest.fixture(scope="session")
def write_rows():
    """A function that writes texts as a JSONL file."""

    def write(file, texts):
        rows = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
        file.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
        return file

    return write


@pytest.fixture(scope="session")
def make_cache(tmp_path_factory, byte_spec, write_rows):
    """A function that makes a token cache of texts."""

    def make(texts, spec=byte_spec):
        folder = tmp_path_factory.mktemp("cache")
        file = write_rows(folder / "rows.jsonl", texts)
        return open_cache(Source(str(file), "pretrain", spec), folder / "cache")

    return make


@pytest.fixture(scope="session")
def open_chats(tmp_path_factory, byte_spec):
    """A function that makes a token cache of conversations, or of pairs."""

    def open_chats(rows, record_format="sft"):
        if record_format != "dpo":
            rows = [{"conversations": row} for row in rows]
        folder = tmp_path_factory.mktemp("chats")
        file = folder / "rows.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return open_cache(Source(str(file), record_format, byte_spec), folder)

    return open_chats
