"""The cost of a run before it starts: parameters, tokens, memory, hours."""

import json
import shlex
from collections.abc import Mapping
from dataclasses import replace

from .config import (
    PRESETS,
    SHAPE_FIELDS,
    ResolvedConfig,
    TrainConfig,
    count_parameters,
    flops_per_token,
)
from .data.demo import DEMO
from .hardware import Hardware, detect_hardware, machine_flops
from .monitor.metrics import History
from .monitor.progress import STATUS_WORDS, position_text
from .monitor.references import expected_loss
from .monitor.tables import Facts
from .session import current_session
from .storage.run_folder import run_of
from .training.initial_weights import NoInitialWeights
from .training.machine import check_room
from .training.preparation import draft
from .training.run_plan import RunPlan, describe_rows, describe_truncated

_UNKNOWN = "known after the first steps: no figure for this GPU"
# Beside products, in fp32 FLOP that take as long: for a column of a block, for a logit;
# for Muon's update of a parameter, by the width. Fitted to 1.6 M and 26 M parameters.
_COLUMN_FLOPS, _LOGIT_FLOPS, _MUON_FLOPS = 9400, 880, 31
_START_SECONDS, _ANSWERS_SECONDS = 8.0, 0.5
TOKENS_A_PARAMETER, _ENOUGH = 20, 15  # Hoffmann et al. 2022; what a shape must get
MOST_EPOCHS = 4  # that are nearly as good as new text: Muennighoff et al. 2023
_UNITS = ("day", 86400), ("hour", 3600), ("minute", 60), ("second", 1)
_MACHINE = ("device", "num_processes", "dtype", "max_seq_len")
_HOURS_USED, _FEWEST_STEPS = 0.95, 100
# fp32 weights, gradients and two moments; logits and their gradients in fp32.
_BYTES_A_PARAMETER, _BYTES_A_LOGIT = 16, 12
# Kept activations of a block for the backward pass, in multiples of its width.
_WIDTHS_A_BLOCK = 14


def plan(cfg: TrainConfig, hours: float | None = None) -> Facts:
    """Return what a configuration amounts to on this machine, as a table.

    Reads the data, and tokenises it unless that was done before; starts no process and
    makes no run folder. Steps and time are those left, at the speed of an existing run
    of the same name, else as this machine's products let expect. `hours` choose the
    length, and for texts the shape if none is set: the largest dense preset that gets
    some 20 tokens a parameter in up to four epochs. Raises what `train` raises before
    it starts, and `ValueError` for too few hours.
    """
    hardware = detect_hardware()
    if hours is None:
        return _describe(draft(cfg, hardware), hardware)
    cfg = fit_to_hours(cfg, hours, hardware)
    facts, asked = _describe(draft(cfg, hardware), hardware), cfg.explicit()
    facts["in Python"] = repr(cfg)
    facts["in a shell"] = f"minimind-nb {asked.pop('stage', cfg.stage)}"
    for name, value in asked.items():
        text = value if isinstance(value, str) else json.dumps(value)
        facts["in a shell"] += f" --{name} {shlex.quote(text)}"
    return facts


def plan_stages(
    text: TrainConfig, chats: TrainConfig, hours: float | None = None
) -> tuple[Facts, TrainConfig, TrainConfig]:
    """Return a plan of pretraining, and of fine-tuning from its run, with their lengths.

    Fine-tuning gets at most a third of the `hours`, by default of those that the session
    has left. A run that exists keeps its length, and so do both if nothing ends the
    session; the demo is fitted to given `hours` only. Raises what `plan` raises.
    """
    hardware = detect_hardware()
    first = draft(text, hardware)
    if hours is None and text.data_path != DEMO and expected_speed(first.cfg, hardware):
        left = current_session().seconds_left(text.max_session_hours)
        hours = left and left / 3600
    if hours and not first.checkpoint:
        text = fit_to_hours(text, hours * 2 / 3, hardware)
        first = draft(text, hardware)
    alone = replace(chats, **first.cfg.shape())
    try:
        alone, second = draft_alone(alone, hardware)
    except ValueError:  # weights of another shape; pretraining makes those it needs
        alone, second = draft_alone(replace(alone, init_from="none"), hardware)
    if hours and not second.checkpoint:
        alone = fit_to_hours(alone, hours / 3, hardware)
        second = draft(alone, hardware)
    found = Facts(f"{hours:.3g} hours for two stages" if hours else "Two stages", {})
    names = "parameters", "steps", "expected loss", "existing run", "in short"
    for drafted in first, second:
        facts = _describe(drafted, hardware)
        told = (f"{name}: {facts[name]}" for name in names if name in facts)
        found[drafted.cfg.run_name] = "; ".join(told)
    own = {"max_steps": alone.max_steps, "init_from": str(first.folder.root)}
    return found, text, replace(chats, **own)


