"""What a run will take, before anything runs: parameters, tokens, memory, hours."""

from __future__ import annotations

import time
from pathlib import Path

from .config import TrainConfig, count_parameters
from .data.tokenizer import load_tokenizer
from .hardware import Hardware, choose_threads
from .monitor.facts import Facts
from .monitor.metrics import History
from .training.preparation import open_corpus, settle

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
    """What a configuration amounts to on this machine, as a table.

    Reads (and tokenises, unless that was done before) the data; starts no process and
    makes no run folder. The time is the speed of an earlier run of the same name where
    there is one, else an expectation from this machine's rate of matrix products.
    Raises what `train` would raise for the configuration and the data.
    """
    settled = settle(cfg)
    corpus = open_corpus(settled, lambda _: None)
    resolved = settled.cfg
    assert resolved.num_processes and resolved.epochs and resolved.batch_size
    stream = corpus.training_stream(resolved, 0, size=resolved.num_processes)
    steps = min(stream.total_steps, resolved.max_steps or stream.total_steps)
    samples = min(stream.total_samples, steps * stream.global_batch)
    tokens = round(samples * stream.width * stream.fill)
    count = count_parameters(resolved.shape())
    active = f", {count['active']:,} active for a token" if resolved.use_moe else ""
    return Facts(
        f"{resolved.run_name} on {settled.hardware.describe()}",
        {
            "parameters": f"{count['total']:,}{active}",
            "precision": f"{resolved.dtype} on {resolved.num_processes} × "
            f"{resolved.device}",
            "documents": f"{len(corpus.documents):,} to train on, "
            f"{len(corpus.val_documents):,} held out",
            "an epoch": f"{int(stream.targets.sum()):,} text tokens in {stream.rows:,} "
            f"rows of {stream.width} (fill {stream.fill:.3f})",
            "global batch": f"{stream.global_batch} rows = batch_size "
            f"{resolved.batch_size} × accumulation_steps "
            f"{resolved.accumulation_steps} × {resolved.num_processes} process(es)",
            "steps": f"{steps:,} optimizer steps, {tokens:,} text tokens",
            "memory": f"about {_memory_gib(resolved):.1f} GiB in each process",
            "checkpoints": f"{count['total'] * 12 / 2**30:.2f} GiB each, "
            f"{resolved.keep_checkpoints} to {resolved.keep_checkpoints + 1} kept",
            "time": _time(resolved, settled.hardware, tokens),
        },
    )


def flops_per_token(cfg: TrainConfig) -> float:
    """Floating point operations of a forward and backward pass, a token.

    6 a parameter in use, and the products of causal attention counted once.
    """
    assert cfg.num_hidden_layers and cfg.max_seq_len
    assert cfg.num_attention_heads and cfg.head_dim
    width = cfg.num_attention_heads * cfg.head_dim
    attention = 6 * cfg.num_hidden_layers * cfg.max_seq_len * width
    return 6.0 * count_parameters(cfg.shape())["active"] + attention


def _memory_gib(cfg: TrainConfig) -> float:
    assert cfg.batch_size and cfg.max_seq_len and cfg.vocab_size
    assert cfg.hidden_size and cfg.num_hidden_layers and cfg.intermediate_size
    tokens = cfg.batch_size * cfg.max_seq_len
    fixed = count_parameters(cfg.shape())["total"] * _BYTES_A_PARAMETER
    inner = 3 * cfg.intermediate_size * (cfg.num_experts_per_tok or 1)
    widths = _WIDTHS_A_BLOCK * cfg.hidden_size + inner
    block = widths * (4 if cfg.dtype == "float32" else 3)
    logits = cfg.vocab_size * _BYTES_A_LOGIT
    return (fixed + tokens * (block * cfg.num_hidden_layers + logits)) / 2**30


def _time(cfg: TrainConfig, hardware: Hardware, tokens: int) -> str:
    speed = _earlier_speed(cfg)
    source = "the speed of the run that is there"
    if speed is None:
        flops = _product_rate(cfg, hardware)
        if flops is None:
            return "known after the first steps: no figure for this GPU"
        speed = _EXPECTED_SHARE * flops / flops_per_token(cfg)
        source = f"expected at {_EXPECTED_SHARE:.0%} of the rate of matrix products"
    minutes = tokens / speed / 60
    span = f"{minutes:.0f} minutes" if minutes < 120 else f"{minutes / 60:.1f} hours"  # noqa: PLR2004
    return f"about {span} at {speed:,.0f} text tokens/s ({source})"


def _earlier_speed(cfg: TrainConfig) -> float | None:
    folder = Path(cfg.out_dir) / (cfg.run_name or "")
    if not (folder / "metrics.jsonl").is_file():
        return None
    last = History.load(folder).last("train")
    return last["tokens_per_second"] if last else None


def _product_rate(cfg: TrainConfig, hardware: Hardware) -> float | None:
    """FLOP/s of all processes together: measured on a CPU, known for some GPUs."""
    assert cfg.num_processes
    if cfg.device == "cuda":
        rate = _SUSTAINED_FLOPS.get(hardware.gpus[0].name)
        return rate * cfg.num_processes if rate else None
    import torch

    threads = torch.get_num_threads()
    used = choose_threads(cfg.num_processes, hardware.cpu_cores) * cfg.num_processes
    torch.set_num_threads(min(used, hardware.cpu_cores))
    try:
        a = torch.randn(_GEMM_SIZE, _GEMM_SIZE)
        torch.mm(a, a)  # the first product allocates
        count, began = 0, time.monotonic()
        while time.monotonic() - began < _GEMM_SECONDS:
            torch.mm(a, a)
            count += 1
        return count * 2 * _GEMM_SIZE**3 / (time.monotonic() - began)
    finally:
        torch.set_num_threads(threads)


def preview(cfg: TrainConfig, rows: int = 2) -> list[str]:
    """The first packed rows of the first epoch as text, as the model will meet them.

    Documents follow each other within a row; special tokens are shown.
    """
    settled = settle(cfg)
    corpus = open_corpus(settled, lambda _: None)
    stream = corpus.training_stream(settled.cfg, settled.tokenizer.pad_id)
    tokenizer = load_tokenizer(settled.tokenizer)
    batch = stream.next_step().micro_batches[0]
    return [str(tokenizer.decode(row)) for row in batch.inputs[:rows]]
