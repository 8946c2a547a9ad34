"""The command line: `minimind-nb pretrain --data_path …`, and a command for each door.

Options are generated from `TrainConfig`: its field names, types and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import functools
import inspect
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from . import __version__
from .config import SHAPE_FIELDS, STAGES, TrainConfig, describe_unknown, kinds
from .launch.outcome import TrainingFailed
from .session import running_kernel

_EXIT_CODES = {
    "finished": 0,
    "time_budget": 0,
    "interrupted": 128 + signal.SIGINT,
    "terminated": 128 + signal.SIGTERM,
}
_USAGE_ERROR = 2
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_MODEL = "a run folder, a checkpoint, a .pth file or a saved folder"
_WHICH = 'which checkpoint of a run: "last", or "best" on validation (last)'
_TOKENIZER = "instead of the one that lies with the weights"
_SAMPLING: dict[str, tuple[type, str]] = {
    "system": (str, "a system turn to begin with"),
    "temperature": (float, "0 takes the likeliest token; more draws freer (0.8)"),
    "top_p": (float, "draw from the likeliest tokens of this probability (0.9)"),
    "top_k": (int, "draw from this many likeliest tokens; 0 from all (0)"),
    "repetition_penalty": (float, "above 1 repeats less (1.0)"),
    "max_new_tokens": (int, "longest answer in tokens (256)"),
    "seed": (int, "the same answers every time"),
}
# What `evaluate` takes; of the shape, what a .pth leaves open.
_EVALUATION = (
    "tokenizer out_dir max_seq_len document_mask batch_size eval_tokens device "
    "num_processes dtype hang_timeout_seconds on_bad_line max_bad_fraction"
).split() + SHAPE_FIELDS


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 when it did what was asked, 143 after SIGTERM.

    `arguments` are those of the process unless given. A mistake of the user's is one
    line on stderr and exit code 2, a failed run its explanation and 1. Raises
    `RuntimeError` in a notebook without `arguments`: the process has those of Jupyter.
    """
    if arguments is None and running_kernel():
        raise RuntimeError(
            "in a notebook the command line is Jupyter's own: call "
            "mm.train(mm.TrainConfig(…)), write !minimind-nb pretrain --data_path …, or "
            'give the arguments, main(["doctor"])'
        )
    options = _parse(arguments)
    try:
        # torchrun starts a command in all its processes, and these need one.
        idle = options.run in (_chat, _export, _tokenizer) and not _is_first()
        if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun prints what is raised
            from torch.distributed.elastic.multiprocessing.errors import record

            options.run = record(options.run)
        code = 0 if idle else options.run(options)
    except BrokenPipeError:  # whoever read has seen enough, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except TrainingFailed as failure:
        if _is_first() or str(failure.rank) == os.environ.get("RANK"):
            print(f"minimind-nb: {failure}", file=sys.stderr)
        code = 1
    except (ValueError, OSError, RuntimeError) as error:
        if _is_first():
            print(f"minimind-nb: {error}", file=sys.stderr)
        code = _USAGE_ERROR
    except KeyboardInterrupt:
        code = _EXIT_CODES["interrupted"]
    sys.exit(code)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minimind-nb", description="MiniMind models on any processor."
    )
    parser.add_argument("-V", "--version", action="version", version=__version__)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, run, add_options, text in (
        ("pretrain", _train, _add_training, "Train a model on plain text."),
        ("sft", _train, _add_training, "Fine-tune a model on conversations."),
        ("dpo", _train, _add_training, "Train on preferences between answers."),
        ("eval", _evaluate, _add_eval, "Measure the loss of a model on a file."),
        ("chat", _chat, _add_chat, "Talk to a model."),
        ("export", _export, _add_export, "Write a model as other programs read it."),
        ("tokenizer", _tokenizer, _add_tokenizer, "Train a vocabulary on JSONL files."),
        ("plan", _plan, _add_plan, "Say what a run would take."),
        ("doctor", _doctor, _add_doctor, "Say what will go wrong on this machine."),
        ("verify", _verify, _add_verify, "Say whether the files of a run are intact."),
    ):
        command = commands.add_parser(
            name, help=text, description=text, allow_abbrev=False
        )
        command.set_defaults(run=run, command=command, stage=name, words={})
        add_options(command)
        words = command.get_default("words")
        shapes = (" {}" if words[word] else " [{}]" for word in words)
        shown = "".join(map(str.format, shapes, map(str.upper, words)))
        command.usage = f"minimind-nb {name}{shown} [--OPTION VALUE ...]"
    return parser


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse, and say what was probably meant for an option that does not exist.

    What a command takes as `words`, such as its source, can be named as an option too;
    the words beside the options are the rest of them, in order.
    """
    options, unknown = _parser().parse_known_args(arguments)
    open_words = [word for word in options.words if getattr(options, word) is None]
    for word in unknown:
        is_option = word.startswith("-") and " " not in word
        if is_option or not open_words:
            known = [o for o in options.command._option_string_actions if o[:2] == "--"]
            name = word.partition("=")[0]
            problem = describe_unknown(name, known, "option")
            if not is_option:
                problem += (
                    "; options are named, as in --data_path FILE, and words with "
                )
                problem += "blanks stand in quotes"
            options.command.error(problem)
        setattr(options, open_words.pop(0), word)
    for word in open_words:
        if options.words[word]:
            options.command.error(f"{word.upper()} is missing: {options.words[word]}")
    return options


def _add_words(parser: argparse.ArgumentParser, **words: str) -> None:
    """Words a command takes, each with its help; `text` may be left out."""
    for word, text in words.items():
        parser.add_argument(f"--{word}", help=text)
    needed = {word: "" if word == "text" else text for word, text in words.items()}
    parser.set_defaults(words=needed)


def _add_fields(parser: argparse.ArgumentParser, names: Iterable[str]) -> None:
    """One option for each of these fields of `TrainConfig`; its docstring is the help."""
    helps = field_docstrings()
    for name in names:
        is_switch = {"nargs": "?", "const": True} if bool in kinds()[name] else {}
        parser.add_argument(
            f"--{name}",
            type=_converter(kinds()[name]),
            default=argparse.SUPPRESS,
            metavar="VALUE",
            help=helps[name].replace("%", "%%"),
            **is_switch,
        )


def _add_training(parser: argparse.ArgumentParser) -> None:
    _add_fields(parser, (name for name in kinds() if name != "stage"))
    switch = _converter((bool,))
    text = "Always on, and taken for MiniMind's sake: every GPU has a process."
    parser.add_argument(
        "--ddp", type=switch, nargs="?", const=True, metavar="VALUE", help=text
    )


def _add_plan(parser: argparse.ArgumentParser) -> None:
    _add_training(parser)
    parser.add_argument("--stage", default="pretrain", choices=STAGES)


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_words(parser, source=_MODEL)
    text = 'JSONL file with one {"text": "…"} or {"conversations": […]} a line'
    parser.add_argument("--data_path", required=True, help=text)
    parser.add_argument("--which", default="last", help=_WHICH)
    _add_fields(parser, (name for name in kinds() if name in _EVALUATION))


def _add_chat(parser: argparse.ArgumentParser) -> None:
    said = "what to say; without it, lines from the terminal until an empty one"
    _add_words(parser, source=_MODEL, text=said)
    parser.add_argument("--which", default="last", help=_WHICH)
    parser.add_argument("--tokenizer", help=_TOKENIZER)
    _add_fields(parser, SHAPE_FIELDS)
    for name, (kind, text) in _SAMPLING.items():
        parser.add_argument(
            f"--{name}", type=kind, default=argparse.SUPPRESS, help=text
        )


def _add_export(parser: argparse.ArgumentParser) -> None:
    _add_words(parser, source=_MODEL, folder="where to write, a new or empty folder")
    formats = "llama, qwen3, qwen3_moe, minimind, pth or gguf; what fits unless set"
    parser.add_argument("--format", help=formats)
    parser.add_argument("--which", default="last", help=_WHICH)
    dtype = "precision of the weights written: float16, bfloat16 or float32"
    parser.add_argument("--dtype", help=dtype)
    parser.add_argument("--tokenizer", help=_TOKENIZER)
    _add_fields(parser, SHAPE_FIELDS)


def _add_tokenizer(parser: argparse.ArgumentParser) -> None:
    option = parser.add_argument
    option("--data_path", required=True, help="JSONL files, separated by commas")
    option("--out_dir", required=True, help="folder for tokenizer.json")
    option("--vocab_size", type=int, default=6400, help="entries (6400)")


def _add_doctor(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out_dir", default="out", help="where runs would go (out)")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    _add_words(parser, run_dir="the folder of a run, such as out/pretrain_512")


@functools.cache
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
            bare = re.fullmatch(r"\[([a-z_, ]*)\]", text)  # a shell took the quotes
            if text.startswith("[") and not bare:
                return tuple(json.loads(text))
            parts = (bare[1] if bare else text).split(",")
            return tuple(part.strip() for part in parts if part.strip())
        for kind in (int, float, str):
            if kind in types:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")

    convert.__name__ = " or ".join(k.__name__ for k in types if k is not type(None))
    return convert


def _is_first() -> bool:
    """Whether this process speaks: of torchrun's processes rank 0 does."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def _show(result: object) -> None:
    if _is_first():
        print(result)


