"""Model shapes, recipes and stages: tables of defaults, and how they combine."""

import math
from collections.abc import Collection, Mapping
from typing import Any

_MINIMIND_3: dict[str, Any] = dict(
    hidden_size=768,
    intermediate_size=2432,
    num_key_value_heads=4,
    rms_norm_eps=1e-6,
    qk_norm=True,
)

PRESETS: dict[str, dict[str, Any]] = {
    "demo": dict(
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
    ),
    "minimind2-small": dict(hidden_size=512, intermediate_size=1408),
    "minimind2": dict(hidden_size=768, num_hidden_layers=16, intermediate_size=2048),
    "minimind2-moe": dict(hidden_size=640, intermediate_size=1728, use_moe=True),
    "minimind-3": _MINIMIND_3,
    "minimind-3-moe": _MINIMIND_3
    | dict(
        use_moe=True,
        aux_loss_alpha=5e-4,
        num_experts_per_tok=1,
        n_shared_experts=0,
        seq_aux=False,
    ),
}
"""Model shapes by name; other settings of the shape are the stage's defaults."""

# MiniMind's own settings, in this project's units.
_MINIMIND: dict[str, Any] = dict(
    batch_size=32,
    accumulation_steps=8,
    learning_rate=5e-4,
    warmup_iters=0,
    weight_decay=0.01,
    beta2=0.999,
    grad_clip=1.0,
    optimizer="adamw",
    schedule="cosine",
)

_MINIMIND_SFT: dict[str, Any] = dict(
    batch_size=16, accumulation_steps=1, learning_rate=5e-7, epochs=2
)
# The settings of the document that this project reproduces.
_FOUNDING: dict[str, Any] = dict(
    accumulation_steps=1, epochs=2, max_seq_len=512, save_interval=500, log_interval=100
)

_DEMO: dict[str, Any] = dict(
    max_seq_len=256, batch_size=4, log_interval=20, eval_tokens=16_384
)

RECIPES: dict[str, dict[str, Any]] = {
    # These steps end at a loss of 0.47; with AdamW at 0.50, and 240 of 8 rows at 0.68.
    "demo": _DEMO
    | dict(
        max_steps=480,
        accumulation_steps=1,
        learning_rate=3e-3,
        warmup_iters=20,
        eval_interval=80,
        save_interval=160,
    ),
    # The model answers 164 of 178 held-out questions; with AdamW, at 2e-3, 3e-3, 4e-3 and
    # 5e-3, 124, 128, 114 and 107.
    "demo-sft": _DEMO
    | dict(
        epochs=4,
        max_steps=1500,
        learning_rate=1e-3,
        eval_interval=300,
        save_interval=300,
    ),
    # Pairs whose margin is above 0 go from 50 to 77 %, and of the 178 questions 163 are
    # answered, 164 before; at 1e-4 and 3e-4 69 and 62 %, and 161 and 156.
    "demo-dpo": _DEMO
    | dict(
        max_steps=60,
        batch_size=8,
        learning_rate=3e-5,
        log_interval=5,
        eval_interval=20,
        save_interval=60,
    ),
    "minimind": _MINIMIND,
    "minimind-sft": _MINIMIND | _MINIMIND_SFT,
    "minimind-3-sft": _MINIMIND
    | _MINIMIND_SFT
    | dict(learning_rate=1e-5, max_seq_len=768),
    "founding": _MINIMIND | _FOUNDING,
    "founding-sft": _MINIMIND | _FOUNDING | _MINIMIND_SFT,
}
"""Optimisation settings by name; the rest are the stage's defaults."""

_PRETRAIN: dict[str, Any] = dict(
    hidden_size=512,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=2,
    vocab_size=6400,
    max_position_embeddings=32_768,
    rope_theta=1e6,
    rms_norm_eps=1e-5,
    dropout=0.0,
    qk_norm=False,
    use_moe=False,
    n_routed_experts=4,
    num_experts_per_tok=2,
    n_shared_experts=1,
    aux_loss_alpha=0.01,
    seq_aux=True,
    norm_topk_prob=True,
    inference_rope_scaling=False,
    init_from="none",
    max_seq_len=512,
    document_mask=False,
    epochs=1,
    batch_size=32,
    accumulation_steps=1,
    allow_smaller_batch=True,
    # Of 600,000 tokens 1.6 M parameters learn, at 3e-3, 5e-3 and 8e-3, down to a loss of
    # 4.97, 4.98 and 5.11; with AdamW at 1e-3, 2e-3 and 4e-3 to 5.62, 5.63 and 5.71.
    learning_rate=3e-3,
    optimizer="muon",
    schedule="linear",
    decay_fraction=0.3,
    warmup_iters=20,
    weight_decay=0.1,
    beta1=0.9,
    beta2=0.95,
    grad_clip=1.0,
    log_interval=10,
    eval_interval=250,
    save_interval=500,
    eval_tokens=65_536,
    sample_tokens=48,
    device="cpu",
    num_processes=1,
    dtype="float32",
    seed=42,
    val_fraction=0.01,
    use_wandb=False,
    wandb_project="MiniMind",
    publish_minutes=30.0,
    keep_checkpoints=2,
    max_skipped_steps=20,
    hang_timeout_seconds=1800.0,
    on_bad_line="error",
    max_bad_fraction=0.01,
)

