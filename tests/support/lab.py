"""JupyterLab in a headless Chromium, as a user has it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nbformat
from nbformat.v4 import new_code_cell, new_notebook

TOKEN = "browser"
PATIENCE = 120_000  # milliseconds
ROOT = Path(__file__).parents[2]
PICTURES, IMAGES = ROOT / "out" / "browser", ROOT / "docs" / "images"
PICTURE = ".minimind-chart > svg"  # of an interactive chart
# A chart takes the colours of a new theme when it is drawn next.
LEAVE = "chart => chart.dispatchEvent(new Event('pointerleave'))"
CURVES = f"{PICTURE} g[stroke]"
NOTEBOOK = "window.jupyterapp.shell.currentWidget.content"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
CHROMIUMS = ("chromium", "chromium-browser", "google-chrome")
# What JupyterLab and Chromium say themselves, with all their outputs in order.
USUAL = ("favicon", "ResizeObserver loop", "Canvas2D", "net::ERR_ABORTED")


def find_chromium() -> str:
    """Return the browser's path; raises `FileNotFoundError` that says how to get one."""
    named = os.environ.get("MINIMIND_NB_CHROMIUM")
    for name in [named] if named else CHROMIUMS:
        if path := shutil.which(name):
            return path
    raise FileNotFoundError(
        f"no {named or 'chromium'} found: apt-get install chromium, or set "
        "MINIMIND_NB_CHROMIUM to the path of a Chromium or Chrome"
    )


