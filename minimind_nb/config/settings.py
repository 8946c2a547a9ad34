"""`TrainConfig`: every setting of a run, flat and frozen."""

from __future__ import annotations

import dataclasses
import functools
import os
import types
import typing
from dataclasses import dataclass
from typing import Any

from .presets import SHAPE_FIELDS, WEIGHTS_NAMES
from .resolution import fill_defaults
from .validation import Kinds, describe_unknown, find_problems, list_problems

PATH_FIELDS = ("data_path", "val_path", "tokenizer", "out_dir", "resume", "init_from")


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Every setting of a run; None means "the default for this stage and shape".

    Steps are optimizer steps everywhere (MiniMind counts micro-batches). Raises one
    `ValueError` that lists all problems found.
    """

    stage: str = "pretrain"
    """What is trained: "pretrain" (text), "sft" (answers) or "dpo" (preferences)."""
    data_path: str | None = None
    """JSON Lines file; a line is {"text": "…"} for pretrain, {"conversations":
    [{"role": "user", "content": "…"}, …]} for sft, {"chosen": […], "rejected": […]} for
    dpo; "demo" for the embedded corpus."""
    val_path: str | None = None
    """Validation file in the same format, instead of a held-out part of data_path."""
    tokenizer: str | None = None
    """A tokenizer.json or Hugging Face folder; the shipped 6400 entries unless set."""
    out_dir: str = "out"
    """Folder for weights and run folders; relative to the working folder."""
    run_name: str | None = None
    """Name of the run folder in out_dir; {stage}_{hidden_size}[_moe] unless set. The
    weights file beside it has this name too, if set, and MiniMind's own if not."""
    resume: str | bool = "auto"
    """"auto" goes on with the run found there, false sets it aside and starts anew,
    a path copies that run into out_dir and goes on with it."""
    allow_change: tuple[str, ...] = ()
    """Names of settings that may differ from the run that is resumed."""
    init_from: str | None = None
    """Weights to begin from: a run, a checkpoint, a .pth or a saved folder; "none" for
    new ones (pretrain's default); "auto" (sft and dpo) takes the newest finished run of
    the stage before in out_dir, an unfinished one where none is: pretrain before sft, sft
    before dpo."""
    preset: str | None = None
    """Model shape: demo, minimind2-small, minimind2, minimind2-moe, minimind-3 or
    minimind-3-moe."""
    recipe: str | None = None
    """Optimisation settings: demo, demo-sft, demo-dpo, minimind or minimind-sft."""
    hidden_size: int | None = None
    """Width of the residual stream."""
    num_hidden_layers: int | None = None
    """Number of transformer blocks."""
    num_attention_heads: int | None = None
    """Query heads a layer."""
    num_key_value_heads: int | None = None
    """Key and value heads a layer; divides num_attention_heads."""
    head_dim: int | None = None
    """Width of a head; hidden_size / num_attention_heads unless set."""
    intermediate_size: int | None = None
    """Width of the feed-forward layer, of each expert too; 3 · hidden_size unless set."""
    vocab_size: int | None = None
    """Rows of the embedding; the tokenizer's entries unless set."""
    max_position_embeddings: int | None = None
    """Longest context in tokens the model states it can take."""
    rope_theta: float | None = None
    """Base of the rotary frequencies."""
    rms_norm_eps: float | None = None
    """Epsilon of the RMS norms."""
    dropout: float | None = None
    """Dropout probability."""
    qk_norm: bool | None = None
    """Whether queries and keys are RMS-normalised (MiniMind's third generation)."""
    use_moe: bool | None = None
    """Whether feed-forward layers are mixtures of experts."""
    n_routed_experts: int | None = None
    """Experts a mixture layer chooses from."""
    num_experts_per_tok: int | None = None
    """Experts chosen for a token."""
    n_shared_experts: int | None = None
    """Experts every token passes besides."""
    aux_loss_alpha: float | None = None
    """Weight of the load-balancing loss, summed over layers."""
    seq_aux: bool | None = None
    """Balance per sequence (second generation) or over the batch (third)."""
    norm_topk_prob: bool | None = None
    """Whether the weights of the chosen experts are normalised to one."""
    inference_rope_scaling: bool | None = None
    """Whether YaRN stretches the rotary frequencies."""
    max_seq_len: int | None = None
    """Tokens a packed row holds, and so the length of context trained on. A longer text
    is split, a longer conversation cut at a turn; a pair's prompt loses its oldest."""
    document_mask: bool | None = None
    """Whether the documents in a packed row are hidden from each other; always, where
    conversations are trained on."""
    epochs: int | None = None
    """Passes over the training documents."""
    batch_size: int | None = None
    """Rows a process takes in one micro-step; the global batch is batch_size ×
    accumulation_steps × num_processes."""
    accumulation_steps: int | None = None
    """Micro-steps whose gradients are summed in one optimizer step."""
    learning_rate: float | None = None
    """Peak learning rate; 5e-4 unless set, for dpo 1e-5. Fine-tuning wants about the rate
    of pretraining: a model of 1.6 M parameters that was pretrained at 2e-3 came from a
    validation loss of 6.17 to 5.94 at 2e-4, 5.83 at 5e-4, 5.74 at 1e-3, 5.69 at 2e-3 and
    5.79 at 4e-3 in two epochs of 1,000 conversations, and to 6.166 at MiniMind's 5e-7,
    which the recipe minimind-sft keeps."""
    min_learning_rate: float | None = None
    """Learning rate at the end of the cosine; a tenth of the peak unless set."""
    warmup_iters: int | None = None
    """Optimizer steps of linear warm-up; at most a tenth of all steps are taken."""
    weight_decay: float | None = None
    """AdamW's decay, on matrices only."""
    beta1: float | None = None
    """AdamW's decay rate of the first moment."""
    beta2: float | None = None
    """AdamW's decay rate of the second moment."""
    grad_clip: float | None = None
    """Largest norm of the gradient; 0 never clips."""
    dpo_beta: float | None = None
    """DPO's β: how dear it is to leave the reference model, which are the weights that
    the run begins from; 0.1 unless set."""
    max_steps: int | None = None
    """Cap on optimizer steps, and then the horizon of the schedule."""
    seed: int = 42
    """Seed of initialisation, order and dropout."""
    val_fraction: float = 0.01
    """Share of the documents held out for validation, chosen by content."""
    eval_tokens: int | None = None
    """Most text tokens a validation looks at."""
    eval_interval: int | None = None
    """Optimizer steps between validations; one is made at step 0 and at the end too."""
    sample_prompts: tuple[str, ...] | None = None
    """What the model is asked at every validation, to see its answers change: beginnings
    of texts, or questions; two held-out ones unless set. The answers are drawn, at a
    temperature of 0.8. On the command line a JSON list."""
    sample_tokens: int | None = None
    """Longest such answer in tokens; 0 asks nothing."""
    log_interval: int | None = None
    """Optimizer steps between rows of metrics."""
    use_wandb: bool = False
    """Whether the metrics go to Weights & Biases too: offline, into the run folder, where
    there is no key or no network. Needs pip install 'minimind_nb[wandb]'."""
    wandb_project: str = "MiniMind"
    """Name of the project there."""
    save_interval: int | None = None
    """Optimizer steps between checkpoints; one is written at the end too."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept, besides the one of lowest validation loss; at least 2."""
    max_session_hours: float | None = None
    """Hours after which the run saves and stops; 11.5 on Kaggle, none elsewhere. The
    clock of Kaggle and Colab starts with the session, that of other places with the
    call."""
    device: str | None = None
    """"cuda" or "cpu"; every GPU there is unless set."""
    num_processes: int | None = None
    """Worker processes: one a GPU, or one on a CPU, unless set."""
    dtype: str | None = None
    """Precision of products: float16, bfloat16 or float32; by hardware unless set."""
    max_skipped_steps: int = 20
    """Non-finite steps in a row after which the run is ended."""
    hang_timeout_seconds: float = 1800.0
    """Seconds a process may keep the others waiting before the run is ended."""
    on_bad_line: str = "error"
    """"error" refuses a file with a malformed line, "skip" leaves such lines out."""
    max_bad_fraction: float = 0.01
    """Largest share of malformed lines that on_bad_line="skip" accepts, and of
    conversations without an answer that fits a row."""

    def __new__(cls, **settings: Any) -> TrainConfig:
        known = kinds()
        problems = [describe_unknown(n, known) for n in settings if n not in known]
        if problems:
            given = {n: _plain(settings[n]) for n in settings if n in known}
            raise ValueError(list_problems(problems + find_problems(given, known)))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        for name, value in list(vars(self).items()):
            plain = _plain(value)
            if name in PATH_FIELDS and isinstance(plain, str):
                plain = os.path.expanduser(plain)  # noqa: PTH111 - a Path drops "./"
            object.__setattr__(self, name, plain)
        if problems := find_problems(self.explicit(), kinds()):
            raise ValueError(list_problems(problems))

    def explicit(self) -> dict[str, Any]:
        """The settings that differ from the dataclass's defaults."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {n: v for n, v in vars(self).items() if v != defaults[n]}

    def portable(self) -> dict[str, Any]:
        """The settings as a file may hold them: the home folder in paths is "~"."""
        paths = {name: shorten_home(getattr(self, name)) for name in PATH_FIELDS}
        return dataclasses.asdict(self) | paths

    @property
    def global_batch(self) -> int:
        """Rows of one optimizer step over all processes (of a resolved configuration)."""
        assert self.batch_size and self.accumulation_steps and self.num_processes
        return self.batch_size * self.accumulation_steps * self.num_processes

    def shape(self) -> dict[str, Any]:
        """The settings that describe the model, by `MiniMindConfig`'s names."""
        return {name: getattr(self, name) for name in SHAPE_FIELDS}

    @property
    def weights_name(self) -> str:
        """MiniMind's name for the weights, `full_sft_512_moe.pth`; of a run with a name
        of its own that name."""
        suffix = f"{self.hidden_size}{'_moe' if self.use_moe else ''}"
        if self.run_name == f"{self.stage}_{suffix}":
            return f"{WEIGHTS_NAMES[self.stage]}_{suffix}.pth"
        return f"{self.run_name}.pth"


