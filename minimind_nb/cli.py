"""The command line: `minimind-nb pretrain | sft | dpo | tokenizer | plan | doctor`.

Options are generated from `TrainConfig`: its field names, types and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import itertools
import json
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

from . import __version__
from .config import STAGES, TrainConfig, describe_unknown, kinds

_EXIT_CODES = {"interrupted": 128 + signal.SIGINT, "terminated": 128 + signal.SIGTERM}
_USAGE_ERROR = 2
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 when it did what was asked, 143 after SIGTERM.

    A mistake of the user's is one line on stderr and exit code 2, a failed run its
    explanation and 1.
    """
    options = _parse(arguments)
    try:
        code = options.run(options)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"minimind-nb: {error}", file=sys.stderr)
        code = 1 if type(error).__name__ == "TrainingFailed" else _USAGE_ERROR
    except KeyboardInterrupt:
        code = _EXIT_CODES["interrupted"]
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minimind-nb", description="MiniMind models on any processor."
    )
    parser.add_argument("-V", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    added = {}
    for name, run, text in (
        ("pretrain", _train, "Train a model on plain text."),
        ("sft", _train, "Fine-tune a model on conversations."),
        ("dpo", _train, "Train a model on preferences between answers."),
        ("plan", _plan, "Say what a run would take."),
        ("tokenizer", _tokenizer, "Train a vocabulary from JSONL files."),
        ("doctor", _doctor, "Say what this machine is and what will go wrong on it."),
    ):
        usage = f"minimind-nb {name} [--OPTION VALUE ...]"
        added[name] = commands.add_parser(
            name, help=text, description=text, usage=usage, allow_abbrev=False
        )
        added[name].set_defaults(run=run, command=added[name])
        if name in STAGES:
            added[name].set_defaults(stage=name)
    for name in (*STAGES, "plan"):
        _add_fields(added[name])
    added["plan"].add_argument("--stage", default="pretrain", choices=STAGES)
    option = added["tokenizer"].add_argument
    option("--data_path", required=True, help="JSONL files, separated by commas")
    option("--out_dir", required=True, help="folder for tokenizer.json")
    option("--vocab_size", type=int, default=6400, help="entries (6400)")
    added["doctor"].add_argument(
        "--out_dir", default="out", help="where runs would go (out)"
    )
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and say what was probably meant for an option that does not exist."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [o for o in options.command._option_string_actions if o[:2] == "--"]
        options.command.error(describe_unknown(name, known, "option"))
    return options


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `TrainConfig`, with its docstring as help."""
    for name, text in field_docstrings().items():
        if name != "stage":  # the command says it
            parser.add_argument(
                f"--{name}",
                type=_converter(kinds()[name]),
                default=argparse.SUPPRESS,
                metavar="VALUE",
                help=text.replace("%", "%%"),
            )


def field_docstrings() -> dict[str, str]:
    """The string below each field of `TrainConfig`, on one line."""
    body: Any = ast.parse(inspect.getsource(TrainConfig)).body[0]
    pairs = itertools.pairwise(body.body)
    return {
        ast.unparse(field.target): " ".join(text.value.value.split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
    }


def _converter(types: tuple[type, ...]) -> Callable[[str], Any]:
    """Read an option's text as the first of a field's types that it fits."""

    def convert(text: str) -> Any:
        if bool in types and text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        if tuple in types:
            if text.startswith("["):
                return tuple(json.loads(text))
            return tuple(part.strip() for part in text.split(",") if part.strip())
        for kind in (int, float, str):
            if kind in types:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")

    convert.__name__ = " or ".join(k.__name__ for k in types if k is not type(None))
    return convert


def _config(options: argparse.Namespace) -> TrainConfig:
    given = {name: value for name, value in vars(options).items() if name in kinds()}
    return TrainConfig(**given)


def _train(options: argparse.Namespace) -> int:
    from .training.api import train

    run = train(_config(options))
    print(run)
    return _EXIT_CODES.get(run.status, 0)


def _plan(options: argparse.Namespace) -> int:
    from .planning import plan

    print(plan(_config(options)))
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from .data.vocabulary_training import train_tokenizer

    paths = [path.strip() for path in options.data_path.split(",")]
    print(train_tokenizer(paths, options.out_dir, vocab_size=options.vocab_size))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .diagnosis import doctor

    print(doctor(options.out_dir))
    return 0
