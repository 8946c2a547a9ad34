"""The bounds in pyproject.toml are the versions that the tests run with."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
EXTRAS = PROJECT["optional-dependencies"]
BOUNDS = {
    requirement.name.lower(): Version(str(requirement.specifier).lstrip(">="))
    for requirement in map(
        Requirement,
        PROJECT["dependencies"] + EXTRAS["test"] + EXTRAS["gguf"] + EXTRAS["parquet"],
    )
    if requirement.name != PROJECT["name"]
}
BY_HAND = "torch"  # 2.10.0 is several gigabytes


def test_uv_sync_installs_what_make_setup_does() -> None:
    group = [Requirement(line) for line in PYPROJECT["dependency-groups"]["dev"]]
    setup = (ROOT / "Makefile").read_text().partition("--editable '.[test]'")[2]
    assert {one.name for one in group} > {
        PROJECT["name"],
        *setup.split("\n")[0].split(),
    }
    assert [one.extras for one in group if one.name == PROJECT["name"]] == [{"test"}]


def pins(name: str) -> dict[str, Version]:
    """The versions that a file of constraints fixes."""
    pairs = (line.split("==") for line in (ROOT / name).read_text().split())
    return {package.lower(): Version(version) for package, version in pairs}


@pytest.mark.parametrize("package", sorted(BOUNDS.keys() - {BY_HAND}))
def test_the_oldest_environment_has_the_oldest_version_admitted(package: str) -> None:
    assert pins("constraints-oldest.txt")[package] == BOUNDS[package]


@pytest.mark.parametrize("line", PROJECT["dependencies"])
def test_kaggles_image_has_every_dependency(line: str) -> None:
    required = Requirement(line)
    assert pins("constraints-kaggle.txt")[required.name] in required.specifier


@pytest.mark.parametrize("package", sorted(BOUNDS))
def test_the_pinned_environment_is_within_the_bounds(package: str) -> None:
    assert pins("constraints.txt")[package] >= BOUNDS[package]
