"""Folders that Kaggle accepts: the wheel, the data, notebooks with their parameters."""

import argparse
import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from kaggle_command import Refused, run

ROOT = Path(__file__).resolve().parents[1]
# The notebooks whose output a notebook reads, in addition to its own last version's.
SOURCES = {
    "start": (),
    "pretrain": (),
    "sft": ("pretrain",),
    "dpo": ("sft",),
    "chat": ("sft",),
    "curves": ("pretrain", "sft", "dpo"),
    "rlaif": ("sft",),
}
BUILT = [
    *(f"datasets/minimind-{name}" for name in ("data", "wheel")),
    *(f"kernels/{name}" for name in SOURCES),
]
DATASET, KERNEL = "dataset-metadata.json", "kernel-metadata.json"
INJECTED = "injected-parameters"  # papermill's tag of the cell with the -p
LATER = ("init_from", "max_session_hours", "resume")  # which a later version adds
OUT = Path("out/kaggle")
PARTS = ("minimind_nb", "pyproject.toml", "README.md", "LICENSE")


def run_build(options: argparse.Namespace) -> None:
    """Write data set and kernel folders below `--out`, and keep others of before."""
    user = find_user(options.user)
    names = list(dict.fromkeys(options.notebook or ["pretrain"]))
    baked = choose_parameters(names, options.p)
    before = find_built(options.out)
    data = options.out / "datasets" / "minimind-data"
    replaced = ("minimind-wheel", *names)
    kept = [] if options.fresh else [f for f in before if f.name not in replaced]
    there = os.listdir(data) if data in kept else []
    named = [v for key, v in options.p if key.endswith(("data_path", "chat_path"))]
    check_data(options.data, there, named)
    for folder in before:
        if folder not in kept:
            shutil.rmtree(folder)
    wheel = build_wheel(write_dataset(options.out, user, "wheel"))
    if options.data or data in kept:
        write_dataset(options.out, user, "data")
        for file in options.data:
            shutil.copyfile(file, data / file.name)
    for name in names:
        write_kernel(options.out, name, baked[name])
    built = find_built(options.out)
    sources = [f"{user}/{f.name}" for f in built if f.parent.name == "datasets"]
    for folder in built:
        if folder.parent.name == "kernels":
            attach(folder, user, sources, wheel)
        files = sorted(file.name for file in folder.iterdir())
        print(folder, *files, *(["(kept; --fresh drops it)"] if folder in kept else []))
    place = [] if options.out == OUT else ["--out", str(options.out)]
    push = shlex.join(["push", *place, "--notebook", *names])
    print(f"Next: pip install 'kaggle>=2.2.2', then python kaggle/kernels.py {push}")


def find_built(out: Path) -> list[Path]:
    """Return the folders below `out` that this command has built."""
    folders = [out / part for part in BUILT]
    return [f for f in folders if f.is_dir() and mark_of(f).is_file()]


def mark_of(folder: Path) -> Path:
    """Return the file that marks a folder as built by this command.

    It lies beside the folder, because everything in a data set folder is uploaded.
    """
    return folder.with_name(f".{folder.name}.built")


