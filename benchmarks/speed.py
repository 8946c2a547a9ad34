"""How fast it is, as ratios of two things measured in turn in one run.

    make bench                                         # all of them, some 15 minutes
    python benchmarks/speed.py a b j --dtype float32 bfloat16 --threads 2
    python benchmarks/speed.py a --compile --data CORPUS.jsonl --out marks.jsonl

Each letter prints a row or several: a ratio, its two sides, and the spread of the ratio
over the turns. A ratio above 1 is in favour of the first side. In each turn every side is
measured once, and another one begins; sides and ratio are medians over the turns. Times
alone mean nothing on a machine that others use, a ratio does: "others" is the mean number
of cores that they took meanwhile, by /proc/stat. Turns in which they took more than
CALM_CORES are disturbed, and left out if three calm ones remain. Where all turns are
disturbed, the ratio of rates by processor time, of all threads, is the better guide, with
`--threads 1`. `--out` appends each row as a JSON object. Linux only.

    a  training against a padded transformers Llama, text tokens/s (Llama in the same
       precision; with another one than float32 also against Llama in float32)
    b  the training step's FLOP/s as a share of the rate of its own matrix products
    c  the mixture against a loop over experts with masks: the layer, the whole step
    d  encoding against `encode_batch_fast`; the whole token cache
    e  the data loader against training, batches/s
    f  ranks of one thread against one rank of all threads, text tokens/s
    g  decoding against `generate` of transformers and of the model, tokens/s
    h  the token cache of ten times the text: seconds, memory
    i  the import; `mm.train` up to its first step, with and without a token cache
    j  compiled against eager; the seconds to compile, without and with Inductor's cache
    k  the all-reduces of a step, counted, and their bytes
    l  learning: what `benchmarks/learning.py` measures

Texts are cuts of the demo corpus with lengths like those of MiniMind's (lognormal, median
162 and mean 306 tokens), or `--data`, a file of {"text": …}. Llama's rate of positions is
multiplied by the share of text in its rows, one document in each, cut or padded.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import math
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch._dynamo.utils import counters as dynamo_counters

import minimind_nb as mm
from minimind_nb.config import ResolvedConfig, count_parameters, resolve
from minimind_nb.data import token_cache
from minimind_nb.data.demo import DEMO, locate
from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.hardware import count_cores
from minimind_nb.launch.cancellation import StopRequest
from minimind_nb.launch.outcome import RankRecord
from minimind_nb.launch.process_group import Group
from minimind_nb.model.architecture import MiniMindForCausalLM, MoEFeedForward
from minimind_nb.model.generation import continue_ids
from minimind_nb.model.hf_formats import FAMILIES
from minimind_nb.model.loading import model_config
from minimind_nb.model.state_dict import write_pth
from minimind_nb.storage.run_folder import RunFolder
from minimind_nb.training import stages
from minimind_nb.training.loop import train_step
from minimind_nb.training.optim import build_optimizer
from minimind_nb.training.preparation import prepare
from minimind_nb.training.run_plan import RunPlan
from minimind_nb.training.trainer import Trainer

Asked = argparse.Namespace
Row = dict[str, Any]
Ways = Mapping[str, Callable[[], float]]

CALM_CORES = 0.15
CALM_TURNS = 3
SLOW_TURNS = 3  # at most, where a turn takes most of a minute
MEDIAN, SIGMA = 162, 1.128  # of the tokens of a document
NEW_TOKENS = 128
SPEC = read_tokenizer()
HEAD = ("", "what", "ratio", "sides", "spread", "by processor time", "others")
ENDLESS: dict[str, Any] = {
    "device": "cpu",
    "epochs": 10**6,
    "max_steps": 10**9,
    "accumulation_steps": 1,
    "learning_rate": 3e-4,
    "val_fraction": 0.0,
    "sample_tokens": 0,
    "save_interval": 10**9,
}
# Whether steps are compiled is what some of these compare, and they do it themselves.
if hasattr(mm.TrainConfig, "compile"):
    ENDLESS["compile"] = False


# The core: turns, their medians, and the load of others


class Race:
    """The values that each way returned in each turn, after a turn that is left out."""

    def __init__(self, ways: Ways, turns: int, warm_up: bool = True) -> None:
        self.values: dict[str, list[float]] = {name: [] for name in ways}
        self.cores: dict[str, list[float]] = {name: [] for name in ways}
        self.others: list[float] = []
        names = [*ways]
        for name in names if warm_up else ():
            ways[name]()
        for turn in range(turns):
            first = turn % len(names)
            began, busy, own = time.perf_counter(), busy_seconds(), own_seconds()
            for name in names[first:] + names[:first]:
                at, before = time.perf_counter(), own_seconds()
                self.values[name].append(ways[name]())
                worked = own_seconds() - before
                self.cores[name].append(worked / (time.perf_counter() - at))
            foreign = (busy_seconds() - busy) - (own_seconds() - own)
            self.others.append(max(0.0, foreign) / (time.perf_counter() - began))

    def row(self, letter: str, what: str, unit: str, *sides: str) -> Row:
        """Return how many times the value of the second side that of the first is."""
        calm = [n for n, cores in enumerate(self.others) if cores <= CALM_CORES]
        turns = range(len(self.others))
        used = calm if len(calm) >= CALM_TURNS else turns
        values = {name: [self.values[name][n] for n in used] for name in sides}
        ratios = [one / other for one, other in zip(*values.values(), strict=True)]
        one, other = ([self.cores[name][n] for n in used] for name in sides)
        by_cpu = map(lambda ratio, a, b: ratio * b / a, ratios, one, other)
        return {
            "letter": letter,
            "what": what,
            "ratio": statistics.median(ratios),
            "cpu_ratio": statistics.median(by_cpu) if unit.endswith("/s") else None,
            "sides": {name: statistics.median(each) for name, each in values.items()},
            "unit": unit,
            "spread": [min(ratios), max(ratios)],
            "turns": len(turns),
            "disturbed": len(turns) - len(calm),
            "others": statistics.mean(self.others[n] for n in used),
        }


def timed(run: Callable[[], object], work: float) -> Callable[[], float]:
    """Return a way that does so much work, and returns the work a second."""

    def way() -> float:
        began = time.perf_counter()
        run()
        return work / (time.perf_counter() - began)

    return way


def busy_seconds() -> float:
    """Return what all cores have worked, or were kept from by another guest, so far."""
    fields = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]
    user, nice, system, _, _, interrupts, soft, steal = map(int, fields)
    ticks = user + nice + system + interrupts + soft + steal
    return ticks / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Return what this process and its ended children have worked so far."""
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


