"""Build the wheel, the data and the notebooks for Kaggle, and push them.

`python kaggle/kernels.py build --user NAME` needs no network where setuptools is
installed; `python kaggle/kernels.py push` needs the command `kaggle` and its key.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# The notebooks whose output a notebook reads, in addition to its own last version's.
SOURCES = {
    "pretrain": (),
    "sft": ("pretrain",),
    "dpo": ("sft",),
    "chat": ("sft",),
    "curves": ("pretrain", "sft", "dpo"),
}
ACCELERATOR = "NvidiaTeslaT4"
BUSY = ("QUEUED", "RUNNING", "CANCEL_REQUESTED", "NEW_SCRIPT")
PATIENCE_SECONDS = 3600  # for the upload of a data set
BUILT = [
    *(f"datasets/minimind-{name}" for name in ("data", "wheel")),
    *(f"kernels/{name}" for name in SOURCES),
]
PARTS = ("minimind_nb", "pyproject.toml", "README.md", "LICENSE")


class Refused(Exception):
    """An error with what to type instead."""


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="write the folders to push")
    build.set_defaults(run=run_build)
    build.add_argument("--user", help="your name on Kaggle")
    build.add_argument("--data", nargs="+", default=[], type=Path, metavar="FILE")
    build.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    push = commands.add_parser("push", help="upload data sets and start notebooks")
    push.set_defaults(run=run_push)
    push.add_argument("--again", action="store_true", help="even if one is running")
    push.add_argument("--kernels-only", action="store_true", help="no data sets")
    push.add_argument("--message", "-m", default="minimind_nb", help="of the versions")
    push.add_argument("--wait", type=float, default=900, help="seconds for data sets")
    for command in (build, push):
        command.add_argument("--notebook", nargs="+", choices=SOURCES, metavar="NAME")
        command.add_argument("--out", type=Path, default=Path("out/kaggle"))
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (Refused, OSError) as reason:
        raise SystemExit(f"kernels.py: {reason}") from None


def run_build(options: argparse.Namespace) -> None:
    """Write data set and kernel folders below `--out`, replacing those of before."""
    user = find_user(options.user)
    names = list(dict.fromkeys(options.notebook or ["pretrain"]))
    baked = choose_parameters(names, options.p)
    check_data(options.data, dict(options.p).get("data_path"))
    for folder in find_built(options.out):
        shutil.rmtree(folder)
    wheel = write_dataset(options.out, user, "MiniMind wheel")
    digest = build_wheel(wheel)
    sources = [f"{user}/{wheel.name}"]
    if options.data:
        data = write_dataset(options.out, user, "MiniMind data")
        for file in options.data:
            shutil.copyfile(file, data / file.name)
        sources.append(f"{user}/{data.name}")
    for name in names:
        write_kernel(options.out, user, name, baked[name], sources, wheel_digest=digest)
    for folder in find_built(options.out):
        print(folder, *sorted(file.name for file in folder.iterdir()))


def find_built(out: Path) -> list[Path]:
    """Return the folders below `out` that this command has built."""
    folders = [out / part for part in BUILT]
    return [f for f in folders if f.is_dir() and mark_of(f).is_file()]


def mark_of(folder: Path) -> Path:
    """Return the file that marks a folder as built by this command.

    It lies beside the folder, because everything in a data set folder is uploaded.
    """
    return folder.with_name(f".{folder.name}.built")


def check_data(files: list[Path], wanted: str | None) -> None:
    """Raise `Refused` if a file is missing, if two have the same name, or if the
    data_path of the notebooks is not among them."""
    names = [file.name for file in files]
    if wanted not in (None, "None", "demo", *names) and not Path(wanted).is_absolute():
        raise Refused(f"data_path is {wanted}, which is not among --data FILE …")
    for file in files:
        if not file.is_file():
            raise Refused(f"{file} does not exist: check --data")
        if file.name == "dataset-metadata.json" or names.count(file.name) > 1:
            raise Refused(f"{file.name} is taken, or given twice: rename that file")


def find_user(named: str | None) -> str:
    """Return the user name as given, from KAGGLE_USERNAME, or from kaggle.json."""
    user = named or os.environ.get("KAGGLE_USERNAME")
    file = Path.home() / ".kaggle" / "kaggle.json"
    if not user and file.is_file():
        try:
            user = json.loads(file.read_bytes()).get("username")
        except (ValueError, AttributeError):
            user = None
    if not isinstance(user, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", user):
        raise Refused(
            f"{user!r} is not a Kaggle user name (letters, digits, hyphens): pass "
            "--user NAME, set KAGGLE_USERNAME, or put the file from Kaggle's settings "
            f"at {file}"
        )
    return user.lower()


def choose_parameters(names: list[str], given: list[list[str]]) -> dict[str, Any]:
    """Return for each notebook the given parameters that it takes, as Python values.

    A value that is not a Python literal is a string. A notebook takes the parameters
    that it lists; those that train take also every setting that none of them lists.
    Raises `Refused` for an unknown parameter and for an invalid value.
    """
    from papermill import inspect_notebook

    from minimind_nb.config import STAGES, TrainConfig, describe_unknown, kinds

    values = {name: _literal(value) for name, value in given}
    listed = {
        name: inspect_notebook(ROOT / f"notebooks/{name}.ipynb") for name in names
    }
    settings = kinds().keys() - {"stage"}
    trained = [name for name in names if name in STAGES]
    others = settings.difference(*(listed[name] for name in trained))
    for name in trained:
        listed[name] |= dict.fromkeys(others)
    known = set().union(*listed.values())
    for name in values:
        if name not in known:
            problem = describe_unknown(name, known, "parameter")
            raise Refused(f"{problem} (of {', '.join(names)})")
    baked = {
        name: {key: value for key, value in values.items() if key in listed[name]}
        for name in names
    }
    for name, chosen in baked.items():
        stage = {"stage": name} if name in STAGES else {}
        fields = {key: value for key, value in chosen.items() if key in settings}
        try:
            TrainConfig(**(stage | fields), **chosen.get("settings", {}))
        except (ValueError, TypeError) as error:
            raise Refused(f"{error} (True, False and None are Python's)") from None
    return baked


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build_wheel(folder: Path) -> str:
    """Build the wheel into a folder, from a copy of the sources; return its sha256."""
    import importlib.metadata

    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        version = "0"
    # An older setuptools cannot read pyproject.toml; then pip fetches a newer one.
    offline = ["--no-build-isolation"] if int(version.split(".")[0]) >= 77 else []  # noqa: PLR2004
    with tempfile.TemporaryDirectory() as copy:
        for part in PARTS:
            ignore = shutil.ignore_patterns("__pycache__")
            if (ROOT / part).is_dir():
                shutil.copytree(ROOT / part, Path(copy) / part, ignore=ignore)
            else:
                shutil.copyfile(ROOT / part, Path(copy) / part)
        pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", *offline]
        answer = _run([*pip, "--wheel-dir", str(folder.resolve()), copy])
    if answer.returncode:
        hint = "" if offline else ' (first try: pip install "setuptools>=77")'
        raise Refused(f"the wheel could not be built{hint}:\n{answer.stdout[-2000:]}")
    (wheel,) = folder.glob("*.whl")
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def write_dataset(out: Path, user: str, title: str) -> Path:
    """Make a data set folder that holds only its metadata."""
    folder = out / "datasets" / slug(title)
    _make(folder)
    values = {"title": title, "id": f"{user}/{folder.name}"}
    _fill("dataset-metadata.json", folder, values)
    return folder


def write_kernel(
    out: Path,
    user: str,
    name: str,
    parameters: dict[str, Any],
    sources: list[str],
    *,
    wheel_digest: str,
) -> None:
    """Make a kernel folder: the notebook with its parameters, and its metadata.

    The notebook installs only the wheel of this sha256.
    """
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    folder = out / "kernels" / name
    _make(folder)
    original = load_notebook_node(str(ROOT / f"notebooks/{name}.ipynb"))
    notebook = parameterize_notebook(original, parameters)
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.source = cell.source.replace('.whl", None', f'.whl", "{wheel_digest}"')
    file = folder / f"{name}.ipynb"
    nbformat.write(notebook, file)
    title = f"MiniMind {name}"
    values = {"id": f"{user}/{slug(title)}", "title": title, "code_file": file.name}
    _fill("kernel-metadata.json", folder, {**values, "dataset_sources": sources})


def _make(folder: Path) -> None:
    if folder.exists():
        raise Refused(f"{folder} was not built by this command: pass another --out")
    folder.mkdir(parents=True)
    mark_of(folder).touch()


def slug(title: str) -> str:
    """Return the form of a title in Kaggle's addresses."""
    return re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")


