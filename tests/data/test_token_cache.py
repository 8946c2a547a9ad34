"""The token cache: the ids of `tokenizers`, made once, whole or not at all."""

import dataclasses
import gzip
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from minimind_nb.data import token_cache
from minimind_nb.data.jsonl import DataError
from minimind_nb.data.record_formats import token_type
from minimind_nb.data.token_cache import Source, TokenCache, open_cache
from minimind_nb.data.tokenizer import read_tokenizer

# A script that opens a cache as its arguments say; what is injected stands before.
OPENER = """
import os, signal, sys, time
from pathlib import Path
from minimind_nb.data import token_cache
from minimind_nb.data.tokenizer import read_tokenizer
# injected
if __name__ == "__main__":
    file, root, tokenizer, processes = sys.argv[1:]
    source = token_cache.Source(file, "pretrain", read_tokenizer(tokenizer))
    print("ready", flush=True)
    sys.stdin.readline()
    cache = token_cache.open_cache(source, Path(root), int(processes))
    print(cache.folder, len(cache), flush=True)
"""
SLOW_BUILD = """
build = token_cache._build
def slow_build(*arguments, **named):
    print("builds", flush=True)
    time.sleep(0.5)
    build(*arguments, **named)
token_cache._build = slow_build
"""
DEATH_AT_PART_3 = """
import itertools, multiprocessing
token_cache._ALONE_BYTES, token_cache.CHUNK_BYTES = 0, 2000
encode = token_cache._encode
def die_at_part_3(*arguments):
    parts = encode(*arguments)
    yield from itertools.islice(parts, 3)
    print(*[p.pid for p in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
token_cache._encode = die_at_part_3
"""
ASK, SAY = '{"role": "user", "content": "a"}', '{"role": "assistant", "content": "é"}'
CHAT = f'{{"conversations": [{ASK}, {SAY}]}}'
PAIR = f'{{"chosen": [{ASK}, {SAY}], "rejected": [{ASK}, {SAY.replace("é", "bcd")}]}}'
ENGLISH = "It's a test: they said 3.14, and we've  two blanks.\n\tNext line…"
CHINESE = "自然语言处理，是人工智能的一个方向；２０２６年。"


@pytest.fixture
def make_source(tmp_path, byte_spec, write_rows):
    def make(texts, name="rows.jsonl", spec=byte_spec, **policy):
        return Source(
            str(write_rows(tmp_path / name, texts)), "pretrain", spec, **policy
        )

    return make


@pytest.fixture
def source_of_bytes(tmp_path, byte_spec):
    def make(raw, name="rows.jsonl", record_format="pretrain", **policy):
        (tmp_path / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
        wanted = {"tokenizer": byte_spec, **policy}
        return Source(str(tmp_path / name), record_format, **wanted)

    return make


@pytest.fixture
def root(tmp_path):
    return tmp_path / "cache"


@pytest.fixture
def no_building(monkeypatch):
    def forbid(*_):
        raise AssertionError("the cache is built again")

    def start():
        monkeypatch.setattr(token_cache, "_build", forbid)

    return start


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def texts_of(cache: TokenCache) -> list[bytes]:
    """The documents of a cache made with `byte_spec`, decoded."""
    letters = {3 + n: letter for n, letter in enumerate(sorted(byte_letters()))}
    return [
        bytes(byte_letters()[letters[i]] for i in cache.document(n)[1:-1].tolist())
        for n in range(len(cache))
    ]


def byte_letters() -> dict[str, int]:
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in printable]
    return {
        **{chr(byte): byte for byte in printable},
        **{chr(256 + n): byte for n, byte in enumerate(rest)},
    }


