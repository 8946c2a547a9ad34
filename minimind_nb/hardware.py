"""The processors of this machine, and the precision that suits them."""

import functools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from .config import ResolvedConfig, flops_per_token

BF16_CAPABILITY, TRITON_CAPABILITY = (8, 0), (7, 0)
_ASK_SECONDS = 120
# FLOP/s that the 70 W cap lets a T4 sustain in products, of 65 and 8.1 TFLOP/s nominal;
# in fp32 the same share is assumed.
_SUSTAINED = {"Tesla T4": {"float16": 24e12, "float32": 3e12}}
_PRODUCT_SECONDS = 0.3
# FLOP/s of eager steps: a Xeon's core in fp32, measured; a T4 in fp16, expected.
_EAGER_FLOPS = {"cpu": 80e9, "cuda": 12e12}
# On a CPU 26 M parameters compile in 46 s, which saves 5 to 20 % of the time; half of
# minimind2-moe in 207 to 312 s, which saves 5 %.
_LEAST_SECONDS, _LEAST_OF_MIXTURES = 20 * 60, 200 * 60

# Runs in a process of its own: the parent of the workers never touches CUDA.
_ASK_TORCH = """
import json, torch
print(json.dumps([" ".join(torch.cuda.get_arch_list()), [
    [p.name, [p.major, p.minor], p.total_memory / 2**30]
    for p in map(torch.cuda.get_device_properties, range(torch.cuda.device_count()))
]]))
"""


@dataclass(frozen=True)
class Gpu:
    """One CUDA device: its name, compute capability and memory in GiB."""

    name: str
    capability: tuple[int, int]
    memory_gib: float


@dataclass(frozen=True)
class Hardware:
    """The processors of this machine, and what torch was built for ("sm_75 sm_80")."""

    gpus: tuple[Gpu, ...]
    cpu_cores: int
    cpu_native_bf16: bool
    memory_gib: float
    architectures: str = ""

    def describe(self) -> str:
        """Return one line such as "2 × Tesla T4 (15 GiB, sm_75), 4 cores"."""
        cores = f"{self.cpu_cores} CPU core{'' if self.cpu_cores == 1 else 's'}"
        parts = [
            f"{count} × {gpu.name} ({gpu.memory_gib:.0f} GiB, "
            f"sm_{gpu.capability[0]}{gpu.capability[1]})"
            for gpu, count in Counter(self.gpus).items()
        ]
        return ", ".join([*parts, cores, f"{self.memory_gib:.0f} GiB of memory"])

    def gpu_problem(self) -> str:
        """Return why no GPU, or not each of them, can train; "" if all can."""
        built = [divmod(int(n), 10) for n in re.findall(r"_(\d+)", self.architectures)]
        for gpu in self.gpus:
            if gpu.capability < min(built, default=(0, 0)):
                built_for = f"this torch, built for {self.architectures}"
                return f"{gpu.name} is too old for {built_for}"
        return "" if self.gpus else "no GPU was found"


def choose_dtype(
    capability: tuple[int, int] | None, cpu_native_bf16: bool = False
) -> str:
    """Return the precision of matrix products: "float16", "bfloat16" or "float32".

    By a GPU's compute capability (None for a CPU), not `torch.cuda.is_bf16_supported`:
    that is True on a T4 (7.5), where bf16 is emulated, three times slower than fp16.
    """
    if capability is None:
        return "bfloat16" if cpu_native_bf16 else "float32"
    return "bfloat16" if capability >= BF16_CAPABILITY else "float16"


def has_compiler(capability: tuple[int, int] | None) -> bool:
    """Return whether steps can be compiled, on a GPU of this capability or a CPU (None)."""
    if capability is None:
        return shutil.which(os.environ.get("CXX", "g++")) is not None
    return capability >= TRITON_CAPABILITY and find_spec("triton") is not None


