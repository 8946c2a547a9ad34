"""A page of Chromium and JupyterLab in it; `make test-browser` runs these tests."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.lab import FLAGS, ROOT, USUAL, Lab, Server, find_chromium, save_picture

import minimind_nb as mm

HERE = Path(__file__).parent
GALLERY_RUNS: dict[str, dict[str, Any]] = {
    "muon": {},
    "muon_slow": {"learning_rate": 3e-4},
    "adamw": {"optimizer": "adamw"},
    "adamw_fast": {"optimizer": "adamw", "learning_rate": 1e-2},
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark every test of this folder, so that the other commands leave them out."""
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker("browser")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser, playwright's."""
    playwright: Any = pytest.importorskip("playwright.sync_api")
    with playwright.sync_playwright() as starter:
        browser = starter.chromium.launch(
            executable_path=find_chromium(), args=FLAGS, headless=True
        )
        yield browser
        browser.close()


def watched(page: Any) -> list[str]:
    """Return the list to which the page's errors will be added."""
    errors: list[str] = []

    def note(text: str) -> None:
        if not any(usual in text for usual in USUAL):
            errors.append(text)

    page.on("pageerror", lambda error: note(f"{error}"))
    page.on("console", lambda said: said.type == "error" and note(said.text))
    return errors


@pytest.fixture
def chromium_page(chromium: Any) -> Iterator[Any]:
    """An empty page; an error in it, or on its console, fails the test."""
    page = chromium.new_page(viewport={"width": 900, "height": 700})
    page.set_default_timeout(10_000)
    errors = watched(page)
    yield page
    page.close()
    assert not errors


@pytest.fixture
def show(chromium_page: Any) -> Callable[..., Any]:
    """Show HTML as on a light or dark page, save its picture, and return the page."""

    def show_html(
        body: str, name: str, dark: bool = False, gallery: bool = False
    ) -> Any:
        colours = "#111111; color: #e6e6e6" if dark else "#ffffff; color: #222222"
        style = (
            f"background: {colours}; margin: 0; padding: 12px; font-family: sans-serif"
        )
        chromium_page.emulate_media(color_scheme="dark" if dark else "light")
        chromium_page.set_content(f'<!doctype html><body style="{style}">{body}</body>')
        name += "-dark" if dark else ""
        save_picture(chromium_page.locator("body"), name, gallery)
        return chromium_page

    return show_html


@pytest.fixture(scope="session")
def jupyterlab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with Server(tmp_path_factory.mktemp("jupyterlab")) as server:
        yield server


@pytest.fixture
def lab(
    chromium: Any, jupyterlab: Server, request: pytest.FixtureRequest
) -> Iterator[Lab]:
    """JupyterLab in a page; an error in it, or on its console, fails the test."""
    page = chromium.new_page(viewport={"width": 1000, "height": 1500})
    errors = watched(page)
    lab = Lab(page, jupyterlab)
    yield lab
    lab.screenshot(f"end-of-{request.node.name}")
    found = [*errors]  # before JupyterLab tells what its end cancelled
    lab.close()
    assert not found


@pytest.fixture(scope="session")
def out_dir() -> str:
    """A folder of runs for notebooks, which train short ones where there are none.

    Those of the gallery are trained in some ten minutes, and kept for the next time.
    """
    if not os.environ.get("GALLERY"):
        return "out"
    folder = ROOT / "out" / "gallery"
    usual: dict[str, Any] = {"out_dir": folder, "device": "cpu", "num_processes": 1}
    usual |= {"log_interval": 5, "batch_size": 4, "view": False}
    for name, settings in GALLERY_RUNS.items():
        shared = usual | {"preset": "demo", "recipe": "demo", "max_steps": 240}
        mm.train("demo", run_name=name, **shared, **settings)
    first = {"init_from": folder / "muon", "recipe": "demo-sft"}
    mm.train("demo", stage="sft", max_steps=700, **usual, **first)
    return str(folder)