class Server:
    """JupyterLab on 127.0.0.1 in `folder`; a context manager that ends it."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "root"
        self._runtime = folder / "runtime"
        self.root.mkdir(parents=True)
        settings = folder / "settings" / "@jupyterlab" / "apputils-extension"
        settings.mkdir(parents=True)
        quiet = {"fetchNews": "false", "checkForUpdates": False}
        name = "notification.jupyterlab-settings"
        (settings / name).write_text(json.dumps(quiet))
        home = {
            "HOME": self.root,
            "IPYTHONDIR": folder / "ipython",
            "JUPYTER_CONFIG_DIR": folder / "config",
            "JUPYTER_DATA_DIR": folder / "data",
            "JUPYTER_RUNTIME_DIR": self._runtime,
            "JUPYTERLAB_SETTINGS_DIR": folder / "settings",
            "JUPYTERLAB_WORKSPACES_DIR": folder / "workspaces",
        }
        self._log = (folder / "jupyterlab.log").open("wb")
        options = {
            "ServerApp.ip": "127.0.0.1",
            "ServerApp.port": 0,
            "ServerApp.open_browser": False,
            "ServerApp.allow_root": True,
            "ServerApp.root_dir": self.root,
            "IdentityProvider.token": TOKEN,
            "LabApp.expose_app_in_browser": True,
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "jupyterlab"]
            + [f"--{name}={value}" for name, value in options.items()],
            env={**os.environ, **{name: str(path) for name, path in home.items()}},
            stdout=self._log,
            stderr=self._log,
        )

    def __enter__(self) -> "Server":
        file = self._runtime / f"jpserver-{self._process.pid}.json"
        until = time.monotonic() + PATIENCE / 1000
        while not (file.exists() and file.read_text().endswith("}")):
            alive = self._process.poll() is None and time.monotonic() < until
            assert alive, Path(self._log.name).read_text()
            time.sleep(0.1)
        self.url = json.loads(file.read_text())["url"]
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)  # ends the kernels, too
        self._process.wait(30)
        self._log.close()


class Lab:
    """One page of JupyterLab; `page` is playwright's."""

    def __init__(self, page: Any, server: Server) -> None:
        self.page, self.server = page, server

    def open_notebook(self, source: Path | list[str], **parameters: object) -> Path:
        """Open a copy of a notebook, or the cells of code given, and wait for a kernel.

        `parameters` go where papermill puts them, into a cell below the tagged one.
        """
        if isinstance(source, Path):
            notebook, name = nbformat.read(source, as_version=4), source.name
        else:
            notebook, name = new_notebook(), "cells.ipynb"
            notebook.cells = [new_code_cell(code) for code in source]
            notebook.metadata.kernelspec = {
                "name": "python3",
                "display_name": "Python 3",
            }
        if parameters:
            lines = [f"{name} = {value!r}" for name, value in parameters.items()]
            tagged = (
                number
                for number, cell in enumerate(notebook.cells)
                if "parameters" in cell.metadata.get("tags", [])
            )
            own = new_code_cell("\n".join(["# Parameters", *lines]))
            notebook.cells.insert(next(tagged) + 1, own)
        folder = self.server.root / f"work{len([*self.server.root.glob('work*')])}"
        folder.mkdir()
        nbformat.write(notebook, folder / name)
        self.reopen(folder / name)
        return folder / name

    def reopen(self, path: Path) -> None:
        """Open a notebook below the server's folder in a fresh page of JupyterLab."""
        where = path.relative_to(self.server.root).as_posix()
        self.page.goto(f"{self.server.url}lab/tree/{where}?token={TOKEN}&reset")
        self.page.wait_for_selector(".jp-Notebook .jp-Cell", timeout=PATIENCE)
        if self.page.locator("#jp-left-stack:not(.lm-mod-hidden)").count():
            self.command("application:toggle-left-area")
        # The notebook's own mark says idle before there is a kernel.
        self.page.wait_for_selector(
            "#jp-main-statusbar:has-text('| Idle')", timeout=PATIENCE
        )

    def command(self, name: str, **arguments: object) -> None:
        """Start one of JupyterLab's own commands, such as "docmanager:save"."""
        self.page.evaluate(
            "([name, given]) => { window.jupyterapp.commands.execute(name, given) }",
            [name, arguments],
        )

    def find(self, code: str) -> int:
        """Return the number of the only cell whose source has `code`."""
        sources = f"{NOTEBOOK}.widgets.map(cell => cell.model.sharedModel.source)"
        sources = self.page.evaluate(sources)
        (number,) = (n for n, source in enumerate(sources) if code in source)
        return number

    def write(self, number: int, code: str) -> None:
        """Replace the source of a cell."""
        source = f"{NOTEBOOK}.widgets[{number}].model.sharedModel.setSource"
        self.page.evaluate(f"code => {source}(code)", code)

    def cell(self, number: int) -> Any:
        """Scroll to a cell, counted from 0, and return its locator."""
        self.page.evaluate(f"{NOTEBOOK}.scrollToItem({number}, 'start')")
        return self.page.locator(f'.jp-Cell[data-windowed-list-index="{number}"]')

    def output(self, number: int) -> Any:
        """Return the locator of what a cell shows."""
        return self.cell(number).locator(".jp-Cell-outputArea")

    def run_all(self) -> None:
        """Run all cells as a user does, by the menu; returns at once."""
        self.page.locator(".lm-MenuBar-itemLabel", has_text="Run").click()
        self.page.locator('[data-command="runmenu:run-all"]').click()

    def run_cell(self, number: int, wait: bool = True) -> Any:
        """Run a cell and return the locator of its output; `wait` until it is done."""
        self.page.evaluate(f"{NOTEBOOK}.activeCellIndex = {number}")
        self.command("notebook:run-cell")
        if wait:
            self.wait_idle()
        return self.output(number)

    def wait_idle(self, seconds: float = PATIENCE / 1000) -> None:
        """Wait until no cell runs or is to run, and the kernel is idle."""
        self.page.wait_for_function(
            f"""() => {NOTEBOOK}.widgets.every(cell => cell.prompt !== "*")
            && document.querySelector("#jp-main-statusbar").innerText.includes("| Idle")
            """,
            timeout=1000 * seconds,
        )

    def interrupt(self) -> None:
        """Press ■."""
        self.page.locator('[data-command="notebook:interrupt-kernel"]').click()

    def save(self) -> None:
        """Save the notebook, and wait until its file has the outputs."""
        self.page.evaluate("window.jupyterapp.commands.execute('docmanager:save')")

    def close(self) -> None:
        """End the kernels and the page, so that none computes beside the next test."""
        self.page.evaluate(
            "() => window.jupyterapp?.serviceManager.sessions.shutdownAll()"
        )
        self.page.close()

    def set_theme(self, dark: bool) -> None:
        theme = f"JupyterLab {'Dark' if dark else 'Light'}"
        self.page.evaluate(
            "theme => window.jupyterapp.commands.execute("
            "'apputils:change-theme', { theme })",
            theme,
        )
        shown = f"body[data-jp-theme-name='{theme}']"
        self.page.wait_for_selector(shown, state="attached", timeout=PATIENCE)
        gone = "#jupyterlab-splash"
        self.page.wait_for_selector(gone, state="detached", timeout=PATIENCE)

    def screenshot(self, name: str, shown: Any = None, gallery: bool = False) -> None:
        """Save a picture of the page or of a locator."""
        save_picture(shown or self.page, name, gallery)

    def picture(self, name: str, shown: Any) -> None:
        """Save pictures of a locator for the gallery, in the light and the dark theme."""
        self.page.mouse.move(0, 0)  # else what is below it is marked
        self.page.evaluate(f"{NOTEBOOK}.activeCellIndex = 0")
        for dark in (True, False):
            self.set_theme(dark)
            self.page.evaluate(
                f"document.querySelectorAll('{PICTURE}').forEach({LEAVE})"
            )
            save_picture(shown, f"{name}{'-dark' * dark}", gallery=True)


def save_picture(shown: Any, name: str, gallery: bool = False, **how: Any) -> Path:
    """Save a locator or page as a PNG in out/browser.

    Those of the gallery go to docs/images, too, with a palette, if GALLERY is set.
    """
    from PIL import Image

    PICTURES.mkdir(parents=True, exist_ok=True)
    file = PICTURES / f"{name}.png"
    shown.screenshot(path=file, **how)
    if gallery and os.environ.get("GALLERY"):
        picture = (
            Image.open(file)
            .convert("RGB")
            .quantize(128, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
        )
        IMAGES.mkdir(exist_ok=True)
        picture.save(IMAGES / file.name, optimize=True)
    return file
