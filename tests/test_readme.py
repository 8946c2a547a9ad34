"""What the documents show is true: their commands, names, links, tables and tree."""

import itertools
import re
import runpy
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any

import kernels
import pytest

import minimind_nb
from minimind_nb import cli
from minimind_nb.config import STAGES, kinds
from minimind_nb.config.presets import PRESETS, RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh.md").read_text(encoding="utf-8")
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
DOCUMENTS = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8")
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))
    if path.name != "faults.md"
}
DOCUMENTS["minimind_nb/ARCHITECTURE.md"] = (
    ROOT / "minimind_nb" / "ARCHITECTURE.md"
).read_text(encoding="utf-8")
EVERYTHING = "\n".join(DOCUMENTS.values())


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def commands(text: str) -> list[str]:
    return re.findall(r"^minimind-nb .*$", text, re.MULTILINE)


def test_every_line_of_the_readme_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As it stands, but for two steps a run."""
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    monkeypatch.chdir(tmp_path)
    text = README.replace("recipe=", "max_steps=2, recipe=")
    text = text.replace("--recipe", "--max_steps 2 --recipe")
    names: dict[str, Any] = {}
    for block in blocks(text, "python"):
        exec(compile(block, "README.md", "exec"), names)
    for command in commands(text):
        with pytest.raises(SystemExit) as ended:
            cli.main(shlex.split(command)[1:])
        assert ended.value.code == 0, command
    assert {path.name for path in (tmp_path / "out").glob("*_128")} == {
        f"{stage}_128" for stage in STAGES
    }


def test_the_chinese_readme_shows_the_same_code() -> None:
    without_words = [
        [
            re.sub(r'(generate\(.*, )".*"|\s*#.*', r"\1", block)
            for language in ("python", "sh")
            for block in blocks(text, language)
        ]
        for text in (README, CHINESE)
    ]
    assert without_words[0] == without_words[1]


@pytest.mark.parametrize("text", [README, CHINESE], ids=["English", "Chinese"])
def test_the_tables_show_the_presets_and_recipes(text: str) -> None:
    shapes = {
        name: (int(width), int(layers))
        for name, width, layers in re.findall(
            r"^\| `(.+?)` \| (\d+) × (\d+) \|", text, re.MULTILINE
        )
    }
    defaults = STAGES["pretrain"] | {}
    assert shapes == {
        name: (
            (shape := defaults | PRESETS[name])["hidden_size"],
            shape["num_hidden_layers"],
        )
        for name in PRESETS
    }
    rates = re.findall(r"^\| `(.+?)` \| `(\w+)` \| ([\d.e-]+) \|", text, re.MULTILINE)
    assert {name: float(rate) for name, _, rate in rates} == {
        name: recipe["learning_rate"] for name, recipe in RECIPES.items()
    }
    assert {stage for _, stage, _ in rates} <= set(STAGES)


@pytest.mark.parametrize("command", dict.fromkeys(commands(EVERYTHING)))
def test_every_command_is_understood(command: str) -> None:
    cli._parse(shlex.split(command, comments=True)[1:])


def test_every_name_of_the_package_exists() -> None:
    for block in blocks(EVERYTHING, "python"):
        compile(block.replace("…", "0"), "a document", "exec")
    names = set(re.findall(r"\bmm\.(\w+)", EVERYTHING))
    assert len(names) > 20
    assert names <= set(minimind_nb.__all__)


def test_every_target_of_make_exists() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"(?:^|`)make (?:\w+=\S+ )?([a-z-]+)", EVERYTHING, re.M))
    assert {"demo", "test", "check", "docs", "faults"} <= targets
    for target in targets:
        assert f"\n{target}:" in makefile, target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_relative_link_leads_to_a_file(document: str) -> None:
    for target in re.findall(r"(?:\]\(|src(?:set)?=\")([^)\"#]+)", DOCUMENTS[document]):
        linked = target.startswith("http") or (ROOT / document).parent / target
        assert linked is True or linked.exists(), target


def test_the_tree_of_the_readme_is_the_tree() -> None:
    shown = set(re.findall(r"^[├└]── (\w+(?:\.py|/))", README, re.MULTILINE))
    package = ROOT / "minimind_nb"
    folders = {f"{path.name}/" for path in package.iterdir() if path.is_dir()}
    modules = {path.name for path in package.glob("[a-z]*.py")}
    assert shown == (folders | modules) - {"__pycache__/"}
    for folder in re.findall(r"^(\w+)/  ", README, re.MULTILINE):
        assert (ROOT / folder).is_dir()


def test_links_are_made_from_the_public_address(tmp_path: Path) -> None:
    script = runpy.run_path(str(ROOT / "tools" / "repository.py"))
    files = [*script["TEXTS"], *(f"notebooks/{f.name}" for f in NOTEBOOKS)]
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    for name in script["TEXTS"]:
        shutil.copyfile(ROOT / name, tmp_path / name)

    def texts_with(url: str) -> list[str]:
        settings = tmp_path / "pyproject.toml"
        line = f'repository = "{url}"'
        text = re.sub("(?m)^repository = .*$", line, settings.read_text("utf-8"))
        settings.write_text(text, encoding="utf-8")
        script["main"](tmp_path)
        return [(tmp_path / name).read_text(encoding="utf-8") for name in files]

    without = texts_with("")
    for text in texts_with("https://github.com/a/b"):
        if "[project]" in text:
            urls = tomllib.loads(text)["project"]["urls"]
            assert urls["Repository"] == "https://github.com/a/b"
        else:
            assert "git+https://github.com/a/b" in text
            raw = "https://raw.githubusercontent.com/a/b/main/notebooks/"
            assert f"(https://kaggle.com/kernels/welcome?src={raw}" in text
            assert "google.com/github/a/b/blob/main/notebooks/" in text
    assert not any("kaggle.com" in text for text in texts_with("https://example.org/a"))
    assert texts_with("") == without
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    committed = [(ROOT / name).read_text(encoding="utf-8") for name in files]
    assert texts_with(settings["tool"]["minimind_nb"]["repository"]) == committed


@pytest.mark.parametrize("command", ["python kaggle/kernels.py build", "papermill"])
def test_the_parameters_of_notebooks_exist(command: str) -> None:
    lines = re.findall(rf"^{command} (.*)$", EVERYTHING, re.MULTILINE)
    words = [word for line in lines for word in shlex.split(line)]
    given = [name for word, name in itertools.pairwise(words) if word == "-p"]
    assert given and set(given) <= {*kinds(), "trial", "settings"}


def test_the_command_under_torchrun_is_understood() -> None:
    words = re.search(r"torchrun --nproc_per_node=2 -m (\w+) (\w+) …", README)
    assert words and words[1] == minimind_nb.__name__
    cli._parse([words[2]])


def test_the_commands_for_kaggle_are_understood() -> None:
    lines = re.findall(r"^python kaggle/kernels.py (.*)$", EVERYTHING, re.MULTILINE)
    assert {line.split()[0] for line in lines} == {"build", "push", "run"}
    for words in map(shlex.split, lines):
        options = kernels.parse(words)
        assert all((ROOT / file).is_file() for file in vars(options).get("data", ()))
