"""Promises about the package as a whole: what it loads, and who may import whom."""

import ast
import dataclasses
import functools
import importlib
import itertools
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import pytest

import minimind_nb

PACKAGE = "minimind_nb"
# Each room may import from the rooms before it only.
ROOMS = (
    {"config"},
    {"lifetime", "hardware"},
    {"storage"},
    {"session"},
    {"errors", "progress_bar"},
    {"hub"},
    {"data"},
    {"launch"},
    {"model"},
    {"monitor"},
    {"training"},
    {"planning", "survey", "benchmark", "diagnosis", "notebook", "cli", "__main__", ""},
)
HEAVY = "torch matplotlib ipywidgets transformers IPython numpy tokenizers tqdm".split()
MOST_LINES = 350
MOST_LINES_OF_ONE = {"model.architecture": 620}
MOST_LINES_OF_A_FUNCTION = 60
MOST_LINES_OF_ALL = 14_150


@dataclasses.dataclass(frozen=True)
class Module:
    """One module: `name` is below the package, "" for the package itself."""

    name: str
    is_package: bool
    source: str

    @functools.cached_property
    def nodes(self) -> list[ast.AST]:
        return list(ast.walk(ast.parse(self.source)))

    @property
    def lines(self) -> int:
        return len(self.source.splitlines())


def find_modules(folder: Path, above: tuple[str, ...] = ()) -> Iterator[Module]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and (path / "__init__.py").is_file():
            yield from find_modules(path, (*above, path.name))
        elif path.suffix == ".py":
            is_package = path.stem == "__init__"
            parts = above if is_package else (*above, path.stem)
            yield Module(".".join(parts), is_package, path.read_text(encoding="utf-8"))


@functools.cache
def modules() -> dict[str, Module]:
    with resources.as_file(resources.files(PACKAGE)) as folder:
        return {module.name: module for module in find_modules(folder)}


def inside(name: str) -> str | None:
    """The name below the package, or None for what lies outside of it."""
    head, _, rest = name.partition(".")
    return rest if head == PACKAGE else None


def imports(module: Module) -> set[str]:
    """The modules of the package that a module imports, at its top or later."""
    found: set[str] = set()
    for node in module.nodes:
        if isinstance(node, ast.Import):
            found |= {n for a in node.names if (n := inside(a.name)) is not None}
        elif isinstance(node, ast.ImportFrom):
            base = source_of(node, module)
            if base is not None:
                below = (f"{base}.{alias.name}".strip(".") for alias in node.names)
                found |= {name if name in modules() else base for name in below}
    return found


def source_of(node: ast.ImportFrom, module: Module) -> str | None:
    """What a `from … import` names, relative or absolute, below the package."""
    if not node.level:
        return inside(node.module or "")
    parts = module.name.split(".") if module.name else []
    up = node.level - module.is_package
    parts = parts[: len(parts) - up] if up else parts
    return ".".join([*parts, *([node.module] if node.module else [])])


def room(name: str) -> int:
    """The place of a module's room in the list."""
    top = name.partition(".")[0]
    return next(n for n, names in enumerate(ROOMS) if top in names)


