"""`TrainConfig`: every setting of a run, flat and frozen."""

import ast
import contextlib
import functools
import html
import os
import types
import typing
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from .presets import SHAPE_FIELDS, WEIGHTS_NAMES, default_run_name, fill_defaults
from .validation import validate

_DEFAULT: Any = None  # of fields that `resolve` always fills in: None until then
_SHOWN = "hidden_size num_hidden_layers max_seq_len epochs learning_rate".split()
PATH_FIELDS = ("data_path", "val_path", "tokenizer", "out_dir", "resume", "init_from")


@dataclass(frozen=True, kw_only=True, repr=False)
class TrainConfig:
    """Every setting of a run as asked for; None means the default.

    The default is the recipe's, the preset's or the stage's, and in a resumed run the
    run's. Steps are optimizer steps (MiniMind counts micro-batches). Raises one
    `ValueError` that lists all problems found.
    """

    stage: str = "pretrain"
    """Stage: "pretrain" (text; the default), "sft" (answers) or "dpo" (preferences)."""
    data_path: str | tuple[str, ...] | None = None
    """Training data: a file (JSON Lines, a JSON array, parquet or text), several,
    a folder of them or a pattern such as "data/*.jsonl"; "demo" is the embedded corpus."""
    data_weights: tuple[float, ...] | None = None
    """Share of each of several files in the samples, in their order, such as 5, 3, 2: an
    epoch ends where one is used up; default: every token once an epoch."""
    val_path: str | None = None
    """Validation file in the same format; default: a held-out part of data_path."""
    tokenizer: str | None = None
    """A tokenizer.json or its folder; default: that of the run or the initial weights,
    else the shipped one."""
    out_dir: str = "out"
    """Folder for weights and run folders in the working directory; default "out"."""
    run_name: str = _DEFAULT
    """Name of the run folder in out_dir; default {stage}_{hidden_size}[_moe]. If set,
    the weights file beside it has this name too, else MiniMind's own."""
    resume: str | bool = "auto"
    """"auto" (default) resumes an existing run; False renames it and starts over;
    a path, or "hf:USER/NAME", copies that run into out_dir and resumes the copy."""
    allow_change: tuple[str, ...] = ()
    """Names of settings that may differ from the run that is resumed."""
    init_from: str = _DEFAULT
    """Initial weights: a run, a checkpoint, a .pth or a saved folder; "auto" (default of
    sft and dpo): the newest run of the previous stage; "none" (of pretrain): random."""
    preset: str | None = None
    """Shape: demo, minimind2-small, minimind2, minimind2-moe, minimind-3, minimind-3-moe."""
    recipe: str | None = None
    """Optimisation settings: demo, demo-sft, demo-dpo, minimind, minimind-sft,
    minimind-3-sft, founding or founding-sft."""
    hidden_size: int = _DEFAULT
    """Width of the residual stream."""
    num_hidden_layers: int = _DEFAULT
    """Number of transformer blocks."""
    num_attention_heads: int = _DEFAULT
    """Query heads per layer."""
    num_key_value_heads: int = _DEFAULT
    """Key and value heads per layer; must divide num_attention_heads."""
    head_dim: int = _DEFAULT
    """Width of a head; default hidden_size / num_attention_heads."""
    intermediate_size: int = _DEFAULT
    """Width of the feed-forward layer, and of each expert; default 3 · hidden_size."""
    vocab_size: int = _DEFAULT
    """Rows of the embedding; default: the tokenizer's entries."""
    max_position_embeddings: int = _DEFAULT
    """Longest context in tokens that the model declares."""
    rope_theta: float = _DEFAULT
    """Base of the rotary frequencies."""
    rms_norm_eps: float = _DEFAULT
    """Epsilon of the RMS norms."""
    dropout: float = _DEFAULT
    """Dropout probability."""
    qk_norm: bool = _DEFAULT
    """RMS-normalise queries and keys (MiniMind's third generation)."""
    use_moe: bool = _DEFAULT
    """Make feed-forward layers mixtures of experts."""
    n_routed_experts: int | None = None
    """Experts that the router of a layer chooses from."""
    num_experts_per_tok: int | None = None
    """Experts chosen per token."""
    n_shared_experts: int | None = None
    """Experts applied to every token in addition to the chosen ones."""
    aux_loss_alpha: float | None = None
    """Weight of the load-balancing loss, summed over layers."""
    seq_aux: bool | None = None
    """Balance per sequence (second generation) or over the batch (third)."""
    norm_topk_prob: bool | None = None
    """Normalise the weights of the chosen experts to sum to one."""
    inference_rope_scaling: bool = _DEFAULT
    """Extend the rotary frequencies with YaRN."""
    max_seq_len: int = _DEFAULT
    """Tokens per packed row. A longer text is split, a longer conversation truncated at a
    turn; a pair's prompt loses its oldest turns."""
    document_mask: bool = _DEFAULT
    """Hide documents in a row from each other; always on for sft and dpo."""
    epochs: int = _DEFAULT
    """Passes over the training documents."""
    global_batch: int = _DEFAULT
    """Rows per optimizer step, which a resumed run keeps; default: batch_size ×
    accumulation_steps × num_processes if one of the first two is set."""
    batch_size: int = _DEFAULT
    """Rows per process in one micro-step; default: the most that divide global_batch."""
    accumulation_steps: int = _DEFAULT
    """Micro-steps whose gradients are summed in one optimizer step."""
    allow_smaller_batch: bool = _DEFAULT
    """Restart with half the rows in batch_size, at the same global_batch, each time that
    memory runs out; default True."""
    learning_rate: float = _DEFAULT
    """Peak learning rate; default 3e-3, for sft 1e-3, for dpo 1e-5."""
    min_learning_rate: float = _DEFAULT
    """Learning rate at the end; default: 0, for a cosine a tenth of the peak."""
    optimizer: str = _DEFAULT
    """"muon" (the layers' matrices; AdamW for the rest) or "adamw"."""
    schedule: str = _DEFAULT
    """After the warm-up: "linear", constant until the last part of the steps, which
    decays in a straight line; or "cosine", MiniMind's."""
    decay_fraction: float = _DEFAULT
    """Share of the steps in which a linear schedule decays."""
    warmup_iters: int = _DEFAULT
    """Optimizer steps of linear warm-up; for a cosine at most a tenth of all steps."""
    weight_decay: float = _DEFAULT
    """Weight decay, applied to matrices only."""
    beta1: float = _DEFAULT
    """AdamW's decay rate of the first moment."""
    beta2: float = _DEFAULT
    """AdamW's decay rate of the second moment."""
    grad_clip: float = _DEFAULT
    """Largest norm of the gradient; 0 disables clipping."""
    dpo_beta: float | None = None
    """β of the DPO loss: strength of the pull towards the initial weights; default 0.1."""
    max_steps: int | None = None
    """Cap on optimizer steps; a lower one ends a run that trains, with its decay."""
    seed: int = _DEFAULT
    """Seed of initialisation, data order and dropout; default 42."""
    val_fraction: float = _DEFAULT
    """Share of the documents held out for validation; default 0.01."""
    eval_tokens: int = _DEFAULT
    """Largest number of text tokens in a validation."""
    eval_interval: int = _DEFAULT
    """Optimizer steps between validations; step 0 and the end are validated too."""
    sample_prompts: tuple[str, ...] | None = None
    """Prompts that the model answers at every validation (a JSON list on the command
    line); default: two held-out ones."""
    sample_tokens: int = _DEFAULT
    """Longest such answer in tokens; 0 disables them."""
    log_interval: int = _DEFAULT
    """Optimizer steps between rows of metrics."""
    use_wandb: bool = _DEFAULT
    """Also log to Weights & Biases, offline, into the run folder. Needs pip
    install 'minimind_nb[wandb]'."""
    wandb_project: str = _DEFAULT
    """Name of the project there; default MiniMind."""
    publish: str | None = None
    """"hf:USER/NAME": keep the newest checkpoint in this repository, made private if it
    does not exist. Needs HF_TOKEN; a resumed call names it again."""
    publish_minutes: float = _DEFAULT
    """Minutes between uploads; default 30. The start and the end upload, too."""
    save_interval: int = _DEFAULT
    """Optimizer steps between checkpoints; one is written at the end too."""
    keep_checkpoints: int = _DEFAULT
    """Newest checkpoints to keep (at least 2), plus the one of lowest validation loss."""
    max_session_hours: float | None = None
    """Hours of the session (elsewhere than on Kaggle and Colab: of the call) after which
    the run saves and stops; default 11.5 on Kaggle, unlimited elsewhere."""
    device: str = _DEFAULT
    """"cuda" or "cpu"; default: every GPU, or the CPU if there is none."""
    num_processes: int = _DEFAULT
    """Worker processes; default: one per GPU, or one on a CPU."""
    dtype: str = _DEFAULT
    """Precision of matrix products: float16, bfloat16 or float32; default: by hardware."""
    compile: str | bool = "auto"
    """Compile the steps, not of dpo: True, False, or "auto" (default), if 20 minutes long.
    On a CPU they are 1.05 to 1.1 times as fast in float32, 1.2 in bfloat16."""
    max_skipped_steps: int = _DEFAULT
    """Non-finite steps in a row after which the run fails; default 20."""
    hang_timeout_seconds: float = _DEFAULT
    """Seconds without progress after which the run fails; default 1800."""
    on_bad_line: str = _DEFAULT
    """"error" (default) refuses a file with a malformed line, "skip" skips such lines."""
    max_bad_fraction: float = _DEFAULT
    """Largest share of lines skipped; default 0.01."""

    def __new__(cls, **settings: Any) -> "TrainConfig":
        if not settings.keys() <= kinds().keys():  # else a TypeError names only one
            validate({n: _plain(v) for n, v in settings.items()}, kinds())
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            plain = _plain(value)
            if name == "data_path" and isinstance(plain, str):
                plain = _split_paths(plain)
            if name == "data_weights":
                plain = _read_numbers(plain)
            if name in PATH_FIELDS:
                plain = change_path(os.path.expanduser, plain)
            object.__setattr__(self, name, plain)
        validate(vars(self), kinds(type(self)), isinstance(self, ResolvedConfig))

    def __repr__(self) -> str:
        """Return the explicit settings as Python: "mm.TrainConfig(epochs=2)"."""
        settings = (f"{name}={value!r}" for name, value in self.explicit().items())
        return f"mm.{type(self).__name__}({', '.join(settings)})"

    def _repr_html_(self) -> str:
        """Return a table of what is set, and of defaults that are known without data."""
        asked = self.explicit()
        names = [n for n in _SHOWN if self.stage == "pretrain" or n not in SHAPE_FIELDS]
        defaults = {n: fill_defaults(asked)[n] for n in names if n not in asked}
        page = "<b>TrainConfig</b><table>"
        for name, value in (asked | defaults).items():
            note = "resolved" if name in defaults else "set"
            page += f"<tr><td>{name}<td>{html.escape(repr(value))}<td>{note}"
        return f"{page}</table>"

    def explicit(self) -> dict[str, Any]:
        """Return the settings that differ from the dataclass's defaults."""
        return {n: v for n, v in vars(self).items() if v != getattr(TrainConfig, n)}

    def portable(self) -> dict[str, Any]:
        """Return the settings for a file, with the home folder in paths as "~"."""
        paths = {name: shorten_home(getattr(self, name)) for name in PATH_FIELDS}
        return asdict(self) | paths

    def shape(self) -> dict[str, Any]:
        """Return the settings that describe the model, by `MiniMindConfig`'s names."""
        return {name: getattr(self, name) for name in SHAPE_FIELDS}