def _fill(template: str, folder: Path, values: dict[str, Any]) -> None:
    metadata = json.loads((ROOT / "kaggle" / template).read_text(encoding="utf-8"))
    text = json.dumps(metadata | values, indent=2)
    (folder / template).write_text(f"{text}\n", encoding="utf-8")


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
        said = _kaggle(*command).stdout
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


def find_state(kernel: str) -> str | None:
    """Return the state of a kernel's last version, or None if it does not exist."""
    said = _kaggle("kernels", "status", kernel).stdout
    found = re.search(r'has status "(?:\w+\.)?(\w+)"', said)
    if found:
        return found[1].upper()
    # Kaggle gives the same answer for kernels that are missing and that are private.
    if re.search(r"40[34]|not found|cannot access", said, re.IGNORECASE):
        return None
    raise Refused(
        f"the state of {kernel} is unknown (kaggle said {said.strip()!r}): check your key "
        f"and `kaggle kernels status {kernel}`"
    )


def push_dataset(folder: Path, message: str, seconds: float) -> None:
    """Create a data set or a new version, and wait until it can be attached."""
    metadata = json.loads((folder / "dataset-metadata.json").read_bytes())
    name = metadata["id"]
    there = _kaggle("datasets", "status", name).returncode == 0
    command = ["version", "-m", message] if there else ["create"]
    said = _kaggle("datasets", command[0], "-p", str(folder), *command[1:]).stdout
    print(said.strip())
    if "is being created" not in said:
        raise Refused(f"{folder} was not uploaded: {said.strip()}")
    end = time.monotonic() + seconds
    time.sleep(max(0, min(seconds, 5)))  # the version before may be ready still
    while not re.search(
        r"(?<!not )\bready\b",
        said := _kaggle("datasets", "status", name).stdout.lower(),
    ):
        if time.monotonic() > end or "error" in said:
            raise Refused(f"{name} is not ready yet ({said.strip()}): push again later")
        time.sleep(5)


def _kaggle(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(["kaggle", *arguments])


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with stderr in its output and without input."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        limit = f"{PATIENCE_SECONDS / 60:.0f} min"
        raise Refused(f"`{shlex.join(command)}` did not end in {limit}") from None
    except OSError as error:
        raise Refused(f"`{command[0]}` cannot be run: {error}") from None


if __name__ == "__main__":
    main()
