from pathlib import Path

import pytest
import torch

from minimind_nb import hardware
from minimind_nb.config import TrainConfig, resolve
from minimind_nb.hardware import (
    Gpu,
    Hardware,
    choose_dtype,
    choose_threads,
    count_cores,
    detect_hardware,
    machine_flops,
    measure_products,
    peak_memory_gib,
)

T4 = Gpu("Tesla T4", (7, 5), 14.6)


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [
        ((6, 0), "float16"),
        ((7, 5), "float16"),
        ((8, 0), "bfloat16"),
        ((8, 9), "bfloat16"),
        ((10, 0), "bfloat16"),
    ],
)
def test_precision_of_a_gpu_follows_its_capability(capability, dtype):
    assert choose_dtype(capability) == dtype
    assert choose_dtype(capability, cpu_native_bf16=True) == dtype


def test_a_cpu_takes_bfloat16_only_where_it_is_native():
    assert choose_dtype(None) == "float32"
    assert choose_dtype(None, cpu_native_bf16=True) == "bfloat16"


@pytest.mark.parametrize(
    ("processes", "cores", "threads"), [(1, 2, 2), (2, 2, 1), (2, 5, 2), (4, 2, 1)]
)
def test_workers_share_the_cores(processes, cores, threads, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert choose_threads(processes, cores) == threads


@pytest.mark.parametrize(
    ("given", "threads"), [("", 4), ("0", 4), ("many", 4), ("1", 1), ("9", 4)]
)
def test_a_number_of_threads_that_is_set_is_the_most(given, threads, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert choose_threads(1, 4) == threads


def test_hardware_is_described_in_a_line():
    two = Hardware((T4, T4), cpu_cores=4, cpu_native_bf16=False, memory_gib=29.4)
    assert two.describe() == (
        "2 × Tesla T4 (15 GiB, sm_75), 4 CPU cores, 29 GiB of memory"
    )
    other = Gpu("A100", (8, 0), 40.0)
    mixed = Hardware((T4, other), cpu_cores=1, cpu_native_bf16=False, memory_gib=9.0)
    assert mixed.describe() == (
        "1 × Tesla T4 (15 GiB, sm_75), 1 × A100 (40 GiB, sm_80), 1 CPU core, "
        "9 GiB of memory"
    )
    none = Hardware((), cpu_cores=2, cpu_native_bf16=False, memory_gib=7.8)
    assert none.describe() == "2 CPU cores, 8 GiB of memory"


@pytest.mark.parametrize(
    ("architectures", "problem"),
    [
        (
            "sm_75 sm_80 sm_90a sm_100 compute_120",
            "too old for this torch, built for sm_75 sm_80",
        ),
        ("sm_50 sm_60 sm_100", ""),
        ("compute_53", ""),
        ("", ""),
    ],
)
def test_a_gpu_older_than_all_that_torch_was_built_for_is_told(architectures, problem):
    p100 = Gpu("Tesla P100-PCIE-16GB", (6, 0), 15.9)
    found = Hardware((T4, p100), 4, False, 29.0, architectures).gpu_problem()
    assert found.startswith("Tesla P100-PCIE-16GB is ") if problem else not found
    assert problem in found


@pytest.mark.parametrize(
    ("quota", "cores"),
    [
        ("max 100000", 8),
        ("200000 100000", 2),
        ("150000 100000", 1),
        ("50000 100000", 1),
        ("9900000 100000", 8),
        ("nonsense", 8),
    ],
)
def test_cores_are_bounded_by_the_containers_quota(quota, cores, monkeypatch):
    monkeypatch.setattr(
        hardware.os, "sched_getaffinity", lambda _: range(8), raising=False
    )
    monkeypatch.setattr(Path, "read_text", lambda _: f"{quota}\n")
    assert count_cores() == cores


def test_this_machine_is_detected_without_initialising_cuda(monkeypatch):
    def refuse():
        raise AssertionError("CUDA was initialised")

    monkeypatch.setattr("torch.cuda._lazy_init", refuse)
    found = detect_hardware()
    assert found.cpu_cores >= 1
    assert 0.1 < found.memory_gib < 1e5


def test_gpus_are_asked_for_in_another_process(monkeypatch):
    answer = '["sm_70 sm_75", [["Tesla T4", [7, 5], 14.6]]]'
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(hardware, "_ASK_TORCH", f"print('hello'); print('{answer}')")
    found = detect_hardware()
    assert (found.gpus, found.architectures) == ((T4,), "sm_70 sm_75")


def test_a_gpu_that_does_not_answer_is_named_with_its_error(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setattr(hardware, "_ASK_TORCH", "raise SystemExit('driver too old')")
    with pytest.raises(RuntimeError) as caught:
        detect_hardware()
    text = str(caught.value)
    assert text.startswith("CUDA is installed but does not answer:")
    assert "driver too old" in text
    assert 'Train on the CPU with device="cpu", or fix the driver installation.' in text


def test_products_are_counted_in_their_precision_and_draw_nothing():
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    for kind in ("float32", "bfloat16"):
        assert 1e8 < measure_products("cpu", kind, 0.01, threads=1) < 1e16
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("gpu", "processes", "flops"),
    [(None, 1, 2e9), (None, 2, 4e9), (None, 9, 4e9), ("Tesla T4", 2, 48e12)]
    + [("Z9000", 2, 0)],
)
def test_a_machines_products_are_those_of_all_processes(
    gpu, processes, flops, monkeypatch
):
    """A core of the two that this machine has makes 2 GFLOP/s, a process's thread one."""
    monkeypatch.setattr(hardware, "count_cores", lambda: 2)
    monkeypatch.setattr(hardware, "measure_products", lambda *a: 2e9 * a[3])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    device, dtype = ("cuda", "float16") if gpu else ("cpu", "float32")
    run = {"device": device, "dtype": dtype, "num_processes": processes}
    gpus = [Gpu(gpu, (7, 5), 15.0)] * 2 if gpu else []
    cfg = resolve(TrainConfig(**run))
    assert machine_flops(cfg, cfg.dtype, gpus) == flops


def test_native_bf16_is_what_onednn_reports(monkeypatch):
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    for name in names:
        monkeypatch.setattr(f"torch.cpu.{name}", lambda: False)
    assert not detect_hardware().cpu_native_bf16
    monkeypatch.setattr(f"torch.cpu.{names[1]}", lambda: True)
    assert detect_hardware().cpu_native_bf16


def test_peak_memory_is_in_gib(monkeypatch):
    held = peak_memory_gib("cpu")
    assert 0.01 < held < 100
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: 3 * 2**29)
    assert peak_memory_gib("cuda") == 1.5
