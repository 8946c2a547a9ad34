"""Build the wheel, the data and the notebooks for Kaggle, and train them there.

`python kaggle/kernels.py build --user NAME` needs no network where setuptools is
installed, and neither does `run --dry-run`; `build --single-file` needs no name either: it
writes a notebook to upload by hand. All else needs the command `kaggle` and its key.
`run` is the chain of all: build, push, wait, fetch, continue.
"""

import argparse
from pathlib import Path

from building import OUT, SOURCES, run_build
from chain import run_chain
from fetching import run_continue, run_fetch, run_wait
from kaggle_command import Refused
from pushing import run_push
from single_file import build_single_files

from minimind_nb.config import STAGES


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line on stderr."""
    options = parse(arguments)
    try:
        options.run(options)
    except (Refused, OSError) as reason:
        raise SystemExit(f"kernels.py: {reason}") from None
    except KeyboardInterrupt:
        raise SystemExit("kernels.py: stopped; the same command resumes") from None


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, of which `run` is the function to call with them."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="write the folders to push")
    build.set_defaults(run=run_build)
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
    chain = commands.add_parser("run", help="build, push, wait, fetch, continue, …")
    for command in (build, chain):
        command.add_argument("--user", help="your name on Kaggle")
        command.add_argument(
            "--data",
            nargs="+",
            default=[],
            type=Path,
            metavar="FILE",
            help="files to add",
        )
        command.add_argument(
            "-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
        )
    push = commands.add_parser("push", help="upload data sets and start notebooks")
    push.set_defaults(run=run_push)
    push.add_argument("--again", action="store_true", help="even if one is running")
    push.add_argument("--kernels-only", action="store_true", help="no data sets")
    waiting = commands.add_parser("wait", help="until the last version has ended")
    waiting.set_defaults(run=run_wait)
    fetch = commands.add_parser("fetch", help="the small files of the last output")
    fetch.set_defaults(run=run_fetch)
    resume = commands.add_parser("continue", help="push again with the last output")
    resume.set_defaults(run=run_continue)
    chain.set_defaults(run=run_chain, fresh=True)
    chain.add_argument("--hours", type=float, help="of GPU time in all (default: 30)")
    chain.add_argument("--no-wait", action="store_true", help="for the week's quota")
    chain.add_argument("--dry-run", action="store_true", help="show the commands")
    for command in (push, chain):
        command.add_argument("--wait", type=float, default=900, help="s for data sets")
    for command in (waiting, chain):
        command.add_argument("--poll", type=float, default=60, help="seconds")
    for command in (build, push, waiting, fetch, resume, chain):
        known = tuple(STAGES) if command is chain else SOURCES
        command.add_argument("--notebook", nargs="+", choices=known, metavar="NAME")
        command.add_argument("--out", type=Path, default=OUT)
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