@dataclass(frozen=True, kw_only=True, repr=False)
class ResolvedConfig(TrainConfig):
    """The settings of a run with every default filled in; None means not used."""

    data_path: str | tuple[str, ...] = ""
    compile: bool = False

    @property
    def weights_name(self) -> str:
        """MiniMind's name for the weights, such as `full_sft_512_moe.pth`, or the run's
        own name if it has one."""
        name = self.run_name
        if name == default_run_name(vars(self)):
            name = name.replace(self.stage, WEIGHTS_NAMES[self.stage], 1)
        return f"{name}.pth"


def resolve(cfg: TrainConfig, **found: Any) -> ResolvedConfig:
    """Fill in every default, of `found` (this machine's, and the shape of the initial
    weights) before the stage's. Raises `ValueError`."""
    return ResolvedConfig(**fill_defaults(cfg.explicit(), found))


def shorten_home(path: Any) -> Any:
    """Return a path below the home folder as "~/…", which hides the user's name."""
    home = os.path.expanduser("~")  # noqa: PTH111 - "~" where there is none
    if isinstance(path, str) and path.startswith(f"{home}/") and home.strip("/~"):
        return f"~{path.removeprefix(home)}"
    return path if isinstance(path, str) else change_path(shorten_home, path)


def change_path(change: Callable[[str], Any], path: Any) -> Any:
    """Return a path, or several, changed; another value as it is."""
    if isinstance(path, tuple):
        return tuple(change_path(change, one) for one in path)
    return change(path) if isinstance(path, str) else path


@functools.cache
def kinds(config: type[TrainConfig] = TrainConfig) -> dict[str, tuple[type, ...]]:
    """Return the types that each field may have, before or after it is resolved."""
    found = {}
    for name, declared in typing.get_type_hints(config).items():
        unset = config is TrainConfig and getattr(config, name) is None
        hint = declared | None if unset else declared
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = tuple(typing.get_origin(part) or part for part in parts)
    return found


def _split_paths(text: str) -> Any:
    """Return the paths in a list as text, or parted by commas; a single one as it is."""
    if text.startswith("["):
        with contextlib.suppress(ValueError, SyntaxError):
            return _plain(ast.literal_eval(text))
    if "," in text and not os.path.exists(text):  # noqa: PTH110 - no Path is needed
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def _read_numbers(value: Any) -> Any:
    """Return numbers that may be given as text, "5, 3, 2"."""
    parts = value.strip("[]").split(",") if isinstance(value, str) else value
    with contextlib.suppress(TypeError, ValueError):
        return tuple(map(float, parts))
    return value


def _plain(value: Any) -> Any:
    """Turn paths, NumPy scalars and lists into plain values."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if getattr(value, "shape", None) == ():
        return value.item()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value
