"""Write the repository's public address into the files that show it, if there is one.

The address is `repository` in [tool.minimind_nb] of pyproject.toml. `make docs` runs this
script; with an empty address it removes the links and install lines.
"""

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TEXTS = {
    "README.md": '\nWithout a clone: `pip install "git+{url}"`.\n',
    "README.zh.md": '\n不克隆仓库也可以安装：`pip install "git+{url}"`。\n',
    "pyproject.toml": '[project.urls]\nRepository = "{url}"\nIssues = "{url}/issues"\n',
}
_BETWEEN = re.compile(
    r"(<!-- repository -->\n|# repository\n).*?(<!-- /|# /)", re.DOTALL
)


def fill(text: str, inserted: str) -> str:
    """Return a file's text with `inserted` between its two markers."""
    return _BETWEEN.sub(lambda found: found[1] + inserted + found[2], text)


def main() -> None:
    """Bring the files in line with pyproject.toml."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    url = settings["tool"]["minimind_nb"]["repository"]
    for name, text in TEXTS.items():
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = fill(before, text.format(url=url) if url else "")
        if after != before:
            path.write_text(after, encoding="utf-8")


if __name__ == "__main__":
    main()