def calls(module: Module) -> Iterator[tuple[str, ast.Call]]:
    for node in module.nodes:
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_importing_the_package_loads_nothing_heavy():
    code = (
        f"import sys, {PACKAGE}\n"
        f"from {PACKAGE} import TrainConfig\n"
        f"{PACKAGE}.TrainConfig(preset='demo'), dir({PACKAGE})\n"
        f"print(*[name for name in {HEAVY!r} if name in sys.modules])"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert answer.stdout.strip() == ""


@pytest.mark.parametrize("name", minimind_nb.__all__)
def test_every_public_name_resolves(name):
    value = getattr(minimind_nb, name)
    assert value.__name__ == name
    assert value.__doc__
    assert name in dir(minimind_nb)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    typed = "trian"
    with pytest.raises(AttributeError, match="'minimind_nb' has no attribute 'trian'"):
        getattr(minimind_nb, typed)


def test_public_names_are_listed_for_people_and_type_checkers_alike():
    stub = resources.files(minimind_nb) / "__init__.pyi"
    exported = re.findall(r"^from \.\S+ import (\w+) as \1$", stub.read_text(), re.M)
    assert sorted(exported) == minimind_nb.__all__
    assert {"TrainConfig", "train", "Run", "load"} <= set(exported)


def test_no_public_name_is_hidden_by_a_module():
    importlib.import_module(f"{PACKAGE}.training.api")
    assert not set(minimind_nb.__all__) & {name.split(".")[0] for name in modules()}


def test_the_import_graph_is_read_right():
    assert imports(modules()["storage.file_system"]) == set()
    storage = {"storage.file_system", "storage.verified"}
    assert imports(modules()["storage.run_folder"]) == storage
    assert {"config", "launch.spawn"} <= imports(modules()["cli"])
    assert "config.presets" in imports(modules()["config"])
    assert imports(modules()["__main__"]) == {"cli"}
    source = (
        "import minimind_nb.training.api, torch\nfrom .. import cli\n"
        "from ..storage import verified\nfrom minimind_nb.model.loading import load\n"
        "def f():\n    from . import token_cache, nothing\n    from .jsonl import Chunk\n"
    )
    assert imports(Module("data.trial", False, source)) == {
        *("training.api", "cli", "storage.verified", "model.loading"),
        *("data.token_cache", "data", "data.jsonl"),
    }


def test_rooms_import_only_from_the_rooms_above_them():
    wrong = [
        f"{module.name} imports {name}"
        for module in modules().values()
        for name in imports(module)
        if room(name) > room(module.name)
    ]
    assert not wrong


def test_there_are_no_circles():
    graph = {name: imports(module) for name, module in modules().items()}
    while True:
        leaves = {name for name, targets in graph.items() if not targets}
        if not leaves:
            break
        graph = {n: t - leaves for n, t in graph.items() if n not in leaves}
    assert not graph


def test_workers_see_nothing_of_the_monitor_but_the_metrics():
    callers = {"training.api", "training.measurement", "training.runs"}
    wrong = [
        f"{module.name} imports {name}"
        for module in modules().values()
        for name in imports(module)
        if module.name.startswith("training.") and module.name not in callers
        if name.startswith("monitor") and name != "monitor.metrics"
    ]
    assert not wrong
    reached, new = set(), {"training.worker"}
    while new:
        reached |= new
        new = set().union(*(imports(modules()[name]) for name in new)) - reached
    assert {name for name in reached if name.startswith("monitor.")} == {
        "monitor.metrics"
    }


@pytest.mark.parametrize("name", ["exec", "eval", "sys.exit", "exit", "quit"])
def test_forbidden_calls_are_nowhere(name):
    allowed = {"cli"} if name == "sys.exit" else set()
    found = {m.name for m in modules().values() for call, _ in calls(m) if call == name}
    assert found <= allowed


@pytest.mark.parametrize(
    ("argument", "value"),
    [("weights_only", False), ("strict", False), ("trust_remote_code", True)],
)
def test_forbidden_arguments_are_nowhere(argument, value):
    found = [
        f"{module.name}: {ast.unparse(call)}"
        for module in modules().values()
        for name, call in calls(module)
        for keyword in call.keywords
        if keyword.arg == argument and name != "zip"
        if isinstance(keyword.value, ast.Constant) and keyword.value.value is value
    ]
    assert not found


def test_the_import_path_the_warnings_and_the_own_file_are_left_alone():
    forbidden = {"sys.path", "__file__", "SystemExit"}
    found = [
        f"{module.name}: {ast.unparse(node)}"
        for module in modules().values()
        for node in module.nodes
        if isinstance(node, ast.Attribute | ast.Name)
        if ast.unparse(node) in forbidden
    ]
    assert found == ["launch.spawn: SystemExit"]  # of processes without work
    found = [
        f"{module.name}: {ast.unparse(call)}"
        for module in modules().values()
        for name, call in calls(module)
        if name.endswith(("filterwarnings", "simplefilter"))
        if call.args and ast.unparse(call.args[0]) == "'ignore'"
    ]
    assert not found


def test_no_server_listens_to_the_world():
    assert not [m.name for m in modules().values() if "0.0.0.0" in m.source]


def test_nothing_is_pickled():
    found = [
        f"{module.name}: {ast.unparse(node)}"
        for module in modules().values()
        for node in module.nodes
        if isinstance(node, ast.Import | ast.ImportFrom)
        if any(name in ast.unparse(node).split() for name in ("pickle", "dill"))
    ]
    assert not found


def test_modules_do_their_work_in_functions():
    """A loop, a block or a bare call at the top of a module is work at import."""
    allowed = ast.Import, ast.ImportFrom, ast.Assign, ast.AnnAssign, ast.FunctionDef
    wrong = []
    for module in modules().values():
        for node in ast.parse(module.source).body:
            if isinstance(node, (*allowed, ast.ClassDef)):
                continue
            if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) in (
                "TYPE_CHECKING",
                "__name__ == '__main__'",
            ):
                continue
            wrong.append(f"{module.name}:{node.lineno}")
    assert not wrong


def test_modules_and_functions_are_short():
    long_modules = {
        module.name: module.lines
        for module in modules().values()
        if module.lines > MOST_LINES_OF_ONE.get(module.name, MOST_LINES)
    }
    long_functions = {
        f"{module.name}.{node.name}": length
        for module in modules().values()
        for node in module.nodes
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and node.end_lineno is not None
        and (length := node.end_lineno - node.lineno + 1) > MOST_LINES_OF_A_FUNCTION
    }
    assert not long_modules
    assert not long_functions


def test_the_whole_package_is_small():
    with resources.as_file(resources.files(PACKAGE)) as folder:
        pages = [p for kind in ("js", "css", "html") for p in folder.rglob(f"*.{kind}")]
        lines = sum(len(page.read_text("utf-8").splitlines()) for page in pages)
    lines += sum(module.lines for module in modules().values())
    assert lines < MOST_LINES_OF_ALL


def test_modules_are_described_and_none_is_a_drawer_for_everything():
    names = set(itertools.chain(*(name.split(".") for name in modules())))
    assert not names & {"utils", "util", "common", "helpers", "misc"}
    assert not [m.name for m in modules().values() if not m.source.startswith('"""')]


def test_the_type_marker_is_shipped():
    assert resources.files(PACKAGE).joinpath("py.typed").is_file()
