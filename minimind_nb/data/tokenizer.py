"""The tokenizer as plain data, where it comes from, and as transformers' object.

``TokenizerSpec`` travels to helper processes and into fingerprints; it is read from the
vocabulary shipped with the package, a ``tokenizer.json``, a Hugging Face folder or a
tokenizer object. Only ``load_tokenizer`` imports transformers.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from tokenizers import Tokenizer

from ..storage import verified

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

    from transformers import PreTrainedTokenizerFast

# Where nothing says which token is which: the contents used by known families, ChatML
# first (an end of turn before an end of text, which serves to pad).
_WELL_KNOWN = {
    "eos": (
        "<|im_end|>",
        "<|eot_id|>",
        "<end_of_turn>",
        "</s>",
        "<|end_of_text|>",
        "<|endoftext|>",
        "<eos>",
        "[EOS]",
    ),
    "bos": ("<|im_start|>", "<|begin_of_text|>", "<s>", "<bos>", "[BOS]"),
    "pad": ("<pad>", "<|pad|>", "[PAD]", "<|endoftext|>"),
}
_MODEL_MAX_LENGTH = 32_768
_LISTED_TOKENS = 12


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as plain data: picklable, comparable, independent of transformers.

    ``json`` is the text of a ``tokenizer.json``. ``vocab_size`` is the number of ids
    that a model needs: the highest id, added tokens included, plus one.
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

    @property
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


class _Source(NamedTuple):
    """What was found: the vocabulary, and what is said about it beside."""

    name: str
    json: str
    tokens: dict[str, str]
    chat_template: str | None


def read_tokenizer(source: Any = None) -> TokenizerSpec:
    """Read a tokenizer from wherever it is; ids and special tokens are checked.

    ``source``: None (the vocabulary shipped with the package), the path of a
    ``tokenizer.json``, a folder with one (as ``save_pretrained`` writes it), an object
    of transformers or tokenizers, or a ``TokenizerSpec``, given back as it is.

    Padding, begin and end are those named by ``tokenizer_config.json`` or
    ``special_tokens_map.json`` beside it, else found by well-known contents; begin and
    padding fall back to the end token. A vocabulary with ChatML's two tokens and no
    chat template of its own gets the package's.

    Raises FileNotFoundError, TypeError or ValueError saying what was found instead.
    Not covered: names on a hub (nothing is downloaded), sentencepiece files.
    """
    if isinstance(source, TokenizerSpec):
        return source
    if source is None:
        found = _shipped()
    elif isinstance(source, str | os.PathLike):
        found = _from_path(Path(source))
    else:
        found = _from_object(source)
    backend = _parse(found.json, found.name)
    vocab = backend.get_vocab(with_added_tokens=True)
    pad, bos, eos = _special_tokens(found, backend, vocab)
    template = found.chat_template
    if template is None and {"<|im_start|>", "<|im_end|>"} <= vocab.keys():
        template = _shipped().chat_template
    return TokenizerSpec(
        json=found.json,
        chat_template=template,
        pad_token=pad,
        bos_token=bos,
        eos_token=eos,
        pad_id=vocab[pad],
        bos_id=vocab[bos],
        eos_id=vocab[eos],
        vocab_size=max(vocab.values()) + 1,
    )


def load_tokenizer(source: Any = None) -> "PreTrainedTokenizerFast":
    """Read a tokenizer as ``read_tokenizer`` does, as an object of transformers.

    It has the chat template and the special tokens set, and adds none of them to a text
    by itself: begin and end of a document are put there by whoever builds documents. A
    post-processor that would add some is therefore left out.
    """
    from transformers import PreTrainedTokenizerFast

    spec = read_tokenizer(source)
    backend = json.loads(spec.json)
    if (backend.get("post_processor") or {}).get("type") != "ByteLevel":
        backend["post_processor"] = None
    backend["truncation"] = backend["padding"] = None
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        pad_token=spec.pad_token,
        bos_token=spec.bos_token,
        eos_token=spec.eos_token,
        model_max_length=_MODEL_MAX_LENGTH,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = spec.chat_template
    return tokenizer


def write_tokenizer(spec: TokenizerSpec, folder: Path) -> None:
    """Write the files of a Hugging Face tokenizer folder; `read_tokenizer` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": spec.pad_token,
        "bos_token": spec.bos_token,
        "eos_token": spec.eos_token,
        "model_max_length": _MODEL_MAX_LENGTH,
        "clean_up_tokenization_spaces": False,
        "chat_template": spec.chat_template,
    }
    text = json.dumps(config, indent=2, ensure_ascii=False)
    verified.write_text(folder / "tokenizer.json", spec.json)
    verified.write_text(folder / "tokenizer_config.json", text + "\n")


