"""The cost of a run before it starts: parameters, tokens, memory, hours; a preview."""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Iterable

import numpy as np

from .config import (
    ResolvedConfig,
    TrainConfig,
    batch_follows_corpus,
    count_parameters,
)
from .data.tokenizer import load_tokenizer
from .hardware import Hardware, detect_hardware
from .monitor.metrics import History
from .monitor.progress import STATUS_WORDS, duration, position_text
from .monitor.tables import Facts
from .storage.run_folder import RunFolder
from .training.initial_weights import NoInitialWeights
from .training.preparation import draft
from .training.run_plan import describe_rows, describe_truncated

# The 70 W cap holds a T4 near this in fp16 products, of 65 TFLOP/s nominal.
_SUSTAINED_FLOPS = {"Tesla T4": 24e12}
# Share of the machine's own rate of matrix products that training is expected to reach.
_EXPECTED_SHARE = 0.5
_GEMM_SECONDS = 0.3
_GEMM_SIZE = 1024
# fp32 weights, gradients and two moments; logits and their gradients in fp32.
_BYTES_A_PARAMETER = 16
_BYTES_A_LOGIT = 12
# Kept activations of a block for the backward pass, in multiples of its width.
_WIDTHS_A_BLOCK = 14


def plan(cfg: TrainConfig) -> Facts:
    """Return what a configuration amounts to on this machine, as a table.

    Reads the data, and tokenises it unless that was done before; starts no process and
    makes no run folder. The time is that of the whole run, at the speed of an existing
    run of the same name, else at a share of this machine's rate of matrix products.
    Raises what `train` raises for the configuration, the data and an existing run.
    """
    hardware = detect_hardware()
    drafted, asked = draft(cfg, hardware), cfg.explicit().keys()
    checkpoint = drafted.checkpoint
    run = RunFolder(checkpoint.parents[1]) if checkpoint else drafted.folder
    history = History(run.metrics_file)
    existing = f"{STATUS_WORDS[run.status()]} at step {position_text(history)}"
    cfg, corpus, steps = drafted.cfg, drafted.corpus, drafted.total_steps
    stream = corpus.training_stream(cfg, 0)
    pairs = cfg.stage == "dpo"
    samples = min(stream.total_samples, steps * cfg.global_batch)
    tokens = round(samples * stream.tokens / stream.rows)
    count = count_parameters(cfg.shape())
    active = f", {count['active']:,} active for a token" if cfg.use_moe else ""
    counts = [len(corpus.documents), len(corpus.val_documents)]
    trained, held_out = (count // (1 + pairs) for count in counts)
    documents = f"{trained:,} to train on, {held_out:,} held out"
    row = "pairs" if pairs else "rows"
    epoch = f"{stream.tokens:,} text tokens in {stream.rows:,} {row}"
    if not pairs:
        fill = stream.tokens / (stream.rows * cfg.max_seq_len)
        epoch += f" of {cfg.max_seq_len} (fill {fill:.3f})"
    if (targets := int(stream.truncated.loss_tokens.sum())) < stream.tokens:
        epoch += f", {targets:,} in the loss"
    follows = not checkpoint and batch_follows_corpus(vars(cfg), asked)
    why = ", for this corpus" if follows else ""
    falls = "falls in a cosine"
    if cfg.schedule == "linear":
        falls = f"falls from step {drafted.decay_start:,} on"
    facts = {
        "parameters": f"{count['total']:,}{active}",
        "precision": f"{cfg.dtype} on {cfg.num_processes} × {cfg.device}",
        "existing run": f"{run.root}, {existing}" if run.exists() else "",
        "begins from": drafted.config["began_from"],
        "data": describe_rows(corpus, cfg),
        ("pairs" if pairs else "documents"): documents,
        "too long": "; ".join(describe_truncated(corpus, cfg)),
        "an epoch": epoch,
        "global batch": f"{cfg.global_batch:,} {row} = batch_size {cfg.batch_size} "
        f"× accumulation_steps {cfg.accumulation_steps} × num_processes "
        f"{cfg.num_processes}{why}",
        "learning rate": f"{cfg.learning_rate:g} by {cfg.optimizer}, rises for "
        f"{cfg.warmup_iters} steps, {falls}",
        "steps": f"{steps:,} optimizer steps, about {tokens:,} text tokens",
        "memory": f"about {_memory_gib(cfg):.1f} GiB in each process",
        "checkpoints": f"{count['total'] * 12 / 2**30:.2f} GiB each, "
        f"{cfg.keep_checkpoints} to {cfg.keep_checkpoints + 2} kept",
        "time": "" if drafted.complete else _time(cfg, hardware, tokens, history),
    }
    known = {name: text for name, text in facts.items() if text}
    return Facts(f"{cfg.run_name} on {hardware.describe()}", known)


def flops_per_token(cfg: ResolvedConfig) -> float:
    """Return FLOP of a token, forward and backward: 6 a parameter, causal attention."""
    width = cfg.num_attention_heads * cfg.head_dim
    attention = 6 * cfg.num_hidden_layers * cfg.max_seq_len * width
    return 6.0 * count_parameters(cfg.shape())["active"] + attention


def _memory_gib(cfg: ResolvedConfig) -> float:
    tokens = cfg.batch_size * cfg.max_seq_len
    fixed = count_parameters(cfg.shape())["total"] * _BYTES_A_PARAMETER
    inner = 3 * cfg.intermediate_size * (cfg.num_experts_per_tok or 1)
    widths = _WIDTHS_A_BLOCK * cfg.hidden_size + inner
    block = widths * (4 if cfg.dtype == "float32" else 3)
    logits = cfg.vocab_size * _BYTES_A_LOGIT
    return (fixed + tokens * (block * cfg.num_hidden_layers + logits)) / 2**30


def _time(
    cfg: ResolvedConfig, hardware: Hardware, tokens: int, history: History
) -> str:
    if last := history.last("train"):
        speed, source = last["tokens_per_second"], "the speed of the existing run"
    elif flops := _product_rate(cfg, hardware):
        speed = _EXPECTED_SHARE * flops / flops_per_token(cfg)
        source = f"expected at {_EXPECTED_SHARE:.0%} of the rate of matrix products"
    else:
        return "known after the first steps: no figure for this GPU"
    span = duration(tokens / speed)
    return f"about {span} at {speed:,.0f} text tokens/s ({source})"


def _product_rate(cfg: ResolvedConfig, hardware: Hardware) -> float | None:
    """Return FLOP/s of all processes: measured on a CPU, known for some GPUs."""
    if cfg.device == "cuda":
        rate = _SUSTAINED_FLOPS.get(hardware.gpus[0].name)
        return rate * cfg.num_processes if rate else None
    import torch

    a = torch.randn(_GEMM_SIZE, _GEMM_SIZE)
    torch.mm(a, a)  # the first product allocates
    count, began = 0, time.monotonic()
    while time.monotonic() - began < _GEMM_SECONDS:
        torch.mm(a, a)
        count += 1
    return count * 2 * _GEMM_SIZE**3 / (time.monotonic() - began)


class Preview(list[str]):
    """Samples as text, below a line that says how the rows were understood."""

    def __init__(self, title: str, samples: Iterable[str]) -> None:
        super().__init__(samples)
        self.title = title

    def __repr__(self) -> str:
        return "\n\n".join([self.title, *self])


def preview(cfg: TrainConfig, rows: int = 2) -> Preview:
    """Return the first samples of the first epoch as text, as the model gets them.

    Documents follow each other within a row, each with its end; special tokens are
    shown. A document that is cut continues in another row. In the chat stages, tokens
    that count in the loss are between ⟦ and ⟧; the chosen answer of a pair comes first.
    Without a run to start from the shipped tokenizer is used, unless one is set.
    """
    try:
        drafted = draft(cfg)
    except NoInitialWeights:
        drafted = draft(dataclasses.replace(cfg, init_from="none"))
    resolved, tokenizer = drafted.cfg, drafted.tokenizer
    stream = drafted.corpus.training_stream(resolved, tokenizer.pad_id)
    decode = load_tokenizer(tokenizer).decode

    def text(ids: np.ndarray, loss_mask: np.ndarray) -> str:
        if resolved.stage == "pretrain":
            return str(decode(ids))
        cuts = [0, *(np.flatnonzero(np.diff(loss_mask)) + 1), len(ids)]
        parts = ((decode(ids[a:b]), loss_mask[a]) for a, b in itertools.pairwise(cuts))
        return "".join(f"⟦{part}⟧" if counts else str(part) for part, counts in parts)

    shown = []
    for sample in range(min(rows, stream.rows)):
        pieces = [text(*piece) for piece in stream.pieces(sample)]
        if resolved.stage == "dpo":
            pieces = ["chosen: ", pieces[0], "\nrejected: ", pieces[1]]
        shown.append("".join(pieces))
    return Preview(describe_rows(drafted.corpus, resolved), shown)
