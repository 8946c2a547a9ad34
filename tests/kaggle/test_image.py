"""The notebooks as Kaggle executes them; `make test-kaggle-image` runs these tests.

The Python that runs them has the versions of Kaggle's image, and no minimind_nb.
"""

import functools
import sys
from pathlib import Path
from typing import Any

import building
import kernels
import nbformat
import psutil
import pytest
from nbformat.v4 import new_code_cell, new_notebook
from support.kaggle_machine import (
    NOTEBOOK,
    PAGE,
    Version,
    execute_version,
    why_no_namespaces,
)

import minimind_nb as mm

pytestmark = pytest.mark.kaggle_image
PYTHON = Path(sys.executable)
WHEEL, RUN = "datasets/ann/minimind-wheel", "out/pretrain_128"
# Kaggle mounts in both ways; of a chain of notebooks each meets one of them.
LAYOUTS = {"sft": "slugs", "chat": "slugs"}
PROBE = """
import errno, importlib.util, socket, time
from pathlib import Path
import psutil
assert importlib.util.find_spec("minimind_nb") is None
assert time.time() - psutil.Process().parents()[-1].create_time() < 60
for path in ("temp", "working"):
    Path("/kaggle", path, "written").touch()
for act in (Path("/kaggle/input/datasets/ann/minimind-wheel/x").touch,
            lambda: socket.create_connection(("192.0.2.1", 80), timeout=9)):
    try:
        act()
    except OSError as error:
        print(errno.errorcode[error.errno])
"""


def build(out: Path, *names: str, **parameters: object) -> dict[str, Path]:
    """Build notebooks, and return what their package cells need to be mounted."""
    given = [word for pair in parameters.items() for word in ("-p", *map(str, pair))]
    kernels.main(
        ["build", "--user", "ann", "--out", str(out), "--notebook", *names, *given]
    )
    return {WHEEL: out / WHEEL.replace("/ann", "")}


@pytest.fixture(scope="module")
def version_of(tmp_path_factory) -> Any:
    """A function that executes a notebook, and before it those whose output it reads."""
    out = tmp_path_factory.mktemp("kaggle")
    wheel = build(out, *building.SOURCES)

    @functools.cache
    def version(name: str) -> Version:
        sources = wheel | {
            f"notebooks/ann/minimind-{before}": version(before).output
            for before in building.SOURCES[name]
        }
        notebook, working = out / f"kernels/{name}/{name}.ipynb", out / name / "working"
        layout = LAYOUTS.get(name, "owners")
        found = execute_version(PYTHON, notebook, sources, working, layout=layout)
        mounted = read_files(working.with_name("input"))
        attached = [read_files(folder) for folder in sources.values()]
        assert sorted(mounted) == sorted(sum(attached, [])), "inputs stay as they are"
        return found

    return version


def last_step(run: mm.Run) -> int:
    return run.history.select("train")[-1]["step"]


def read_files(folder: Path) -> list[tuple[str, bytes]]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return [(path.name, path.read_bytes()) for path in files]


@pytest.mark.parametrize("name", building.SOURCES)
def test_a_notebook_runs_and_is_saved(version_of, name) -> None:
    version = version_of(name)
    assert version.state == "COMPLETE", version.log[-5000:]
    assert "does not fit" not in version.log
    saved = nbformat.read(version.output / NOTEBOOK, as_version=4)
    assert "widgets" not in saved.metadata
    outputs = {
        cell.source: cell.outputs for cell in saved.cells if cell.cell_type == "code"
    }
    kinds = {
        kind for found in outputs.values() for o in found for kind in o.get("data", ())
    }
    assert kinds <= {"text/plain", "text/html", "image/png"}, "no state of widgets"
    assert sum(map(len, outputs.values())) < 16, "no flood"
    for source, found in outputs.items():
        assert not any(o.get("name") == "stderr" for o in found), source
        if any(call in source for call in ("mm.train(", "mm.inspect(")):
            (chart,) = found
            assert {"text/html", "image/png"} <= chart.data.keys()
    size, page = (version.output / NOTEBOOK).stat().st_size, version.output / PAGE
    assert size < 500_000 and page.stat().st_size < 1_200_000
    if name in mm.config.STAGES:
        run = mm.Run(version.output / "out" / f"{name}_128")
        assert (run.status, last_step(run)) == ("finished", 12)
        if not why_no_namespaces():  # token caches are not saved
            assert not (version.output / "out" / "cache").exists()


def test_a_session_ends_in_time_and_the_next_version_resumes(tmp_path) -> None:
    first, second = tmp_path / "1", tmp_path / "2"
    notebook = "kernels/pretrain/pretrain.ipynb"

    def execute(folder: Path, sources: dict[str, Path], layout: str) -> Version:
        return execute_version(
            PYTHON,
            folder / notebook,
            sources,
            folder / "working",
            run_type="Interactive",
            layout=layout,
        )

    wheel = build(first, "pretrain", trial=False, epochs=999, max_session_hours=0.02)
    stopped = execute(first, wheel, "owners")
    assert (stopped.state, stopped.seconds < 120) == ("COMPLETE", True), stopped.log
    run = mm.Run(stopped.output / RUN)
    assert run.status == "time_budget"
    reached = last_step(run)
    wheel = build(second, "pretrain", trial=False, epochs=999, max_steps=reached + 5)
    sources = wheel | {"notebooks/ann/minimind-pretrain": stopped.output}
    resumed = execute(second, sources, "slugs")
    assert resumed.state == "COMPLETE", resumed.log
    run = mm.Run(resumed.output / RUN)
    assert (run.status, last_step(run)) == ("finished", reached + 5)
    events = [row["event"] for row in run.history.select("event")]
    assert events.index("end") < events.index("resume")


def test_the_machine_is_as_kaggles(tmp_path) -> None:
    if reason := why_no_namespaces():
        pytest.skip(f"namespaces are forbidden: {reason}")
    (tmp_path / "folder").mkdir()
    file, working = tmp_path / "probe.ipynb", tmp_path / "working"

    def execute(code: str, **more: Any) -> Version:
        notebook = new_notebook(cells=[new_code_cell(code)])
        notebook.metadata.kernelspec = {"name": "python3", "display_name": "Python 3"}
        nbformat.write(notebook, file)
        return execute_version(
            PYTHON, file, {WHEEL: tmp_path / "folder"}, working, **more
        )

    found = execute(PROBE)
    assert found.state == "COMPLETE", found.log
    assert found.log.count("EROFS") == found.log.count("ENETUNREACH") == 1
    failed = execute("open('before', 'w'); 1 / 0")
    assert failed.state == "ERROR" and "ZeroDivisionError" in failed.log
    assert (failed.output / "before").exists() and (failed.output / PAGE).exists()
    marker, mine = working / "begun", f"{tmp_path}"
    endless = "open('begun', 'w')\nwhile True: pass"
    ended = execute(endless, cancelled=marker.exists, environ={"SESSION": mine})
    assert (ended.state, marker.exists()) == ("CANCEL_ACKNOWLEDGED", True)
    processes = psutil.process_iter(["environ"])
    left = [p for p in processes if (p.info["environ"] or {}).get("SESSION") == mine]
    assert not psutil.wait_procs(left, timeout=9)[1]
    late = execute("import time; time.sleep(99)", limit_seconds=0.5)
    assert late.state == "CANCEL_ACKNOWLEDGED"
