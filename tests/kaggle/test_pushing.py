"""Pushing, with a stand-in for the command `kaggle`."""

import json
import os
import shutil
import sys

import building
import kernels
import pushing
import pytest
from support.kaggle import metadata

STAND_IN = """#!{python}
import json, os, sys
from pathlib import Path
folder = Path(os.environ["KAGGLE_STAND_IN"])
with (folder / "calls.txt").open("a") as file:
    print(*sys.argv[1:], file=file)
answers = json.loads((folder / "answers.json").read_text())
line = " ".join(sys.argv[1:])
for start, (text, code) in answers.items():
    if line.startswith(start):
        print(text)
        sys.exit(code)
"""
PUSHED = ["Kernel version 1 successfully pushed.  Please check progress at …", 0]
ANSWERS = {
    "kernels status": ["404 Client Error: Not Found", 1],
    "kernels push": PUSHED,
    "datasets status ann/minimind-data": ["ready", 0],
    "datasets status": ["403 Client Error: Forbidden", 1],
    "datasets create": ["Your private Dataset is being created.", 0],
    "datasets version": ["Dataset version is being created.", 0],
}


@pytest.fixture
def kaggle(tmp_path, monkeypatch, built):
    """A stand-in for the command `kaggle`, and a copy of what was built."""
    command = tmp_path / "bin" / "kaggle"
    command.parent.mkdir()
    command.write_text(STAND_IN.format(python=sys.executable))
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("KAGGLE_STAND_IN", str(tmp_path))
    shutil.copytree(built, tmp_path / "out")

    def push(*arguments, **answers):
        said = ANSWERS | answers
        (tmp_path / "answers.json").write_text(json.dumps(said))
        return ["push", "--out", str(tmp_path / "out"), "--wait", "0", *arguments]

    return tmp_path, push


def test_a_push_attaches_what_exists(kaggle):
    folder, push = kaggle
    only = ("--kernels-only", "--notebook", "pretrain")
    kernels.main(push(*only))
    kernel = folder / "out" / "kernels" / "pretrain"
    assert metadata(kernel)["kernel_sources"] == []
    complete = ['ann/x has status "KernelWorkerStatus.COMPLETE"', 0]
    kernels.main(push(*only, **{"kernels status": complete}))
    assert metadata(kernel)["kernel_sources"] == ["ann/minimind-pretrain"]
    call = f"kernels push -p {kernel} --accelerator NvidiaTeslaT4"
    assert (folder / "calls.txt").read_text().splitlines()[-1] == call


def test_a_notebook_waits_for_the_one_whose_output_it_reads(kaggle, capsys):
    folder, push = kaggle
    kernels.main(push("--kernels-only", "--notebook", "pretrain", "sft"))
    pushes = (folder / "calls.txt").read_text().count("kernels push")
    assert pushes == 1
    told = "sft starts from the output of pretrain: when that is complete, run python"
    assert told in capsys.readouterr().out


def test_what_this_command_has_not_made_is_not_uploaded(kaggle):
    folder, push = kaggle
    (folder / "out" / "datasets" / ".DS_Store").touch()
    (folder / "out" / "datasets" / "mine").mkdir()
    with pytest.raises(SystemExit, match="minimind-wheel is not ready yet"):
        kernels.main(push("--notebook", "pretrain"))
    assert "mine" not in (folder / "calls.txt").read_text()


def test_a_failed_push_is_told_though_it_exits_with_0(kaggle):
    _, push = kaggle
    only = ("--kernels-only", "--notebook", "pretrain")
    invalid = f"The following are not valid dataset sources: …\n{PUSHED[0]}"
    for said in ("Kernel push error: …", invalid):
        with pytest.raises(SystemExit, match="was not pushed: "):
            kernels.main(push(*only, **{"kernels push": [said, 0]}))


def test_a_running_kernel_is_pushed_again_only_when_asked(kaggle):
    folder, push = kaggle
    only = ("--kernels-only", "--notebook", "pretrain")
    running = {"kernels status": ['ann/x has status "KernelWorkerStatus.RUNNING"', 0]}
    with pytest.raises(SystemExit, match="is RUNNING: .* push --again"):
        kernels.main(push(*only, **running))
    assert "kernels push" not in (folder / "calls.txt").read_text()
    kernels.main(push(*only, "--again", **running))
    odd = {"kernels status": ["no connection", 1]}
    with pytest.raises(SystemExit, match="is unknown .*'no connection'"):
        kernels.main(push(*only, **odd))


def test_data_sets_are_created_or_get_a_version(kaggle):
    folder, push = kaggle
    with pytest.raises(SystemExit, match="minimind-wheel is not ready yet"):
        kernels.main(push("--notebook", "pretrain"))
    calls = (folder / "calls.txt").read_text()
    data, wheel = (folder / "out/datasets" / f"minimind-{n}" for n in ("data", "wheel"))
    assert f"datasets version -p {data} -m minimind_nb\n" in calls
    assert f"datasets create -p {wheel}\n" in calls
    failed = {"datasets version": ["Dataset version creation error: …", 0]}
    with pytest.raises(SystemExit, match="was not uploaded: Dataset version creation"):
        kernels.main(push("--notebook", "pretrain", **failed))


def test_nothing_is_pushed_without_command_or_folders(kaggle, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match="nothing to push in .*build first"):
        kernels.main(["push", "--out", str(tmp_path / "empty")])
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with pytest.raises(SystemExit, match="command kaggle is missing: pip install"):
        kernels.main(["push"])


def test_a_version_gets_its_lines_without_parameters_of_the_build(tmp_path):
    wheel, folder = tmp_path / "a.whl", tmp_path / "kernels" / "pretrain"
    wheel.touch()
    for parameters, internet in (({"publish": "hf:ann/run"}, True), ({}, False)):
        building.write_kernel(tmp_path, "pretrain", parameters)
        building.attach(folder, "ann", [], wheel)
        version = [tmp_path / "next", "ann/x", ["ann/y"], ["resume = 'y/out'"]]
        values = metadata(pushing.write_version(folder, *version))
        assert values["enable_internet"] is internet
        cells = json.loads((tmp_path / "next" / "pretrain.ipynb").read_text())["cells"]
        tagged = {str(c["metadata"].get("tags")): "".join(c["source"]) for c in cells}
        first, injected, *_ = [tag for tag in tagged if "parameters" in tag]
        assert "'parameters'" in first and "injected-parameters" in injected
        assert tagged[injected].startswith("# Parameters\n")
        assert tagged[injected].endswith("\nresume = 'y/out'\n")