def shorten_home(path: Any) -> Any:
    """A path below the home folder as "~/…", which tells nobody's name; else itself."""
    home = os.path.expanduser("~")  # noqa: PTH111 - "~" where there is none
    if isinstance(path, str) and path.startswith(f"{home}/") and home.strip("/~"):
        return f"~{path.removeprefix(home)}"
    return path


@functools.cache
def kinds() -> Kinds:
    """The types each field of `TrainConfig` may have, None among them."""
    found = {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        found[name] = tuple(typing.get_origin(part) or part for part in parts)
    return found


def resolve(cfg: TrainConfig, **machine: Any) -> TrainConfig:
    """Fill in every default that stands for stage, shape or machine.

    `machine` is what was found here: device, num_processes, dtype, vocab_size, and the
    shape of the weights to begin from. An explicit value, the recipe and the preset go
    before it. Raises `ValueError`.
    """
    return TrainConfig(**fill_defaults(cfg.explicit(), machine))


def _plain(value: Any) -> Any:
    """Turn paths, NumPy scalars and lists into what JSON and a shell can hold.

    A string of a class of its own becomes a plain one: where that class was defined in
    a cell, no worker process could read it.
    """
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if getattr(value, "shape", None) == ():
        value = value.item()
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list | tuple):
        return tuple(map(_plain, value))
    if isinstance(value, int | float) and not isinstance(value, bool):
        return int(value) if isinstance(value, int) else float(value)
    return value
