"""The tokenizer as plain data, its sources, and as an object of transformers.

`TokenizerSpec` travels to helper processes and into fingerprints; it is read from the
vocabulary shipped with the package, a `tokenizer.json`, a Hugging Face folder or a
tokenizer object. Only `load_tokenizer` imports transformers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ..storage import verified

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Taken if nothing names the tokens: ChatML's, else the commonest.
_WELL_KNOWN = {
    "pad": ("<pad>", "<|endoftext|>"),
    "bos": ("<|im_start|>", "<s>"),
    "eos": ("<|im_end|>", "</s>", "<|endoftext|>"),
}
_CHATML = {"<|im_start|>", "<|im_end|>"}
_MODEL_MAX_LENGTH = 32_768
_LISTED_TOKENS = 12
_MOST_GROWTH = 1000


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as plain data: picklable, comparable, independent of transformers.

    `json` is the text of a `tokenizer.json`. `vocab_size` is the number of ids that a
    model needs: the highest id, added tokens included, plus one.
    """

    json: str
    chat_template: str | None
    pad_token: str
    bos_token: str
    eos_token: str
    pad_id: int
    bos_id: int
    eos_id: int
    vocab_size: int

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 in hex over all that decides about ids and templates.

        Neither the layout of the JSON counts, nor the settings in it that are never
        applied here; so a tokenizer keeps its fingerprint through save_pretrained.
        """
        vocabulary = json.loads(self.json)
        for unused in ("truncation", "padding", "post_processor"):
            vocabulary.pop(unused, None)
        parts = [vocabulary, self.chat_template]
        parts += [self.pad_token, self.bos_token, self.eos_token]
        canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def read_tokenizer(source: Any = None) -> TokenizerSpec:
    """Read a tokenizer and check its special tokens.

    `source`: None (the vocabulary shipped with the package), the path of a
    `tokenizer.json`, a folder with one (as `save_pretrained` writes it), an object of
    transformers or tokenizers, or a `TokenizerSpec`, which is returned as it is.

    Padding, begin and end are those named by `tokenizer_config.json` or
    `special_tokens_map.json` beside it, else ChatML's or `</s>` and its like; begin and
    padding fall back to the end token. A vocabulary with ChatML's two tokens and no chat
    template of its own gets the package's.

    Raises FileNotFoundError, TypeError or ValueError saying what was found instead.
    Not covered: names on a hub (nothing is downloaded), sentencepiece files.
    """
    if isinstance(source, TokenizerSpec):
        return source
    shipped = Path(str(resources.files("minimind_nb.data") / "vocabulary"))
    if source is None or isinstance(source, str | os.PathLike):
        path = shipped if source is None else Path(source)
        name, (data, described) = str(path), _read_path(path)
    else:
        name, (data, described) = type(source).__name__, _read_object(source)
    try:
        backend = Tokenizer.from_buffer(data)
    # The binding raises plain Exception, whatever is wrong with the text.
    except Exception as error:
        raise ValueError(
            f"{name} is not a tokenizer.json that tokenizers can read ({error}): give"
            " a file written by Tokenizer.save or save_pretrained"
        ) from error
    if (growth := _growth(json.loads(data).get("normalizer"))) > _MOST_GROWTH:
        raise ValueError(
            f"the normalizer of {name} may make a text {growth:,} times as long, which "
            "would take all memory: take another tokenizer"
        )
    vocab = backend.get_vocab(with_added_tokens=True)
    pad, bos, eos = _special_tokens(name, backend, described, vocab)
    template = described.get("chat_template")
    if isinstance(template, list):  # several, as a folder names them
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):
        template = template.get("default")
    if template is None and vocab.keys() >= _CHATML:
        template = _read_path(shipped)[1]["chat_template"]
    return TokenizerSpec(
        json=data.decode(),
        chat_template=template,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        pad_id=vocab[pad],
        bos_id=vocab[bos],
        eos_id=vocab[eos],
        vocab_size=max(vocab.values()) + 1,
    )


def load_tokenizer(source: Any = None) -> PreTrainedTokenizerFast:
    """Read a tokenizer as `read_tokenizer` does, into an object of transformers.

    It has the chat template and the special tokens, and adds none of them to a text by
    itself: whoever builds documents adds begin and end. A post-processor that would add
    some is therefore left out.
    """
    from transformers import PreTrainedTokenizerFast

    spec = read_tokenizer(source)
    backend = json.loads(spec.json)
    if (backend.get("post_processor") or {}).get("type") != "ByteLevel":
        backend["post_processor"] = None
    backend["truncation"] = backend["padding"] = None
    bare = Tokenizer.from_str(json.dumps(backend))
    return PreTrainedTokenizerFast(tokenizer_object=bare, **_settings(spec))


def write_tokenizer(spec: TokenizerSpec, folder: Path) -> None:
    """Write the files of a Hugging Face tokenizer folder; `read_tokenizer` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **_settings(spec)}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    verified.write_text(folder / "tokenizer.json", spec.json)
    verified.write_text(folder / "tokenizer_config.json", text + "\n")


