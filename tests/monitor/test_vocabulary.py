"""A vocabulary in readable text: kinds of entries, and how a text is cut."""

import re

import pytest
from support.small_models import make_tokenizer
from tokenizers import Tokenizer, models

from minimind_nb.data.tokenizer import load_tokenizer
from minimind_nb.monitor.vocabulary import readable, spell, vocabulary


def rows(table):
    return {kind: cells for kind, *cells in table.rows}


def test_every_entry_is_counted_once_by_kind():
    found = rows(vocabulary())
    assert sum(int(cells[0].replace(",", "")) for cells in found.values()) == 6400
    assert found["special"][:2] == ["3", "“<|endoftext|>” “<|im_start|>” “<|im_end|>”"]
    assert found["bytes"][1].startswith("“‹")
    assert "“部分”" in found["text"][1] and "éĥ¨åĪĨ" in found["text"][2]


def test_bytes_spell_what_the_tokenizer_decodes():
    tokenizer = load_tokenizer()
    text = "naïve 饕餮\n\tdef  f(): 你好，<|im_end|>\x00é\u00ad"
    ids = tokenizer(text)["input_ids"]
    entries = spell(tokenizer)
    assert b"".join(entries[token] for token in ids).decode() == text
    inner = Tokenizer(models.BPE({"é": 0, "</s>": 1}, []))
    inner.add_special_tokens(["</s>"])
    assert spell(load_tokenizer(inner)) == ["é".encode(), b"</s>"]


def test_signs_stand_for_what_has_no_glyph():
    assert readable(b"a\n\t\x00\xe4\xbd") == "a↵⇥␀‹E4›‹BD›"


def test_a_text_is_shown_cut_by_both_tokenizers():
    table = vocabulary(None, "one 你", make_tokenizer())
    assert re.fullmatch(
        r"A vocabulary of 6,400 entries; the text in \d tokens, \d\.\d\d bytes per token; "
        r"the text in 5 tokens, 1\.40 bytes per token",
        table.title,
    )
    first, second = re.findall(r'<div class="tokens">(.*?)</div>', table._repr_html_())
    assert first.count("<span") < second.count("<span") == 5
    assert re.sub("<[^>]*>", "", second) == "one ‹E4›‹BD›‹A0›"
    assert "0.14" in second and "0.42" in second


@pytest.mark.parametrize("text", [None, ""])
def test_without_a_text_only_the_entries_are_shown(text):
    html = vocabulary(make_tokenizer(), text)._repr_html_()
    assert "<table>" in html and "<span" not in html