# What is measured: texts, a training run, Llama


def write_texts(file: Path, size: int) -> Path:
    """Write documents of so many bytes of text in all, always the same."""
    lines = locate(DEMO, file.parent).read_text(encoding="utf-8").splitlines()
    draw = np.random.default_rng(0)
    texts = [json.loads(line)["text"] for line in lines]
    text = "\n".join(texts[n] for n in draw.permutation(len(texts)))
    characters = len(text) / len(BulkEncoder(SPEC).encode([text])[0])  # a token
    with file.open("w", encoding="utf-8") as out:
        while size > 0:
            tokens = draw.lognormal(math.log(MEDIAN), SIGMA)
            begin = int(draw.integers(len(text)))
            cut = text[begin : begin + max(1, int(tokens * characters))]
            size -= len(cut.encode())
            out.write(json.dumps({"text": cut}, ensure_ascii=False) + "\n")
    return file


def corpus(asked: Asked, megabytes: int = 1) -> str:
    """Return a file with texts: what was asked for, or our own."""
    file = asked.folder / f"texts_{megabytes}.jsonl"
    if asked.data or file.exists():
        return asked.data or str(file)
    return str(write_texts(file, megabytes * 10**6))


@contextlib.contextmanager
def training(asked: Asked, **settings: Any) -> Iterator[Trainer]:
    """Yield the state of a run on this process, whose steps are never over."""
    given: dict[str, Any] = ENDLESS | {
        "data_path": corpus(asked),
        "out_dir": str(asked.folder / "runs"),
        "run_name": f"run{time.monotonic_ns()}",
        "preset": asked.preset,
        "max_seq_len": asked.width,
        "batch_size": asked.rows,
        "num_processes": 1,
        "dtype": asked.dtype,
        "optimizer": "adamw",
    }
    given |= settings
    with prepare(mm.TrainConfig(**given)) as (plan, _):
        stop = StopRequest()
        stop.restore()  # an interrupt ends the benchmark
        record = RankRecord(plan.folder.record_file(0), 0)
        group, device = Group(0, 1, "", "cpu"), torch.device("cpu")
        trainer = Trainer(plan, group, device, record, stop)
        with trainer.metrics:
            yield trainer