_CHAT: dict[str, Any] = _PRETRAIN | dict(
    init_from="auto",
    max_seq_len=1024,
    document_mask=True,
    eval_interval=50,
    save_interval=100,
)

STAGES: dict[str, dict[str, Any]] = {
    "pretrain": _PRETRAIN,
    "sft": _CHAT | dict(epochs=2, batch_size=16, learning_rate=1e-3),
    "dpo": _CHAT
    | dict(epochs=1, batch_size=4, optimizer="adamw", learning_rate=1e-5, dpo_beta=0.1),
}
"""Defaults by stage; this machine's device, processes and precision take precedence."""

STAGE_BEFORE = {"sft": "pretrain", "dpo": "sft"}
"""The stage whose weights init_from="auto" loads."""

WEIGHTS_NAMES = {"pretrain": "pretrain", "sft": "full_sft", "dpo": "dpo"}
"""MiniMind's names for the weights of a stage, as in `full_sft_512.pth`."""

_BATCH = ("global_batch", "batch_size", "accumulation_steps")
_FEWEST_ROWS = 2  # of a global batch that follows from the corpus

CHANGEABLE_ON_RESUME = frozenset(
    "epochs max_steps save_interval log_interval eval_interval keep_checkpoints "
    "sample_prompts sample_tokens max_session_hours max_skipped_steps "
    "hang_timeout_seconds out_dir run_name resume allow_change data_path val_path "
    "init_from tokenizer on_bad_line max_bad_fraction device num_processes dtype "
    "batch_size accumulation_steps allow_smaller_batch preset recipe use_wandb "
    "wandb_project publish publish_minutes compile".split()
)
"""Settings that may change when a run is resumed; any other difference is refused."""

SHAPE_FIELDS = (
    "hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
    "intermediate_size vocab_size max_position_embeddings rope_theta rms_norm_eps "
    "dropout qk_norm use_moe n_routed_experts num_experts_per_tok n_shared_experts "
    "aux_loss_alpha seq_aux norm_topk_prob inference_rope_scaling"
).split()

MIXTURE_FIELDS = (
    "n_routed_experts num_experts_per_tok n_shared_experts aux_loss_alpha seq_aux "
    "norm_topk_prob"
).split()
"""Settings of mixtures of experts only."""

TRAINING_SHAPE_FIELDS = (
    "max_position_embeddings dropout aux_loss_alpha seq_aux inference_rope_scaling"
).split()
"""Settings of the shape that may differ from those the weights were trained with."""


