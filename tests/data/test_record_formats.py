"""A row's documents: of text, of conversations, of pairs."""

import dataclasses
from typing import Any

import pytest

from minimind_nb.config import STAGES
from minimind_nb.data.conversations import IN_LOSS
from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.jsonl import Fault
from minimind_nb.data.record_formats import RECORD_FORMATS

A, B, C = 67, 68, 69
PAD, BEGIN, END = 0, 1, 2


def good(made: Any) -> Any:
    assert not [one for row in made for one in row if isinstance(one, Fault)]
    return made


@pytest.fixture(scope="module")
def encode(byte_spec):
    def encode(text, spec=byte_spec):
        ((document,),) = good(
            RECORD_FORMATS["pretrain"].encode([{"text": text}], BulkEncoder(spec))
        )
        assert document.marks is None
        return document.ids.tolist()

    return encode


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("abc", [BEGIN, A, B, C, END]),
        ("<|im_start|>abc<|im_end|>", [BEGIN, A, B, C, END]),
        ("<|im_start|>abc", [BEGIN, A, B, C, END]),
        ("abc<|im_end|>", [BEGIN, A, B, C, END]),
        ("a<|im_end|><|im_start|>b", [BEGIN, A, END, BEGIN, B, END]),
        ("<|im_end|>a<|im_start|>", [BEGIN, END, A, BEGIN, END]),
        ("a<|endoftext|>", [BEGIN, A, PAD, END]),
        ("<|im_start|>", [BEGIN, END]),
        ("", [BEGIN, END]),
    ],
)
def test_begin_and_end_are_added_where_they_are_missing(encode, text, ids):
    assert encode(text) == ids


def test_one_token_may_be_both_begin_and_end(encode, byte_spec):
    spec = dataclasses.replace(byte_spec, bos_token="<|im_end|>", bos_id=END)
    assert encode("a", spec) == [END, A, END]
    assert encode("<|im_end|>a<|im_end|>", spec) == [END, A, END]


def test_documents_keep_their_order_and_one_type(byte_spec):
    rows = [{"text": text} for text in ("a", "<|im_start|>b<|im_end|>", "c<|im_end|>")]
    made = good(RECORD_FORMATS["pretrain"].encode(rows, BulkEncoder(byte_spec)))
    ids = [document.ids for documents in made for document in documents]
    assert [each[1:-1].tolist() for each in ids] == [[A], [B], [C]]
    assert {each.dtype.name for each in ids} == {"uint32"}


@pytest.mark.parametrize("name", RECORD_FORMATS)
def test_no_rows_have_no_documents(byte_spec, name):
    encode = RECORD_FORMATS[name].encode
    assert encode([], BulkEncoder(byte_spec)) == []


def test_every_stage_has_a_record_format():
    assert STAGES.keys() | {"rlaif"} == RECORD_FORMATS.keys()


def test_pretraining_rows_are_checked_and_read():
    format_ = RECORD_FORMATS["pretrain"]
    assert format_.check({"text": "a", "source": "b"}) is None
    assert format_.text({"text": "a", "source": "b"}) == "a"
    fault = format_.check({"source": "b"})
    assert fault is not None and fault.kind == "missing_text"


def talk(*contents):
    roles = ("user", "assistant")
    return [
        {"role": roles[n % 2], "content": said, "id": n}
        for n, said in enumerate(contents)
    ]


@pytest.fixture
def trained(byte_spec):
    """A function that gives what is learned from of each document of each row."""
    encoder = BulkEncoder(byte_spec)
    letters = {67: "a", 68: "b", 69: "c", 70: "d", 71: "e", END: ".", 201: ""}

    def encode(name, rows):
        assert [RECORD_FORMATS[name].check(row) for row in rows] == [None] * len(rows)
        made = good(RECORD_FORMATS[name].encode(rows, encoder))
        return [
            [
                "".join(letters[n] for n in one.ids[one.marks & IN_LOSS > 0].tolist())
                for one in documents
            ]
            for documents in made
        ]

    return encode


def test_every_answer_or_the_last_is_learned_from(trained):
    rows = [
        {"conversations": talk("a", "b", "c", "d")},
        {"conversations": talk("a", "e")},
    ]
    assert trained("sft", rows) == [["b.d."], ["e."]]
    assert trained("rlaif", rows) == [["d."], ["e."]]


def test_of_pairs_only_what_follows_the_common_turns_is_learned_from(trained):
    first = {"chosen": talk("a", "b"), "rejected": talk("a", "c")}
    later = {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "b", "c", "e")}
    apart = {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "d", "c", "d")}
    assert trained("dpo", [first, later, apart]) == [
        ["b.", "c."],
        ["d.", "e."],
        ["b.d.", "d.d."],
    ]


def test_sizes_are_bytes_of_the_answers_and_the_rest_is_left_out(byte_spec):
    row = {"conversations": talk("a", "文", "c", "dd", "e")}
    encoder = BulkEncoder(byte_spec)
    ((document,),) = good(RECORD_FORMATS["sft"].encode([row], encoder))
    assert list(document.answer_sizes) == [3, 2]
    assert document.ids[-4:].tolist() == [70, 70, END, 201]
    assert document.marks is not None and len(document.marks) == len(document.ids)
    row = {"conversations": talk("a", "文", "c", "dd")}
    ((document,),) = good(RECORD_FORMATS["rlaif"].encode([row], encoder))
    assert list(document.answer_sizes) == [2]


def test_a_fault_stands_in_the_place_of_its_document(byte_spec):
    template = (
        "{% if messages[-1].content == 'e' %}{{ raise_exception('no') }}{% endif %}"
    )
    spec = dataclasses.replace(
        byte_spec, chat_template=template + (byte_spec.chat_template or "")
    )
    rows = [{"chosen": talk("a", "b"), "rejected": talk("a", each)} for each in "ced"]
    made = RECORD_FORMATS["dpo"].encode(rows, BulkEncoder(spec))
    faults = [[isinstance(one, Fault) for one in row] for row in made]
    assert faults == [[False, False], [False, True], [False, False]]


def test_content_is_what_the_messages_say():
    for name in ("sft", "rlaif"):
        text = RECORD_FORMATS[name].text
        bare = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        assert text({"conversations": talk("a", "b")}) == text({"conversations": bare})
        assert text({"conversations": talk("a", "b")}) != text(
            {"conversations": talk("a", "c")}
        )
    text = RECORD_FORMATS["dpo"].text
    pair = {"chosen": talk("a", "b"), "rejected": talk("a", "c")}
    turned = {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    assert text(pair) != text(turned)