def draft_alone(
    cfg: TrainConfig, hardware: Hardware | None = None
) -> tuple[TrainConfig, RunPlan]:
    """Return a configuration and its draft, with new weights if there are none."""
    try:
        return cfg, draft(cfg, hardware)
    except NoInitialWeights:
        cfg = replace(cfg, init_from="none")
        return cfg, draft(cfg, hardware)


def fit_to_hours(cfg: TrainConfig, hours: float, hardware: Hardware) -> TrainConfig:
    """Return the configuration with a preset and a length for so many hours."""
    hours = float(hours)
    seconds = max(0.0, hours * 3600 * _HOURS_USED - _START_SECONDS)
    epochs = cfg.epochs or (MOST_EPOCHS if cfg.stage == "pretrain" else None)
    cfg = replace(cfg, epochs=epochs, max_steps=cfg.max_steps or 10**9)
    shape = {"preset", "init_from", *SHAPE_FIELDS} & cfg.explicit().keys()
    if cfg.stage == "pretrain" and not shape:
        dense = [name for name, preset in PRESETS.items() if "use_moe" not in preset]
        trials = (draft(replace(cfg, preset=n, resume=False), hardware) for n in dense)
        found = [Estimate(trial, hardware) for trial in trials]
        sizes = {n: (e.parameters, e.speed) for n, e in zip(dense, found, strict=True)}
        cfg = replace(cfg, preset=choose(sizes, seconds, found[0].tokens))
    estimate = Estimate(draft(cfg, hardware), hardware)
    if not estimate.speed:
        raise ValueError(f"hours={hours:g}: the speed is {_UNKNOWN}")
    step = (estimate.seconds() - _START_SECONDS) / max(1, estimate.steps)
    if seconds < (least := min(estimate.steps, _FEWEST_STEPS) * step):
        raise ValueError(
            f"hours={hours:g} is too little for a useful run of {estimate.cfg.run_name}: "
            f"{_FEWEST_STEPS} steps take hours={(least + _START_SECONDS) / 3400:.2g}"
        )
    steps = min(estimate.steps, int(seconds / step)) if step else 0
    return replace(cfg, max_steps=estimate.done + steps)


def choose(sizes: Mapping[str, tuple[int, float]], seconds: float, most: int) -> str:
    """Return which of some sizes, (parameters, tokens a second), to train for a time.

    It is the largest that gets about 20 tokens a parameter, of `most` tokens, else the
    one that comes nearest.
    """

    def rank(name: str) -> tuple[bool, float]:
        parameters, speed = sizes[name]
        got = min(seconds * speed, most) / parameters
        return got >= _ENOUGH, parameters if got >= _ENOUGH else got

    return max(sizes, key=rank)


