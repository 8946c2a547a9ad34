"""What `fuzz.py` feeds: valid seeds, odd values, and a reader for each kind of input."""

import contextlib
import functools
import gzip
import io
import itertools
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file
from support.runs import train_here
from support.small_models import make_tokenizer
from tokenizers import Tokenizer

import minimind_nb as mm
from minimind_nb import cli
from minimind_nb.config import STAGES, kinds, presets, resolve
from minimind_nb.config.settings import ResolvedConfig
from minimind_nb.data import chat_template, containers, fast_encoding, tokenizer
from minimind_nb.data.conversations import FORMS, TURN, read_chat
from minimind_nb.data.jsonl import Fault
from minimind_nb.data.token_cache import Source, open_cache
from minimind_nb.model.loading import model_config
from minimind_nb.monitor import chat as chats
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import api, measurement, resuming
from minimind_nb.training.preparation import prepare

Tensors = dict[str, torch.Tensor]
Files = dict[str, bytes | None]  # to write, or to remove
STEPS, DEEP = 12, "@deep"
BOM, GZIP, ZIP = b"\xef\xbb\xbf", b"\x1f\x8b", b"PK"
_NUMBERS = "null true false 0 -1 2 1.5 -0.0 1e400 -Infinity NaN 9223372036854775808"
_NESTED = '[] {} [[]] [null] {"a":{}} ["x",1]'
_TEXTS = ",x, ,\0,\ud800,\u2028\ufeff,９,1e9,../x,<|im_end|>,nan,none,[,{},~,*,demo,\n"
ODD: list[Any] = [*map(json.loads, f"{_NUMBERS} {_NESTED}".split()), 10**400]
ODD += [*_TEXTS.split(","), "a" * 900, "a,b", DEEP]
_ARRAYS = (np.float32(1.5), np.int64(3), np.arange(2), torch.ones(()), torch.ones(2))
ODD_OBJECTS = [*_ARRAYS, Path("x"), b"x", {1}, 1j, len, object(), Decimal(1), range(3)]
_HEX = "00 0a0a 0d0a fffe efbbbf eda080 1f8b 7b7d 50415231 e280a8".split()
ODD_BYTES = [*map(bytes.fromhex, _HEX), b"}" * 99, b"[" * 99_999, b"9" * 5000]
_PIECES = (
    'one, two,你好,\n,\r\n,\t,\u2028,\u200b,e\u0301,👩‍👧,\\,{{,",\0,\ufdd0,\U000f0000'
)
_SPECIAL = "<|im_start|>,<|im_end|>,<|im_start|>user\n,<think>,</think>,</tool_call>"
PIECES = [*f"{_PIECES},{_SPECIAL}".split(","), " " * 50, "a" * 2000]
TEMPLATE = """\
{% for m in messages %}[{{ m.role }}]{% if m.role == 'assistant' %}{% generation %}\
{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}{% endif %}\
{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"""
ODD_JINJA = """\
{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}
{{ 'x' * 10**10 }};{{ messages[99].content }};{{ raise_exception('no') }};{{ 1 / 0 }}
{% generation %};{% if;{% include 'x' %};{{ x() }};%};{{ ''.__class__.__mro__ }}
{{ messages }};{{ messages | tojson }};{{ messages[0].content.x.y }}"""
SETTINGS: dict[str, Any] = {
    **dict(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, max_seq_len=32),
    **dict(epochs=50, max_steps=STEPS, batch_size=2, save_interval=4, eval_interval=6),
    **dict(eval_tokens=300, sample_tokens=2, log_interval=1, accumulation_steps=1),
    **dict(device="cpu", dtype="float32", num_processes=1, compile=False),
}


class Finding(Exception):
    """What a case shows that the package does not raise: the outcome, and why."""

    def __init__(self, outcome: str, text: str) -> None:
        super().__init__(text)
        self.outcome = outcome


@dataclass(frozen=True)
class Seeds:
    """Valid things in a folder, made once: a corpus, a run, and exports of it."""

    folder: Path
    spec: tokenizer.TokenizerSpec
    run: RunFolder
    tensors: dict[int, Tensors]  # of the run's checkpoints, by step
    settings: dict[str, Any]


