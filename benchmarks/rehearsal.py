"""A plan of many sessions on a Kaggle that lies, with real training.

    make rehearsal
    PYTHONPATH=.:tests .venv-kaggle/bin/python benchmarks/rehearsal.py --steps 6000

`kaggle/kernels.py run` drives a stand-in for the site, `kaggle_site.py`, which kills
sessions, and the chain itself, which is started again as a person would. The final
weights must be those of one unbroken session. Everything is left in out/rehearsal.
"""

import argparse
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

from kaggle_site import Record, Site, install

from minimind_nb.storage.verified import hash_file

ROOT = Path(__file__).resolve().parents[1]
LEAST_SESSIONS = 6  # that make steps
SETTINGS: Record = {
    **{"data_path": "corpus.jsonl", "preset": None, "recipe": None, "seed": 42},
    **{"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"max_seq_len": 64, "batch_size": 2, "accumulation_steps": 1, "epochs": 9999},
    **{"log_interval": 5, "save_interval": 20, "eval_interval": 100},
    **{"eval_tokens": 500, "num_processes": 2, "device": "cpu", "dtype": "float32"},
}
# Sessions 1, 3, 5 and 7 are the first ones with a new source, which is mounted empty.
LIES: Record = {
    **{"empty": True, "kill": {6: 35, 9: 35}, "lost": [9]},
    **{"one_gpu": [10], "late": {8: 4.0}, "failed_pushes": [4], "unreadable_every": 40},
    **{"kill_caller_of_push": [2, 7], "kill_caller_of_output": [5]},
    **{"quota_seconds": 110, "week_seconds": 150},
}
KILLED, ENDED = "-- the chain was killed", "-- the chain ended"


def main() -> None:
    """Rehearse, and show what happened."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=420)
    given, folder = parser.parse_args(), ROOT / "out" / "rehearsal"
    shutil.rmtree(folder, ignore_errors=True)
    settings = SETTINGS | {"max_steps": given.steps}
    unbroken, _ = run_plan(folder / "unbroken", settings, {})
    lies = LIES | {"steps": given.steps // 6}
    site, said = run_plan(folder / "chain", settings, lies)
    lines = [*describe(unbroken, site, said), compare(unbroken, site)]
    print("", *lines, sep="\n")
    if site.state["beside"] or " NOT " in "".join(lines):
        sys.exit("the rehearsal failed")


def run_plan(folder: Path, settings: Record, script: Record) -> tuple[Site, list[str]]:
    """Run the chain on a site with this script, and again each time it ends early.

    Returns the site, and what the chain printed.
    """
    site, said = folder / "site", []
    environment = install(site, script)
    baked = [word for n, value in settings.items() for word in ("-p", n, f"{value}")]
    command = [sys.executable, ROOT / "kaggle" / "kernels.py", "run", "--user", "ann"]
    command += ["--data", ROOT / "examples" / "corpus.jsonl", "--out", folder / "out"]
    command += [*baked, "--hours", "30", "--poll", "0.5", "--wait", "60"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    for _ in range(12):
        with subprocess.Popen(command, env=environment, **pipes) as process:
            for line in process.stdout or ():
                said.append(line.rstrip())
                print(said[-1], flush=True)
        if process.returncode == 0:
            return Site(site), said
        said.append(KILLED if process.returncode < 0 else ENDED)
    sys.exit("the chain is not finished after 12 starts")


def describe(unbroken: Site, site: Site, said: list[str]) -> list[str]:
    """Return what happened: a line for each session, and figures of the chain."""
    sessions = site.sessions()
    made = [record for record in sessions if record["reached"] > record["began_at"]]
    pairs = zip(made, made[1:], strict=False)
    twice = sum(max(0, one["reached"] - then["began_at"]) for one, then in pairs)
    few = ", NOT enough: raise --steps" if len(made) < LEAST_SESSIONS else ""
    return [
        *(
            f"session {record['session']}, {'/'.join(record['folder'].split('/')[-2:])}: "
            f"{record['state']} after {record['ended'] - record['began']:.0f} s, "
            f"steps {record['began_at']:.0f} to {record['reached']:.0f}"
            for record in [*unbroken.sessions(), *sessions]
        ),
        f"sessions: {len(sessions)} in {sessions[-1]['ended'] - sessions[0]['began']:.0f} "
        f"s, {Counter(r['state'] for r in sessions)}; {len(made)} made steps{few}",
        f"the chain: killed {said.count(KILLED)}, ended early {said.count(ENDED)} times",
        f"steps made twice: {twice:.0f}",
        f"sessions beside another: {site.state['beside']}",
    ]


def compare(*sites: Site) -> str:
    """Return whether the last weights on two sites are equal."""
    folders = [Path(site.sessions()[-1]["folder"]) for site in sites]
    files = [max(f.glob("working/out/*/*/step_*/model.safetensors")) for f in folders]
    one, other = map(hash_file, files)
    equal = "of both" if one == other else f"and {other}, NOT equal"
    return f"sha256 of {files[0].parent.name}: {one} {equal}"


if __name__ == "__main__":
    main()
