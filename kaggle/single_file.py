"""A notebook that carries the package in itself, to be uploaded in a browser."""

import argparse
import base64
import lzma
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from building import SOURCES, build_wheel, choose_parameters, prepare, stamp
from kaggle_command import Refused

FIRST = next(iter(SOURCES))  # the notebook that `--single-file` writes
# Where Kaggle and Colab keep in a notebook which machine it runs on.
GPU = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4"},
    "kaggle": {
        "accelerator": "nvidiaTeslaT4",
        "isGpuEnabled": True,
        "isInternetEnabled": False,
        "language": "python",
        "sourceType": "notebook",
    },
}
CARRYING_CELL = """\
# This notebook carries the package: the long line is its wheel, compressed.
import base64
import lzma
import tempfile
from pathlib import Path

carrier = tempfile.TemporaryDirectory()  # ends with the kernel
CARRIED = [Path(carrier.name, "{wheel}")]
CARRIED[0].write_bytes(lzma.decompress(base64.b64decode("{blob}")));\
"""


def build_single_files(options: argparse.Namespace) -> None:
    """Write notebooks that carry the wheel, each to be uploaded alone."""
    if options.data:
        raise Refused("--single-file carries no data: attach it on Kaggle (Add Input)")
    names = list(dict.fromkeys(options.notebook or [FIRST]))
    baked = choose_parameters(names, options.p)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        wheel = build_wheel(Path(folder))
        decompress(wheel)
        for name in names:
            file = options.out / f"minimind-{name}.ipynb"
            write_single_file(file, prepare(name, baked[name]), wheel)
            print(file, f"({file.stat().st_size / 1000:.0f} kB)")
    print(
        "Next: on kaggle.com, Create > New Notebook > File > Import Notebook; "
        "docs/kaggle.md has every click, for Colab and Jupyter, too"
    )


def write_single_file(file: Path, notebook: Any, wheel: Path) -> None:
    """Write a notebook with the wheel in a folded cell before the one that installs it.

    A cell is what every site keeps of a notebook; attachments and metadata may get lost.
    """
    import nbformat

    position = stamp(notebook, wheel)
    blob = base64.b64encode(lzma.compress(wheel.read_bytes(), preset=9)).decode()
    cell = nbformat.v4.new_code_cell(
        CARRYING_CELL.format(wheel=wheel.name, blob=blob),
        id="cell-wheel",
        metadata=notebook.cells[position].metadata,
    )
    notebook.cells.insert(position, cell)
    notebook.metadata |= GPU
    nbformat.write(notebook, file)


def decompress(wheel: Path) -> None:
    """Rewrite a wheel without compression: as a whole, xz makes it smaller."""
    with zipfile.ZipFile(wheel) as packed:
        files = {entry: packed.read(entry) for entry in packed.infolist()}
    with zipfile.ZipFile(wheel, "w") as stored:
        for entry, content in files.items():
            stored.writestr(entry, content, zipfile.ZIP_STORED)