def stepping(trainer: Trainer, work: float) -> Callable[[], float]:
    """Return a way that makes a step."""
    return timed(lambda: train_step(trainer), work)


def compiled_step(trainer: Trainer) -> Callable[[], object]:
    """Return a step that is compiled by its first call."""
    torch._dynamo.reset()
    plain, losses = stages.target_losses, torch.compile(stages.target_losses)

    def step() -> None:
        stages.target_losses = losses
        try:
            train_step(trainer)
        finally:
            stages.target_losses = plain

    return step


class PaddedLlama:
    """transformers' Llama of the same size, one document a row, with the same AdamW."""

    def __init__(self, trainer: Trainer, dtype: str) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        ours: Any = trainer.model.config
        config: Any = LlamaConfig(**FAMILIES["llama"].config_json(ours))
        self.model: Any = LlamaForCausalLM(config).train()
        self.cfg, self.cache = trainer.cfg, trainer.stream.cache
        self.optimizer = build_optimizer(self.model, self.cfg)
        reduced = dtype != "float32"
        self.autocast = torch.autocast("cpu", getattr(torch, dtype), enabled=reduced)
        text = np.minimum(self.cache.targets, self.cfg.max_seq_len - 1)
        self.fill = float(text.mean()) / self.cfg.max_seq_len
        self.next = 0

    def step(self) -> None:
        """Take the next rows; without an attention mask, which right padding need not."""
        rows, width = self.cfg.batch_size, self.cfg.max_seq_len
        ids = torch.full((rows, width), SPEC.pad_id)
        labels = torch.full((rows, width), -100)
        for row in range(rows):
            document = self.next % len(self.cache)
            count = min(int(self.cache.targets[document]), width - 1)
            piece = torch.from_numpy(self.cache.piece(document, 0, count).astype(int))
            ids[row, : count + 1] = labels[row, : count + 1] = piece
            self.next += 1
        self.optimizer.zero_grad()
        with self.autocast:
            loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.cfg.grad_clip)
        self.optimizer.step()


# a to l


def measure_training(asked: Asked) -> Iterator[Row]:
    """a: text tokens/s against Llama."""
    positions = asked.rows * asked.width  # packed rows are full of text
    with training(asked) as trainer:
        ways = {"ours": stepping(trainer, positions)}
        if asked.compile:
            ways["ours, compiled"] = timed(compiled_step(trainer), positions)
        mine, fill = [*ways], 0.0
        for dtype in dict.fromkeys((asked.dtype, "float32")):
            llama = PaddedLlama(trainer, dtype)
            fill = llama.fill
            ways[f"padded Llama, {dtype}"] = timed(llama.step, positions * fill)
        race = Race(ways, asked.turns)
    for name in mine:
        for other in [*ways][len(mine) :]:
            what = f"training; {fill:.3f} of padded rows is text"
            yield race.row("a", what, "text tokens/s", name, other)


def measure_products(asked: Asked) -> Iterator[Row]:
    """b: the share of the rate of matrix products; attention is counted once."""
    with training(asked) as trainer:
        cfg, dtype = trainer.cfg, getattr(torch, asked.dtype)
        tokens = asked.rows * asked.width
        attention = 6 * cfg.num_hidden_layers * cfg.max_seq_len
        attention *= cfg.num_attention_heads * cfg.head_dim
        per_token = 6 * count_parameters(cfg.shape())["active"] + attention
        gflop = tokens * per_token / 1e9
        sizes = product_sizes(cfg)
        multiply = products(sizes, tokens, dtype)
        work = sum(6 * tokens * m * n for m, n in sizes) / 1e9
        ways = {
            "the step": stepping(trainer, gflop),
            "its products": timed(multiply, work),
        }
        if asked.compile:
            ways["the step, compiled"] = timed(compiled_step(trainer), gflop)
        race = Race(ways, asked.turns)
    for name in (name for name in ways if name.startswith("the step")):
        what = f"share of the products' rate, {per_token / 1e6:.1f} MFLOP a token"
        yield race.row("b", what, "GFLOP/s", name, "its products")


