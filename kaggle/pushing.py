"""Upload data sets and start notebooks by the command `kaggle`."""

import argparse
import contextlib
import json
import re
import shutil
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from building import DATASET, INJECTED, KERNEL, SOURCES, find_built, id_of
from kaggle_command import (
    NotPushed,
    Refused,
    Unreadable,
    find_state,
    is_busy,
    kaggle,
    shorten,
)

ACCELERATOR = "NvidiaTeslaT4"
MISSING = r"\b40[34]\b|not found|permission"


def run_push(options: argparse.Namespace) -> None:
    """Upload the data sets, wait until they are ready, and push the notebooks."""
    kernels = find_kernels(options)
    for folder in kernels:
        attach_sources(folder, options.again)
    if not options.kernels_only:
        push_datasets(options.out, options.wait)
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
        push_kernel(folder)
        pushed.append(folder.name)


def find_kernels(options: argparse.Namespace) -> list[Path]:
    """Return the built folders of the notebooks that are asked for.

    Raises `Refused` if there are none, or without the command `kaggle`.
    """
    check_command()
    wanted = options.notebook or SOURCES
    built = [f for f in find_built(options.out) if f.parent.name == "kernels"]
    if found := [folder for folder in built if folder.name in wanted]:
        return found
    raise Refused(f"nothing to push in {options.out}: run kernels.py build first")


def check_command() -> None:
    """Raise `Refused` without the command `kaggle`."""
    if shutil.which("kaggle") is None:
        raise Refused("the command kaggle is missing: pip install 'kaggle>=2.2.2'")


def push_command(folder: Path) -> list[str]:
    """Return the arguments that push a kernel's folder."""
    return ["kernels", "push", "-p", str(folder), "--accelerator", ACCELERATOR]


def push_kernel(folder: Path) -> int | None:
    """Push a kernel, which starts a session, and return the number of its version.

    Raises `NotPushed` if it started none, `Unreadable` if that is unknown, and `Refused`
    if the session that it started lacks a source.
    """
    said = kaggle(*push_command(folder))
    print(said.strip())
    # It exits 0 whatever happens.
    if "successfully pushed" in said and "not valid" not in said:
        version = re.search(r"version (\d+) successfully", said)
        return int(version[1]) if version else None
    text = f"{folder} was not pushed: {shorten(said)}"
    if "successfully pushed" in said:
        raise Refused(
            f"{text}; the session that has started lacks them: cancel it on Kaggle"
        )
    if re.search(r"\b403 client|permission|forbidden", said, re.IGNORECASE):
        raise NotPushed(
            f"{text}; this key has no rights there: is --user the name it belongs to?"
        )
    raise NotPushed(text) if "Kernel push error" in said else Unreadable(text)


def kernel_of(folder: Path) -> str:
    """Return the id of the kernel in a built folder: "USER/SLUG"."""
    return read_metadata(folder)["id"]


def read_metadata(folder: Path) -> dict[str, Any]:
    """Return a kernel's metadata; raises `Refused` without a usable id."""
    file = folder / KERNEL
    try:
        metadata = json.loads(file.read_text(encoding="utf-8"))
        if "/" in metadata["id"]:
            return metadata
    except (ValueError, KeyError, TypeError):
        pass
    raise Refused(f"{file} was edited and has no id: build again")


def write_metadata(folder: Path, metadata: dict[str, Any]) -> None:
    """Write a kernel's metadata."""
    text = f"{json.dumps(metadata, indent=2)}\n"
    (folder / KERNEL).write_text(text, encoding="utf-8")


def write_version(
    built: Path,
    folder: Path,
    kernel: str,
    sources: Iterable[str] = (),
    lines: Iterable[str] = (),
) -> Path:
    """Write the folder of a version: what was built, with another id, and with sources
    and lines of parameters. Return the folder."""
    import nbformat

    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(built, folder)
    metadata = read_metadata(built)
    suffix = kernel.removeprefix(metadata["id"]).replace("-", " ").upper()
    title = metadata["title"] + suffix
    changed = {"id": kernel, "title": title, "kernel_sources": list(sources)}
    write_metadata(folder, metadata | changed)
    file = folder / metadata["code_file"]
    notebook = nbformat.read(file, as_version=4)
    tags = [cell.metadata.get("tags", ()) for cell in notebook.cells]
    if not any(INJECTED in own for own in tags):  # built without -p
        cell = nbformat.v4.new_code_cell("# Parameters", metadata={"tags": [INJECTED]})
        position = next(i for i, own in enumerate(tags) if "parameters" in own) + 1
        notebook.cells.insert(position, cell)
    for cell in notebook.cells:
        if INJECTED in cell.metadata.get("tags", ()):
            cell.source = "\n".join([cell.source.rstrip("\n"), *lines, ""])
    nbformat.write(notebook, file)
    return folder


def attach_sources(folder: Path, again: bool) -> None:
    """Write into the metadata the kernels whose output this one reads.

    These are its own last version and the stage before, if they exist. Raises `Refused`
    if one of them is still running.
    """
    metadata = read_metadata(folder)
    user, out = metadata["id"].partition("/")[0], folder.parents[1]
    others = [find_holder(out, user, name) for name in SOURCES[folder.name]]
    states = {name: find_state(name) for name in (metadata["id"], *others)}
    busy = [f"{name} is {state}" for name, state in states.items() if is_busy(state)]
    if busy and not again:
        raise Refused(
            f"{', '.join(busy)}: pushing {folder.name} now would start a second session "
            "without its output: wait, or push --again"
        )
    metadata["kernel_sources"] = [name for name, state in states.items() if state]
    write_metadata(folder, metadata)


def find_holder(out: Path, user: str, name: str) -> str:
    """Return the kernel that holds a notebook's output, the last good one of a chain."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        if good := json.loads((out / "chain.json").read_bytes())["runs"][name]["good"]:
            return good
    return id_of(user, name)


def push_datasets(out: Path, seconds: float) -> None:
    """Upload the data sets in `out`, and wait until they can be attached."""
    for folder in find_built(out):
        if folder.parent.name == "datasets":
            push_dataset(folder, seconds)


def push_dataset(folder: Path, seconds: float) -> None:
    """Create a data set or a new version, and wait until it can be attached."""
    metadata = json.loads((folder / DATASET).read_bytes())
    name = metadata["id"]
    there = not re.search(MISSING, kaggle("datasets", "status", name), re.IGNORECASE)
    command = ["version", "-m", "minimind_nb"] if there else ["create"]
    said = kaggle("datasets", command[0], "-p", str(folder), *command[1:])
    print(said.strip())
    if "is being created" not in said:
        raise Refused(f"{folder} was not uploaded: {shorten(said)}")
    end = time.monotonic() + seconds
    time.sleep(max(0, min(seconds, 5)))  # the version before may be ready still
    while not re.search(
        r"(?<!not )\bready\b",
        said := kaggle("datasets", "status", name).lower(),
    ):
        if time.monotonic() > end or "error" in said:
            raise Refused(
                f"{name} is not ready yet ({shorten(said)}): push again later"
            )
        time.sleep(5)