def make_seeds(folder: Path) -> Seeds:
    """Make the seeds, and do what takes seconds when a process does it first."""
    spec = tokenizer.read_tokenizer(make_tokenizer())
    tokenizer.write_tokenizer(spec, folder / "tokenizer")
    data, out = folder / "corpus.jsonl", folder / "out"
    texts = (f"第 {n} 篇 one two {n * 7 % 13}" for n in range(80))
    data.write_text("".join(f"{json.dumps({'text': text})}\n" for text in texts))
    places = {"data_path": str(data), "out_dir": str(out)}
    settings = {**SETTINGS, **places, "tokenizer": str(folder / "tokenizer")}
    _, run = train_here(settings)
    for kind in ("llama", "minimind"):
        mm.export(run.root, folder / kind, format=kind)
    mm.Run(run.root).plot().png()
    found = {int(one.name[5:]): one for one in run.checkpoint_folders()}
    tensors = {n: load_file(one / "model.safetensors") for n, one in found.items()}
    return Seeds(folder, spec, run, tensors, settings)


def start_nothing() -> None:
    """From now on end a case as fine where it would start a training; cut answers."""
    changed: Any = (api, chats, measurement)

    def start(*_: object, **__: object) -> None:
        raise Finding("fine", "a training would start")

    changed[0]._run = changed[2].launch = start
    real = chats.stream_ids
    changed[1].stream_ids = lambda *a, **b: itertools.islice(real(*a, **b), 3)


def dumps(draw: Random, value: Any) -> bytes:
    """Return JSON, of odd spelling now and then."""
    text = json.dumps(value, ensure_ascii=draw.random() < 0.5)
    deep = draw.choice((50, 900, 99_999))
    text = text.replace(f'"{DEEP}"', "[" * deep + "]" * deep)
    return text.encode(errors="surrogatepass")


def damage(draw: Random, data: bytes) -> bytes:
    """Flip, cut, repeat, insert or clear bytes, at up to four places."""
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        at = draw.randrange(len(changed) + 1)
        end = at + draw.choice((1, 4, 100, len(changed)))
        kind = draw.randrange(6)
        if kind < 2 and at < len(changed):
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == 2:
            del changed[at:end]
        elif kind == 3:
            changed[at:at] = changed[at:end]
        elif kind == 4:
            changed[at:at] = draw.choice(ODD_BYTES)
        else:
            changed[at:end] = bytes(len(changed[at:end]))
    return bytes(changed)


def swap(draw: Random, value: Any) -> Any:
    """Return JSON with a part of it removed, renamed, doubled, or of another type."""
    if not isinstance(value, dict | list) or not value or draw.random() < 0.15:
        return draw.choice(ODD)
    keys: Any = [*value] if isinstance(value, dict) else range(len(value))
    value, key, kind = value.copy(), draw.choice(keys), draw.random()
    if kind < 0.1:
        del value[key]
    elif kind < 0.2 and isinstance(value, dict):
        value[str(draw.choice(ODD))] = value.pop(key)
    elif kind < 0.2:
        value.insert(key, value[key])
    else:
        value[key] = swap(draw, value[key])
    return value


def change(draw: Random, data: bytes) -> bytes:
    """Damage JSON, or a safetensors header, as bytes or by its values."""
    if draw.random() < 0.5 or data.startswith(ZIP):
        return damage(draw, data)
    size = 0 if data.startswith(b"{") else int.from_bytes(data[:8], "little") + 8
    header = dumps(draw, swap(draw, json.loads(data[8:size] if size else data)))
    return len(header).to_bytes(8, "little") + header + data[size:] if size else header


def put(files: Files, folder: Path, original: Path) -> Path:
    """Copy a folder, then write or remove files in it."""
    shutil.copytree(original, folder, dirs_exist_ok=True)
    for name, data in files.items():
        (folder / name).unlink(missing_ok=True)
        if data is not None:
            (folder / name).write_bytes(data)
    return folder