def product_sizes(cfg: ResolvedConfig) -> list[tuple[int, int]]:
    """Return inputs and outputs of every matrix of a dense model that multiplies."""
    width, inner = cfg.hidden_size, cfg.intermediate_size
    query = cfg.num_attention_heads * cfg.head_dim
    keys = cfg.num_key_value_heads * cfg.head_dim
    layer = [(width, query), (width, keys), (width, keys), (query, width)]
    layer += [(width, inner), (width, inner), (inner, width)]
    return layer * cfg.num_hidden_layers + [(width, cfg.vocab_size)]


def products(
    sizes: list[tuple[int, int]], tokens: int, dtype: torch.dtype
) -> Callable[[], None]:
    """Return what multiplies as the forward and backward pass of these matrices."""

    def matrices(m: int, n: int) -> tuple[Tensor, ...]:
        shapes = ((tokens, m), (n, m), (tokens, n))
        x, w, y = (torch.randn(shape).to(dtype) for shape in shapes)
        return x, w, y, *(torch.empty_like(each) for each in (x, w, y))

    each = {size: matrices(*size) for size in set(sizes)}

    def multiply() -> None:
        for size in sizes:
            x, w, y, dx, dw, out = each[size]
            torch.mm(x, w.T, out=out)
            torch.mm(y, w, out=dx)
            torch.mm(y.T, x, out=dw)

    return multiply


def measure_mixture(asked: Asked) -> Iterator[Row]:
    """c: sorted rows against masks, with forward and backward pass."""
    ours, names = MoEFeedForward.forward, ("sorted rows", "masks")
    shape = {"preset": "minimind2-moe", "num_hidden_layers": 4}
    with training(asked, **shape) as trainer:
        first: Any = trainer.model.model.layers[0]
        mlp = first.mlp
        size = (asked.rows, asked.width, trainer.cfg.hidden_size)
        x_BTD = torch.randn(size, requires_grad=True)
        results = {}

        def layer(name: str, forward: Callable[..., Any]) -> Callable[[], None]:
            def run() -> None:
                mlp.zero_grad(set_to_none=False)  # which are parts of one tensor
                with trainer.autocast:
                    y_BTD, aux_loss = forward(mlp, x_BTD)
                (y_BTD.square().sum() + aux_loss).backward()
                grad = mlp.experts[0].down_proj.weight.grad
                results[name] = y_BTD.detach(), grad.clone()

            return run

        def step(forward: Any) -> Callable[[], None]:
            def run() -> None:
                MoEFeedForward.forward = forward
                train_step(trainer)
                MoEFeedForward.forward = ours

            return run

        both = dict(zip(names, (ours, by_masks), strict=True))
        tokens = asked.rows * asked.width
        layers = {name: timed(layer(name, way), tokens) for name, way in both.items()}
        race = Race(layers, 3 * asked.turns)
        if asked.dtype == "float32":
            for one, other in zip(*results.values(), strict=True):
                torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)
        yield race.row("c", "a layer of the mixture", "tokens/s", *names)
        steps = {name: timed(step(way), tokens) for name, way in both.items()}
        race = Race(steps, asked.turns)
        yield race.row("c", "a step of the mixture", "tokens/s", *names)


