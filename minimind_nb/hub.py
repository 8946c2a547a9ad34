"""Repositories on the Hugging Face Hub, "hf:USER/NAME", and the runs in them.

A run lies below `run/` as in its folder, with one checkpoint; each state is one commit.
"""

import contextlib
import importlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

from .storage import verified
from .storage.run_folder import RunFolder

# All that is uploaded of a run, and taken from a repository: JSON and safetensors.
RUN_FILE = (
    r"run/((config|rank0)\.json|metrics\.jsonl|reference\.safetensors|"
    r"tokenizer/(\w+\.json|chat_template\.jinja)|checkpoints/step_\d{8}/"
    r"((manifest|state)\.json|(model|optimizer)\.safetensors))"
)
_TIMEOUT_SECONDS = 60.0  # without a byte


def find_token(place: str = "") -> str | None:
    """Return HF_TOKEN, the token of a login, or the secret HF_TOKEN of Colab or Kaggle.

    Raises `ValueError` without one if it is needed to write to `place`.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        with contextlib.suppress(
            Exception
        ):  # no Kaggle, no such secret, or no internet
            client = importlib.import_module("kaggle_secrets").UserSecretsClient()
            token = client.get_secret("HF_TOKEN")
    if place and not token:
        raise ValueError(
            f"publishing to {place} needs a token with the right to write: set HF_TOKEN "
            "in the environment or as a secret of the notebook (on Kaggle, switch on "
            "its internet, too)"
        )
    return token.strip() if token else None


class Repository:
    """A repository at its newest commit; `files` are the names of its files.

    It is made if it is missing and `private` is not None. Raises `OSError` if the Hub
    refuses or does not answer.
    """

    def __init__(self, place: str, token: str | None, private: bool | None = None):
        from huggingface_hub import HfApi
        from huggingface_hub.utils import get_session

        self.name = place.removeprefix("hf:")
        endpoint = os.environ.get("HF_ENDPOINT")  # may be set after the import
        self._api: Any = HfApi(endpoint=endpoint, token=token or False)
        get_session().timeout = _TIMEOUT_SECONDS
        try:
            if private is not None:
                self._api.create_repo(self.name, private=private, exist_ok=True)
            info = self._api.model_info(self.name)
        except importlib.import_module("huggingface_hub.errors").HTTPError as error:
            raise OSError(
                f"{place} cannot be opened: {' '.join(str(error).split())}. Check its "
                "name, the rights of HF_TOKEN, and the internet (on Kaggle a setting of "
                "the notebook)"
            ) from error
        self.commit: str = info.sha
        self.files = {file.rfilename for file in info.siblings}
        self.address = f"{self._api.endpoint}/{self.name}"

    def download(self, wanted: str, folder: Path) -> RunFolder:
        """Download the files whose names match, and return the run in them."""
        given = {"revision": self.commit, "local_dir": folder}
        for name in filter(re.compile(wanted).fullmatch, self.files):
            self._api.hf_hub_download(self.name, name, **given)
        return RunFolder(folder / "run")

    def replace(self, folder: Path, text: str) -> None:
        """Commit the files of a folder, and that those of `run/` which it lacks go."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        new = {str(f.relative_to(folder)): f for f in folder.rglob("*") if f.is_file()}
        old = {name for name in self.files if name.startswith("run/")} - new.keys()
        added = [CommitOperationAdd(name, file) for name, file in new.items()]
        operations = [*added, *map(CommitOperationDelete, old)]
        # The parent is named so that of two writers one fails.
        given = {"commit_message": text, "parent_commit": self.commit}
        self._api.create_commit(self.name, operations, **given)


def download_run(place: str, cache: Path) -> Path:
    """Download the run in a repository, verified, and return its folder in `cache`.

    Raises `OSError` as `Repository` does, `FileNotFoundError` if there is no run, and
    `NoGoodCheckpoint` if its files are not those that were written.
    """
    repository = Repository(place, find_token())
    final = cache / f".hub-{repository.commit}"
    if final.is_dir():
        return final
    for old in cache.glob(".hub-*"):
        shutil.rmtree(old, ignore_errors=True)
    with verified.beside(final) as aside:
        run = repository.download(RUN_FILE, aside)
        if not run.exists() or not run.newest_good_checkpoint():
            raise FileNotFoundError(f"{place} has no run that could be resumed")
        run.root.rename(final)
    return final
