"""A row's documents: of text, of conversations, of pairs."""

import dataclasses
import json

import numpy as np
import pytest

from minimind_nb.config import STAGES
from minimind_nb.data.conversations import FORMS, IN_LOSS
from minimind_nb.data.jsonl import Chunk
from minimind_nb.data.record_formats import encode_chunk

A, B, C = 67, 68, 69
PAD, BEGIN, END = 0, 1, 2


def encode(name, rows, spec):
    """The arrays of some rows, their documents' ids and marks, and the rows counted."""
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    arrays, tally = encode_chunk(name, spec, Chunk(1, data))
    ends = arrays["offsets"]
    ids = [each.tolist() for each in np.split(arrays["tokens"], ends)[:-1]]
    marks = np.split(arrays["marks"], ends)[:-1] if "marks" in arrays else []
    return arrays, ids, marks, tally


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
    ],
)
def test_begin_and_end_are_added_if_they_are_missing(byte_spec, text, ids):
    _, found, marks, _ = encode("pretrain", [{"text": text, "source": "b"}], byte_spec)
    assert (found, marks) == ([ids], [])


def test_one_token_may_be_both_begin_and_end(byte_spec):
    spec = dataclasses.replace(byte_spec, bos_token="<|im_end|>", bos_id=END)
    rows = [{"text": "a"}, {"text": "<|im_end|>a<|im_end|>"}]
    assert encode("pretrain", rows, spec)[1] == [[END, A, END]] * 2


def test_documents_keep_their_order(byte_spec):
    rows = [{"text": text} for text in ("a", "<|im_start|>b<|im_end|>", "c<|im_end|>")]
    _, ids, _, tally = encode("pretrain", rows, byte_spec)
    assert [each[1:-1] for each in ids] == [[A], [B], [C]]
    assert tally.good == 3


@pytest.mark.parametrize("name", FORMS)
def test_no_rows_have_no_documents(byte_spec, name):
    arrays, ids, *_ = encode(name, [], byte_spec)
    assert ids == [] and not any(map(len, arrays.values()))


def test_every_stage_has_a_record_format():
    assert STAGES.keys() | {"rlaif"} == FORMS.keys()


def talk(*contents):
    roles = ("user", "assistant")
    return [
        {"role": roles[n % 2], "content": said, "id": n}
        for n, said in enumerate(contents)
    ]


def in_loss(name, rows, spec):
    """The tokens in the loss of each document, as letters."""
    letters = {67: "a", 68: "b", 69: "c", 70: "d", 71: "e", END: ".", 201: ""}
    _, ids, marks, _ = encode(name, rows, spec)
    return [
        "".join(letters[n] for n in np.array(one)[each & IN_LOSS > 0].tolist())
        for one, each in zip(ids, marks, strict=True)
    ]


def test_every_answer_or_the_last_is_in_the_loss(byte_spec):
    rows = [
        {"conversations": talk("a", "b", "c", "d")},
        {"conversations": talk("a", "e")},
    ]
    assert in_loss("sft", rows, byte_spec) == ["b.d.", "e."]
    assert in_loss("rlaif", rows, byte_spec) == ["d.", "e."]


def test_of_pairs_only_what_follows_the_common_turns_is_in_the_loss(byte_spec):
    first = {"chosen": talk("a", "b"), "rejected": talk("a", "c")}
    later = {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "b", "c", "e")}
    apart = {"chosen": talk("a", "b", "c", "d"), "rejected": talk("a", "d", "c", "d")}
    expected = ["b.", "c.", "d.", "e.", "b.d.", "d.d."]
    assert in_loss("dpo", [first, later, apart], byte_spec) == expected


def test_sizes_are_bytes_of_the_answers_and_the_rest_is_left_out(byte_spec):
    row = {"conversations": talk("a", "文", "c", "dd", "e")}
    arrays, ids, marks, _ = encode("sft", [row], byte_spec)
    assert arrays["answer_sizes"].tolist() == [3, 2]
    assert ids[0][-4:] == [70, 70, END, 201]
    assert len(marks[0]) == len(ids[0])
    row = {"conversations": talk("a", "文", "c", "dd")}
    arrays, *_ = encode("rlaif", [row], byte_spec)
    assert arrays["answer_sizes"].tolist() == [2]


def test_a_pair_with_an_answer_that_the_template_refuses_is_a_bad_row(byte_spec):
    template = (
        "{% if messages[-1].content == 'e' %}{{ raise_exception('no') }}{% endif %}"
    )
    spec = dataclasses.replace(
        byte_spec, chat_template=template + (byte_spec.chat_template or "")
    )
    rows = [{"chosen": talk("a", "b"), "rejected": talk("a", each)} for each in "ced"]
    arrays, _, _, tally = encode("dpo", rows, spec)
    assert arrays["lines"].tolist() == [1, 1, 3, 3]
    assert (tally.good, tally.kinds) == (2, {"chat_template": 1})
    assert [row.line for row in tally.problems] == [2]


def test_the_content_hash_is_of_what_the_messages_say(byte_spec):
    def hashes(name, *rows):
        return encode(name, rows, byte_spec)[0]["hashes"].tolist()

    bare = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chats = [{"conversations": each} for each in (talk("a", "b"), bare, talk("a", "c"))]
    for name in ("sft", "rlaif"):
        one, same, other = hashes(name, *chats)
        assert one == same != other
    pair = {"chosen": talk("a", "b"), "rejected": talk("a", "c")}
    turned = {"chosen": pair["rejected"], "rejected": pair["chosen"]}
    assert len(set(hashes("dpo", pair, turned))) == 2
