"""What a tokenizer is read from, what is found in it, and its chat template."""

import json
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    pre_tokenizers,
    processors,
)

from minimind_nb.data.tokenizer import load_tokenizer, read_tokenizer, write_tokenizer

TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "2+3?"},
    {"role": "assistant", "content": "5"},
]


def make_words(*special: str) -> Tokenizer:
    vocab = {token: n for n, token in enumerate([*special, "a", "b", "[UNK]"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(special))
    return tokenizer


def make_bytes(*special: str) -> Tokenizer:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: n for n, letter in enumerate(letters)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in special])
    return tokenizer


def save(tokenizer: Tokenizer, folder: Path, **files: object) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return folder


def test_shipped_vocabulary_is_the_one_promised():
    spec = read_tokenizer()
    assert spec.vocab_size == 6400
    assert (spec.pad_token, spec.pad_id) == ("<|endoftext|>", 0)
    assert (spec.bos_token, spec.bos_id) == ("<|im_start|>", 1)
    assert (spec.eos_token, spec.eos_id) == ("<|im_end|>", 2)
    added = [one["content"] for one in json.loads(spec.json)["added_tokens"]]
    assert added == ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer.from_str(spec.json)
    text = "  Mixed 中文, naïve 👩‍👩‍👧\t\n\n end\x00 "
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_fingerprint_ignores_layout_and_nothing_else():
    spec = read_tokenizer()
    content = json.loads(spec.json)
    wide = replace(spec, json=json.dumps(content, indent=4, sort_keys=True))
    assert wide.fingerprint == spec.fingerprint
    assert len(spec.fingerprint) == 64
    content["model"]["merges"].pop()
    for change in (
        {"json": json.dumps(content)},
        {"chat_template": "other"},
        {"eos_token": "<|endoftext|>"},
    ):
        assert replace(spec, **change).fingerprint != spec.fingerprint


def test_fingerprint_survives_transformers_and_its_folder(tmp_path: Path):
    spec = read_tokenizer()
    tokenizer = load_tokenizer()
    assert read_tokenizer(tokenizer).fingerprint == spec.fingerprint
    tokenizer.save_pretrained(tmp_path)
    assert read_tokenizer(tmp_path).fingerprint == spec.fingerprint
    assert read_tokenizer(tmp_path / "tokenizer.json").chat_template


def test_spec_is_written_pickled_and_given_back_as_it_is(tmp_path: Path):
    spec = read_tokenizer()
    write_tokenizer(spec, tmp_path / "new")
    assert read_tokenizer(tmp_path / "new") == spec == pickle.loads(pickle.dumps(spec))
    write_tokenizer(spec, tmp_path / "run" / "tokenizer")
    assert read_tokenizer(tmp_path / "run") == spec
    assert read_tokenizer(spec) is spec


def test_config_names_the_special_tokens(tmp_path: Path):
    save(
        make_bytes("<s>", "</s>", "<stop>"),
        tmp_path,
        tokenizer_config={
            "eos_token": {"content": "<stop>"},
            "bos_token": None,
            "chat_template": [{"name": "default", "template": "T"}],
        },
    )
    spec = read_tokenizer(str(tmp_path))
    assert (spec.bos_token, spec.eos_token, spec.pad_token) == (
        "<s>",
        "<stop>",
        "<stop>",
    )
    assert spec.eos_id == 258
    assert spec.vocab_size == 259
    assert spec.chat_template == "T"


def test_special_tokens_map_is_read_and_a_template_file_wins(tmp_path: Path):
    save(
        make_bytes("<s>", "<stop>"),
        tmp_path,
        special_tokens_map={"eos_token": "<stop>", "pad_token": "<s>"},
        tokenizer_config={"chat_template": "old"},
    )
    (tmp_path / "chat_template.jinja").write_text("new", encoding="utf-8")
    spec = read_tokenizer(tmp_path)
    assert (spec.eos_token, spec.pad_token, spec.chat_template) == (
        "<stop>",
        "<s>",
        "new",
    )


@pytest.mark.parametrize(
    ("special", "expected"),
    [
        (["<|endoftext|>", "<|im_start|>", "<|im_end|>"], (0, 1, 2)),
        (["<unk>", "<s>", "</s>", "<pad>"], (3, 1, 2)),
        (["<s>", "<|endoftext|>"], (1, 0, 1)),
        (["<|endoftext|>"], (0, 0, 0)),
    ],
)
def test_well_known_tokens_are_found(
    tmp_path: Path, special: list[str], expected: tuple[int, int, int]
):
    file = tmp_path / "other.json"
    make_words(*special).save(str(file))
    spec = read_tokenizer(file)
    assert (spec.pad_id, spec.bos_id, spec.eos_id) == expected
    has_turns = "<|im_start|>" in special
    assert (spec.chat_template == read_tokenizer().chat_template) == has_turns


