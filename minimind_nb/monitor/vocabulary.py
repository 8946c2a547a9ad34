"""A vocabulary in readable text: its entries by kind, and how it cuts a text."""

import html
import itertools
import re
from collections.abc import Sequence
from typing import Any

from ..data.tokenizer import load_tokenizer
from .page import page
from .tables import Table

_KINDS = {  # the first pattern that is found in an entry
    "bytes": "‹[0-9A-F]{2}›",
    "Chinese": "[\u3400-\u9fff]",
    "English": "^[ -~]*[A-Za-z][ -~]*$",
    "other": "",
}
# GPT-2's alphabet: printable bytes are their letters in Latin-1, these follow U+0100.
_BYTES = dict(enumerate([*range(33), *range(127, 161), 173], 0x100))
_SIGNS = {n: 0x2400 + n for n in range(32)} | {9: "⇥", 10: "↵"}  # of control characters
_MOST_TOKENS, _MOST_BYTES = 2_000, 250_000  # of a text on a page


Mark = tuple[str, str, float, bool]
"""A token's text, note for hovering and tint (0 to 1), and whether it is faint."""


class MarkedText(Table):
    """A table, and above it on a page a text in its tokens, the HTML `body`."""

    body = ""

    def _repr_html_(self) -> str:
        return page(self.body + super()._repr_html_())


def spell(tokenizer: Any) -> list[bytes]:
    """Return the bytes that each token stands for, by id."""
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.decoder)
    spelled = list[bytes]()
    for entry in tokenizer.convert_ids_to_tokens(range(len(tokenizer))):
        letters = entry.translate(_BYTES)
        in_bytes = byte_level and max(letters, default="") < "\u0100"
        spelled.append(letters.encode("latin-1") if in_bytes else entry.encode())
    return spelled


def readable(data: bytes) -> str:
    """Return bytes as text, with ‹E4› for one that makes no character."""
    text = data.decode(errors="surrogateescape").translate(_SIGNS)
    return re.sub("[\udc80-\udcff]", lambda m: f"‹{ord(m[0]) - 0xDC00:02X}›", text)


def tint(share: float) -> str:
    """Return the style of a background, from none (0) to strongest (1), as HTML."""
    style = f' style="background:rgba(221,107,31,{0.7 * share:.2f})"'
    return style if round(share, 2) else ""


def mark_tokens(tokens: Sequence[Mark]) -> str:
    """Return a text as HTML; what is too much for a page is counted."""
    spans, size = list[str](), 0
    for text, note, share, faint in tokens[:_MOST_TOKENS]:
        # Where page.css shows the note, the empty title hides the browser's own.
        shown = '<i title=""></i>' + html.escape(text.replace("↵", "↵\n"))
        style = tint(share) + ' class="faint"' * faint
        spans.append(f'<span{style} title="{html.escape(note)}">{shown}</span>')
        size += len(spans[-1].encode())
        if size > _MOST_BYTES:
            break
    left = len(tokens) - len(spans)
    more = f'<p class="faint">and {left:,} more</p>' if left else ""
    return f'<div class="tokens">{"".join(spans)}</div>{more}'


def vocabulary(
    tokenizer: Any = None, text: str | None = None, other: Any = None
) -> MarkedText:
    """Show what the entries of a vocabulary stand for, and how it cuts a text.

    A `tokenizer.json` spells bytes in letters: "Ġthe" is " the", "çļĦ" is "的". The
    table has the entries by kind: their number, the first of more than
    one byte, the longest. A `text` is
    shown in its tokens, and below in those of the tokenizer `other`. Both are what
    `load_tokenizer` takes, such as a run. Raises what that raises.
    """
    first = load_tokenizer(tokenizer)
    pieces, kinds = spell(first), dict[str, list[int]]()
    for token, piece in enumerate(pieces):
        entry = readable(piece)
        kind = next(kind for kind, found in _KINDS.items() if re.search(found, entry))
        kind = "special" if token in first.added_tokens_decoder else kind
        kinds.setdefault(kind, []).append(token)
    columns = ["kind", "entries", "the first", "in tokenizer.json", "the longest"]
    table = MarkedText(f"A vocabulary of {len(pieces):,} entries", columns, [])
    for kind, ids in kinds.items():
        longer = [token for token in ids if len(pieces[token]) > 1] or ids
        shown = [f"“{readable(pieces[token])}”" for token in longer]
        stored = " ".join(first.convert_ids_to_tokens(longer[:5]))
        row = [kind, f"{len(ids):,}", " ".join(shown[:5]), stored, max(shown, key=len)]
        table.rows.append(row)
    cutters = [tokenizer] if other is None else [tokenizer, other]
    for one in map(load_tokenizer, cutters if text is not None else []):
        ids: Any = one(text, add_special_tokens=False)["input_ids"]
        cut = [readable(piece) for piece in map(spell(one).__getitem__, ids)]
        size = len(str(text).encode()) / max(1, len(ids))
        counts = f"the text in {len(ids):,} tokens, {size:.2f} bytes per token"
        tints = itertools.cycle((0.2, 0.6))
        named = zip(cut, ids, strict=True)
        marks = [(text, f"“{text}” {n}", next(tints), False) for text, n in named]
        table.title += f"; {counts}"
        table.body += f'<div class="faint">{counts}</div>{mark_tokens(marks)}'
    return table
