"""A vocabulary in readable text: its entries by kind, and how it cuts a text."""

import html
import re
from collections.abc import Iterable
from itertools import islice
from typing import Any

from ..data.fast_encoding import BYTES
from ..data.tokenizer import load_tokenizer
from .tables import Table

_SIGNS = {n: 0x2400 + n for n in range(32)} | {9: "⇥", 10: "↵"}  # of control characters
_MOST = 1_000  # tokens on a page


def spell(tokenizer: Any) -> list[bytes]:
    """Return the bytes that each token stands for, by id."""
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    spelled = list[bytes]()
    for entry in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        letters = entry.translate(BYTES)
        in_bytes = byte_level and max(letters, default="") < "\u0100"
        spelled.append(letters.encode("latin-1") if in_bytes else entry.encode())
    return spelled


def readable(data: bytes) -> str:
    """Return bytes as text, with ‹E4› for one that makes no character."""
    text = data.decode(errors="surrogateescape").translate(_SIGNS)
    return re.sub("[\udc80-\udcff]", lambda m: f"‹{ord(m[0]) - 0xDC00:02X}›", text)


def mark_tokens(marks: Iterable[tuple[str, str, float]]) -> str:
    """Return a text as HTML, of each token (of at most 1,000) its text, its note for
    hovering, and its tint, from 0 to 1."""
    rest, spans = iter(marks), ""
    for text, note, share in islice(rest, _MOST):
        tint = f"background:rgba(221,107,31,{0.7 * min(1.0, share):.2f})"
        # Where page.css shows the note, the empty title hides the browser's own.
        shown = '<i title=""></i>' + html.escape(text.replace("↵", "↵\n"))
        spans += f'<span style="{tint}" title="{html.escape(note)}">{shown}</span>'
    return f'<div class="tokens">{spans}{"…" * any(rest)}</div>'


def vocabulary(
    tokenizer: Any = None, text: str | None = None, other: Any = None
) -> Table:
    """Show what the entries of a vocabulary stand for, and how it cuts a text.

    A `tokenizer.json` spells bytes in letters: "Ġthe" is " the", "çļĦ" is "的". The
    table has the entries by kind: their number, some of them, and these as in the file.
    A `text` is shown in its tokens, and below in those of the tokenizer `other`. Both
    are what `load_tokenizer` takes, such as a run. Raises what that raises.
    """
    first, kinds = load_tokenizer(tokenizer), dict[str, list[int]]()
    entries = [*map(readable, spell(first))]
    for token, entry in enumerate(entries):
        kind = "bytes" if "‹" in entry else "text"
        kind = "special" if token in first.added_tokens_decoder else kind
        kinds.setdefault(kind, []).append(token)
    columns = ["kind", "entries", "some of them", "in tokenizer.json"]
    table = Table(f"A vocabulary of {len(entries):,} entries", columns, [])
    for kind, ids in kinds.items():
        some = ids[:: len(ids) // 10 + 1]
        shown = " ".join(f"“{entries[token]}”" for token in some)
        stored = " ".join(first.convert_ids_to_tokens(some))
        table.rows.append([kind, f"{len(ids):,}", shown, stored])
    cutters = [first] if other is None else [first, load_tokenizer(other)]
    for one in cutters if text else []:
        ids: Any = one(text, add_special_tokens=False)["input_ids"]
        cut = [readable(piece) for piece in map(spell(one).__getitem__, ids)]
        tints = [0.2 + 0.4 * (n % 2) for n in range(len(ids))]
        marks = [*zip(cut, map(str, ids), tints, strict=True)]
        size = len(str(text).encode()) / len(ids)
        counts = f"the text in {len(ids):,} tokens, {size:.2f} bytes per token"
        table.title += f"; {counts}"
        table.above += f'<div class="faint">{counts}</div>{mark_tokens(marks)}'
    return table