def by_masks(
    mlp: MoEFeedForward, x_BTD: Tensor, real_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same mixture, expert by expert, each with a mask of its tokens."""
    expert_BTK, weight_BTK, choices_2E, aux_loss = mlp.gate(x_BTD, real_BT)
    mlp.expert_load = choices_2E[1].long().tolist()
    x_ND = x_BTD.flatten(0, 1)
    expert_NK, weight_NK = expert_BTK.flatten(0, 1), weight_BTK.flatten(0, 1)
    y_ND = torch.zeros_like(x_ND)
    for number, expert in enumerate(mlp.experts):
        token, choice = torch.where(expert_NK == number)
        found = expert(x_ND[token]) * weight_NK[token, choice, None]
        y_ND = y_ND.index_add(0, token, found.type_as(y_ND))
    y_BTD = y_ND.view_as(x_BTD)
    for expert in mlp.shared_experts:
        y_BTD = y_BTD + expert(x_BTD)
    return y_BTD, aux_loss


def measure_encoding(asked: Asked) -> Iterator[Row]:
    """d: ids as those of tokenizers, which uses all threads, ours one."""
    file, slow = corpus(asked, 5), Tokenizer.from_str(SPEC.json)
    texts = [json.loads(line)["text"] for line in Path(file).open("rb")]
    fast, megabytes = BulkEncoder(SPEC), Path(file).stat().st_size / 1e6
    pairs = zip(fast.encode(texts), slow.encode_batch_fast(texts), strict=True)
    equal = sum(ours.tolist() == theirs.ids for ours, theirs in pairs)
    assert equal == len(texts), f"the ids of {len(texts) - equal} documents differ"

    def build_plainly() -> None:
        texts = [json.loads(line)["text"] for line in Path(file).open("rb")]
        ids = [[0, *each.ids, 0] for each in slow.encode_batch_fast(texts)]
        with tempfile.TemporaryDirectory() as folder:
            np.save(f"{folder}/ids.npy", np.concatenate(ids).astype(np.uint16))
            np.save(f"{folder}/ends.npy", np.cumsum([len(each) for each in ids]))

    def build() -> None:
        source = token_cache.Source(file, "pretrain", SPEC)
        with tempfile.TemporaryDirectory() as folder:
            token_cache.open_cache(source, Path(folder), asked.threads)

    ways = {
        "ours": timed(lambda: fast.encode(texts), megabytes),
        "encode_batch_fast": timed(lambda: slow.encode_batch_fast(texts), megabytes),
        "our cache": timed(build, megabytes),
        "a plain one": timed(build_plainly, megabytes),
    }
    race = Race(ways, asked.turns, warm_up=False)
    what = f"encoding, ids equal on {equal:,} documents"
    yield race.row("d", what, "MB/s", "ours", "encode_batch_fast")
    yield race.row("d", "the whole token cache", "MB/s", "our cache", "a plain one")


def measure_loader(asked: Asked) -> Iterator[Row]:
    """e: the stream that training reads, alone."""
    with training(asked) as trainer:
        batches = 500

        def read() -> None:
            for _ in range(batches):
                trainer.stream.next_step()

        ways = {"the loader": timed(read, batches), "training": stepping(trainer, 1)}
        race = Race(ways, asked.turns)
    yield race.row("e", "the data loader", "batches/s", *ways)


def measure_ranks(asked: Asked) -> Iterator[Row]:
    """f: one rank a thread against one rank of all threads; the demo's model."""
    ranks, steps = max(2, asked.threads), 24

    def way(count: int) -> Callable[[], float]:
        given: dict[str, Any] = ENDLESS | {
            "out_dir": str(asked.folder / "ranks"),
            "preset": "demo",
            "max_seq_len": 256,
            "global_batch": 8 * ranks,
            "num_processes": count,
            "dtype": "float32",
            "max_steps": steps,
            "log_interval": steps // 3,  # the first third is not counted
            "resume": False,
        }
        del given["accumulation_steps"]

        def run() -> float:
            os.environ["OMP_NUM_THREADS"] = str(ranks // count)
            history = mm.train(corpus(asked), view=False, **given).history
            os.environ["OMP_NUM_THREADS"] = str(asked.threads)
            first, *_, last = history.select("train")
            seconds = last["seconds"] - first["seconds"]
            return (last["tokens"] - first["tokens"]) / seconds

        return run

    ways = {f"{ranks} ranks of a thread": way(ranks), f"1 of {ranks}": way(1)}
    race = Race(ways, min(asked.turns, SLOW_TURNS), warm_up=False)
    yield race.row("f", "ranks against threads", "text tokens/s", *ways)


def measure_decoding(asked: Asked) -> Iterator[Row]:
    """g: greedy and sampled, one row and eight, in float32; greedy ids are equal."""
    model, llama = decoders(asked)
    with Path(corpus(asked)).open(encoding="utf-8") as lines:
        texts = [json.loads(line)["text"] for line in lines]
    long = [ids.tolist() for ids in BulkEncoder(SPEC).encode(texts) if len(ids) > 64]
    sampled = {"temperature": 0.8, "top_p": 0.9}
    for size, greedy in itertools.product((1, 8), (True, False)):
        rows = [ids[: 64 - 5 * n] for n, ids in enumerate(long[:size])]
        settings: dict[str, Any] = {"temperature": 0.0} if greedy else sampled
        theirs = {"do_sample": not greedy} | ({} if greedy else sampled | {"top_k": 0})
        found: dict[str, list[list[int]]] = {}
        runs: dict[str, Callable[[], object]] = {
            "ours": functools.partial(decode, model, rows, settings, found),
            "Llama": functools.partial(generate, "Llama", llama, rows, theirs, found),
            "own": functools.partial(generate, "own", model, rows, theirs, found),
        }
        work = size * NEW_TOKENS
        ways = {name: timed(run, work) for name, run in runs.items()}
        race = Race(ways, asked.turns)
        if greedy:
            assert all(ids == found["ours"] for ids in found.values()), "ids differ"
        kind = "greedy, ids equal" if greedy else "sampled"
        for name in ("Llama", "own"):
            what = f"decoding {size} row{'s' * (size > 1)} ({kind}), {name} by generate"
            yield race.row("g", what, "tokens/s", "ours", name)


def decoders(asked: Asked) -> tuple[Any, Any]:
    """Return a new model and its export as a Llama, neither of which ever ends a text."""
    from transformers import AutoModelForCausalLM

    cfg = resolve(mm.TrainConfig(preset=asked.preset))
    torch.manual_seed(0)
    model: Any = MiniMindForCausalLM(model_config(vars(cfg), SPEC)).eval()
    file, folder = asked.folder / "decoded.pth", asked.folder / "llama"
    write_pth(model.state_dict(), file, torch.float32)
    shape = {name: cfg.shape()[name] for name in ("num_attention_heads", "rope_theta")}
    with contextlib.redirect_stdout(sys.stderr):
        mm.export(file, folder, format="llama", **shape)
    llama: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
    for each in (model, llama):
        each.generation_config.eos_token_id = None
        each.generation_config.pad_token_id = SPEC.pad_id
    return model, llama


def decode(model: Any, rows: Any, settings: dict[str, Any], found: Any) -> None:
    """Continue the rows with the package's own loop."""
    found["ours"] = continue_ids(
        model, rows, ends=(-1,), max_new_tokens=NEW_TOKENS, **settings
    )


def generate(name: str, model: Any, rows: Any, settings: Any, found: Any) -> None:
    """Continue the rows with transformers' loop."""
    width = max(map(len, rows))
    ids = [[SPEC.pad_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    given = {"attention_mask": torch.tensor(mask), "max_new_tokens": NEW_TOKENS}
    made = model.generate(torch.tensor(ids), **given, **settings)
    found[name] = made[:, width:].tolist()


_BUILD = """
import sys, tempfile, time
from pathlib import Path
from minimind_nb.data.token_cache import Source, open_cache
from minimind_nb.data.tokenizer import read_tokenizer
began = time.perf_counter()
with tempfile.TemporaryDirectory() as folder:
    open_cache(Source(sys.argv[1], "pretrain", read_tokenizer()), Path(folder))
    print(time.perf_counter() - began)
print(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
"""


def measure_cache(asked: Asked) -> Iterator[Row]:
    """h: one process, of which the peak memory is VmHWM.

    Not ru_maxrss, which starts at the size of the process that started this one.
    """
    peaks: dict[str, list[float]] = {}

    def build(name: str, file: Path) -> Callable[[], float]:
        def run() -> float:
            command = [sys.executable, "-c", _BUILD, str(file)]
            seconds, kib = subprocess.check_output(command, text=True).split()
            peaks.setdefault(name, []).append(int(kib) / 1024)
            return float(seconds) / (file.stat().st_size / 1e6)

        return run

    ways = {}
    for megabytes in (10 * asked.megabytes, asked.megabytes):
        file = asked.folder / f"cached_{megabytes}.jsonl"
        write_texts(file, megabytes * 10**6)
        ways[f"{megabytes} MB"] = build(f"{megabytes} MB", file)
    race = Race(ways, min(asked.turns, SLOW_TURNS), warm_up=False)
    yield race.row("h", "the token cache of tenfold text, time", "s/MB", *ways)
    race.values = peaks
    yield race.row("h", "the token cache of tenfold text, peak memory", "MiB", *ways)


def measure_start(asked: Asked) -> Iterator[Row]:
    """i: in seconds; what `mm.train` itself imports is imported here already."""

    def importing(module: str) -> Callable[[], float]:
        code = f"import time; t = time.perf_counter(); import {module}; "
        command = [sys.executable, "-c", code + "print(time.perf_counter() - t)"]
        return lambda: float(subprocess.check_output(command))

    def first_step(folder: Callable[[], Path]) -> Callable[[], float]:
        def run() -> float:
            out, name = folder(), f"start{time.monotonic_ns()}"
            metrics = RunFolder(out / name).metrics_file
            reached: list[float] = []

            def watch() -> None:
                while not (metrics.exists() and b'"train"' in metrics.read_bytes()):
                    time.sleep(0.01)
                reached.append(time.perf_counter())

            watcher = threading.Thread(target=watch, daemon=True)
            began = time.perf_counter()
            watcher.start()
            given: dict[str, Any] = {
                "preset": "demo",
                "recipe": "demo",
                "device": "cpu",
            }
            given |= {"max_steps": 1, "log_interval": 1, "num_processes": 1}
            mm.train(DEMO, view=False, run_name=name, out_dir=str(out), **given)
            watcher.join(10)
            return reached[0] - began

        return run

    turns, warm = min(asked.turns, SLOW_TURNS), asked.folder / "warm"
    imports = {name: importing(name) for name in ("minimind_nb", "torch")}
    yield Race(imports, turns).row("i", "the import", "s", *imports)
    first_step(lambda: warm)()
    cold = first_step(lambda: asked.folder / f"cold{time.monotonic_ns()}")
    ways = {"no token cache": cold, "token cache": first_step(lambda: warm)}
    race = Race(ways, turns, warm_up=False)
    yield race.row("i", "mm.train up to its first step", "s", *ways)


def measure_compilation(asked: Asked) -> Iterator[Row]:
    """j: compiled against eager; a fresh process compiles, and another once more."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp(dir=asked.folder)
    corpus(asked)
    compiling: Any = lambda: in_processes(compile_seconds, [asked])[0]  # noqa: E731
    ways: Ways = {"without Inductor's cache": compiling, "with it": compiling}
    race = Race(ways, 1, warm_up=False)
    yield race.row("j", "the compilation", "s", *ways)
    tokens = asked.rows * asked.width
    with training(asked) as trainer:
        step = compiled_step(trainer)
        counts = dynamo_counters["stats"]
        before = counts["unique_graphs"]
        ways = {"compiled": timed(step, tokens), "eager": stepping(trainer, tokens)}
        race = Race(ways, asked.turns)
        graphs = counts["unique_graphs"] - before
    what = f"compiled against eager, {graphs} graph{'s' * (graphs != 1)}"
    yield race.row("j", what, "text tokens/s", *ways)


def compile_seconds(asked: Asked) -> float:
    """Return how much longer the first compiled step takes than the third."""
    settle(asked)
    with training(asked) as trainer:
        step = timed(compiled_step(trainer), 1)
        first, _, third = (1 / step() for _ in range(3))
    return first - third


def in_processes(work: Callable[..., Any], arguments: list[Any]) -> list[Any]:
    """Return what a function returns for each argument, each in a fresh process."""
    spawn = multiprocessing.get_context("spawn")
    pool = concurrent.futures.ProcessPoolExecutor
    with pool(len(arguments), mp_context=spawn) as processes:
        return [*processes.map(work, arguments)]


def measure_reduces(asked: Asked) -> Iterator[Row]:
    """k: counted on the first of two ranks, in three steps of the demo's model."""
    with tempfile.TemporaryDirectory(dir=asked.folder) as folder:
        given: dict[str, Any] = ENDLESS | {"preset": "demo", "max_seq_len": 64}
        given |= {"data_path": corpus(asked), "out_dir": folder, "num_processes": 2}
        given |= {"dtype": "float32", "batch_size": 1}
        with prepare(mm.TrainConfig(**given)) as (plan, _):
            work = [(rank, str(plan.folder.root), asked) for rank in range(2)]
            (sizes, parameters), _ = in_processes(count_reduces, work)
    calls, sent = sorted({len(step) for step in sizes}), sum(map(sum, sizes)) / 3
    counted = calls[0] if len(calls) == 1 else f"{calls[0]} to {calls[-1]}"
    what = f"bytes all-reduced a step, in {counted} call{'s' * (calls != [1])}"
    sides = {"bytes": sent, "parameters": parameters}
    row = {"letter": "k", "what": what, "ratio": sent / parameters, "sides": sides}
    yield row | {"unit": "", "calls": calls}


def count_reduces(place: tuple[int, str, Asked]) -> tuple[list[list[int]], int]:
    """Return the bytes of each all-reduce in each step, and the number of parameters."""
    rank, folder, asked = place
    settle(asked)
    plan, stop = RunPlan.read(RunFolder(folder)), StopRequest()
    group, device = Group(rank, 2, f"{folder}/store", "cpu"), torch.device("cpu")
    record = RankRecord(plan.folder.record_file(rank), rank)
    trainer = Trainer(plan, group, device, record, stop)
    sizes: list[list[int]] = []
    reduce = dist.all_reduce

    def counting(tensor: Tensor, *given: Any, **more: Any) -> Any:
        sizes[-1].append(tensor.nbytes)
        return reduce(tensor, *given, **more)

    dist.all_reduce = counting
    for _ in range(3):
        sizes.append([])
        train_step(trainer)
    group.close()
    return sizes, sum(p.numel() for p in trainer.model.parameters())


def point_to_learning(asked: Asked) -> Iterator[Row]:
    """l: a run of its own."""
    data = asked.data or "CORPUS.jsonl"
    what = f"python benchmarks/learning.py {data} --tokens 600000 --out trials.jsonl"
    yield {"letter": "l", "what": what}


LETTERS = {
    "a": measure_training,
    "b": measure_products,
    "c": measure_mixture,
    "d": measure_encoding,
    "e": measure_loader,
    "f": measure_ranks,
    "g": measure_decoding,
    "h": measure_cache,
    "i": measure_start,
    "j": measure_compilation,
    "k": measure_reduces,
    "l": point_to_learning,
}
IN_EACH_PRECISION = "abj"


def show(row: Row) -> str:
    """Return a row as a line of the table."""
    cells = [row["letter"], ", ".join(filter(None, (row["what"], row.get("dtype"))))]
    if "ratio" in row:
        sides = (f"{name} {value:,.4g}" for name, value in row["sides"].items())
        cells += [f"{row['ratio']:.4g}", f"{', '.join(sides)} {row['unit']}".rstrip()]
    if "spread" in row:
        low, high = row["spread"]
        disturbed = f"{row['disturbed']} of {row['turns']} turns disturbed"
        cells += [f"{low:.4g} to {high:.4g}"]
        cells += [f"{row['cpu_ratio']:.4g}" if row["cpu_ratio"] else ""]
        cells += [f"{row['others']:.2f} cores, {disturbed}"]
    return f"| {' | '.join(cells + [''] * (len(HEAD) - len(cells)))} |"


def settle(asked: Asked) -> None:
    """Use the threads that were asked for, here and in processes started from here."""
    for name in ("OMP_NUM_THREADS", "RAYON_NUM_THREADS"):
        os.environ[name] = str(asked.threads)
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    torch.set_num_threads(asked.threads)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("letters", nargs="*", metavar="LETTER", help="default: all")
    parser.add_argument("--threads", type=int, default=count_cores())
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--dtype", nargs="+", default=["float32"], dest="dtypes")
    parser.add_argument("--compile", action="store_true", help="a and b compiled, too")
    parser.add_argument("--data", help="a JSONL file of texts instead of our own")
    parser.add_argument("--preset", default="minimind2-small", help="for a, b, e, g, j")
    parser.add_argument("--rows", type=int, default=4, help="of a step")
    parser.add_argument("--width", type=int, default=512, help="of a row, in tokens")
    parser.add_argument("--megabytes", type=int, default=15, help="for h, and tenfold")
    parser.add_argument("--out", type=Path, help="a file to append each row to")
    asked = parser.parse_args(arguments)
    if unknown := set(asked.letters) - LETTERS.keys():
        parser.error(f"{', '.join(unknown)} is not one of {', '.join(LETTERS)}")
    settle(asked)
    about = {"threads": asked.threads, "torch": torch.__version__}
    table = [f"| {' | '.join(HEAD)} |", "|---" * len(HEAD) + "|"]
    print(*table, sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        asked.folder = Path(folder)
        for letter in asked.letters or LETTERS:
            several = asked.dtypes if letter in IN_EACH_PRECISION else asked.dtypes[:1]
            for dtype in several:
                asked.dtype = dtype
                for row in LETTERS[letter](asked):
                    if letter in "abcej":
                        row["dtype"] = dtype
                    table.append(show(row))
                    print(table[-1], flush=True)
                    if asked.out and "ratio" in row:
                        with asked.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(row | about) + "\n")
    print("", *table, sep="\n")


if __name__ == "__main__":
    main()
