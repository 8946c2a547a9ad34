"""Write the repository's public address into the files that show it, if there is one.

The address is `repository` in [tool.minimind_nb] of pyproject.toml. `make docs` runs this
script; with an empty address it removes the links and install lines. Links that open the
notebooks on Kaggle and Colab need an address on GitHub.
"""

import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "README.md": '\nWithout a clone: `pip install "git+{url}"`.\n{links}',
    "README.zh.md": '\n不克隆仓库也可以安装：`pip install "git+{url}"`。\n{links}',
    "pyproject.toml": '[project.urls]\nRepository = "{url}"\nIssues = "{url}/issues"\n',
}
IN_NOTEBOOK = """\
Open it on {link}. Without the wheel, switch the internet on and run this in a new cell first:

    %pip install --no-deps git+{url}\
"""
BRANCH = "main"
CELL = {"cell_type": "markdown", "id": "links", "metadata": {}}
_BETWEEN = re.compile(
    r"(<!-- repository -->\n|# repository\n).*?(<!-- /|# /)", re.DOTALL
)


def fill(text: str, inserted: str) -> str:
    """Return a file's text with `inserted` between its two markers."""
    return _BETWEEN.sub(lambda found: found[1] + inserted + found[2], text)


def fill_notebook(text: str, inserted: str) -> str:
    """Return a notebook's text with `inserted` as the cell under its title, or without."""
    notebook = json.loads(text)
    cells = [cell for cell in notebook["cells"] if cell["id"] != CELL["id"]]
    if inserted:
        cells.insert(1, {**CELL, "source": inserted.splitlines(True)})
    notebook["cells"] = cells
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def link_notebook(url: str, name: str) -> str:
    """Return links that open a notebook on Kaggle and Colab; none if not on GitHub."""
    host, _, project = url.partition("github.com/")
    if host != "https://":
        return ""
    raw = f"https://raw.githubusercontent.com/{project}/{BRANCH}/notebooks/{name}"
    colab = "https://colab.research.google.com/github"
    return (
        f"[Kaggle](https://kaggle.com/kernels/welcome?src={raw}) · "
        f"[Colab]({colab}/{project}/blob/{BRANCH}/notebooks/{name})"
    )


def main(root: Path = ROOT) -> None:
    """Bring the files in line with pyproject.toml."""
    settings = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
    url = settings["tool"]["minimind_nb"]["repository"].removesuffix("/")
    notebooks = sorted(root.glob("notebooks/*.ipynb"))
    links = {file: link_notebook(url, file.name) for file in notebooks}
    rows = [f"- `{file.name}`: {link}\n" for file, link in links.items() if link]
    for name, text in TEXTS.items():
        listing = "".join(["\n", *rows] if rows else [])
        inserted = text.format(url=url, links=listing) if url else ""
        _write(root / name, fill, inserted)
    for file, link in links.items():
        _write(
            file, fill_notebook, IN_NOTEBOOK.format(url=url, link=link) if link else ""
        )


def _write(path: Path, change: Callable[[str, str], str], inserted: str) -> None:
    before = path.read_text(encoding="utf-8")
    if (after := change(before, inserted)) != before:
        path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
