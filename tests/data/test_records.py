"""A row's ids: begin and end are added once, special strings are special."""

import dataclasses

import pytest

from minimind_nb.config import STAGES
from minimind_nb.data.encoding import BulkEncoder
from minimind_nb.data.records import RECORD_FORMATS, encode_documents

A, B, C = 67, 68, 69
PAD, BEGIN, END = 0, 1, 2


@pytest.fixture(scope="module")
def encode(byte_spec):
    encoder = BulkEncoder(byte_spec)

    def encode(text, spec=byte_spec):
        (ids,) = encode_documents([text], encoder, spec)
        return ids.tolist()

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
    texts = ["a", "<|im_start|>b<|im_end|>", "", "c<|im_end|>"]
    ids = encode_documents(texts, BulkEncoder(byte_spec), byte_spec)
    assert [each[1:-1].tolist() for each in ids] == [[A], [B], [], [C]]
    assert {each.dtype.name for each in ids} == {"uint32"}


def test_no_documents_have_no_ids(byte_spec):
    assert encode_documents([], BulkEncoder(byte_spec), byte_spec) == []


def test_every_stage_has_a_record_format():
    assert RECORD_FORMATS.keys() == STAGES.keys()


def test_pretraining_rows_are_checked_and_read():
    format_ = RECORD_FORMATS["pretrain"]
    assert format_.check({"text": "a", "source": "b"}) is None
    assert format_.text({"text": "a", "source": "b"}) == "a"
    fault = format_.check({"source": "b"})
    assert fault is not None and fault.kind == "missing_text"