def write_text(draw: Random) -> str:
    return "".join(("a", *draw.choices(PIECES, k=draw.choice((1, 2, 5))), "b"))


def converse(draw: Random) -> list[Any]:
    """Return the messages of a conversation."""
    role, content = draw.choice((("role", "content"), ("from", "value")))
    messages = [{role: "system", content: "s"}] * draw.randrange(2)
    for number in range(2 * draw.choice((1, 1, 2, 3))):
        name = "assistant" if number % 2 else "user"
        messages.append({role: name, content: write_text(draw)})
    return messages


def write_row(draw: Random, record_format: str) -> Any:
    """Return a row of a format; one in fifteen is odd."""
    row: dict[str, Any] = {}
    for key in draw.choice(FORMS[record_format]).split():
        whole = key in ("conversations", "messages") or key.endswith("_messages")
        row[key] = converse(draw) if whole else write_text(draw)
    if len(row) == 2 and record_format == "dpo":  # they begin alike
        first = converse(draw)
        row = {
            key: [*first[:-1], first[-1] | {"value": "x", "content": key}]
            for key in row
        }
    return swap(draw, row) if draw.random() < 0.07 else row


# Each reader draws a case, and feeds it.


class Data(NamedTuple):
    """A data file; `texts` were written into it before it was damaged."""

    record_format: str
    name: str
    on_bad_line: str
    data: bytes
    texts: set[str]


def draw_data(draw: Random, seeds: Seeds) -> Data:
    record_format = draw.choice([*FORMS])
    rows = [write_row(draw, record_format) for _ in range(draw.choice((1, 3, 20)))]
    whole = [row for row in rows if isinstance(row, dict)]
    kind = draw.choice(("jsonl", "json", "txt", "parquet"))
    if kind == "jsonl":
        data = b"\n".join(dumps(draw, row) for row in rows)
    elif kind == "json":
        data = dumps(draw, rows)
    elif kind == "txt":
        whole = [{"text": f"a{draw.choice(PIECES[:3])}b"} for _ in rows]
        data = "\n\n".join(row["text"] for row in whole).encode()
    else:
        buffer = io.BytesIO()
        with contextlib.suppress(pa.ArrowException, UnicodeError, OverflowError):
            pq.write_table(pa.Table.from_pylist(whole), buffer)
        data = buffer.getvalue()
    if kind != "parquet" and draw.random() < 0.3:
        data = gzip.compress(data, mtime=0)
    texts = {str(row.get(key)) for row in whole for key in ("text", "content")}
    name = draw.choice((f"data.{kind}", f"data.{kind}", f"data.{kind}.gz", "data.txt"))
    data = damage(draw, data) if draw.random() < 0.5 else data
    return Data(record_format, name, draw.choice(("error", "skip")), data, texts)


def feed_data(case: Data, place: Path, seeds: Seeds) -> None:
    path = place / case.name
    path.write_bytes(case.data)
    containers.check_file(path)
    how = case.record_format, seeds.spec, case.on_bad_line, 0.9
    cache = open_cache(Source(str(path), *how), place)
    kind = containers.find_kind(path)
    sealed = kind == "lines" or (kind == "array" and case.data.startswith(GZIP))
    if case.record_format != "pretrain" or not (sealed or kind == "parquet"):
        return  # nothing to compare with
    known = set(case.texts)
    for line in case.data.removeprefix(BOM).split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError, AttributeError):
            known |= {*map(json.loads(line).get, ("text", "content"))}
    decode = Tokenizer.from_str(seeds.spec.json).decode
    for number in range(len(cache)):
        text = decode(cache.document(number).tolist(), skip_special_tokens=False)
        inner = text.removeprefix(seeds.spec.bos_token).removesuffix(
            seeds.spec.eos_token
        )
        if not {text, inner} & known:
            outcome = "silent acceptance" if sealed else "unsealed"
            raise Finding(outcome, f"a text that the {kind} does not hold: {text!r}")


