"""The weights that a new run starts from: those of a run, a file or a folder."""

import contextlib
import logging
import shutil
from pathlib import Path
from typing import Any

import torch

from ..config import (
    PRESETS,
    SHAPE_FIELDS,
    STAGE_BEFORE,
    STAGES,
    TRAINING_SHAPE_FIELDS,
    WEIGHTS_NAMES,
    TrainConfig,
)
from ..model.architecture import MiniMindConfig, MiniMindForCausalLM
from ..model.loading import NOT_IN_PTH, FoundWeights, find_weights, model_config
from ..model.state_dict import put_weights, read_tensors
from ..session import runs_below
from ..storage.run_folder import RunFolder
from ..storage.verified import hash_file
from .run_plan import RunPlan

logger = logging.getLogger(__name__)
_RUNS = "*/config.json"
FIXED_SHAPE = [name for name in SHAPE_FIELDS if name not in TRAINING_SHAPE_FIELDS]


class NoInitialWeights(FileNotFoundError):
    """There is no run of the previous stage to start from."""


def find_initial_weights(cfg: TrainConfig) -> FoundWeights | None:
    """Return the weights that `init_from` names, or None for a random initialisation.

    "auto" is the newest finished run of the previous stage in out_dir, else an unfinished
    one, else a weights file. Raises `FileNotFoundError` if there are none, `ValueError`
    if there are several shapes, or shape or tokenizer are others than the settings'.
    """
    source = cfg.init_from or STAGES[cfg.stage]["init_from"]
    if source == "none":
        return None
    asked = asked_shape(cfg)
    if source == "auto":
        source = str(_newest_before(cfg))
    hints = {n: asked[n] for n in NOT_IN_PTH if n in asked and Path(source).is_file()}
    weights = find_weights(source, "last", cfg.tokenizer, **hints)
    has = weights.shape()
    if weights.config.rope_parameters != MiniMindConfig(**has).rope_parameters:
        raise ValueError(
            f"{source} was exported with rope_scaling: start from the exported run itself"
        )
    if differences := [
        f"{name}: {has.get(name)!r} in the weights, {value!r} in the settings"
        for name, value in asked.items()
        if has.get(name) != value
    ]:
        raise ValueError(
            f"the weights in {source} have another shape than the settings:\n  "
            + "\n  ".join(differences)
            + "\nLeave these settings (and preset) out, since the shape comes with the "
            'weights; or set init_from to other weights, or to "none".'
        )
    return weights


def initial_model(plan: RunPlan) -> MiniMindForCausalLM:
    """Return the model that a run starts from: random, or with its initial weights."""
    model = new_model(plan)
    if plan.initial:
        put_weights(model, read_tensors(plan.initial), str(plan.initial))
    return model


def new_model(plan: RunPlan) -> MiniMindForCausalLM:
    """Return a randomly initialised model, the same for the same seed on any rank."""
    torch.manual_seed(plan.cfg.seed)
    rope = plan.config.get("rope_scaling")  # of weights that are only measured
    config = model_config(plan.cfg.shape(), plan.tokenizer, rope_scaling=rope)
    return MiniMindForCausalLM(config).train()


def find_runs(cfg: TrainConfig, stage: str) -> list[RunFolder]:
    """Return the runs of a stage in out_dir with a checkpoint and the asked shape."""
    asked = asked_shape(cfg)
    runs = map(RunFolder, runs_below(Path(cfg.out_dir), stage, pattern=_RUNS))
    return [run for run in runs if asked.items() <= run.settings().items()]


def keep_reference(plan: RunPlan) -> None:
    """Copy the initial weights of a preference run, its reference, into its folder.

    A random initialisation needs none, since the seed gives it again. Raises
    `RuntimeError` if the weights are not those that the run started from.
    """
    digest, began_from = plan.config["hashes"]["initial"], plan.config["began_from"]
    if plan.cfg.stage != "dpo" or not digest:
        return
    kept = plan.folder.root.glob("reference.*")
    for place in filter(None, (*kept, plan.initial, began_from)):
        with contextlib.suppress(OSError, ValueError):
            file = find_weights(place).file if isinstance(place, str) else place
            if hash_file(file) == digest:
                break
    else:
        raise RuntimeError(
            f"the initial weights ({began_from}) changed or are missing, and the DPO "
            "reference is computed from them: restore them, or start over with "
            "resume=False"
        )
    plan.initial = plan.folder.root / f"reference{file.suffix}"
    if file != plan.initial:
        shutil.copyfile(file, plan.initial)


def asked_shape(cfg: TrainConfig) -> dict[str, Any]:
    """Return the settings of the shape that the weights must have."""
    explicit = {k: v for k, v in cfg.shape().items() if v is not None}
    asked = PRESETS.get(cfg.preset or "", {}) | explicit
    return {name: asked[name] for name in FIXED_SHAPE if name in asked}


def _newest_before(cfg: TrainConfig) -> Path:
    """Return the run, or weights file, of the previous stage that "auto" stands for."""
    stage, out_dir = STAGE_BEFORE[cfg.stage], Path(cfg.out_dir)
    fits = find_runs(cfg, stage)
    fits = [run for run in fits if run.status() == "finished"] or fits
    known = [(run, run.settings()) for run in fits]
    dense = {s["hidden_size"] for _, s in known if not s["use_moe"]}
    for run, settings in known:
        if settings["use_moe"] and settings["hidden_size"] in dense:
            logger.warning(f"{run.root}, a mixture, is left out: use_moe=True takes it")
            fits.remove(run)
    shapes = {tuple(run.settings().get(name) for name in FIXED_SHAPE) for run in fits}
    if len(shapes) == 1:
        newest = max(fits, key=lambda run: run.checkpoints.stat().st_mtime)
        if (status := newest.status()) != "finished":
            logger.warning(
                f"{newest.root} is not finished ({status}); starting from its newest "
                "checkpoint"
            )
        return newest.root
    runs = runs_below(out_dir, stage, pattern=_RUNS)
    weights = f"{WEIGHTS_NAMES[stage]}_*.pth"
    files = set(out_dir.glob(weights))
    if not cfg.use_moe:
        files -= {file.with_stem(f"{file.stem}_moe") for file in files}
    if not runs and len(files) == 1:
        return files.pop()
    named = [f'"{file}"' for file in sorted(files)]
    if places := [_describe(run) for run in runs] or named:
        raise ValueError(
            f"stage={cfg.stage!r} can start from several weights, or none of the shape in "
            "the settings; choose one:"
            + "".join(f"\n  init_from={place}" for place in places)
        )
    found = ", ".join(sorted(file.parent.name for file in out_dir.glob(_RUNS)))
    raise NoInitialWeights(
        f"stage={cfg.stage!r} starts from a trained model, and out_dir={cfg.out_dir!r} "
        f"has no run of stage={stage!r} and no {weights} (runs found: "
        f'{found or "none"}). Train one first, name the weights with init_from="…", or '
        'set init_from="none" for a random initialisation'
    )


def _describe(place: Path) -> str:
    run = RunFolder(place)
    s = run.settings()
    experts = f", {s['n_routed_experts']} experts" if s["use_moe"] else ""
    shape = f"{s['hidden_size']} × {s['num_hidden_layers']}{experts}"
    return f'"{place}"  ({shape}, {run.status()})'
