"""What the README tells to type exists, and the tree it shows is the tree."""

import re
import shlex
from pathlib import Path

import pytest

import minimind_nb
from minimind_nb import cli
from minimind_nb.config import STAGES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^minimind-nb .*$", README, re.MULTILINE)


def test_the_readme_shows_commands() -> None:
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_of_the_readme_is_understood(command: str) -> None:
    options = cli._parse(shlex.split(command)[1:])
    assert options.command == shlex.split(command)[1]


def test_every_name_of_the_package_in_the_readme_exists() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 4
    for block in blocks:
        compile(block.replace("…", "0"), "README.md", "exec")
        for name in re.findall(r"\bmm\.(\w+)", block):
            assert hasattr(minimind_nb, name), name


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, re.MULTILINE):
        assert f"\n{target}:" in makefile


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_every_linked_file_exists(path: str) -> None:
    assert (ROOT / path).exists()


def test_the_tree_of_the_readme_is_the_tree() -> None:
    shown = set(re.findall(r"^[├└]── (\w+(?:\.py|/))", README, re.MULTILINE))
    package = ROOT / "minimind_nb"
    there = {f"{path.name}/" for path in package.iterdir() if path.is_dir()}
    there |= {path.name for path in package.glob("[a-z]*.py")}
    assert shown == there - {"__pycache__/"}
    for folder in re.findall(r"^(\w+)/  ", README, re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_the_notebooks_parameters_are_fields_of_the_configuration() -> None:
    import ast
    import dataclasses

    import nbformat

    from minimind_nb.config import TrainConfig

    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(file, as_version=4)
        cells = [
            c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])
        ]
        assert len(cells) == 1
        for line in ast.parse(cells[0].source).body:
            assert isinstance(line, ast.Assign)
            assert isinstance(line.targets[0], ast.Name)
            name = line.targets[0].id
            known = name in fields or name == "questions"
            assert known or file.stem not in STAGES
            ast.literal_eval(line.value)
        assert not any(cell.get("outputs") for cell in notebook.cells)
        assert notebook.metadata.kernelspec.name == "python3"


@pytest.mark.parametrize("command", ["python kaggle/kernels.py build", "papermill"])
def test_the_parameters_of_notebooks_exist(command: str) -> None:
    line = re.search(rf"^{command} (.*)$", README, re.MULTILINE)
    assert line
    words = shlex.split(line[1])
    notebook = (ROOT / "notebooks" / "pretrain.ipynb").read_text(encoding="utf-8")
    assert words.count("-p") > 3
    for before, name in zip(words, words[1:], strict=False):
        assert before != "-p" or f'"{name} = ' in notebook


def test_the_command_under_torchrun_is_understood() -> None:
    words = re.search(r"torchrun --nproc_per_node=2 -m (\w+) (\w+) …", README)
    assert words and words[1] == minimind_nb.__name__
    assert cli._parse([words[2]]).command == words[2]


def test_the_build_for_kaggle_is_understood() -> None:
    line = re.search(r"^python kaggle/kernels.py build (.*)$", README, re.MULTILINE)
    assert line
    words = shlex.split(line[1])
    script = (ROOT / "kaggle" / "kernels.py").read_text(encoding="utf-8")
    for option in {word for word in words if word.startswith("--")}:
        assert f'"{option}"' in script
