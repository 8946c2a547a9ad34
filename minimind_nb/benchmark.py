"""The speed of this machine, measured: matrix products, and the real training step."""

import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from importlib.metadata import version
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

from .config import TrainConfig, count_parameters, flops_per_token
from .data.demo import DEMO
from .hardware import Hardware, detect_hardware, measure_products
from .lifetime import without_main_script
from .monitor.tables import Facts
from .planning import Estimate, draft_alone
from .session import current_session
from .training.api import train
from .training.preparation import draft

_WARM_STEPS, _FEWEST_STEPS, _MOST_STEPS = 2, 3, 100
_STEP_SECONDS, _PRODUCT_SECONDS = 10.0, 2.0
# TFLOP/s of dense products in fp16 and bf16, by NVIDIA's data sheets.
_NOMINAL = {"Tesla T4": 65, "NVIDIA L4": 121, "NVIDIA A100-SXM4-40GB": 312}


def bench(cfg: TrainConfig | None = None) -> Facts:
    """Measure how fast this machine trains a configuration, in a minute on a CPU.

    Trains new weights of the run's shape for some steps in a temporary folder, on the
    data ("demo" if none is set) and in all processes, then multiplies matrices on each
    device. Leaves nothing behind but the token cache; the last row is one line to send
    in. Raises what `train` raises.
    """
    hardware = detect_hardware()
    asked = _with_new_weights(cfg or TrainConfig(), hardware)
    with tempfile.TemporaryDirectory(prefix="minimind_nb_") as folder:
        tokens = current_session().cache_folder(asked.out_dir)
        if tokens.is_dir():
            Path(folder, "cache").symlink_to(tokens)
        asked = replace(asked, out_dir=folder)
        planned = Estimate(draft(asked, hardware), hardware)
        steps = round(_STEP_SECONDS * planned.speed * planned.steps / planned.tokens)
        steps = max(_FEWEST_STEPS, min(steps or _MOST_STEPS, _MOST_STEPS))
        brief = {"epochs": 10**6, "max_steps": _WARM_STEPS + steps, "log_interval": 1}
        brief |= {"eval_tokens": 1, "sample_tokens": 0, "use_wandb": False}
        brief |= {"publish": None, "publish_minutes": None}
        asked = replace(asked, **brief, compile=planned.cfg.compile)
        run = train(asked, view=False)
        rows, status = run.history.select("train")[_WARM_STEPS - 1 :], run.status
    if status == "interrupted":
        raise KeyboardInterrupt
    if len(rows) <= steps:
        raise RuntimeError(f"the steps to measure were not all made: {status}")
    tokens, seconds = (rows[-1][n] - rows[0][n] for n in ("tokens", "seconds"))
    planned.speed, cfg = tokens / seconds, planned.cfg
    cuda = cfg.device == "cuda"
    devices = [f"cuda:{n}" for n in range(cfg.num_processes)] if cuda else ["cpu"]
    how = repeat(cfg.dtype), repeat(_PRODUCT_SECONDS)
    spawn = get_context("spawn")
    with without_main_script(), ProcessPoolExecutor(len(devices), spawn) as pool:
        rates = [rate / 1e12 for rate in pool.map(measure_products, devices, *how)]
    flops = planned.speed * flops_per_token(vars(cfg)) / 1e12
    share = f"{flops / sum(rates):.2f} of products"
    nominal = cuda and cfg.dtype != "float32" and _NOMINAL.get(hardware.gpus[0].name)
    mfu = f"MFU {flops / len(rates) / nominal:.2f}" if nominal else "MFU unknown"
    shape = f"{count_parameters(cfg.shape())['total'] / 1e6:.1f} M parameters"
    batch = f"{cfg.global_batch} × {cfg.max_seq_len}"
    speed = f"{planned.speed:,.0f} text tokens/s"
    versions = [f"{name} {version(name)}" for name in ("minimind_nb", "torch")]
    place = [hardware.describe(), f"{cfg.dtype} on {cfg.num_processes} × {cfg.device}"]
    place[1] += f"{', compiled' * cfg.compile}, {cfg.stage} of preset {cfg.preset}"
    line = [*versions, *place, shape, batch, speed, share, mfu]
    facts = {
        "products": f"{', '.join(f'{r:.3g}' for r in rates)} TFLOP/s in {cfg.dtype}",
        "training": f"{speed} in steps of {batch}, fill {rows[-1]['fill']:.3f}",
        "model": f"{flops:.3g} TFLOP/s for {shape}: {share}, {mfu}",
        "to send in": ", ".join(line),
    }
    return Facts("Speed of this machine", facts)


def _with_new_weights(cfg: TrainConfig, hardware: Hardware) -> TrainConfig:
    """Return a configuration of the same shape that needs no weights to start from."""
    asked = replace(cfg, data_path=cfg.data_path or DEMO, resume=False)
    _, drafted = draft_alone(asked, hardware)
    return replace(asked, **drafted.cfg.shape(), resume="auto", init_from="none")
