"""The command line: `minimind-nb pretrain | tokenizer | plan | doctor`.

Options are generated from `TrainConfig`: its field names, types and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import signal
import sys
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

from .config import TrainConfig, describe_unknown, kinds

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
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        print(f"minimind-nb: {error}", file=sys.stderr)
        code = 1 if type(error).__name__ == "TrainingFailed" else _USAGE_ERROR
    except KeyboardInterrupt:
        code = _EXIT_CODES["interrupted"]
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minimind-nb", description="MiniMind models on any processor."
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[Any], int], text: str) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name,
            help=text,
            description=text,
            usage=f"minimind-nb {name} [--OPTION VALUE ...]",
            allow_abbrev=False,
        )
        command.set_defaults(run=run, command=command)
        return command

    _add_fields(add("pretrain", _pretrain, "Train a model on plain text."))
    _add_fields(add("plan", _plan, "Say what a run would take."))
    tokenizer = add("tokenizer", _tokenizer, "Train a vocabulary from JSONL files.")
    tokenizer.add_argument("--data_path", required=True, help="JSONL files, by commas")
    tokenizer.add_argument("--out_dir", required=True, help="folder for tokenizer.json")
    tokenizer.add_argument(
        "--vocab_size", type=int, default=6400, help="entries (6400)"
    )
    doctor = add("doctor", _doctor, "Say what this machine is and what will go wrong.")
    doctor.add_argument("--out_dir", default="out", help="where runs would go (out)")
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and say what was probably meant for an option that does not exist."""
    options, unknown = _parser().parse_known_args(arguments)
    if unknown:
        name = unknown[0].partition("=")[0]
        known = [name.lstrip("-") for name in options.command._option_string_actions]
        options.command.error(describe_unknown(name, known, "option"))
    return options


def _add_fields(parser: argparse.ArgumentParser) -> None:
    """One option for each field of `TrainConfig`, with its docstring as help."""
    helps = field_docstrings()
    for field in dataclasses.fields(TrainConfig):
        if field.name == "stage":
            continue  # the command says it
        parser.add_argument(
            f"--{field.name}",
            type=_converter(kinds()[field.name]),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=helps[field.name].replace("%", "%%"),
        )


def field_docstrings() -> dict[str, str]:
    """The string below each field of `TrainConfig`, on one line."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(TrainConfig)))
    body = tree.body[0].body  # pyright: ignore[reportAttributeAccessIssue]
    return {
        field.target.id: " ".join(str(text.value.value).split())
        for field, text in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name)
        if isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant)
    }


def _converter(types: tuple[type, ...]) -> Callable[[str], Any]:
    """Read an option's text as the first of a field's types that it fits."""

    def convert(text: str) -> Any:
        if bool in types and text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        if tuple in types:
            return tuple(part.strip() for part in text.split(",") if part.strip())
        for kind in (int, float, str):
            if kind in types:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")

    convert.__name__ = " or ".join(k.__name__ for k in types if k is not type(None))
    return convert


def _config(options: argparse.Namespace) -> TrainConfig:
    names = [field.name for field in dataclasses.fields(TrainConfig)]
    given = {name: getattr(options, name) for name in names if hasattr(options, name)}
    return TrainConfig(stage="pretrain", **given)


def _pretrain(options: argparse.Namespace) -> int:
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