def check_data(files: list[Path], kept: list[str], wanted: list[str]) -> None:
    """Raise `Refused` if a file is missing, if two have the same name, if no parameter
    of the notebooks names data, or if one names what is neither new nor kept."""
    names = [file.name for file in files]
    known = ("None", "demo", *names, *kept)
    for name in wanted:
        if name not in known and not Path(name).is_absolute():
            raise Refused(f"data_path is {name}, which is not among --data FILE …")
    for file in files:
        if not file.is_file():
            raise Refused(f"{file} does not exist: check --data")
        if file.name == DATASET or names.count(file.name) > 1:
            raise Refused(f"{file.name} is taken, or given twice: rename that file")
    if files and not wanted:
        raise Refused(f"no notebook reads --data: add -p data_path {names[0]}")


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
    "sft.epochs" is the parameter of one notebook, and wins.
    Raises `Refused` for an unknown parameter and for an invalid value.
    """
    from papermill import inspect_notebook

    from minimind_nb.config import STAGES, TrainConfig, describe_unknown, kinds

    for name, value in given:
        if value in ("true", "false", "none", "null"):
            raise Refused(f"{name}='{value}': True, False and None are Python's")
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
    own = {f"{name}.{key}" for name in names for key in listed[name]}
    for name in values:
        if name not in known | own:
            problem = describe_unknown(name, known, "parameter")
            raise Refused(f"{problem} (of {', '.join(names)})")
    baked = {
        name: {key: value for key, value in values.items() if key in listed[name]}
        | {k: values[f"{name}.{k}"] for k in listed[name] if f"{name}.{k}" in values}
        for name in names
    }
    for name, chosen in baked.items():
        stage = {"stage": name} if name in STAGES else {}
        fields = {key: value for key, value in chosen.items() if key in settings}
        try:
            for key in LATER:
                if key in chosen.get("settings", {}):
                    raise Refused(f"{key} is among settings: pass it as -p {key} VALUE")
            TrainConfig(**(stage | fields), **chosen.get("settings", {}))
        except (ValueError, TypeError) as error:
            raise Refused(str(error)) from None
    return baked


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def build_wheel(folder: Path) -> Path:
    """Build the wheel into a folder, from a copy of the sources."""
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
        answer = run([*pip, "--wheel-dir", str(folder.resolve()), copy])
    if answer.returncode:
        hint = "" if offline else ' (first try: pip install "setuptools>=77")'
        raise Refused(f"the wheel could not be built{hint}:\n{answer.stdout[-2000:]}")
    (wheel,) = folder.glob("*.whl")
    return wheel


def write_dataset(out: Path, user: str, name: str) -> Path:
    """Make a data set folder, or take over the one kept, and write its metadata."""
    folder = out / "datasets" / f"minimind-{name}"
    _make(folder)
    _fill(folder / DATASET, {"title": f"MiniMind {name}", "id": id_of(user, name)})
    return folder


def write_kernel(out: Path, name: str, parameters: dict[str, Any]) -> None:
    """Make a kernel folder that holds the notebook with its parameters."""
    import nbformat

    folder = out / "kernels" / name
    _make(folder)
    nbformat.write(prepare(name, parameters), folder / f"{name}.ipynb")


def attach(folder: Path, user: str, sources: list[str], wheel: Path) -> None:
    """Write a kernel's metadata, and into its notebook the wheel that it installs."""
    import nbformat

    file = folder / f"{folder.name}.ipynb"
    notebook = nbformat.read(file, as_version=4)
    stamp(notebook, wheel)
    nbformat.write(notebook, file)
    cells = [c.source for c in notebook.cells if INJECTED in c.metadata.get("tags", ())]
    if internet := bool(re.search("[\"']hf:", "".join(cells))):
        print(f"{folder} gets internet, since a parameter names hf:…")
    values = {"id": id_of(user, folder.name), "title": f"MiniMind {folder.name}"}
    values |= {"code_file": file.name, "enable_internet": internet}
    _fill(folder / KERNEL, {**values, "dataset_sources": sources})


def prepare(name: str, parameters: dict[str, Any]) -> Any:
    """Return the notebook of this name with its parameters and without outputs."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    original = load_notebook_node(str(ROOT / f"notebooks/{name}.ipynb"))
    notebook = parameterize_notebook(original, parameters) if parameters else original
    notebook.metadata.pop("papermill", None)
    for cell in notebook.cells:
        cell.metadata.pop("papermill", None)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return notebook


def stamp(notebook: Any, wheel: Path) -> int:
    """Write the wheel that a notebook may install into its cell; return the position."""
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    line = f'WHEEL, SHA256 = "{wheel.name}", "{digest}"'
    for position, cell in enumerate(notebook.cells):
        cell.source, found = re.subn("(?m)^WHEEL, SHA256 = .*", line, cell.source)
        if found:
            return position
    raise Refused("a notebook has no cell that installs the package: build --fresh")


def _make(folder: Path) -> None:
    if folder.exists() and not mark_of(folder).is_file():
        raise Refused(f"{folder} was not built by this command: pass another --out")
    folder.mkdir(parents=True, exist_ok=True)
    mark_of(folder).touch()


def id_of(user: str, name: str) -> str:
    """Return Kaggle's id of a notebook or data set, which follows from its title."""
    return f"{user}/minimind-{name}"


def _fill(file: Path, values: dict[str, Any]) -> None:
    template = json.loads((ROOT / "kaggle" / file.name).read_text(encoding="utf-8"))
    text = json.dumps(template | values, indent=2)
    file.write_text(f"{text}\n", encoding="utf-8")
