"""Upload data sets and start notebooks by the command `kaggle`."""

import argparse
import json
import re
import shutil
import time
from pathlib import Path

from building import SOURCES, find_built, slug
from kaggle_command import BUSY, Refused, find_state, kaggle

ACCELERATOR = "NvidiaTeslaT4"


def run_push(options: argparse.Namespace) -> None:
    """Upload the data sets, wait until they are ready, and push the notebooks."""
    if shutil.which("kaggle") is None:
        raise Refused("the command kaggle is missing: pip install 'kaggle>=2.2'")
    built = find_built(options.out)
    wanted = options.notebook or SOURCES
    kernels = [f for f in built if f.parent.name == "kernels" and f.name in wanted]
    if not kernels:
        raise Refused(f"nothing to push in {options.out}: run kernels.py build first")
    for folder in kernels:
        attach_sources(folder, options.again)
    if not options.kernels_only:
        for folder in (f for f in built if f.parent.name == "datasets"):
            push_dataset(folder, options.message, options.wait)
    pushed: list[str] = []
    for folder in kernels:
        if waits_for := [name for name in SOURCES[folder.name] if name in pushed]:
            print(
                f"{folder.name} starts from the output of {', '.join(waits_for)}: when "
                "that is complete, run python kaggle/kernels.py push --kernels-only "
                f"--notebook {folder.name}"
            )
            continue
        attach_sources(folder, options.again)
        command = ["kernels", "push", "-p", str(folder), "--accelerator", ACCELERATOR]
        said = kaggle(*command).stdout
        print(said.strip())
        # It exits 0 whatever happens.
        if "successfully pushed" not in said or "not valid" in said:
            raise Refused(f"{folder} was not pushed: {said.strip()}")
        pushed.append(folder.name)


def attach_sources(folder: Path, again: bool) -> None:
    """Write into the metadata the kernels whose output this one reads.

    These are its own last version and the stage before, if they exist. Raises `Refused`
    if one of them is still running.
    """
    file = folder / "kernel-metadata.json"
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        user = metadata["id"].partition("/")[0]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise Refused(f"{file} was edited and has no id: build again") from None
    others = [f"{user}/{slug(f'MiniMind {name}')}" for name in SOURCES[folder.name]]
    states = {name: find_state(name) for name in (metadata["id"], *others)}
    busy = [f"{name} is {state}" for name, state in states.items() if state in BUSY]
    if busy and not again:
        raise Refused(
            f"{', '.join(busy)}: pushing {folder.name} now would start a second session "
            "without its output: wait, or push --again"
        )
    metadata["kernel_sources"] = [name for name, state in states.items() if state]
    file.write_text(f"{json.dumps(metadata, indent=2)}\n", encoding="utf-8")


def push_dataset(folder: Path, message: str, seconds: float) -> None:
    """Create a data set or a new version, and wait until it can be attached."""
    metadata = json.loads((folder / "dataset-metadata.json").read_bytes())
    name = metadata["id"]
    there = kaggle("datasets", "status", name).returncode == 0
    command = ["version", "-m", message] if there else ["create"]
    said = kaggle("datasets", command[0], "-p", str(folder), *command[1:]).stdout
    print(said.strip())
    if "is being created" not in said:
        raise Refused(f"{folder} was not uploaded: {said.strip()}")
    end = time.monotonic() + seconds
    time.sleep(max(0, min(seconds, 5)))  # the version before may be ready still
    while not re.search(
        r"(?<!not )\bready\b",
        said := kaggle("datasets", "status", name).stdout.lower(),
    ):
        if time.monotonic() > end or "error" in said:
            raise Refused(f"{name} is not ready yet ({said.strip()}): push again later")
        time.sleep(5)
