"""The command line: `minimind-nb pretrain --data_path …` and a command for each task.

Options are generated from `TrainConfig`: its field names, types and docstrings.
"""

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
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import __version__
from .config import SHAPE_FIELDS, STAGES, TrainConfig, describe_unknown, kinds
from .data.demo import check_files
from .launch.outcome import TrainingFailed
from .launch.spawn import enter_torchrun

_EXIT_CODES = {
    "finished": 0,
    "time_budget": 0,
    "interrupted": 128 + signal.SIGINT,
    "terminated": 128 + signal.SIGTERM,
}
_MINIMIND = ["ddp", "pretrain_data_path", "sft_data_path"]  # its scripts' own options
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
_TRAINING = [*(name for name in kinds() if name != "stage"), *_MINIMIND]
_EVALUATION = (
    "SOURCE data_path which tokenizer rope_scaling out_dir max_seq_len document_mask "
    "batch_size allow_smaller_batch eval_tokens device num_processes dtype "
    "hang_timeout_seconds on_bad_line max_bad_fraction"
).split() + SHAPE_FIELDS
_SAMPLING = (
    "temperature max_new_tokens system thinking top_p top_k repetition_penalty seed"
).split()
_LOADING = "which tokenizer rope_scaling".split()
_CHAT = ["SOURCE", "TEXT", *_SAMPLING, *_LOADING, *SHAPE_FIELDS]
_EXPORT = ["SOURCE", "FOLDER", "format", "dtype", *_LOADING, *SHAPE_FIELDS]
_TOKENIZER = "data_path vocab_size special out_dir".split()
# The public function that a command calls, its help and arguments: the positional ones
# are written in capitals.
_COMMANDS: dict[str, tuple[str, str, Sequence[str]]] = {
    "pretrain": ("train", "Train a model on plain text.", _TRAINING),
    "sft": ("train", "Fine-tune a model on conversations.", _TRAINING),
    "dpo": ("train", "Train on preferences between answers.", _TRAINING),
    "eval": ("evaluate", "Measure the loss of a model on a file.", _EVALUATION),
    "chat": ("chat", "Talk to a model.", _CHAT),
    "export": ("export", "Write a model in another program's format.", _EXPORT),
    "tokenizer": ("train_tokenizer", "Train a tokenizer on data files.", _TOKENIZER),
    "plan": ("plan", "Estimate what a run takes.", ["stage", "hours", *_TRAINING]),
    "preview": ("preview", "Show packed rows.", ["stage", "rows", *_TRAINING]),
    "report": ("data_report", "Find faults in data.", ["stage", *_TRAINING]),
    "bench": ("bench", "Measure the speed of training.", ["stage", *_TRAINING]),
    "runs": ("runs", "List the runs in a folder.", ["out_dir"]),
    "compare": ("compare", "Draw runs in one picture.", ["RUNS", "file", "y", "x"]),
    "doctor": ("doctor", "Report problems of this machine.", ["out_dir"]),
    "verify": ("verify", "Check the files of a run.", ["RUN_DIR"]),
}
# Help of what is no field of `TrainConfig`, or means something else in a command.
_HELP = {
    "SOURCE": "run folder, checkpoint, .pth file or Hugging Face folder",
    "TEXT": "what to say; without it, lines are read from the terminal",
    "FOLDER": "where to write: a new or empty folder",
    "RUN_DIR": "folder of a run, such as out/pretrain_512",
    "RUNS": "folders of runs",
    "which": 'checkpoint of a run: "last", or "best" on validation (default last)',
    "rope_scaling": "factor of YaRN: read so many times the max_seq_len trained with; "
    "or JSON, with the original_max_position_embeddings of weights without a run",
    "ddp": "is always on: one process per GPU, or --num_processes of them",
    "pretrain_data_path": "is for pretrain only, and unused by other commands",
    "sft_data_path": "is for sft only, and unused by other commands",
    "system": "system turn at the start of the conversation",
    "thinking": "think before an answer, or not (default: as the model likes)",
    "temperature": "0 takes the likeliest token (default 0.8)",
    "top_p": "sample from the likeliest tokens of this total probability (default 0.9)",
    "top_k": "sample from this many likeliest tokens; 0 from all (default 0)",
    "repetition_penalty": "above 1 repeats less (default 1.0)",
    "max_new_tokens": "longest answer in tokens (default 256)",
    "hours": "choose the preset, unless a shape is set, and the length for these hours",
    "rows": "how many rows to show (default 2)",
    "file": "the picture to write (default compare.png)",
    "y": "what is drawn up: loss, perplexity, learning_rate, … (default loss)",
    "x": "and across: step, tokens or minutes (default step)",
    "format": "llama, qwen3, qwen3_moe, minimind, pth or gguf (default: what fits)",
    "chat seed": "seed of the sampling",
    "export dtype": "precision of the weights: float16, bfloat16 or float32",
    "tokenizer data_path": "data files, separated by commas",
    "tokenizer out_dir": "folder to write the tokenizer to",
    "eval data_path": "the file to measure on, texts or conversations",
    "eval max_seq_len": "tokens in a row (default: as many as SOURCE was trained with)",
    "eval out_dir": "folder for the token cache (default: that of SOURCE)",
    "eval eval_tokens": "largest number of text tokens (default: all)",
    "special": "further special strings, separated by commas",
    "tokenizer vocab_size": "entries (default 6400)",
}
_TYPES: dict[str, tuple[type, ...]] = {
    **kinds(),
    **dict.fromkeys(["ddp", "thinking"], (bool,)),
    "special": (tuple,),
    "rope_scaling": (float, dict),
    **dict.fromkeys(["hours", "temperature", "top_p", "repetition_penalty"], (float,)),
    **dict.fromkeys(["top_k", "max_new_tokens", "rows"], (int,)),
}
# The arguments that begin a group in the help of a command.
_GROUPS = {
    "data_path": "data",
    "out_dir": "folders and weights",
    "which": "weights",
    "hidden_size": "shape, if preset or weights do not say it",
    "max_seq_len": "training",
    "val_fraction": "validation, metrics and checkpoints",
    "max_session_hours": "session and machine",
    "ddp": "for MiniMind's command lines",
    "temperature": "answers",
}
_KINDS = (int, float, str, bool, tuple, dict)
_METAVARS = dict(zip(_KINDS, "INT FLOAT TEXT BOOL LIST JSON".split(), strict=True))
_MORE: dict[str, Any] = {
    **{"TEXT": {"nargs": "?"}, "RUNS": {"nargs": "+"}},
    **dict.fromkeys(["eval data_path", "tokenizer data_path"], {"required": True}),
    "tokenizer out_dir": {"required": True},
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command and exit: 0 on success, 143 after SIGTERM.

    `arguments` default to those of the process. A user's mistake is one line on stderr
    and exit code 2; a failed run is its explanation and exit code 1.
    """
    warnings.formatwarning = lambda text, *_: f"minimind-nb: {_as_options(f'{text}')}\n"
    try:
        enter_torchrun()
        code = run(**vars(_parse(arguments)))
    except BrokenPipeError:  # the reader of our output has left, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 128 + signal.SIGPIPE
    except (ValueError, OSError, RuntimeError) as error:
        code = 1 if isinstance(error, TrainingFailed) else 2
        text = str(error) if code == 1 else _as_options(str(error))
        print(f"minimind-nb: {text}", file=sys.stderr)
    except KeyboardInterrupt:
        code = _EXIT_CODES["interrupted"]
    sys.exit(code)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; an unknown name is an error that names the closest known one."""
    parser = _parser()
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--mode")  # MiniMind's command line has it for a command
    mode, words = finder.parse_known_args(arguments)
    words = [mode.mode, *words] if mode.mode else words or ["--help"]
    if not words[0].startswith("-") and words[0] not in _COMMANDS:
        problem = describe_unknown(words[0], _COMMANDS, "command")
        parser.error(f"{problem} (--help lists them)")
    options, rest = parser.parse_known_args(words)
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
    if path := vars(options).pop(f"{options.command}_data_path", None):
        vars(options).setdefault("data_path", path)
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
        group: Any = parser
        for name in names:
            types = _TYPES.get(name, (str,))
            more = _MORE.get(f"{command} {name}") or _MORE.get(name, {})
            metavar = "|".join(_METAVARS[k] for k in types if k in _METAVARS)
            if name in _GROUPS:
                group = parser.add_argument_group(_GROUPS[name])
            group.add_argument(
                name.lower() if name.isupper() else f"--{name}",
                type=_converter(types),
                metavar=name if name.isupper() else metavar,
                help=_describe(command, name).replace("%", "%%"),
                **({"nargs": "?", "const": True} if bool in types else more),
            )
    return main_parser


def _describe(command: str, name: str) -> str:
    """Return the help of an argument, of a training with its default."""
    text = _HELP.get(f"{command} {name}") or _HELP.get(name) or field_docstrings()[name]
    stages = [command] if command in STAGES else STAGES
    values = dict.fromkeys(str(STAGES[stage].get(name)) for stage in stages)
    if "efault" in text or "None" in values or "ddp" not in _COMMANDS[command][2]:
        return text
    return f"{text} (default {' or '.join(values)}{', by stage' * (len(values) > 1)})"


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
        if dict in types and text.startswith("{"):
            return json.loads(text)
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
    text = re.sub(r"""\bstage=["'](\w+)["']""", r"\1", text)  # a command here
    return re.sub(rf"\b({'|'.join(names)})=", r"--\1 ", text)


def run(command: str, **options: Any) -> int:
    """Call the function behind a command, print its result, return the exit code."""
    for name in options.keys() & set(_MINIMIND):
        del options[name]
        print(f"minimind-nb: --{name} {_HELP[name]}", file=sys.stderr)
    function = _COMMANDS[command][0]
    package = importlib.import_module("minimind_nb")
    if "ddp" in _COMMANDS[command][2]:
        options |= {"stage": command} if command in STAGES else {}
        extra = {n: options.pop(n) for n in ("hours", "rows") if n in options}
        options = {"cfg": TrainConfig(**options), **extra}
    if command == "tokenizer":
        options["paths"] = re.split(r"\s*,\s*", options.pop("data_path").strip())
    _check_files(options)
    if command == "chat" and options.keys() & set(SHAPE_FIELDS):
        named = options.keys() & {"source", *_LOADING, *SHAPE_FIELDS}
        options["source"] = package.load(**{name: options.pop(name) for name in named})
    runs, file = options.pop("runs", ()), options.pop("file", "compare.png")
    result = getattr(package, function)(*runs, **options)
    if command == "compare":
        result.savefig(file)
        result = file
    if command != "chat":
        print(result)
    if command == "verify":
        return 0 if result.intact else 1
    return _EXIT_CODES.get(result.status, 1) if function == "train" else 0


def _check_files(options: Mapping[str, Any]) -> None:
    """Refuse missing files before torch is loaded, which takes seconds."""
    if "torch" in sys.modules:
        return  # the commands check the same
    source = options.get("source")
    if source and not Path(source).expanduser().exists():
        raise FileNotFoundError(f"{source} does not exist: name a {_HELP['SOURCE']}")
    paths = vars(options["cfg"]) if "cfg" in options else options
    check_files(paths.get("data_path"), paths.get("val_path"))