class Estimate:
    """Estimate a planned run: its text tokens, and the steps, tokens and time left."""

    def __init__(self, drafted: RunPlan, hardware: Hardware) -> None:
        self.cfg, self.done, total = drafted.cfg, drafted.done, drafted.total_steps
        cfg, corpus, checkpoint = drafted.cfg, drafted.corpus, drafted.checkpoint
        self.run = run_of(checkpoint) if checkpoint else drafted.folder
        self.speed, self.source = expected_speed(cfg, hardware), "expected"
        self.history = History(self.run.metrics_file)
        last = self.history.last("train")
        before = self.run.settings() if checkpoint else {}
        if last and all(before.get(name) == getattr(cfg, name) for name in _MACHINE):
            self.speed, self.source = last["tokens_per_second"], "as the existing run"
        self.parameters = count_parameters(cfg.shape())["active"]
        self.stream = stream = corpus.training_stream(cfg, 0)
        ends = (
            min(n * cfg.global_batch, stream.total_samples) for n in (self.done, total)
        )
        begin, self.tokens = (round(n * stream.tokens / stream.rows) for n in ends)
        self.tokens_left, self.steps = self.tokens - begin, total - self.done
        held_out, interval = corpus.validation_rows(cfg, 0), cfg.eval_interval
        self.held_out = sum(rows.tokens for rows in held_out.sources) if held_out else 0
        begins = self.done // interval - (self.done == 0)
        self.validations = -(-total // interval) - begins

    def seconds(self) -> float:
        """Return the time left; a token of validation takes a third of another's."""
        answers = _ANSWERS_SECONDS * (self.cfg.sample_tokens > 0)
        validations = self.validations * (self.held_out / 3 / self.speed + answers)
        return _START_SECONDS + self.tokens_left / self.speed + validations


def _describe(drafted: RunPlan, hardware: Hardware) -> Facts:
    estimate = Estimate(drafted, hardware)
    run, at = estimate.run, position_text(estimate.history)
    existing = f"{run.root}, {STATUS_WORDS[run.status()]} at step {at}"
    cfg, corpus, stream = drafted.cfg, drafted.corpus, estimate.stream
    count, pairs = count_parameters(cfg.shape()), cfg.stage == "dpo"
    active = f", {count['active']:,} active for a token" if cfg.use_moe else ""
    counts = [len(corpus.documents), len(corpus.val_documents)]
    trained, held_out = (count // (1 + pairs) for count in counts)
    row, what = ("pairs", "pairs") if pairs else ("rows", "documents")
    epoch = f"{stream.tokens:,} text tokens in {stream.rows:,} {row}"
    if not pairs:
        fill = stream.tokens / (stream.rows * cfg.max_seq_len)
        epoch += f" of {cfg.max_seq_len} (fill {fill:.3f})"
    if (targets := int(stream.truncated.loss_tokens.sum())) < stream.tokens:
        epoch += f", {targets:,} in the loss"
    how = "in a cosine", f"from step {drafted.decay_start:,} on"
    left = (f"{estimate.steps:,} of ", " left") if drafted.checkpoint else ("", "")
    facts = {
        "parameters": f"{count['total']:,}{active}",
        "precision": f"{cfg.dtype} on {cfg.num_processes} × {cfg.device}"
        + ", compiled" * cfg.compile,
        "existing run": existing if run.exists() else "",
        "begins from": drafted.config["began_from"],
        "data": describe_rows(corpus, cfg),
        what: f"{trained:,} to train on, {held_out:,} held out",
        "too long": "; ".join(describe_truncated(corpus, cfg)),
        "an epoch": epoch,
        "global batch": f"{cfg.global_batch:,} {row} = batch_size {cfg.batch_size} "
        f"× accumulation_steps {cfg.accumulation_steps} × num_processes "
        f"{cfg.num_processes}",
        "learning rate": f"{cfg.learning_rate:g} by {cfg.optimizer}, rises for "
        f"{cfg.warmup_iters} steps, falls {how[cfg.schedule == 'linear']}",
        "steps": f"{left[0]}{drafted.total_steps:,} optimizer steps{left[1]}, about "
        f"{estimate.tokens_left:,} text tokens",
        "expected loss": expected_loss(vars(cfg), estimate.tokens),
        "checkpoints": f"{count['total'] * 12 / 2**30:.2f} GiB each, "
        f"{cfg.keep_checkpoints} to {cfg.keep_checkpoints + 2} kept",
        "in short": "" if drafted.complete else _judge(estimate, drafted, hardware),
    }
    known = {name: text for name, text in facts.items() if text}
    return Facts(f"{cfg.run_name} on {hardware.describe()}", known)


def _judge(estimate: Estimate, drafted: RunPlan, hardware: Hardware) -> str:
    """Say whether a run fits this machine, and whether it is long enough to learn."""
    cfg, each = estimate.cfg, estimate.tokens / estimate.parameters
    takes, seconds = f"has a speed {_UNKNOWN}", 0.0
    if estimate.speed:
        seconds = estimate.seconds()
        units = (pair for pair in _UNITS if seconds >= 2 * pair[1])
        unit, size = next(units, _UNITS[-1])
        takes = f"takes about {seconds / size:.0f} {unit}s, at {estimate.speed:,.0f} "
        takes += f"text tokens/s ({estimate.source}),"
    room, needed = hardware.memory_gib, memory_gib(cfg) * cfg.num_processes
    if cfg.device == "cuda":
        room, needed = min(gpu.memory_gib for gpu in hardware.gpus), memory_gib(cfg)
    memory = f"{needed:.1f} GiB of memory, of {room:.0f}"
    left = current_session().seconds_left(cfg.max_session_hours)
    fits = f"fits this machine, with {memory}"
    if needed > room:
        fits = f"needs {memory}: lower batch_size"
    elif left is not None and seconds > left:
        fits = "outlasts the session: it saves, and the same call resumes in the next"
    try:
        check_room(drafted)
    except OSError as error:
        fits = f"does not fit the disk: {error}".rstrip(".")
    learns = f"It sees {each:.2g} tokens a parameter; {TOKENS_A_PARAMETER} are best"
    if drafted.total_steps < _FEWEST_STEPS:
        more = "max_steps" if cfg.max_steps else "epochs"
        learns = f"{drafted.total_steps} steps teach it hardly anything: raise {more}"
    elif cfg.stage != "pretrain" or cfg.data_path == DEMO:
        learns = "It learns what is in its data, and nothing else"
    elif each < _ENOUGH:
        learns += ": expect fluent nonsense, or raise epochs or take a smaller preset"
    return f"This run {takes} and {fits}. {learns}."


def memory_gib(cfg: ResolvedConfig) -> float:
    """Return the GiB that a process needs, compiled or not."""
    tokens = cfg.batch_size * cfg.max_seq_len
    fixed = count_parameters(cfg.shape())["total"] * _BYTES_A_PARAMETER
    inner = 3 * cfg.intermediate_size * (cfg.num_experts_per_tok or 1)
    widths = _WIDTHS_A_BLOCK * cfg.hidden_size + inner
    block = widths * (4 if cfg.dtype == "float32" else 3)
    logits = cfg.vocab_size * _BYTES_A_LOGIT
    return (fixed + tokens * (block * cfg.num_hidden_layers + logits)) / 2**30


def expected_speed(cfg: ResolvedConfig, hardware: Hardware) -> float:
    """Return text tokens/s by the rates of products, measured on a CPU and known for
    some GPUs; 0 for others. Every process makes the whole update."""
    kinds, size = (cfg.dtype, "float32"), cfg.num_processes
    rates = [machine_flops(cfg, kind, hardware.gpus) / size for kind in kinds]
    if not all(rates):
        return 0.0
    beside = _COLUMN_FLOPS * cfg.num_hidden_layers * cfg.hidden_size
    beside += _LOGIT_FLOPS * cfg.vocab_size
    token = (flops_per_token(vars(cfg)) / rates[0] + beside / rates[1]) / size
    token *= 4 / 3 if cfg.stage == "dpo" else 1  # the reference's forward pass
    matrices = count_parameters(cfg.shape())["total"] - cfg.vocab_size * cfg.hidden_size
    update = _MUON_FLOPS * cfg.hidden_size * matrices * (cfg.optimizer == "muon")
    return 1 / (token + update / rates[0] / (cfg.global_batch * cfg.max_seq_len))
