"""Runs on the Hugging Face Hub: beside a training, and when it is finished."""

import contextlib
import io
import json
import os
import re
import shutil
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

from ..config import ResolvedConfig, TrainConfig, count_parameters, shorten_home
from ..hub import RUN_FILE, Repository, explained, find_token
from ..storage import verified
from ..storage.run_folder import RunFolder, step_of
from .follower import Follower
from .metrics import History
from .progress import figures

FINISH_SECONDS = 300.0
_OF_NO_MODEL = {".gitattributes", "README.md", "LICENSE"}
_CARD = """---
{header}
---

# {title}

A language model of {parameters:,} parameters, trained with minimind_nb, as it was at
step {step:,} of its {stage} run:

{figures}

{load}Train it further, on the same data, with
`mm.train(data_path, stage="{stage}", resume="{place}")`.
"""
_LOAD = "Load it with `AutoModelForCausalLM.from_pretrained({})` of transformers.\n"


def publisher(history: History, cfg: ResolvedConfig) -> Follower | None:
    """Return the process that uploads the run, if `cfg.publish`.

    It does so at the start, at each interval and at the end. Raises `ValueError` without
    a token.
    """
    if not cfg.publish:
        return None
    folder, log = history.path.parent, history.path.with_name("publish.log")
    given = (folder, cfg.publish, 60 * cfg.publish_minutes)
    token = find_token(cfg.publish)
    return Follower("publishing", log, FINISH_SECONDS, _follow, token, given)


def publish(
    run: str | os.PathLike[str], place: str, private: bool = True, **card: Any
) -> str:
    """Upload a run to "hf:USER/NAME" as a model for transformers; return its address.

    The repository gets the model of the newest checkpoint as `export` writes it, a card
    whose header `card` extends (`license="apache-2.0"`), and below `run/` what
    resume="hf:USER/NAME" needs. One that is missing is made, by default a private one.

    Raises what `export` raises, `ValueError` for another `place` or without a token,
    `OSError` if the Hub refuses or does not answer, and `RuntimeError` if the repository
    holds another model or a later step.
    """
    TrainConfig(publish=place)  # raises for another form
    folder = RunFolder(Path(run).expanduser())
    return _upload(folder, place, find_token(place), private, card)


def _follow(
    finish: Event,
    say: Callable[[str], None],
    token: str,
    given: tuple[Path, str, float],
) -> None:
    (folder, place, interval), over, said = given, False, ""
    while not over:
        over = finish.is_set()
        try:
            address = _upload(RunFolder(folder), place, token)
            text = f"published at {address}" if over and address else ""
        except Exception as error:
            print(traceback.format_exc().replace(token, "…"), flush=True)
            text = (
                f"not published ({error}); the training is not affected, and "
                f'mm.publish("{shorten_home(str(folder))}", "{place}") does it later'
            ).replace(token, "…")
        if text not in ("", said):
            say(text)
        said = text
        if not over:
            finish.wait(interval)


def _upload(
    run: RunFolder,
    place: str,
    token: str | None,
    private: bool = True,
    card: dict[str, Any] | None = None,
) -> str:
    """Upload the newest checkpoint, and if there is a `card` the model.

    Returns the address of the repository, or "" if nothing is saved yet.
    """
    found = run.newest_good_checkpoint()
    step = step_of(found) if found else 0
    with explained(place), verified.beside(run.root / "published") as aside:
        repository = Repository(place, token, private)
        _check_is_of(run, step, repository)
        if not found:
            return ""
        if card is not None:
            from ..model.export import export

            with contextlib.redirect_stdout(io.StringIO()):
                export(found, aside)
        _stage(run, found, aside / "run")
        if card is not None or "model.safetensors" not in repository.files:
            text = _describe(aside, step, repository, card)
            (aside / "README.md").write_text(text, encoding="utf-8")
        repository.replace(aside, f"Step {step:,}")
    return repository.address


def _check_is_of(run: RunFolder, step: int, repository: Repository) -> None:
    """Raise `RuntimeError` if another model, or a later step, is in the repository."""
    files, place = repository.files, repository.place
    other = files.keys() - _OF_NO_MODEL
    if "run/config.json" in files:
        with tempfile.TemporaryDirectory() as folder:
            config = repository.download("run/config.json", Path(folder)).read_bytes()
        other = json.loads(config).get("run") != run.read_config().get("run", "")
    if other:
        raise RuntimeError(
            f"{place} holds another model, and was left as it is: choose a new name"
        )
    steps = re.findall(r"/step_(\d{8})/", " ".join(files))
    if (theirs := max(map(int, steps), default=0)) > step:
        raise RuntimeError(
            f'{place} is at step {theirs:,}, this run at {step:,}: resume="{place}" '
            "takes that up, or choose a new name"
        )


def _stage(run: RunFolder, checkpoint: Path, target: Path) -> None:
    """Copy what is uploaded of a run, so that nothing changes meanwhile."""
    # While a run trains, its summary is that of an earlier session.
    more = () if run.status() == "running" else ("summary.md", "loss.png")
    for file in filter(Path.is_file, run.root.rglob("*")):
        name = str(file.relative_to(run.root))
        wanted = RUN_FILE.fullmatch(f"run/{name}") or name in more
        if wanted and file.parent in (run.root, run.tokenizer, checkpoint):
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
    verified.verify(target / checkpoint.relative_to(run.root))


def _describe(
    folder: Path, step: int, repository: Repository, card: dict[str, Any] | None
) -> str:
    """Return the model card, with the figures of the step that is uploaded."""
    run, name = RunFolder(folder / "run"), json.dumps(repository.name)
    history, settings = History(run.metrics_file), run.settings()
    history.rewind(step)
    shown = figures(history)
    shown.pop("time left", None)
    header = {"license": "unknown", "pipeline_tag": "text-generation"} | (card or {})
    if settings["data_path"] == "demo":
        header.setdefault("language", ["zh", "en"])
    if (folder / "modeling_minimind.py").is_file():
        name += ", trust_remote_code=True"
    return _CARD.format(
        header="\n".join(f"{key}: {json.dumps(header[key])}" for key in header),
        title=repository.name.rpartition("/")[2],
        parameters=count_parameters(settings)["total"],
        step=step,
        stage=history.stage,
        figures="\n".join(f"- {key}: {text}" for key, text in shown.items()),
        load="" if card is None else _LOAD.format(name),
        place=repository.place,
    )