def fill_defaults(
    settings: Mapping[str, Any], found: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Return every setting that has a default.

    Precedence: the explicit value, the recipe's, the preset's, what this machine and the
    initial weights say (`found`), and the stage's default.
    """
    stage = settings.get("stage", "pretrain")
    explicit = {k: v for k, v in settings.items() if v is not None}
    values = {
        "stage": stage,
        **STAGES[stage],
        **(found or {}),
        **PRESETS.get(settings.get("preset") or "", {}),
        **RECIPES.get(settings.get("recipe") or "", {}),
        **explicit,
    }
    width, heads = values["hidden_size"], values["num_attention_heads"]
    values.setdefault("intermediate_size", 3 * width)
    values.setdefault("head_dim", width // heads)
    lowest = 0.1 * values["learning_rate"] if values["schedule"] == "cosine" else 0.0
    values.setdefault("min_learning_rate", lowest)
    if not values["use_moe"]:
        # Explicit ones stay, to be refused as a contradiction.
        values |= {name: settings.get(name) for name in MIXTURE_FIELDS}
    values.setdefault("run_name", default_run_name(values))
    return values | resolve_batch(values, explicit.keys())


def default_run_name(settings: Mapping[str, Any]) -> str:
    """Return `{stage}_{hidden_size}[_moe]`, as MiniMind names its files."""
    moe = "_moe" if settings.get("use_moe") else ""
    return f"{settings.get('stage')}_{settings.get('hidden_size')}{moe}"


def resolve_batch(
    values: Mapping[str, Any], explicit: Collection[str]
) -> dict[str, Any]:
    """Return `global_batch`, `batch_size` and `accumulation_steps`.

    Defaults make the same global batch on any number of processes, or a little more if
    that does not divide; explicit ones are per process, and multiply with their number.
    Numbers that do not divide are left for `validation` to refuse.
    """
    rows, steps = values["batch_size"], values["accumulation_steps"]
    processes, total = values["num_processes"], values.get("global_batch")
    keep_rows, keep_steps = "batch_size" in explicit, "accumulation_steps" in explicit
    if total is None:
        if not (keep_rows or keep_steps):
            share = math.ceil(rows * steps / processes)
            steps = math.ceil(share / rows)
            rows = math.ceil(share / steps)
        total = rows * steps * processes
    elif total % processes == 0:
        share = total // processes
        if not (keep_rows or keep_steps):
            rows = max(n for n in range(1, min(rows, share) + 1) if share % n == 0)
        if not keep_steps:
            steps = max(1, share // rows)
        elif not keep_rows:
            rows = max(1, share // steps)
    return {"global_batch": total, "batch_size": rows, "accumulation_steps": steps}


def batch_follows_corpus(
    settings: Mapping[str, Any], explicit: Collection[str]
) -> bool:
    """Return whether neither an explicit setting nor the recipe sets the batch."""
    known = {*explicit, *RECIPES.get(settings["recipe"] or "", ())}
    return settings["stage"] != "dpo" and known.isdisjoint(_BATCH)


def fit_batch(
    settings: Mapping[str, Any], explicit: Collection[str], tokens: int
) -> dict[str, Any]:
    """Return `global_batch` and its parts for resolved settings and a corpus.

    Unless one of them is set, a step takes 1.5 · √tokens of an epoch, so that a small
    corpus makes enough steps and a large one large steps. With 600,000 tokens and 1.6 M
    parameters 2, 4 and 8 rows of 256 end at a loss of 5.02, 4.97 and 4.99, where 128
    rows end at 8.2; with 3 M tokens 4, 8 and 16 at 4.28, 4.20 and 4.19; 26 M parameters
    with 350,000 tokens at 5.24, 5.31 and 5.52. Preferences keep their default.
    """
    if not batch_follows_corpus(settings, explicit):
        return {name: settings[name] for name in _BATCH}
    rows = 1.5 * math.sqrt(max(1, tokens)) / settings["max_seq_len"]
    total = max(2 ** round(math.log2(rows)), _FEWEST_ROWS)
    at_once = min(total, STAGES[settings["stage"]]["batch_size"])
    batch = dict(zip(_BATCH, (None, at_once, total // at_once), strict=True))
    return resolve_batch({**settings, **batch}, ())


def count_parameters(shape: Mapping[str, Any]) -> dict[str, int]:
    """Return the parameters of a resolved shape: "total", and "active" per token.

    Tied embeddings count once. The two differ for a mixture of experts only.
    """
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    heads, kv_heads = shape["num_attention_heads"], shape["num_key_value_heads"]
    head_dim, experts, chosen = shape["head_dim"], 1, 1
    gate = 0
    if shape["use_moe"]:
        experts = shape["n_routed_experts"] + shape["n_shared_experts"]
        chosen = shape["num_experts_per_tok"] + shape["n_shared_experts"]
        gate = width * shape["n_routed_experts"]
    attention = 2 * width * head_dim * (heads + kv_heads)
    norms = 2 * width + (2 * head_dim if shape["qk_norm"] else 0)
    layer, expert = attention + norms + gate, 3 * width * inner
    outside = shape["vocab_size"] * width + width
    return {
        name: outside + shape["num_hidden_layers"] * (layer + count * expert)
        for name, count in (("total", experts), ("active", chosen))
    }


def flops_per_token(settings: Mapping[str, Any]) -> float:
    """Return FLOP of a token, forward and backward: 6 a parameter, causal attention."""
    width = settings["num_attention_heads"] * settings["head_dim"]
    attention = 6 * settings["num_hidden_layers"] * settings["max_seq_len"] * width
    return 6.0 * count_parameters(settings)["active"] + attention