def draw_tokenizer(draw: Random, seeds: Seeds) -> Files:
    found = sorted((seeds.folder / "tokenizer").iterdir())
    files: Files = {}
    for file in draw.sample(found, draw.choice((0, 1, 1, 2))):
        files[file.name] = change(draw, file.read_bytes())
    if draw.random() < 0.3:
        files["chat_template.jinja"] = damage(draw, TEMPLATE.encode())
    if draw.random() < 0.2:
        special = b'{"eos_token": {"content": "<|im_end|>"}, "pad_token": null}'
        files["special_tokens_map.json"] = change(draw, special)
    return files | {draw.choice(found).name: None} if draw.random() < 0.1 else files


def feed_tokenizer(case: Files, place: Path, seeds: Seeds) -> None:
    folder = put(case, place, seeds.folder / "tokenizer")
    spec = tokenizer.read_tokenizer(folder)
    texts = ["one two 你好\n <|im_end|> x", "", " ".join(PIECES)]
    tokenizer.load_tokenizer(spec)(texts)
    read = Tokenizer.from_str(spec.json).encode_batch(texts, add_special_tokens=False)
    encoded = fast_encoding.BulkEncoder(spec).encode(texts)
    if [ids.tolist() for ids in encoded] != [one.ids for one in read]:
        raise Finding("silent acceptance", "other ids than those of tokenizers")
    if max(ids.max(initial=0) for ids in encoded) >= spec.vocab_size:
        raise Finding("silent acceptance", "an id beyond the entries")


def draw_template(draw: Random, seeds: Seeds) -> tuple[str, bool, Any, Any]:
    template = draw.choice((str(seeds.spec.chat_template), TEMPLATE))
    changed = draw.random() < 0.6
    if changed and draw.random() < 0.5:
        at, odd = draw.randrange(len(template)), ODD_JINJA.replace("\n", ";").split(";")
        template = template[:at] + draw.choice(odd) + template[at:]
    elif changed:
        template = damage(draw, template.encode()).decode(errors="replace")
    messages: Any = converse(draw)
    messages = swap(draw, messages) if draw.random() < 0.3 else messages
    tools = draw.choice((None, None, [{"name": "f"}], "[]", draw.choice(ODD)))
    return template, changed, messages, tools


def feed_template(case: tuple[Any, ...], place: Path, seeds: Seeds) -> None:
    template, changed, *said = case
    chat, _ = read_chat(*said)
    encoder = chat_template.ChatEncoder(replace(seeds.spec, chat_template=template))
    try:
        encoded = encoder.encode(chat)
    except Fault as fault:
        raise Finding("refused", fault.reason) from fault
    roles = [message["role"] for message in chat.messages]
    turns = np.count_nonzero(encoded[1] & TURN)
    if not changed and turns != len(roles) + (roles[-1] != "assistant"):
        raise Finding("silent acceptance", f"{turns} turns of {len(roles)}")
    encoder.prompt(chat.messages, chat.tools)


def draw_weights(draw: Random, seeds: Seeds) -> tuple[str, str, dict[str, Any], bytes]:
    base = draw.choice(("llama", "minimind", "out"))
    heads = draw.choice((4, 4, 4, 4, None, 0, 3, -1, 10**9, "4"))
    shape = {"num_attention_heads": heads} if base == "out" else {}
    name = draw.choice(("model.safetensors", "config.json"))
    name = "pretrain_32.pth" if base == "out" else name
    return base, name, shape, change(draw, (seeds.folder / base / name).read_bytes())


def feed_weights(case: tuple[Any, ...], place: Path, seeds: Seeds) -> None:
    base, name, shape, data = case
    source = place / name
    if base == "out":
        source.write_bytes(data)
    else:
        source = put({name: data}, place, seeds.folder / base)
    model, _ = mm.load(source, tokenizer=seeds.spec, **shape)
    for key, value in model.named_parameters():
        wanted = seeds.tensors[STEPS][key]
        wanted = wanted.half().float() if base == "out" else wanted
        if not torch.equal(value, wanted):
            outcome = "silent acceptance" if name == "config.json" else "unsealed"
            raise Finding(outcome, f"other weights in {Path(name).suffix}")
    with torch.no_grad():
        model(torch.ones(1, 3, dtype=torch.int64))


