"""The command line: `minimind-nb pretrain --data_path …` and a command for each task.

Options are generated from `TrainConfig`: its field names, types and docstrings.
"""

from __future__ import annotations

import argparse
import ast
import functools
import importlib
import inspect
import itertools
import json
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
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
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_TRAINING = [*(name for name in kinds() if name != "stage"), "ddp"]
_EVALUATION = (
    "SOURCE data_path which tokenizer out_dir max_seq_len document_mask batch_size "
    "eval_tokens device num_processes dtype hang_timeout_seconds on_bad_line "
    "max_bad_fraction"
).split() + SHAPE_FIELDS
_SAMPLING = (
    "system thinking temperature top_p top_k repetition_penalty max_new_tokens seed"
).split()
_CHAT = ["SOURCE", "TEXT", "which", "tokenizer", *SHAPE_FIELDS, *_SAMPLING]
_EXPORT = ["SOURCE", "FOLDER", *"format which dtype tokenizer".split(), *SHAPE_FIELDS]
# The public function that a command calls, its help and arguments: the positional ones
# are written in capitals.
_COMMANDS: dict[str, tuple[str, str, Sequence[str]]] = {
    "pretrain": ("train", "Train a model on plain text.", _TRAINING),
    "sft": ("train", "Fine-tune a model on conversations.", _TRAINING),
    "dpo": ("train", "Train on preferences between answers.", _TRAINING),
    "eval": ("evaluate", "Measure the loss of a model on a file.", _EVALUATION),
    "chat": ("chat", "Talk to a model.", _CHAT),
    "export": ("export", "Write a model in another program's format.", _EXPORT),
    "tokenizer": (
        "train_tokenizer",
        "Train a tokenizer on data files.",
        ["data_path", "out_dir", "vocab_size", "special"],
    ),
    "plan": ("plan", "Estimate what a run takes.", [*_TRAINING, "stage", "hours"]),
    "bench": ("bench", "Measure the speed of training.", [*_TRAINING, "stage"]),
    "doctor": ("doctor", "Report problems of this machine.", ["out_dir"]),
    "verify": ("verify", "Check the files of a run.", ["RUN_DIR"]),
}
_REQUIRED = ("eval data_path", "tokenizer data_path", "tokenizer out_dir")
# Help of what is no field of `TrainConfig`, or means something else in a command.
_HELP = {
    "SOURCE": "run folder, checkpoint, .pth file or Hugging Face folder",
    "TEXT": "what to say; without it, lines are read from the terminal",
    "FOLDER": "where to write: a new or empty folder",
    "RUN_DIR": "folder of a run, such as out/pretrain_512",
    "which": 'checkpoint of a run: "last", or "best" on validation (last)',
    "ddp": "Accepted for compatibility with MiniMind; DDP is always on.",
    "system": "system turn at the start of the conversation",
    "thinking": "think before an answer, or not (the model's own choice)",
    "temperature": "0 takes the likeliest token (0.8)",
    "top_p": "sample from the likeliest tokens of this total probability (0.9)",
    "top_k": "sample from this many likeliest tokens; 0 from all (0)",
    "repetition_penalty": "above 1 repeats less (1.0)",
    "max_new_tokens": "longest answer in tokens (256)",
    "hours": "choose the preset, unless a shape is set, and the length for these hours",
    "format": "llama, qwen3, qwen3_moe, minimind, pth or gguf; the one that fits",
    "chat seed": "seed of the sampling",
    "export dtype": "precision of the weights: float16, bfloat16 or float32",
    "tokenizer data_path": "data files, separated by commas",
    "special": "further special strings, separated by commas",
    "tokenizer vocab_size": "entries (6400)",
}
_TYPES: dict[str, tuple[type, ...]] = {
    **kinds(),
    **dict.fromkeys(["ddp", "thinking"], (bool,)),
    "special": (tuple,),
    **dict.fromkeys(["hours", "temperature", "top_p", "repetition_penalty"], (float,)),
    **dict.fromkeys(["top_k", "max_new_tokens"], (int,)),
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 on success, 143 after SIGTERM.

    `arguments` default to those of the process. A user's mistake is one line on stderr
    and exit code 2; a failed run is its explanation and exit code 1. Raises
    `RuntimeError` in a notebook without `arguments`, where the process has Jupyter's.
    """
    if arguments is None and running_kernel():
        raise RuntimeError(
            "in a notebook the command line is Jupyter's own: call "
            "mm.train(mm.TrainConfig(…)), or write !minimind-nb pretrain --data_path …"
        )
    options, call = _parse(arguments), run
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun prints what is raised
        from torch.distributed.elastic.multiprocessing.errors import record

        call = record(run)
    try:
        code = call(**vars(options))
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except TrainingFailed as failure:
        if _is_first():
            print(f"minimind-nb: {failure}", file=sys.stderr)
        code = 1
    except (ValueError, OSError, RuntimeError) as error:
        if _is_first():
            print(f"minimind-nb: {_as_options(str(error))}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = _EXIT_CODES["interrupted"]
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; an unknown option is an error that names the closest known one."""
    options, rest = _parser().parse_known_args(arguments)
    parser = vars(options).pop("parser")
    if rest and options.command == "chat" and not rest[0].startswith("--"):
        # Before Python 3.13 argparse ignores an optional positional after an option.
        vars(options).setdefault("text", rest.pop(0))
    if rest:
        known = [o for o in parser._option_string_actions if o.startswith("--")]
        problem = describe_unknown(rest[0].partition("=")[0], known, "option")
        if not rest[0].startswith("-"):
            problem += "; name it, as in --data_path FILE, and quote words with blanks"
        parser.error(problem)
    return options


def _parser() -> argparse.ArgumentParser:
    """Build the parser; an option that is not given is absent from its result."""
    main_parser = argparse.ArgumentParser(
        prog="minimind-nb", description="Train MiniMind models and talk to them."
    )
    main_parser.add_argument("-V", "--version", action="version", version=__version__)
    commands = main_parser.add_subparsers(
        title="commands", required=True, metavar="COMMAND", dest="command"
    )
    for command, (_, text, names) in _COMMANDS.items():
        words = ["[TEXT]" if n == "TEXT" else n for n in names if n.isupper()]
        parser = commands.add_parser(
            command,
            help=text,
            description=text,
            usage=" ".join(["minimind-nb", command, *words, "[--OPTION VALUE ...]"]),
            allow_abbrev=False,
            argument_default=argparse.SUPPRESS,
        )
        parser.set_defaults(parser=parser)
        for name in names:
            types = _TYPES.get(name, (str,))
            more: dict[str, Any] = {}
            if name == "TEXT" or bool in types:
                more = {"nargs": "?", "const": True}
            elif f"{command} {name}" in _REQUIRED:
                more = {"required": True}
            shown = _HELP.get(f"{command} {name}") or _HELP.get(name)
            parser.add_argument(
                name.lower() if name.isupper() else f"--{name}",
                type=_converter(types),
                metavar=name if name.isupper() else "VALUE",
                help=(shown or field_docstrings()[name]).replace("%", "%%"),
                **more,
            )
    return main_parser


@functools.cache
def field_docstrings() -> dict[str, str]:
    """Return the docstring of each field of `TrainConfig`, on one line."""
    body: Any = ast.parse(inspect.getsource(TrainConfig)).body[0]
    pairs = itertools.pairwise(body.body)
    return {
        ast.unparse(field.target): " ".join(text.value.value.split())
        for field, text in pairs
        if isinstance(field, ast.AnnAssign)
    }


def _converter(types: tuple[type, ...]) -> Callable[[str], Any]:
    """Return a parser of an option's text: the first of a field's types that fits."""

    def convert(text: str) -> Any:
        if bool in types and text.lower() in (*_TRUE, *_FALSE):
            return text.lower() in _TRUE
        if tuple in types and str not in types:
            if text.startswith("["):
                return tuple(json.loads(text))
            return tuple(part.strip() for part in text.split(",") if part.strip())
        for kind in (int, float, str):
            if kind in types:
                return kind(text)
        raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")

    convert.__name__ = " or ".join(k.__name__ for k in types if k is not type(None))
    return convert


def _as_options(text: str) -> str:
    """Write the settings in a message as options: `--resume False` for `resume=False`."""
    names = {name for _, _, names in _COMMANDS.values() for name in names}
    text = re.sub(r'=(\["[^]]*\])', r"='\1'", text)  # quoted for the shell
    return re.sub(rf"\b({'|'.join(names)})=", r"--\1 ", text)


def _is_first() -> bool:
    """Return whether this process prints: under torchrun, only rank 0 does."""
    return os.environ.get("RANK", "0") == "0" or "WORLD_SIZE" not in os.environ


def run(command: str, **options: Any) -> int:
    """Call the function behind a command, print its result, return the exit code."""
    if command in ("bench", "chat", "export", "tokenizer") and not _is_first():
        return 0  # torchrun starts every command in all its processes
    if options.pop("ddp", None) is not None and _is_first():
        text = "--ddp is always on: one process per GPU, or --num_processes of them"
        print(f"minimind-nb: {text}", file=sys.stderr)
    function = _COMMANDS[command][0]
    package = importlib.import_module("minimind_nb")
    if function in ("train", "plan", "bench"):
        options |= {"stage": command} if command in STAGES else {}
        extra = {name: options.pop(name) for name in ("hours",) if name in options}
        options = {"cfg": TrainConfig(**options), **extra}
    if command == "tokenizer":
        options["paths"] = re.split(r"\s*,\s*", options.pop("data_path").strip())
    if command == "chat" and options.keys() & set(SHAPE_FIELDS):
        named = options.keys() & {"source", "which", "tokenizer", *SHAPE_FIELDS}
        options["source"] = package.load(**{name: options.pop(name) for name in named})
    result = getattr(package, function)(**options)
    if command != "chat" and _is_first():
        print(result)
    if command == "verify":
        return 0 if result.intact else 1
    return _EXIT_CODES.get(result.status, 1) if function == "train" else 0
