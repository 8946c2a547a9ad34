"""What publishing beside a training costs: the time of a step, as a ratio to without.

Demo shape and data, fp32 on a CPU, one process. It uploads every 3 s instead of 30
minutes, to a stand-in on 127.0.0.1 that answers, one that never does, and a closed port.

    PYTHONPATH=tests python benchmarks/publishing_cost.py [--steps 60] [--rounds 3]
"""

import argparse
import os
import statistics
import tempfile

from support.hub import standing_in

import minimind_nb as mm
from minimind_nb.monitor import publishing

CASES = ("without", "answers", "never answers", "closed port")


def measure(case: str, steps: int) -> tuple[float, str]:
    """Return the median seconds of a step, and how the run ended."""
    more = {} if case == "without" else {"publish": "hf:me/x", "publish_minutes": 0.05}
    with standing_in() as hub, tempfile.TemporaryDirectory() as folder:
        hub.mood = "deaf" if case == "never answers" else "well"
        if case == "closed port":
            os.environ["HF_ENDPOINT"] = "http://127.0.0.1:9"
        cfg = mm.TrainConfig(
            data_path="demo", out_dir=folder, preset="demo", recipe="demo",
            max_steps=steps, log_interval=1, save_interval=10, sample_tokens=0,
            eval_interval=steps, device="cpu", num_processes=1, dtype="float32", **more,
        )  # fmt: skip
        run = mm.train(cfg, view=False)
        times = [row["seconds"] for row in run.history.select("train")][5:]
        steps_taken = [b - a for a, b in zip(times, times[1:], strict=False)]
        return statistics.median(steps_taken), run.status


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    publishing.FINISH_SECONDS = 5.0  # only the steps are measured
    found = {case: [] for case in CASES}
    for _ in range(options.rounds):
        for case in CASES:
            seconds, status = measure(case, options.steps)
            found[case].append(seconds)
            print(f"{case}: {1000 * seconds:.1f} ms a step, {status}", flush=True)
    base = statistics.median(found["without"])
    for case in CASES:
        print(f"{case}: {statistics.median(found[case]) / base:.3f}")


if __name__ == "__main__":
    main()