def draw_metadata(draw: Random, seeds: Seeds) -> Files:
    name = draw.choice(("config.json", "rank0.json", "metrics.jsonl", "metrics.jsonl"))
    data = (seeds.run.root / name).read_bytes().rstrip(b"\0")
    if name != "metrics.jsonl":
        return {name: change(draw, data)}
    if draw.random() < 0.4:
        return {name: damage(draw, data)}
    rows = data.splitlines()
    for at in draw.sample(range(len(rows)), draw.choice((1, 3))):
        rows[at] = dumps(draw, swap(draw, json.loads(rows[at])))
    return {name: b"\n".join(rows) + b"\n"}


def feed_metadata(case: Files, place: Path, seeds: Seeds) -> None:
    run = mm.Run(put(case, place / seeds.run.root.name, seeds.run.root))
    views: list[Callable[[], object]] = [
        lambda: repr((run, run.samples(), mm.runs(place))),
        lambda: (run.summary(), run._repr_html_()),
        lambda: resuming.upgraded_config(RunFolder(run.folder)),
        lambda: compare(read_loaded(run.folder, {}), seeds, STEPS),
        *([run.plot] * (len(run.history.rows) % 5 == 0)),
    ]
    errors: list[Exception] = []
    for view in views:
        try:
            view()
        except Exception as error:
            errors.append(error)
    if errors:
        raise ExceptionGroup("", errors)


def draw_commands(draw: Random, seeds: Seeds) -> list[str]:
    command = draw.choice([*cli._COMMANDS])
    paths = [seeds.run.root, seeds.folder / "corpus.jsonl", seeds.folder / "tokenizer"]
    paths += [seeds.folder / "llama", seeds.folder / "out" / "pretrain_32.pth", "x", ""]
    names = [*cli._COMMANDS[command][2]]
    options = [name for name in names if name.islower() and name != "use_wandb"]
    line = [command if draw.random() < 0.97 else f"{command}x"]
    shown = [name for name in names if name in ("SOURCE", "RUN_DIR", "RUNS")]
    line += [str(draw.choice(paths)) for _ in shown]
    line += ["x" for name in names if name in ("TEXT", "FOLDER")]
    if "data_path" in options:
        line += ["--data_path", str(draw.choice(paths))]
    for option in draw.choices(options, k=draw.randrange(5) if options else 0):
        types, name = cli._TYPES.get(option, (str,)), option
        common = {
            int: "2 4 32",
            float: "0.5 1e-3",
            bool: "true false",
            str: "cpu x sft",
        }
        value = draw.choice([v for t in types for v in common.get(t, "last").split()])
        if draw.random() < 0.3:
            value = str(draw.choice(ODD)).replace("\0", "0")
        if draw.random() < 0.1:
            at = draw.randrange(len(name))
            name = draw.choice((name.replace("_", "-"), name[:at] + name[at + 1 :]))
        line += draw.choice(([f"--{name}", value], [f"--{name}={value}"]))
    return line


def feed_commands(case: list[str], place: Path, seeds: Seeds) -> None:
    errors: list[BaseException] = []
    real = cli.run

    def run(*given: Any, **options: Any) -> int:
        try:
            return real(*given, **options)
        except BaseException as error:
            errors.append(error)  # which `main` puts in words
            raise

    try:
        cli.run = run
        cli.main(case)
    except SystemExit as end:
        if errors:
            raise errors[0] from None
        if end.code:
            raise Finding("refused", "argparse") from None
    finally:
        cli.run = real


def draw_settings(draw: Random, seeds: Seeds) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    common = {int: [1, 2, 4, 64, 512], float: [0.1, 0.5, 1e-4], bool: [True, False]}
    for name in draw.choices([*kinds()], k=draw.choice((1, 2, 3, 6))):
        fitting = [value for kind in kinds()[name] for value in common.get(kind, [])]
        value = draw.choice(fitting or [STAGES["pretrain"].get(name), "x"])
        if draw.random() < 0.3:
            value = draw.choice([*ODD, *ODD_OBJECTS])
        if isinstance(value, str) and value == DEEP:
            value = functools.reduce(lambda inner, _: [inner], range(5000), value)
        settings[name if draw.random() < 0.97 else name[1:]] = value
    return settings


