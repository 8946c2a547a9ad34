"""The tokenizer as plain data, and as an object of transformers."""

import functools
import hashlib
import json
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer, processors

from ..storage import verified
from ..storage.run_folder import RunFolder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Taken if nothing names the tokens: ChatML's, else the commonest, else the end token.
_WELL_KNOWN = {
    "eos_token": ("<|im_end|>", "</s>", "<|endoftext|>"),
    "bos_token": ("<|im_start|>", "<s>"),
    "pad_token": ("<pad>", "<|endoftext|>"),
}
_MODEL_MAX_LENGTH = 32_768


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as plain data: picklable, comparable, independent of transformers.

    `json` is the text of a `tokenizer.json`, `vocab_size` the highest id plus one.
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
        """sha256 in hex of all that decides about ids and templates.

        The layout of the JSON and settings that are never applied here do not count.
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
    `tokenizer.json`, a folder with one (as `save_pretrained` writes it), a run, an object
    of transformers or tokenizers, or a `TokenizerSpec`, which is returned as it is.

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
    source = shipped if source is None else source
    if isinstance(source, str | os.PathLike):
        name, (data, described) = str(source), _read_path(Path(source))
    else:
        name, (data, described) = type(source).__name__, _read_object(source)
    try:
        backend = Tokenizer.from_buffer(data)
    # The binding raises plain Exception, whatever is wrong with the text.
    except Exception as error:
        raise ValueError(
            f"{name} is no tokenizer.json ({error}): save it with save_pretrained"
        ) from error
    content = json.loads(data)
    if content.get("truncation") or content.get("padding"):  # never applied here
        data = json.dumps(content | {"truncation": None, "padding": None}).encode()
    vocab = backend.get_vocab(with_added_tokens=True)
    special = _special_tokens(name, backend, described, vocab)
    template = described.get("chat_template")
    if isinstance(template, list):  # several, as a folder names them
        template = {one["name"]: one["template"] for one in template}
    if isinstance(template, dict):  # as an object has them
        template = template.get("default")
    if template is None and vocab.keys() >= {"<|im_start|>", "<|im_end|>"}:
        template = _read_path(shipped)[1]["chat_template"]
    return TokenizerSpec(
        json=data.decode(),
        chat_template=template,
        **special,
        pad_id=vocab[special["pad_token"]],
        bos_id=vocab[special["bos_token"]],
        eos_id=vocab[special["eos_token"]],
        vocab_size=max(vocab.values()) + 1,
    )


def load_tokenizer(source: Any = None) -> "PreTrainedTokenizerFast":
    """Read a tokenizer as `read_tokenizer` does, into an object of transformers.

    It has the chat template and the special tokens, and adds none of them to a text by
    itself: a post-processor that would is left out.
    """
    from transformers import PreTrainedTokenizerFast

    spec = read_tokenizer(source)
    backend = Tokenizer.from_str(spec.json)
    if not isinstance(backend.post_processor, processors.ByteLevel):
        backend.post_processor = None
    return PreTrainedTokenizerFast(tokenizer_object=backend, **_settings(spec))


def write_tokenizer(spec: TokenizerSpec, folder: Path) -> None:
    """Write the files of a Hugging Face tokenizer folder; `read_tokenizer` reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **_settings(spec)}
    text = json.dumps(config, indent=2, ensure_ascii=False)
    verified.write_text(folder / "tokenizer.json", spec.json)
    verified.write_text(folder / "tokenizer_config.json", text + "\n")


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
    """Return a `tokenizer.json`, and the settings in the files beside it."""
    if (own := RunFolder(path).tokenizer).is_dir():
        path = own
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"no tokenizer at {path}: give a tokenizer.json, a folder with one, or None"
        )
    beside, described = file, dict[str, Any]()
    if file.name == "tokenizer.json":
        try:
            for name in ("special_tokens_map.json", "tokenizer_config.json"):
                if (beside := file.with_name(name)).is_file():
                    described |= json.loads(beside.read_bytes())
            if (beside := file.with_name("chat_template.jinja")).is_file():
                described["chat_template"] = beside.read_text(encoding="utf-8")
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{beside} cannot be read ({error}): save it again, as UTF-8"
            ) from error
    return file.read_bytes(), described


def _read_object(source: Any) -> tuple[bytes, dict[str, Any]]:
    backend = getattr(source, "backend_tokenizer", source)
    if not isinstance(backend, Tokenizer):
        raise TypeError(
            f"{type(source).__name__} is no tokenizer: give None, a path or a fast tokenizer"
        )
    names = (*_WELL_KNOWN, "chat_template")
    described = {name: getattr(source, name, None) for name in names}
    return backend.to_str().encode(), described


def _special_tokens(
    name: str, backend: Tokenizer, described: dict[str, Any], vocab: dict[str, int]
) -> dict[str, str]:
    """Return the end, begin and pad tokens, each of them an entry of the vocabulary."""
    found: dict[str, str] = {}
    for role, known in _WELL_KNOWN.items():
        token = described.get(role)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str):
            candidates = [*known, found.get("eos_token")]
            token = next((each for each in candidates if each in vocab), None)
        if token not in vocab:
            wrong = f"names {token!r} as its {role}" if token else f"names no {role}"
            added = [one.content for one in backend.get_added_tokens_decoder().values()]
            raise ValueError(
                f"{name} {wrong}: name one of its special tokens, such as {added[:12]}, in "
                f'tokenizer_config.json, {{"{role}": "…"}}'
            )
        found[role] = token
    return found