def choose_threads(num_processes: int, cpu_cores: int) -> int:
    """Return the threads for each of `num_processes` workers that share `cpu_cores`.

    More threads than cores is the costly mistake: two workers of two threads each
    on two cores took 300 ms a step, of one thread each 90 ms. OMP_NUM_THREADS, if it
    is set, is the most.
    """
    most = os.environ.get("OMP_NUM_THREADS", "")
    threads = max(1, cpu_cores // num_processes)
    return min(threads, int(most)) if most.isdecimal() and int(most) else threads


def pays_to_compile(cfg: ResolvedConfig, steps: int, cores: int) -> bool:
    """Return whether so many eager steps would take long enough."""
    threads = choose_threads(cfg.num_processes, cores) if cfg.device == "cpu" else 1
    rate = _EAGER_FLOPS[cfg.device] * cfg.num_processes * threads
    flops = flops_per_token(vars(cfg)) * steps * cfg.global_batch * cfg.max_seq_len
    return flops / rate >= (_LEAST_OF_MIXTURES if cfg.use_moe else _LEAST_SECONDS)


def machine_flops(cfg: ResolvedConfig, dtype: str, gpus: Sequence[Gpu]) -> float:
    """Return the FLOP/s of matrix products in a precision, over all processes of a run.

    Measured on a CPU, once, with the threads that they have together, and known for some
    GPUs; 0 for others.
    """
    if cfg.device == "cuda":
        return cfg.num_processes * _SUSTAINED.get(gpus[0].name, {}).get(dtype, 0.0)
    cores, processes = count_cores(), cfg.num_processes
    threads = min(cores, processes * choose_threads(processes, cores))
    return measure_products("cpu", dtype, _PRODUCT_SECONDS, threads)


@functools.cache
def measure_products(
    device: str, dtype: str, seconds: float, threads: int = 0
) -> float:
    """Return the FLOP/s of square matrix products in a precision on a device.

    `threads` are those of a CPU, by default as many as torch has.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    size = 1024 if device == "cpu" else 4096
    own = torch.Generator(device)  # the caller's draws stay as they are
    a = torch.randn(size, size, device=device, generator=own).to(getattr(torch, dtype))
    torch.mm(a, a)[0, 0].item()  # the first product allocates
    count, began = 0, time.monotonic()
    while (spent := time.monotonic() - began) < seconds:
        torch.mm(a, a)[0, 0].item()  # waits for the device
        count += 1
    torch.set_num_threads(before)
    return count * 2 * size**3 / spent


def detect_hardware() -> Hardware:
    """Describe this machine without initialising CUDA in this process."""
    import psutil
    import torch

    gpus, built_for = _ask_torch() if torch.cuda.device_count() > 0 else ((), "")
    return Hardware(
        gpus=gpus,
        cpu_cores=count_cores(),
        # With AVX512-BF16 alone steps of "demo" are 1.1 to 1.3 times as fast, of 26 M 1.7.
        cpu_native_bf16=torch.cpu._is_avx512_bf16_supported()
        or torch.cpu._is_amx_tile_supported(),
        memory_gib=psutil.virtual_memory().total / 2**30,
        architectures=built_for,
    )


def count_cores() -> int:
    """Return the cores that this process may use, by its affinity and its container's quota."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 0
    cores = cores or os.cpu_count() or 1
    try:
        # "max 100000" if there is no quota.
        quota, period = map(int, Path("/sys/fs/cgroup/cpu.max").read_text().split())
    except (OSError, ValueError):
        return cores
    return max(1, min(cores, quota // period))


def _ask_torch() -> tuple[tuple[Gpu, ...], str]:
    try:
        command = [sys.executable, "-c", _ASK_TORCH]
        answer = subprocess.check_output(
            command, stderr=subprocess.PIPE, text=True, timeout=_ASK_SECONDS
        )
    except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(
            f"CUDA is installed but does not answer: {error}\n{str(error.stderr)[-600:]}\n"
            'Train on the CPU with device="cpu", or fix the driver installation.'
        ) from error
    built_for, found = json.loads(answer.splitlines()[-1])
    gpus = (Gpu(name, tuple(version), memory) for name, version, memory in found)
    return tuple(gpus), built_for


def peak_memory_gib(device: str) -> float:
    """Return this process's peak memory in GiB: the GPU's on CUDA, else resident."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # KiB on Linux
