"""Code in a Python process of its own, without a network."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

_SECONDS = 1800
_SHOWN = 2000  # characters


def run_fresh(code: str, *arguments: object, failed: str) -> None:
    """Run Python code with as many threads as here.

    Raises `RuntimeError` with `failed` and the end of what it said, where it fails or
    takes longer than half an hour.
    """
    threads = str(torch.get_num_threads())
    alone = {"HF_HUB_OFFLINE": "1", "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": threads}
    try:
        subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)],
            env={**os.environ, **alone},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=True,
        )
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"{failed}:\n{error.stderr.strip()[-_SHOWN:]}") from None
    except subprocess.TimeoutExpired:
        limit = f"{_SECONDS / 60:.0f} min"
        raise RuntimeError(f"{failed}: it takes longer than {limit}") from None
