"""The token cache beside plain tokenisation: ids, speed, memory, fill.

    python benchmarks/token_cache.py FILE.jsonl

`encode_batch_fast` uses all cores, ours one thread. Ratios are of things
measured in turn in one run; "cpu" is processor time over all threads and processes.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from minimind_nb.data import token_cache
from minimind_nb.data.fast_encoding import BulkEncoder
from minimind_nb.data.packing import arrange_epoch
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.hardware import count_cores

SPEC = read_tokenizer()
SLOW = Tokenizer.from_str(SPEC.json)
WIDTH = 512


def compare_encoding(texts: list[str]) -> None:
    fast, slow = BulkEncoder(SPEC).encode, SLOW.encode_batch_fast
    pairs = zip(fast(texts), slow(texts), strict=True)
    same = sum(a.tolist() == b.ids for a, b in pairs)
    print(f"ids equal on {same} of {len(texts)} documents")
    ways = {"encode_batch_fast": partial(slow, texts), "ours": partial(fast, texts)}
    race(ways, sum(len(text.encode()) for text in texts) / 1e6, times=5)


def compare_building(file: Path) -> None:
    plain = {"plain build": partial(build_plainly, file)}
    ours = {f"{n} process(es)": partial(build, file, n) for n in {1, count_cores()}}
    race({**plain, **ours}, file.stat().st_size / 1e6, times=3)


def build(file: Path, processes: int) -> np.ndarray:
    """Build a cache, throw it away, and return the documents' numbers of targets."""
    token_cache._ALONE_BYTES = 0  # the threshold that this shall help to choose
    source = token_cache.Source(str(file), "pretrain", SPEC)
    with tempfile.TemporaryDirectory() as folder:
        return token_cache.open_cache(source, Path(folder), processes).targets


def build_plainly(file: Path) -> None:
    texts = [json.loads(line)["text"] for line in file.open("rb")]
    encoded = SLOW.encode_batch_fast(texts)
    ids = [[SPEC.bos_id, *each.ids, SPEC.eos_id] for each in encoded]
    with tempfile.TemporaryDirectory() as folder:
        np.save(f"{folder}/tokens.npy", np.concatenate(ids).astype(np.uint16))
        np.save(f"{folder}/ends.npy", np.cumsum([len(each) for each in ids]))


def race(ways: Mapping[str, Callable[[], object]], size: float, times: int) -> None:
    """Print medians for each way, and how much faster it is than the first."""
    taken = {name: np.zeros((times, 2)) for name in ways}
    for n in range(times):
        for name, way in ways.items():
            before = time.perf_counter(), cpu_seconds()
            way()
            taken[name][n] = np.subtract((time.perf_counter(), cpu_seconds()), before)
    first = next(iter(taken.values()))
    for name, seconds in taken.items():
        wall, cpu = map(statistics.median, seconds.T)
        faster, cheaper = map(statistics.median, (first / seconds).T)
        speed = f"{wall:6.2f} s {size / wall:5.1f} MB/s {faster:5.2f} x"
        print(f"{name:28} {speed} | cpu {cpu:6.2f} s {cheaper:5.2f} x")


def cpu_seconds() -> float:
    uses = map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(use.ru_utime + use.ru_stime for use in uses)


def compare_memory(file: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        tenfold = Path(folder) / "tenfold.jsonl"
        tenfold.write_bytes(file.read_bytes() * 10)
        for each in (file, tenfold):
            subprocess.run([sys.executable, *sys.argv[:1], each, "--build"], check=True)


def show_packing(targets: np.ndarray) -> None:
    pieces = np.stack([np.arange(len(targets)), 0 * targets, targets], 1)
    rows = arrange_epoch(pieces, "pretrain", WIDTH, seed=42, epoch=0)
    ends = np.cumsum(targets)
    cut = ((ends - targets) // WIDTH < (ends - 1) // WIDTH).sum()
    fill = rows.pieces[:, 2].sum() / (len(rows) * WIDTH)
    print(f"fill {fill:.4f} at {WIDTH}: {len(targets)} documents, {len(rows)} rows")
    split = (np.unique(rows.pieces[:, 0], return_counts=True)[1] > 1).sum()
    print(f"split {split}, by plain concatenation {cut}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--build", action="store_true", help="only show peak memory")
    options = parser.parse_args()
    targets = build(options.file, processes=1)
    if options.build:
        # Not ru_maxrss: that starts at the size of the process which started this one.
        peak = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
        print(f"{options.file.name} built with {int(peak) >> 10} MiB at most")
    else:
        compare_encoding([json.loads(row)["text"] for row in options.file.open("rb")])
        compare_building(options.file)
        compare_memory(options.file)
        show_packing(targets)