def start_opener(
    tmp_path: Path, source: Source, root: Path, processes: int, inject: str
) -> subprocess.Popen[str]:
    script = tmp_path / "opener.py"
    script.write_text(OPENER.replace("# injected", inject))
    (tmp_path / "vocabulary.json").write_text(source.tokenizer.json)
    vocabulary = str(tmp_path / "vocabulary.json")
    arguments = [source.path, str(root), vocabulary, str(processes)]
    return subprocess.Popen(
        [sys.executable, str(script), *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def key_of(source: Source) -> str:
    return source.name(source.content())


def test_ids_are_those_of_tokenizers_with_begin_and_end_once(make_source, root):
    spec = read_tokenizer()
    slow = Tokenizer.from_str(spec.json)
    bare = [ENGLISH, CHINESE, f"{CHINESE} {ENGLISH}" * 5, "a<|endoftext|>b", " "]
    dressed = [f"<|im_start|>{text}<|im_end|>" for text in bare]
    cache = open_cache(make_source([*bare, *dressed], spec=spec), root)
    expected = [slow.encode(text, add_special_tokens=False).ids for text in dressed]
    found = [cache.document(n).tolist() for n in range(len(cache))]
    assert found == expected * 2
    assert all(ids.count(spec.bos_id) == 1 == ids.count(spec.eos_id) for ids in found)


def test_what_a_cache_holds_at_literal_points(make_source, root):
    cache = open_cache(make_source(["abc", "", "文"]), root)
    assert cache.tokens.tolist() == [1, 67, 68, 69, 2, 1, 165, 247, 232, 2]
    assert cache.offsets.tolist() == [0, 5, 10]
    assert cache.targets.tolist() == [4, 4]
    assert cache.lines.tolist() == [1, 3]
    assert cache.sizes.tolist() == [3, 3]
    # The held-out split goes by this value, so it stays the same between versions.
    assert int(cache.hashes[0]) == 0x5995D533D814BBD8
    assert (cache.tokens.dtype, cache.hashes.dtype) == (np.uint16, np.uint64)
    assert len(cache) == 2
    assert not (cache.folder / token_cache.REJECTED).exists()
    assert cache.facts["tokens"] == 10
    assert cache.facts["record_format"] == "pretrain"
    assert (
        cache.marks is cache.loss_tokens is cache.answers is cache.answer_sizes is None
    )
    assert contents(cache.folder).keys() == {
        *("tokens", "offsets", "lines", "sizes", "hashes", "manifest.json")
    }


def test_what_a_cache_of_conversations_holds_at_literal_points(source_of_bytes, root):
    longer = CHAT.replace("}]}", f"}}, {ASK}, {SAY.replace('é', 'b')}, {ASK}]}}")
    source = source_of_bytes(f"{CHAT}\n\n{longer}\n", record_format="sft")
    cache = open_cache(source, root)
    assert cache.offsets.tolist() == [0, 24, 24 + 24 + 9 + 14]
    assert cache.document(0)[-4:].tolist() == [130, 105, 2, 201]
    assert cache.marks_of(0).tolist() == [6, *[0] * 8, 2, *[0] * 10, 1, 1, 1, 1]
    assert cache.marks is not None and cache.marks.dtype == np.uint8
    assert cache.marks_of(1)[-4:].tolist() == [0, 1, 1, 1]
    for found, values in (
        (cache.lines, [1, 3]),
        (cache.sizes, [2, 3]),
        (cache.loss_tokens, [4, 7]),
        (cache.answers, [1, 2]),
        (cache.answer_sizes, [2, 2, 1]),
    ):
        assert found is not None and found.dtype == np.int64
        assert found.tolist() == values
    assert (cache.facts["rows"], cache.facts["record_format"]) == (2, "sft")


def test_chosen_and_rejected_are_neighbours(source_of_bytes, root):
    cache = open_cache(source_of_bytes(f"{PAIR}\n{PAIR}", record_format="dpo"), root)
    assert cache.lines.tolist() == [1, 1, 2, 2]
    assert len(set(cache.hashes.tolist())) == 1
    assert cache.answer_sizes is not None
    assert cache.answer_sizes.tolist() == cache.sizes.tolist() == [2, 3, 2, 3]
    assert (cache.facts["rows"], len(cache)) == (2, 4)


@pytest.mark.parametrize(
    ("record_format", "row", "kind"),
    [
        ("sft", '{"text": "a"}', "unknown_form"),
        ("sft", '{"conversations": null}', "not_a_list"),
        ("sft", '{"conversations": []}', "no_messages"),
        ("sft", f'{{"conversations": [{ASK}, 5]}}', "not_a_message"),
        ("sft", '{"conversations": [{"content": "a"}]}', "missing_role"),
        ("sft", '{"conversations": [{"role": "user"}]}', "missing_content"),
        ("sft", CHAT.replace("user", "bot"), "unknown_role"),
        ("sft", CHAT.replace("user", "assistant"), "role_order"),
        ("sft", CHAT.replace('"é"', "null"), "empty_answer"),
        ("sft", CHAT.replace('"é"', "1"), "content_not_a_string"),
        ("sft", CHAT.replace('"é"', "[5]"), "content_not_a_string"),
        ("sft", CHAT.replace("é", " "), "empty_answer"),
        ("sft", CHAT.replace('"a"', '""'), "empty_content"),
        ("sft", f'{{"conversations": [{ASK}]}}', "no_answer"),
        (
            "sft",
            CHAT.replace("é", "NaN").replace('"NaN"', "NaN"),
            "content_not_a_string",
        ),
        ("dpo", CHAT, "unknown_form"),
        ("dpo", PAIR.replace("rejected", "worse"), "unknown_form"),
        ("dpo", PAIR.replace("bcd", "é"), "no_difference"),
        ("dpo", PAIR.replace('"a"', '"b"', 1), "no_common_prompt"),
        ("dpo", PAIR.replace("bcd", ""), "empty_answer"),
    ],
)
def test_malformed_chat_rows_are_refused_with_their_line(
    source_of_bytes, root, record_format, row, kind
):
    good = PAIR if record_format == "dpo" else CHAT
    raw = f"{good}\n\n{row}\n{good}\n"
    source = source_of_bytes(raw, record_format=record_format)
    with pytest.raises(
        DataError, match=r"1 of 3 rows[^$]*\n  rows\.jsonl:3:\d"
    ) as refused:
        open_cache(source, root)
    assert [(row.line, row.kind) for row in refused.value.problems] == [(3, kind)]
    lax = dataclasses.replace(source, on_bad_line="skip", max_bad_fraction=0.5)
    assert open_cache(lax, root).facts["bad_rows"] == {kind: 1}


def test_a_fault_in_a_message_is_shown_where_it_is(source_of_bytes, root):
    bad = f'{{"conversations": [{ASK}, {SAY}, {ASK.replace("user", "bot")}]}}'
    with pytest.raises(DataError) as refused:
        open_cache(source_of_bytes(bad, record_format="sft"), root)
    assert refused.value.problems[0].column == bad.index('"bot"') + 1
    assert 'message 3 has the role "bot", not system, user' in str(refused.value)


def test_a_row_that_the_chat_template_refuses_is_a_bad_row(
    source_of_bytes, root, byte_spec
):
    template = (
        "{% if messages|length > 2 %}{{ raise_exception('too long') }}{% endif %}"
    )
    template += byte_spec.chat_template
    spec = dataclasses.replace(byte_spec, chat_template=template)
    longer = CHAT.replace("]}", f", {ASK}, {SAY}]}}")
    raw = f"no\n{longer}\n{CHAT}\n{longer}\n"
    source = source_of_bytes(raw, record_format="sft", tokenizer=spec)
    with pytest.raises(DataError, match="chat template fails: too long") as refused:
        open_cache(source, root)
    places = [(row.line, row.column, row.kind) for row in refused.value.problems]
    assert places == [
        (1, 1, "not_json"),
        (2, 1, "chat_template"),
        (4, 1, "chat_template"),
    ]
    assert longer.startswith(refused.value.problems[1].excerpt)
    lax = dataclasses.replace(source, on_bad_line="skip", max_bad_fraction=0.8)
    cache = open_cache(lax, root)
    assert (cache.lines.tolist(), cache.facts["rows"]) == ([3], 1)


def test_chat_rows_want_a_chat_template(source_of_bytes, root, byte_spec):
    spec = dataclasses.replace(byte_spec, chat_template=None)
    source = source_of_bytes(CHAT, record_format="sft", tokenizer=spec)
    with pytest.raises(ValueError, match="the tokenizer has no chat template"):
        open_cache(source, root)


def test_empty_texts_are_left_out(make_source, root):
    cache = open_cache(make_source(["", "a", "", " ", "b"]), root)
    assert texts_of(cache) == [b"a", b" ", b"b"]
    assert cache.lines.tolist() == [2, 4, 5]
    assert cache.facts["rows"] == 5


def test_a_file_of_empty_texts_makes_an_empty_cache(make_source, root):
    cache = open_cache(make_source(["", ""]), root)
    assert len(cache) == len(cache.targets) == len(cache.tokens) == 0


def test_lines_are_physical_ones(source_of_bytes, root):
    source = source_of_bytes(
        b'\xef\xbb\xbf{"text": "a"}\r\n\r\n   \n{"text": "b"}\n'
        b'{"text": "c\\n\xe2\x80\xa8d"}\r\n{"text": "e"}'
    )
    cache = open_cache(source, root)
    assert cache.lines.tolist() == [1, 4, 5, 6]
    assert texts_of(cache) == [b"a", b"b", b"c\n\xe2\x80\xa8d", b"e"]


def test_lines_go_on_from_chunk_to_chunk(make_source, root, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", 50)
    cache = open_cache(make_source([f"text {n}" for n in range(40)]), root)
    assert cache.lines.tolist() == list(range(1, 41))
    assert texts_of(cache) == [b"text %d" % n for n in range(40)]


def test_a_gzip_file_gives_the_same_documents(source_of_bytes, root):
    raw = b'{"text": "a"}\n\n{"text": "b"}\n'
    plain = open_cache(source_of_bytes(raw), root)
    packed = open_cache(source_of_bytes(gzip.compress(raw), "rows.jsonl.gz"), root)
    assert packed.folder != plain.folder
    assert packed.lines.tolist() == plain.lines.tolist() == [1, 3]
    assert packed.tokens.tolist() == plain.tokens.tolist()


@pytest.mark.parametrize(
    ("record_format", "rows"),
    [
        ("pretrain", [json.dumps({"text": f"{n} {ENGLISH}"}) for n in range(200)]),
        ("dpo", [PAIR.replace("bcd", "x" * n) for n in range(1, 60)]),
    ],
)
def test_helpers_make_the_same_bytes_as_one_process(
    record_format, rows, source_of_bytes, root, monkeypatch
):
    monkeypatch.setattr(token_cache, "_ALONE_BYTES", 0)
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", 2000)
    source = source_of_bytes("\n".join(rows), record_format=record_format)
    alone = open_cache(source, root / "alone")
    helped = open_cache(source, root / "helped", processes=2)
    assert contents(alone.folder) == contents(helped.folder)
    assert len(helped) >= len(rows)


def test_small_files_start_no_helpers(make_source, root, monkeypatch):
    monkeypatch.setattr(token_cache.concurrent.futures, "ProcessPoolExecutor", None)
    assert len(open_cache(make_source(["a"]), root, processes=8)) == 1


@pytest.mark.parametrize(
    ("vocab_size", "name"),
    [(6400, "uint16"), (65_536, "uint16"), (65_537, "uint32"), (151_936, "uint32")],
)
def test_tokens_take_the_smallest_type_that_holds_them(vocab_size, name):
    assert token_type(vocab_size) == name


def test_ids_over_65536_are_kept(make_source, root):
    vocab = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2, "a": 70_000}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(list(vocab)[:3])
    cache = open_cache(make_source(["a a"], spec=read_tokenizer(tokenizer)), root)
    assert cache.tokens.dtype == np.uint32
    assert cache.tokens.tolist() == [1, 70_000, 70_000, 2]


@pytest.mark.fault("F46")
def test_an_id_beyond_the_vocabulary_is_refused(make_source, root, byte_spec):
    spec = dataclasses.replace(byte_spec, vocab_size=68)
    assert len(open_cache(make_source(["aAa"], spec=spec), root)) == 1
    source = make_source(["ab"], spec=spec)
    with pytest.raises(ValueError, match="gave the id 68 but states 68 entries"):
        open_cache(source, root)


def test_key_depends_on_content_and_not_on_the_name_or_the_limit(make_source):
    key = key_of(make_source(["a"]))
    assert key_of(make_source(["a"], name="other.jsonl", max_bad_fraction=0.5)) == key
    assert key_of(make_source(["b"])) != key


@pytest.mark.fault("F61")
def test_key_depends_on_all_that_decides_about_ids(make_source, monkeypatch):
    source = make_source(["a"])
    spec = source.tokenizer
    others = [
        {"record_format": "sft"},
        {"on_bad_line": "skip"},
        {"tokenizer": dataclasses.replace(spec, eos_token="<|endoftext|>")},
        {"tokenizer": dataclasses.replace(spec, chat_template="{{ messages }}")},
        {"tokenizer": read_tokenizer()},
    ]
    keys = [key_of(dataclasses.replace(source, **other)) for other in others]
    keys.append(key_of(source))
    monkeypatch.setattr(token_cache, "_CONTENT_VERSION", "another")
    keys.append(key_of(source))
    assert len(set(keys)) == len(keys)


def test_second_opening_builds_nothing(make_source, root, no_building):
    source = make_source(["a", "b"])
    first = open_cache(source, root)
    no_building()
    again = open_cache(make_source(["a", "b"], name="other.jsonl"), root)
    assert again.folder == first.folder
    assert texts_of(again) == [b"a", b"b"]
    assert again.facts == first.facts


@pytest.mark.fault("F61")
def test_changed_data_is_tokenised_anew(make_source, root):
    file = Path(make_source(["aa"]).path)
    before = file.stat()
    assert texts_of(open_cache(make_source(["aa"]), root)) == [b"aa"]
    source = make_source(["bb"])
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert texts_of(open_cache(source, root)) == [b"bb"]


@pytest.mark.fault("F23")
@pytest.mark.parametrize("name", ["tokens", "offsets", "hashes", "manifest.json"])
def test_damaged_cache_is_rebuilt(make_source, root, name, caplog):
    source = make_source(["a", "b"])
    folder = open_cache(source, root).folder
    whole = contents(folder)
    raw = bytearray(whole[name])
    raw[len(raw) // 2] ^= 1
    (folder / name).write_bytes(raw)
    cache = open_cache(source, root)
    assert contents(cache.folder) == whole
    assert caplog.messages[0].startswith("the token cache is damaged, rebuilding it: ")


def test_bad_rows_refuse_the_file_and_leave_no_cache(source_of_bytes, root):
    source = source_of_bytes(b'{"text": "a"}\n{"text": 1}\n\n{"text": "b"\n')
    with pytest.raises(DataError, match="2 of 3 rows read cannot be used") as caught:
        open_cache(source, root)
    assert [(row.line, row.kind) for row in caught.value.problems] == [
        (2, "not_a_string"),
        (4, "truncated"),
    ]
    assert [path for path in root.iterdir() if path.is_dir()] == []


def test_skipped_rows_are_listed_and_counted(source_of_bytes, root):
    raw = b'{"text": "a"}\nno\n{"text": "b"}\n{"text": 1}\n'
    source = source_of_bytes(raw, on_bad_line="skip", max_bad_fraction=0.5)
    cache = open_cache(source, root)
    assert texts_of(cache) == [b"a", b"b"]
    assert cache.lines.tolist() == [1, 3]
    assert cache.facts["bad_rows"] == {"not_json": 1, "not_a_string": 1}
    assert cache.facts["rows"] == 2
    rejected = cache.folder / token_cache.REJECTED
    listed = map(json.loads, rejected.read_text().splitlines())
    assert [(row["line"], row["kind"]) for row in listed] == [
        (2, "not_json"),
        (4, "not_a_string"),
    ]


def test_limit_of_bad_rows_holds_for_a_cache_that_is_there(source_of_bytes, root):
    raw = b'{"text": "a"}\nno\n'
    lax = source_of_bytes(raw, on_bad_line="skip", max_bad_fraction=0.5)
    open_cache(lax, root)
    strict = dataclasses.replace(lax, max_bad_fraction=0.01)
    with pytest.raises(DataError, match=r"at most max_bad_fraction=0\.01") as again:
        open_cache(strict, root)
    with pytest.raises(DataError) as fresh:
        open_cache(strict, root / "elsewhere")
    assert str(again.value) == str(fresh.value)
    assert len(open_cache(lax, root)) == 1


def test_a_file_that_changes_while_it_is_read_makes_no_cache(
    make_source, root, monkeypatch
):
    source = make_source(["aa"])
    build = token_cache._build

    def change_and_build(*arguments, **named):
        Path(source.path).write_text('{"text": "other"}\n')
        build(*arguments, **named)

    monkeypatch.setattr(token_cache, "_build", change_and_build)
    with pytest.raises(DataError, match=r"rows\.jsonl changed while it was read"):
        open_cache(source, root)
    assert [path for path in root.iterdir() if path.is_dir()] == []
    monkeypatch.undo()
    assert texts_of(open_cache(source, root)) == [b"other"]


@pytest.mark.fault("F59")
def test_of_two_processes_one_builds_and_the_other_waits(tmp_path, make_source, root):
    source = make_source([f"text {n}" for n in range(100)])
    openers = [start_opener(tmp_path, source, root, 1, SLOW_BUILD) for _ in range(2)]
    for opener in openers:
        assert opener.stdout and opener.stdout.readline() == "ready\n"
    outputs = []
    for opener in openers:
        assert opener.stdin
        opener.stdin.write("go\n")
        opener.stdin.flush()
    for opener in openers:
        outputs.append(opener.communicate(timeout=60)[0].splitlines())
        assert opener.returncode == 0
    assert sorted(len(lines) for lines in outputs) == [1, 2]
    assert {lines[-1] for lines in outputs} == {f"{root}/{key_of(source)} 100"}
    alone = open_cache(source, root / "alone")
    assert contents(Path(outputs[0][-1].split()[0])) == contents(alone.folder)


@pytest.mark.fault("F60")
def test_death_during_a_build_leaves_nothing_that_is_used(tmp_path, make_source, root):
    source = make_source([f"{n} {ENGLISH}" for n in range(300)])
    with start_opener(tmp_path, source, root, 2, DEATH_AT_PART_3) as opener:
        output = opener.communicate("go\n", timeout=60)[0].splitlines()
    assert opener.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 3
    for helper in output[1].split():
        while Path(f"/proc/{helper}").exists():
            state = Path(f"/proc/{helper}/stat").read_text().rpartition(")")[2].split()
            if state[0] == "Z":
                break
            assert time.monotonic() < deadline, "a helper outlives its parent"
            time.sleep(0.02)
    assert len(output[1].split()) == 2
    left = [path.name for path in root.iterdir() if path.is_dir()]
    assert len(left) == 1 and left[0].startswith(".tokens-")
    rebuilt = open_cache(source, root)
    assert [path for path in root.iterdir() if path.is_dir()] == [rebuilt.folder]
    elsewhere = open_cache(source, root / "elsewhere")
    assert contents(rebuilt.folder) == contents(elsewhere.folder)


def test_killed_helper_is_told_in_plain_words(make_source, root, monkeypatch):
    monkeypatch.setattr(token_cache, "_ALONE_BYTES", 0)
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", 2000)
    encode = token_cache._encode

    def kill_and_encode(*arguments):
        parts = encode(*arguments)
        yield next(parts)
        for helper in multiprocessing.active_children():
            helper.kill()
        yield from parts

    monkeypatch.setattr(token_cache, "_encode", kill_and_encode)
    source = make_source([f"{n} {ENGLISH}" for n in range(900)])
    with pytest.raises(RuntimeError, match="a tokenising process was killed"):
        open_cache(source, root, processes=2)


def test_memory_does_not_grow_with_the_file(make_source, root, monkeypatch):
    monkeypatch.setattr(token_cache, "CHUNK_BYTES", 8_000)

    def peak(texts):
        source = make_source(texts)
        tracemalloc.start()
        try:
            open_cache(source, root)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    small = peak([f"{n} {ENGLISH}" for n in range(300)])
    large = peak([f"{n} {ENGLISH}" for n in range(3_000)])
    assert large < 1.2 * small


def test_a_file_that_is_read_in_another_way_has_another_cache(root, tmp_path):
    text, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    text.write_text("a\n\nb\n")
    tokenizer = read_tokenizer()
    assert len(open_cache(Source(str(text), "pretrain", tokenizer), root)) == 2
    rows.write_bytes(text.read_bytes())
    with pytest.raises(DataError):
        open_cache(Source(str(rows), "pretrain", tokenizer), root)