def feed_settings(case: dict[str, Any], place: Path, seeds: Seeds) -> None:
    cfg = mm.TrainConfig(**case)
    machine = {"device": "cpu", "num_processes": 1, "dtype": "float32"}
    resolved = resolve(cfg, **{k: v for k, v in machine.items() if k not in case})
    for name, value in cfg.explicit().items():
        if (kept := getattr(resolved, name)) != value:
            raise Finding("silent acceptance", f"{name}: {value!r} became {kept!r}")
    if ResolvedConfig(**json.loads(json.dumps(resolved.portable()))) != resolved:
        raise Finding("silent acceptance", "config.json holds other settings")
    model_config(vars(resolved), seeds.spec)
    presets.flops_per_token(vars(resolved))
    presets.fit_batch(vars(resolved), cfg.explicit(), 10_000)


def draw_damage(draw: Random, seeds: Seeds) -> tuple[str, bytes | None]:
    out = seeds.folder / "out"
    files = sorted(str(f.relative_to(out)) for f in out.rglob("*") if f.is_file())
    name = draw.choice(draw.choice((files, [f for f in files if "checkpoints" in f])))
    data, other = (out / name).read_bytes(), (out / draw.choice(files)).read_bytes()
    cut = data[: draw.randrange(len(data) or 1)]
    return name, draw.choice((damage(draw, data), cut, b"", None, other))


def feed_damage(case: tuple[str, bytes | None], place: Path, seeds: Seeds) -> None:
    name, data = case
    intact = (seeds.folder / "out" / name).read_bytes()
    out = put({name: data}, place / "out", seeds.folder / "out")
    folder = out / seeds.run.root.name
    broken = {n for n in seeds.tensors if f"step_{n:08d}" in name and data != intact}
    newest = max(seeds.tensors.keys() - broken)
    if broken and mm.verify(folder).intact:
        raise Finding("silent acceptance", f"verify finds nothing: {name}")
    refused: list[Exception] = []
    for read in (read_loaded, read_resumed):
        try:
            tensors = read(folder, {**seeds.settings, "out_dir": str(out)})
        except Exception as error:
            if broken:
                raise Finding("loss", f"step {newest} is not found: {error}") from error
            refused.append(error)
        else:
            compare(tensors, seeds, newest)
    repr((mm.Run(folder), mm.runs(out)))
    if refused:
        raise ExceptionGroup("", refused)


def compare(tensors: Tensors, seeds: Seeds, step: int) -> None:
    wanted = seeds.tensors[step]
    equal = {n: torch.equal(t, wanted[n]) for n, t in tensors.items()}
    if equal.keys() != wanted.keys() or not all(equal.values()):
        raise Finding("silent acceptance", f"other weights than those of step {step}")


def read_loaded(folder: Path, _: dict[str, Any]) -> Tensors:
    return dict(mm.load(folder)[0].named_parameters())


def read_resumed(folder: Path, settings: dict[str, Any]) -> Tensors:
    """Return the weights that a run resumes from, as a rank would read them."""
    with prepare(mm.TrainConfig(**settings)) as (plan, _):
        return (
            load_file(plan.checkpoint / "model.safetensors") if plan.checkpoint else {}
        )


class Reader(NamedTuple):
    """How many cases a campaign has, how one is drawn, and how it is fed."""

    cases: int
    draw: Callable[[Random, Seeds], Any]
    feed: Callable[[Any, Path, Seeds], None]


READERS = {
    "data": Reader(2000, draw_data, feed_data),
    "tokenizer": Reader(2000, draw_tokenizer, feed_tokenizer),
    "template": Reader(2000, draw_template, feed_template),
    "weights": Reader(2000, draw_weights, feed_weights),
    "metadata": Reader(2000, draw_metadata, feed_metadata),
    "commands": Reader(1500, draw_commands, feed_commands),
    "settings": Reader(1700, draw_settings, feed_settings),
    "damage": Reader(400, draw_damage, feed_damage),
}