def _shipped() -> _Source:
    return _from_folder(resources.files("minimind_nb.data") / "vocabulary")


def _from_path(path: Path) -> _Source:
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}: give a tokenizer.json, a folder that holds one,"
            " or None for the vocabulary of this package. Names on a hub are not"
            " downloaded: save_pretrained(FOLDER) there first, then give FOLDER"
        )
    if path.name == "tokenizer.json":
        return _from_folder(path.parent)
    return _Source(str(path), _read_text(path), {}, None)


def _from_folder(folder: "Traversable") -> _Source:
    """Read a Hugging Face folder: ``tokenizer.json`` and what describes it."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        names = sorted(entry.name for entry in folder.iterdir())
        shown = ", ".join(names[:_LISTED_TOKENS]) or "nothing"
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json (it holds {shown}). Where it is a"
            " tokenizer of another kind, open it with transformers'"
            " AutoTokenizer.from_pretrained and give that object, or save it with"
            " save_pretrained and give the new folder"
        )
    config = _read_object(folder / "tokenizer_config.json")
    described = _read_object(folder / "special_tokens_map.json") | config
    tokens = {}
    for role in _WELL_KNOWN:
        token = described.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str):
            tokens[role] = token
    template = config.get("chat_template")
    if isinstance(template, list):
        template = {one["name"]: one["template"] for one in template}.get("default")
    template_file = folder / "chat_template.jinja"
    if template_file.is_file():
        template = _read_text(template_file)
    return _Source(str(folder), _read_text(file), tokens, template)


def _from_object(source: Any) -> _Source:
    backend = getattr(source, "backend_tokenizer", source)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            f"a tokenizer cannot be read from {type(source).__name__}: give None, a"
            " path, a TokenizerSpec, or a tokenizer of transformers that is backed by"
            " tokenizers (is_fast is True)"
        )
    named = {role: getattr(source, f"{role}_token", None) for role in _WELL_KNOWN}
    tokens = {role: token for role, token in named.items() if isinstance(token, str)}
    template = getattr(source, "chat_template", None)
    if isinstance(template, dict):
        template = template.get("default")
    return _Source(type(source).__name__, backend.to_str(), tokens, template)


def _read_text(file: "Traversable") -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text: {error}") from error


def _read_object(file: "Traversable") -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(_read_text(file))
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON ({error}); save it again") from error
    if not isinstance(content, dict):
        raise ValueError(
            f"{file} holds a JSON {type(content).__name__}, an object is expected:"
            " save the tokenizer again with save_pretrained"
        )
    return content


def _parse(text: str, name: str) -> Tokenizer:
    try:
        return Tokenizer.from_str(text)
    # The binding raises plain Exception, whatever is wrong with the text.
    except Exception as error:
        raise ValueError(
            f"{name} is not a tokenizer.json that tokenizers can read ({error}): give"
            " a file written by Tokenizer.save or save_pretrained"
        ) from error


def _special_tokens(
    found: _Source, backend: Tokenizer, vocab: dict[str, int]
) -> tuple[str, str, str]:
    """Name the pad, begin and end tokens, each of them an entry of the vocabulary."""
    for role, token in found.tokens.items():
        if token not in vocab:
            raise ValueError(
                f"{found.name} names {token!r} as its {role}_token, but the vocabulary"
                f" has no such entry: correct {role}_token in tokenizer_config.json"
            )

    def choose(role: str) -> str | None:
        known = (token for token in _WELL_KNOWN[role] if token in vocab)
        return found.tokens.get(role) or next(known, None)

    eos = choose("eos")
    if eos is None:
        added = [token.content for token in backend.get_added_tokens_decoder().values()]
        raise ValueError(
            f"{found.name} has no end token that is known: its special tokens are"
            f" {_listed(added)}. Put a tokenizer_config.json beside it that names one,"
            ' {"eos_token": "…"}'
        )
    return choose("pad") or eos, choose("bos") or eos, eos


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_LISTED_TOKENS])
    more = len(names) - _LISTED_TOKENS
    return (shown or "none") + (f" and {more} more" if more > 0 else "")