def _given(options: argparse.Namespace, names: Iterable[str]) -> dict[str, Any]:
    """What was given of these options."""
    return {name: value for name, value in vars(options).items() if name in names}


def _config(options: argparse.Namespace) -> TrainConfig:
    if options.ddp is not None and _is_first():
        text = "--ddp is always on: a process for each GPU, or --num_processes of them"
        print(f"minimind-nb: {text}", file=sys.stderr)
    return TrainConfig(**_given(options, kinds()))


def _train(options: argparse.Namespace) -> int:
    from .training.api import train

    run = train(_config(options))
    _show(run)
    return _EXIT_CODES.get(run.status, 1)


def _plan(options: argparse.Namespace) -> int:
    from .planning import plan

    _show(plan(_config(options)))
    return 0


def _evaluate(options: argparse.Namespace) -> int:
    from .training.api import evaluate

    settings = _given(options, _EVALUATION)
    _show(evaluate(options.source, options.data_path, options.which, **settings))
    return 0


def _chat(options: argparse.Namespace) -> int:
    from .monitor.chat import chat

    source, opening = options.source, ("which", "tokenizer", *SHAPE_FIELDS)
    named, sampling = _given(options, opening), _given(options, _SAMPLING)
    if named.keys() & set(SHAPE_FIELDS):
        from .model.loading import load

        source, named = load(source, **named), {}
    chat(source, options.text, **named, **sampling)
    return 0


def _export(options: argparse.Namespace) -> int:
    from .model.export import export

    choices = _given(options, ("format", "which", "tokenizer", "dtype", *SHAPE_FIELDS))
    _show(export(options.source, options.folder, **choices))
    return 0


def _tokenizer(options: argparse.Namespace) -> int:
    from .data.tokenizer_training import train_tokenizer

    paths = [path.strip() for path in options.data_path.split(",")]
    _show(train_tokenizer(paths, options.out_dir, vocab_size=options.vocab_size))
    return 0


def _doctor(options: argparse.Namespace) -> int:
    from .diagnosis import doctor

    _show(doctor(options.out_dir))
    return 0


def _verify(options: argparse.Namespace) -> int:
    from .diagnosis import verify

    verdict = verify(options.run_dir)
    _show(verdict)
    return 0 if verdict.intact else 1
