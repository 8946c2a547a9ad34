"""What is built for Kaggle runs there, as far as a stand-in can show."""

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import building
import kernels
import nbformat
import pytest
import single_file
from kaggle_command import Refused
from support.kaggle import STEPS, TINY, metadata
from support.runs import train_here

import minimind_nb

ROOT = Path(__file__).parents[2]
SECONDS = 120


@pytest.fixture(scope="module")
def version_before(built, tmp_path_factory):
    """What a version of the notebook left that ended halfway."""
    folder = tmp_path_factory.mktemp("before")
    data = built / "datasets" / "minimind-data" / "corpus.jsonl"
    where = {"data_path": str(data), "out_dir": str(folder / "out")}
    train_here(TINY | where | {"max_steps": STEPS // 2, "epochs": 1})
    return folder


@pytest.fixture
def lacking(tmp_path):
    """The site-packages of a fresh environment that lacks only the package."""
    site, own = tmp_path / "site", tmp_path / "venv"
    site.mkdir()
    for path in map(Path, sys.path):
        for entry in path.iterdir() if path.name == "site-packages" else ():
            link = site / entry.name
            if "minimind_nb" not in entry.name and not link.is_symlink():
                link.symlink_to(entry)
    venv = [sys.executable, "-m", "venv", "--without-pip", str(own)]
    subprocess.run(venv, check=True)
    packages = next(own.glob("lib/python*/site-packages"))
    (packages / "base.pth").write_text(f"{site}\n")
    return packages


def run_on_stand_in(packages, mount, *arguments, **more):
    """Run Python there, with these inputs; gives its working folder and output."""
    working = mount.parent / "working"
    working.mkdir()
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environ |= {"MINIMIND_NB_INPUTS": str(mount), "OMP_NUM_THREADS": "1", **more}
    answer = subprocess.run(
        [str(packages.parents[2] / "bin" / "python"), *map(str, arguments)],
        cwd=working,
        env=environ,
        timeout=SECONDS,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert (packages / "minimind_nb" / "session.py").is_file()
    return working, answer.stdout


def test_a_pushed_notebook_resumes_the_run_of_the_version_before(
    built, version_before, lacking, tmp_path
):
    mount = tmp_path / "input"
    shutil.copytree(built / "datasets", mount / "datasets" / "ann")
    shutil.copytree(version_before, mount / "notebooks" / "ann" / "minimind-pretrain")
    for version in ("0.0.9", minimind_nb.__version__, "9.9"):  # what others attached
        stray = mount / "zz" / "extras" / f"minimind_nb-{version}-py3-none-any.whl"
        stray.parent.mkdir(parents=True, exist_ok=True)
        stray.write_text("no wheel that was built here")
    notebook = built / "kernels" / "pretrain" / "pretrain.ipynb"
    papermill = ("-m", "papermill", "--no-progress-bar", notebook, "out.ipynb")
    working, _ = run_on_stand_in(lacking, mount, *papermill)
    run = working / "out" / "pretrain_32"
    assert (run / "checkpoints" / f"step_{STEPS:08}").is_dir()
    rows = minimind_nb.History(run / "metrics.jsonl").select("train")
    steps = [row["step"] for row in rows]
    assert steps == [*range(1, STEPS + 1)]


def test_all_is_found_in_the_older_layout(built, version_before, lacking, tmp_path):
    mount = tmp_path / "input"
    shutil.copytree(built / "datasets", mount)
    shutil.copytree(version_before, mount / "minimind-pretrain")
    file = built / "kernels" / "pretrain" / "pretrain.ipynb"
    cells = [c.source for c in nbformat.read(file, 4).cells if c.cell_type == "code"]
    until = next(n for n, source in enumerate(cells) if "cfg = " in source)
    code = "\n".join([*cells[: until + 1], "print(cfg.data_path, cfg.resume)"])
    _, found = run_on_stand_in(lacking, mount, "-c", code)
    data = mount / "minimind-data" / "corpus.jsonl"
    run = mount / "minimind-pretrain" / "out" / "pretrain_32"
    assert found.split() == [str(data), str(run)]


@pytest.mark.parametrize("trains", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_single_file_needs_nothing_beside_it(lacking, tmp_path, capsys, trains):
    out = tmp_path / "built"
    kernels.main(["build", "--single-file", "--out", str(out)])
    (file,) = out.iterdir()
    assert "Import Notebook" in capsys.readouterr().out
    assert file.name == f"minimind-{single_file.FIRST}.ipynb"
    assert file.stat().st_size <= 700_000
    notebook = nbformat.read(file, as_version=4)
    (carrying,) = (cell for cell in notebook.cells if "CARRIED =" in cell.source)
    assert carrying.metadata["jupyter"]["source_hidden"]
    if not trains:
        first = next(c for c in notebook.cells if "mm.train(" in c.source)
        del notebook.cells[notebook.cells.index(first) :]
        nbformat.write(notebook, file)
    papermill = ("-m", "papermill", "--no-progress-bar", file, "out.ipynb")
    kaggle = {"KAGGLE_KERNEL_RUN_TYPE": "Batch", "https_proxy": "http://127.0.0.1:9"}
    working, _ = run_on_stand_in(lacking, tmp_path / "none", *papermill, **kaggle)
    left = {"out.ipynb", "out"} if trains else {"out.ipynb"}
    assert {path.name for path in working.iterdir()} == left


def test_built_notebooks_are_what_kaggle_takes(built):
    for name in building.SOURCES:
        folder = built / "kernels" / name
        values = metadata(folder)
        assert values["id"] == f"ann/{values['title'].lower().replace(' ', '-')}"
        assert (values["is_private"], values["enable_gpu"]) == (True, True)
        assert values["enable_internet"] is False
        assert values["machine_shape"] == "NvidiaTeslaT4"
        assert values["dataset_sources"] == ["ann/minimind-data", "ann/minimind-wheel"]
        notebook = nbformat.read(folder / values["code_file"], as_version=4)
        assert notebook.metadata.kernelspec.name == "python3"
        assert not any(cell.get("outputs") for cell in notebook.cells)
    baked = nbformat.read(
        built / "kernels" / "pretrain" / "pretrain.ipynb", as_version=4
    )
    (cell,) = [c for c in baked.cells if "injected-parameters" in str(c.metadata)]
    assert f"max_steps = {STEPS}\n" in cell.source
    assert 'data_path = "corpus.jsonl"\n' in cell.source
    assert "preset = None\n" in cell.source


def test_a_data_set_holds_what_is_to_be_uploaded_and_nothing_else(built):
    for name, ending in (("wheel", "whl"), ("data", "jsonl")):
        folder = built / "datasets" / f"minimind-{name}"
        files = sorted(path.suffix[1:] for path in folder.iterdir())
        assert files == sorted(["json", ending])
        assert all(path.stat().st_size for path in folder.iterdir())


def wheel_cell():
    """The cell that installs the wheel, the same in all notebooks."""
    sources = set()
    for name in building.SOURCES:
        notebook = nbformat.read(ROOT / f"notebooks/{name}.ipynb", as_version=4)
        (cell,) = (cell for cell in notebook.cells if "WHEEL, SHA256" in cell.source)
        assert cell.metadata["jupyter"]["source_hidden"], "folded in every front end"
        sources.add(cell.source)
    (source,) = sources
    return source


def run_wheel_cell(code, inputs, beside):
    """Run it; what it installs is printed instead. Gives the last line of what it says."""
    code = code.replace("subprocess.run(", "print(").replace(", check=True", "")
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=beside,
        env={**os.environ, "MINIMIND_NB_INPUTS": str(inputs), "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return answer.stdout.strip().rpartition("\n")[2]


def test_a_notebook_installs_the_wheel_of_its_own_version_only(tmp_path):
    own = f"minimind_nb-{minimind_nb.__version__}-py3-none-any.whl"
    assert f'WHEEL, SHA256 = "{own}", None' in wheel_cell()
    missing = wheel_cell().replace('find_spec("minimind_nb")', 'find_spec("not_there")')
    inputs, beside = tmp_path / "input", tmp_path / "content"
    beside.mkdir()
    (beside / own).write_text("uploaded on Colab")
    assert run_wheel_cell(missing, inputs, beside).endswith(f"'{beside / own}']")
    (beside / own).unlink()
    said = run_wheel_cell(missing, inputs, beside)
    assert f"Needed: one {own} (sha256 any), found: []. On Kaggle: Add Input" in said
    others = [inputs / "extras" / own.replace("0.1.0", v) for v in ("9.9", "0.0.9")]
    for wheel in (*others, inputs / "a" / own, inputs / "b" / own):
        wheel.parent.mkdir(exist_ok=True, parents=True)
        wheel.write_text("the same bytes in two places are one wheel")
    said = run_wheel_cell(missing, inputs, beside)
    assert own in said and "extras" not in said
    (inputs / "b" / own).write_text("others")
    said = run_wheel_cell(missing, inputs, beside)
    assert all(str(wheel) in said for wheel in (*others, inputs / "a" / own))
    assert "Remove any other" in said


def test_a_notebook_says_if_another_version_is_installed(tmp_path):
    assert run_wheel_cell(wheel_cell(), tmp_path, tmp_path) == ""
    newer = wheel_cell().replace(minimind_nb.__version__, "9.9")
    said = run_wheel_cell(newer, tmp_path, tmp_path)
    assert f"minimind_nb {minimind_nb.__version__} is installed and used. For" in said


def test_a_build_keeps_what_it_does_not_replace(built, tmp_path, capsys):
    """And what is kept has the new wheel and belongs to the new user."""
    out = tmp_path / "out"
    shutil.copytree(built, out)
    build = ["build", "--user", "bob", "--out", str(out), "--notebook", "sft"]
    kernels.main([*build, "-p", "data_path", "corpus.jsonl"])
    said = capsys.readouterr().out
    assert "corpus.jsonl dataset-metadata.json (kept; --fresh drops it)" in said
    assert f"kernels.py push --out {out} --notebook sft\n" in said
    (wheel,) = out.glob("datasets/minimind-wheel/*.whl")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    for name in building.SOURCES:
        values = metadata(out / "kernels" / name)
        assert values["id"] == f"bob/minimind-{name}"
        assert values["dataset_sources"] == ["bob/minimind-data", "bob/minimind-wheel"]
        assert digest in (out / "kernels" / name / f"{name}.ipynb").read_text()
    text = (out / "kernels" / "pretrain" / "pretrain.ipynb").read_text()
    assert f"max_steps = {STEPS}" in text
    kernels.main([*build, "--fresh"])
    left = {*out.glob("[dk]*/[a-z]*")}
    assert left == {wheel.parent, out / "kernels" / "sft"}
    sources = metadata(out / "kernels" / "sft")["dataset_sources"]
    assert sources == ["bob/minimind-wheel"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["-p", "max_step", "3"],
            "unknown parameter 'max_step'; did you mean max_steps",
        ),
        (["-p", "settings", "{'beta3': 0.9}"], "unknown setting 'beta3'; did you mean"),
        (
            ["-p", "settings", "{'resume': None}"],
            "resume is among settings: pass it as",
        ),
        (["-p", "dpo_beta", "0.2"], 'dpo_beta needs stage="dpo"'),
        (["-p", "use_moe", "true"], "(?s)use_moe='true'.*True, False and None are P"),
        (["-p", "data_path", "c.jsonl"], "c.jsonl, which is not among --data FILE"),
        (["-p", "pretrain.data_path", "c.txt"], "c.txt, which is not among --data"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl does not exist"),
        (["--data", "README.md", "README.md"], "README.md is taken, or given twice"),
        (["--data", "README.md"], "no notebook reads --data: add -p data_path README"),
        (["-p", "trial", "false"], "trial='false': True, False and None are Python's"),
        (["--user", "a/b"], "is not a Kaggle user name"),
        (["--single-file", "--data", "README.md"], "attach it on Kaggle .Add Input"),
    ],
)
def test_what_cannot_be_built_is_refused(tmp_path, arguments, words):
    with pytest.raises(SystemExit, match=words):
        kernels.main(["build", "--user", "ann", "--out", str(tmp_path), *arguments])
    assert not [*tmp_path.iterdir()]


def test_a_notebook_gets_the_parameters_it_lists_and_settings_that_none_lists():
    given = [["preset", "demo"], ["dpo_beta", "0.2"], ["beta1", "0.8"], ["x", "step"]]
    given += [["dpo.beta1", "0.7"]]
    chosen = building.choose_parameters(["pretrain", "dpo", "curves"], given)
    assert chosen == {
        "pretrain": {"preset": "demo", "beta1": 0.8},
        "dpo": {"dpo_beta": 0.2, "beta1": 0.7},
        "curves": {"x": "step"},
    }


def test_a_folder_of_somebody_elses_is_left_alone(tmp_path):
    theirs = tmp_path / "datasets" / "minimind-wheel"
    theirs.mkdir(parents=True)
    (theirs / "dataset-metadata.json").touch()
    other = tmp_path / "kernels" / "titanic" / "kernel-metadata.json"
    other.parent.mkdir(parents=True)
    other.touch()
    with pytest.raises(SystemExit, match="was not built by this command"):
        kernels.main(["build", "--user", "ann", "--out", str(tmp_path)])
    assert other.exists() and [*theirs.iterdir()]


def test_the_users_name_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KAGGLE_USERNAME", raising=False)
    with pytest.raises(Refused, match="pass --user NAME"):
        building.find_user(None)
    (tmp_path / ".kaggle").mkdir()
    key_file = tmp_path / ".kaggle" / "kaggle.json"
    key_file.write_text('{"username": "bob", "key": "k"}')
    assert building.find_user(None) == "bob"
    monkeypatch.setenv("KAGGLE_USERNAME", "eve")
    assert (building.find_user(None), building.find_user("Ann")) == ("eve", "ann")