def _growth(normalizer: dict[str, Any] | None) -> int:
    """Return how many times as long a normalizer can make a text by what it inserts."""
    steps = (normalizer or {}).get("normalizers", [normalizer or {}])
    longer = [len(step.get("content") or "") for step in steps if "pattern" in step]
    nested = [_growth(step) for step in steps if "normalizers" in step]
    return math.prod([max(1, length) for length in longer] + nested)


def _settings(spec: TokenizerSpec) -> dict[str, Any]:
    return {
        "pad_token": spec.pad_token,
        "bos_token": spec.bos_token,
        "eos_token": spec.eos_token,
        "model_max_length": _MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": spec.chat_template,
    }


def _read_path(path: Path) -> tuple[bytes, dict[str, Any]]:
    """Return the bytes of a `tokenizer.json`, and the settings in the files beside it."""
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        held = sorted(each.name for each in path.iterdir()) if path.is_dir() else []
        raise FileNotFoundError(
            f"no tokenizer at {path}{f' (it holds {held[:9]})' if held else ''}: "
            "give a tokenizer.json, a folder that holds one, or None for the vocabulary "
            "of this package. A tokenizer of another kind, or on a hub: open it with "
            "transformers, save_pretrained(FOLDER) there, then give FOLDER"
        )
    described: dict[str, Any] = {}
    if file.name == "tokenizer.json":
        for name in ("special_tokens_map.json", "tokenizer_config.json"):
            if (beside := file.with_name(name)).is_file():
                described |= _read_json(beside)
        if (template := file.with_name("chat_template.jinja")).is_file():
            described["chat_template"] = template.read_text(encoding="utf-8")
    return file.read_bytes(), described


def _read_object(source: Any) -> tuple[bytes, dict[str, Any]]:
    backend = getattr(source, "backend_tokenizer", source)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            f"a tokenizer cannot be read from {type(source).__name__}: give None, a"
            " path, a TokenizerSpec, or a tokenizer of transformers that is backed by"
            " tokenizers (is_fast is True)"
        )
    names = (*(f"{role}_token" for role in _WELL_KNOWN), "chat_template")
    described = {name: getattr(source, name, None) for name in names}
    return backend.to_str().encode(), described


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_bytes())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error}); save it again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a JSON {type(content).__name__}, an object is expected:"
            " save the tokenizer again with save_pretrained"
        )
    return content


def _special_tokens(
    name: str, backend: Tokenizer, described: dict[str, Any], vocab: dict[str, int]
) -> tuple[str, str, str]:
    """Return the pad, begin and end tokens, each of them an entry of the vocabulary."""
    found: dict[str, str] = {}
    for role, known in _WELL_KNOWN.items():
        token = described.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            token = next((each for each in known if each in vocab), None)
        elif token not in vocab:
            raise ValueError(
                f"{name} names {token!r} as its {role}_token, but the vocabulary has"
                f" no such entry: correct {role}_token in tokenizer_config.json"
            )
        if token:
            found[role] = token
    if "eos" not in found:
        tokens = backend.get_added_tokens_decoder().values()
        added = [repr(token.content) for token in tokens]
        more = len(added) - _LISTED_TOKENS
        raise ValueError(
            f"{name} has no known end token: its special tokens are"
            f" {', '.join(added[:_LISTED_TOKENS]) or 'none'}"
            f"{f' and {more} more' if more > 0 else ''}. Put a tokenizer_config.json"
            ' beside it that names one, {"eos_token": "…"}'
        )
    eos = found["eos"]
    return found.get("pad", eos), found.get("bos", eos), eos
