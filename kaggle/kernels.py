"""Build the wheel, the data and the notebooks for Kaggle, and push them.

`python kaggle/kernels.py build --user NAME` needs no network where setuptools is
installed, and `build --single-file` no name: it writes a notebook to upload by hand.
`python kaggle/kernels.py push` needs the command `kaggle` and its key.
"""

import argparse
from pathlib import Path

from building import OUT, SOURCES, run_build
from kaggle_command import Refused
from pushing import run_push
from single_file import build_single_files


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="write the folders to push")
    build.set_defaults(run=run_build)
    build.add_argument("--user", help="your name on Kaggle")
    build.add_argument(
        "--data", nargs="+", default=[], type=Path, metavar="FILE", help="files to add"
    )
    build.add_argument(
        "--single-file",
        dest="run",
        action="store_const",
        const=build_single_files,
        help="a notebook to upload by hand, which carries the wheel",
    )
    build.add_argument(
        "--fresh",
        action="store_true",
        help="drop data and notebooks of the build before",
    )
    build.add_argument(
        "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    push = commands.add_parser("push", help="upload data sets and start notebooks")
    push.set_defaults(run=run_push)
    push.add_argument("--again", action="store_true", help="even if one is running")
    push.add_argument("--kernels-only", action="store_true", help="no data sets")
    push.add_argument("--message", "-m", default="minimind_nb", help="of the versions")
    push.add_argument("--wait", type=float, default=900, help="seconds for data sets")
    for command in (build, push):
        command.add_argument("--notebook", nargs="+", choices=SOURCES, metavar="NAME")
        command.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (Refused, OSError) as reason:
        raise SystemExit(f"kernels.py: {reason}") from None


if __name__ == "__main__":
    main()