def test_object_of_tokenizers_is_read():
    assert read_tokenizer(make_bytes("</s>")).vocab_size == 257


def test_missing_tokenizer_says_what_may_be_given(tmp_path: Path):
    (tmp_path / "tokenizer.model").write_text("x")
    for source in ("gpt2", tmp_path):
        text = f"no tokenizer at {source}: give a tokenizer.json,"
        with pytest.raises(FileNotFoundError, match=text):
            read_tokenizer(source)


@pytest.mark.parametrize("content", [b'{"model": 3}', b"\xff\xfe{"])
def test_file_that_is_no_tokenizer_is_refused(tmp_path: Path, content: bytes):
    file = tmp_path / "t.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"t\.json is no tokenizer\.json"):
        read_tokenizer(file)


@pytest.mark.parametrize("content", ["[1]", "{"])
def test_damaged_config_is_refused(tmp_path: Path, content: str):
    save(make_bytes("</s>"), tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer_config\.json cannot be read"):
        read_tokenizer(tmp_path)


def test_a_chat_template_in_another_encoding_is_refused(tmp_path: Path):
    save(make_bytes("</s>"), tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes("{# 模板 #}".encode("gb18030"))
    text = r"template\.jinja cannot be read \('utf-8' .*: save it again, as UTF-8"
    with pytest.raises(ValueError, match=text):
        read_tokenizer(tmp_path)


def test_unknown_end_token_says_what_was_found(tmp_path: Path):
    save(make_bytes("<a>", "<b>"), tmp_path)
    listed = r"names no eos_token: .* special tokens, such as \['<a>', '<b>'\], in"
    with pytest.raises(ValueError, match=listed):
        read_tokenizer(tmp_path)
    save(make_bytes(*(f"<{n}>" for n in range(20))), tmp_path)
    with pytest.raises(ValueError, match=r"tokens, such as .* '<11>'\], in"):
        read_tokenizer(tmp_path)


def test_named_token_must_be_an_entry(tmp_path: Path):
    save(make_bytes("</s>"), tmp_path, tokenizer_config={"pad_token": "[PAD]"})
    with pytest.raises(ValueError, match=r"names '\[PAD\]' as its pad_token: "):
        read_tokenizer(tmp_path)


def test_source_of_another_type_is_refused():
    with pytest.raises(TypeError, match="int is no tokenizer: give None"):
        read_tokenizer(3)


def test_loaded_tokenizer_is_set_up():
    tokenizer = load_tokenizer()
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id) == (0, 1)
    assert tokenizer.eos_token_id == 2
    assert len(tokenizer) == 6400
    assert tokenizer.model_max_length == 32_768
    assert not tokenizer.clean_up_tokenization_spaces
    assert tokenizer.decode(tokenizer("a , b .")["input_ids"]) == "a , b ."


def test_loaded_tokenizer_adds_nothing_by_itself():
    other = make_bytes("<s>", "</s>")
    other.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    other.enable_truncation(2)
    assert len(load_tokenizer(other)("abcd")["input_ids"]) == 4
    assert len(load_tokenizer()("\n")["input_ids"]) == 1


def test_template_renders_literally():
    tokenizer = load_tokenizer()
    assert tokenizer.apply_chat_template(
        TALK[:3], tokenize=False, add_generation_prompt=True
    ) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n你好<|im_end|>\n"
        "<|im_start|>assistant\nHello!<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    tool = [{"role": "tool", "content": " {}\n"}]
    rendered = tokenizer.apply_chat_template(tool, tokenize=False)
    assert rendered == "<|im_start|>tool\n {}\n<|im_end|>\n"


def test_template_refuses_unknown_roles():
    with pytest.raises(
        Exception, match="must be system, user, assistant or tool, not x"
    ):
        load_tokenizer().apply_chat_template([{"role": "x", "content": ""}])


def test_assistant_mask_covers_answers_to_their_closing_newline():
    tokenizer = load_tokenizer()
    encoded: Any = tokenizer.apply_chat_template(
        TALK, return_dict=True, return_assistant_tokens_mask=True
    )
    spans: list[list[int]] = [[]]
    for token, supervised in zip(
        encoded["input_ids"], encoded["assistant_masks"], strict=True
    ):
        if supervised:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    answers = [tokenizer.decode(span) for span in spans if span]
    assert answers == ["Hello!<|im_end|>\n", "5<|im_end|>\n"]


def test_reading_a_tokenizer_imports_no_framework():
    import subprocess
    import sys

    code = (
        "import sys\n"
        "from minimind_nb.data.fast_encoding import BulkEncoder\n"
        "from minimind_nb.data.tokenizer import read_tokenizer\n"
        "BulkEncoder(read_tokenizer())\n"
        "print(sorted({'torch', 'transformers'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
