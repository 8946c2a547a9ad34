"""Runs on the Hugging Face Hub: beside a training, and when it is finished."""

import contextlib
import io
import itertools
import json
import os
import re
import shutil
import traceback
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from ..config import ResolvedConfig, TrainConfig, count_parameters, shorten_home
from ..hub import RUN_FILE, Repository, find_token
from ..storage import verified
from ..storage.run_folder import WEIGHTS, RunFolder, step_of
from .follower import Follower
from .metrics import History
from .progress import figures

FINISH_SECONDS = 300.0
_OF_NO_MODEL = {".gitattributes", "README.md", "LICENSE"}
_SHOWN = ("summary.md", "loss.png")  # uploaded, too, for readers


def publisher(history: History, cfg: ResolvedConfig) -> Follower | None:
    """Start the process that uploads the run, if `cfg.publish`.

    It does so at the start, at each interval and at the end. Raises `ValueError` without
    a token.
    """
    if not cfg.publish:
        return None
    given = (_follow, history, cfg, find_token(cfg.publish))
    return Follower("publishing", history.path.parent, FINISH_SECONDS, *given)


def publish(
    run: str | os.PathLike[str], place: str, private: bool = True, **card: Any
) -> str:
    """Upload a run to "hf:USER/NAME" as a model for transformers; return its address.

    The repository gets the model of the newest checkpoint as `export` writes it, a card
    whose header `card` extends (`license="apache-2.0"`), and below `run/` what
    resume="hf:USER/NAME" needs. One that is missing is made, by default a private one.

    Raises what `export` raises, `ValueError` for another `place` or without a token,
    `RuntimeError` if the repository holds another model or a later step, and `OSError`
    or an error of huggingface_hub if the Hub refuses or does not answer.
    """
    TrainConfig(publish=place)  # raises for another form
    return _upload(Path(run).expanduser(), place, find_token(place), private, card)


def _follow(
    finish: Event,
    say: Callable[[str], None],
    history: History,
    cfg: ResolvedConfig,
    token: str,
) -> None:
    folder, place = history.path.parent, str(cfg.publish)
    over, text = False, ""
    while not over:
        over, said = finish.is_set(), text
        try:
            address = _upload(folder, place, token)
            text = address and f"published at {address}"
        except Exception as error:
            print(traceback.format_exc().replace(token, "…"), flush=True)
            text = (
                f"not published ({error}); the training is not affected, and "
                f'mm.publish("{shorten_home(str(folder))}", "{place}") does it later'
            ).replace(token, "…")
        if text not in ("", said):
            say(text)
        if not over:
            finish.wait(60 * cfg.publish_minutes)


def _upload(
    folder: Path,
    place: str,
    token: str | None,
    private: bool = True,
    card: dict[str, Any] | None = None,
) -> str:
    """Upload the newest checkpoint, and if there is a `card` the model.

    Returns the address of the repository, or "" if nothing is saved yet.
    """
    run = RunFolder(folder)
    found = run.newest_good_checkpoint()
    with verified.beside(run.root / "published") as aside:
        new, repository = aside / "new", Repository(place, token, private)
        theirs = repository.download(r"run/config\.json", aside)
        _check_is_of(run, found, repository, theirs)
        if card is not None:
            from ..model.export import export

            with contextlib.redirect_stdout(io.StringIO()):
                export(found or run.root, new)
        if not found:
            return ""
        folders = (run.root, run.tokenizer, found)
        for file in itertools.chain(*(f.glob("*") for f in folders)):
            name = f"run/{file.relative_to(run.root)}"
            if re.fullmatch(RUN_FILE, name) or file.name in _SHOWN:
                (new / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, new / name)  # the run continues meanwhile
        verified.verify(new / "run" / found.relative_to(run.root))
        if card is not None or WEIGHTS not in repository.files:
            _write_card(new, step_of(found), repository.name, card)
        repository.replace(new, f"Step {step_of(found):,}")
    return repository.address


def _check_is_of(
    run: RunFolder, found: Path | None, repository: Repository, theirs: RunFolder
) -> None:
    """Raise `RuntimeError` if another model, or a later step, is in the repository."""
    files, place = repository.files, f"hf:{repository.name}"
    other = files - _OF_NO_MODEL
    if theirs.exists():
        other = theirs.read_config().get("run") != run.read_config().get("run", "")
    if other:
        raise RuntimeError(
            f"{place} holds another model, and was left as it is: choose a new name"
        )
    steps = (
        name.split("/")[2] for name in files if name.startswith("run/checkpoints/")
    )
    later = max(steps, default="")
    own = found.name if found else ""
    if later > own:
        raise RuntimeError(
            f'{place} is at {later}, this run at {own or "step 0"}: resume="{place}" '
            "takes that up, or choose a new name"
        )


def _write_card(
    folder: Path, step: int, name: str, card: dict[str, Any] | None
) -> None:
    """Write the model card, with the figures of the step that is uploaded."""
    run, load = RunFolder(folder / "run"), ""
    history = History(run.metrics_file)
    history.rewind(step)
    facts = "\n".join(f"- {key}: {text}" for key, text in figures(history).items())
    header = {"license": "unknown", "pipeline_tag": "text-generation"} | (card or {})
    lines = "\n".join(f"{key}: {json.dumps(header[key])}" for key in header)
    if card is not None:
        code = ", trust_remote_code=True" * (folder / "modeling_minimind.py").is_file()
        load = f"""Load it with `AutoModelForCausalLM.from_pretrained("{name}"{code})` of
transformers. """
    text = f"""---
{lines}
---

# {name.rpartition("/")[2]}

A language model of {count_parameters(run.settings())["total"]:,} parameters, trained with
minimind_nb, as it was at step {step:,} of its {history.stage} run:

{facts}

{load}Train it further, on the same data, with
`mm.train(data_path, stage="{history.stage}", resume="hf:{name}")`.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")
