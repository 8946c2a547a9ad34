"""Build the wheel, the data and the notebooks for Kaggle, and train them there.

`build` and `run --dry-run` need no network if setuptools is installed; the other commands
need the command `kaggle` and an API key.
"""

import argparse
import math
from functools import partial
from pathlib import Path

from building import OUT, SOURCES, run_build
from chain import run_chain
from chain_state import HOURS
from fetching import run_continue, run_fetch, run_wait
from kaggle_command import Refused
from pushing import run_push
from single_file import build_single_files

from minimind_nb.config import STAGES


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; an error is one line on stderr."""
    try:
        options = parse(arguments)
        options.run(options)
    except (Refused, OSError) as reason:
        raise SystemExit(f"kernels.py: {reason}") from None
    except KeyboardInterrupt:
        raise SystemExit("kernels.py: stopped; the same command resumes") from None


def number(text: str, least: float = 0.0) -> float:
    """Return the number that an option names; raises `Refused` for a useless one."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if least <= value < math.inf:
        return value
    raise Refused(
        f"{text!r} is no number of at least {least:g} (--hours, --poll, --wait)"
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options, of which `run` is the function to call with them."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(required=True)
    build = commands.add_parser("build", help="write the folders that push uploads")
    build.set_defaults(run=run_build)
    build.add_argument(
        "--single-file",
        dest="run",
        action="store_const",
        const=build_single_files,
        help="instead write a notebook that carries the wheel, to upload by hand",
    )
    build.add_argument(
        "--fresh",
        action="store_true",
        help="delete data and notebooks of earlier builds",
    )
    chain = commands.add_parser(
        "run", help="build, push, wait, fetch, continue until finished"
    )
    for command in (build, chain):
        command.add_argument("--user", help="your Kaggle user name")
        command.add_argument(
            "--data",
            nargs="+",
            default=[],
            type=Path,
            metavar="FILE",
            help="data files to upload",
        )
        command.add_argument(
            "-p",
            nargs=2,
            action="append",
            default=[],
            metavar=("NAME", "VALUE"),
            help="a parameter of the notebooks, or NOTEBOOK.NAME of one of them",
        )
    push = commands.add_parser("push", help="upload data sets and start notebooks")
    push.set_defaults(run=run_push)
    push.add_argument("--again", action="store_true", help="push also what is running")
    push.add_argument("--kernels-only", action="store_true", help="upload no data sets")
    waiting = commands.add_parser("wait", help="wait until the last version has ended")
    waiting.set_defaults(run=run_wait)
    fetch = commands.add_parser(
        "fetch", help="download the small files of the last output"
    )
    fetch.set_defaults(run=run_fetch)
    resume = commands.add_parser(
        "continue", help="push again and resume from the last output"
    )
    resume.set_defaults(run=run_continue)
    chain.set_defaults(run=run_chain, fresh=True)
    chain.add_argument(
        "--hours",
        type=partial(number, least=0.1),
        help=f"GPU hours in all (default {HOURS:g})",
    )
    chain.add_argument(
        "--adopt", action="store_true", help="resume the run that the notebooks hold"
    )
    chain.add_argument(
        "--no-wait", action="store_true", help="end if the GPU quota is used up"
    )
    chain.add_argument(
        "--dry-run", action="store_true", help="print the commands of kaggle only"
    )
    for command in (push, chain):
        command.add_argument(
            "--wait",
            type=number,
            default=900,
            metavar="SECONDS",
            help="for data sets to be processed (default %(default)s)",
        )
    for command in (waiting, chain):
        command.add_argument(
            "--poll",
            type=number,
            default=60,
            metavar="SECONDS",
            help="between questions to Kaggle (default %(default)s)",
        )
    for command in (build, push, waiting, fetch, resume, chain):
        known = tuple(STAGES) if command is chain else SOURCES
        command.add_argument(
            "--notebook",
            nargs="+",
            choices=known,
            metavar="NAME",
            help=", ".join(known),
        )
        command.add_argument(
            "--out", type=Path, default=OUT, help="folder (default %(default)s)"
        )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
