"""The command `kaggle`: run it, and read what it prints, since its exit codes lie."""

import os
import re
import shlex
import subprocess
from typing import NamedTuple

ENDED = ("COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED")
PATIENCE_SECONDS = 3600  # for the upload of a data set
_NETWORK = (
    r"timed? ?out|connection|max retries|resolve|\b5\d\d \w+ ?error|\b429\b|rate limit"
)
_MISSING = r"\b40[34] client error|\bnot found\b|\bcannot access kernel\b"
_NO_KEY = (
    "kaggle has no valid key: create a token on Kaggle's settings page and save it at "
    "~/.kaggle/access_token, or run `kaggle auth login`; then repeat this command"
)


class Refused(Exception):
    """An error with what to type instead."""


class Unreadable(Refused):
    """An answer from which nothing can be concluded, such as a network error."""


class NotPushed(Refused):
    """A push that has certainly not started a session."""


class Quota(NamedTuple):
    """The GPU hours that are left this week, and when the week ends."""

    hours_left: float
    refresh_at: str


def find_state(kernel: str) -> str | None:
    """Return the state of a kernel's last version, or None if it does not exist.

    Raises `Unreadable` if Kaggle's answer does not say, `Refused` without a key.
    """
    said = kaggle("kernels", "status", kernel)
    found = re.search(r'has status "(?:\w+\.)?(\w+)"', said)
    if found:
        return found[1].upper()
    # Kaggle gives the same answer for kernels that are missing and that are private.
    if re.search(_MISSING, said, re.IGNORECASE) and not is_network_error(said):
        return None
    raise Unreadable(
        f"the state of {kernel} is unknown (kaggle said {shorten(said)!r}): check your key "
        f"and `kaggle kernels status {kernel}`"
    )


def is_busy(state: str | None) -> bool:
    """Return whether a version in this state runs or will, which an unknown one may."""
    return state is not None and state not in ENDED


def read_quota() -> Quota | None:
    """Return the GPU quota, or None if Kaggle's answer does not say."""
    row = re.search(r"^GPU\W.*$", kaggle("quota"), re.MULTILINE)
    hours = re.findall(r"(\d+(?:\.\d+)?)\s*h\b", row[0]) if row else []
    if len(hours) < 2:  # noqa: PLR2004
        return None
    refresh = re.search(r"\d{4}-\d\d-\d\dT\d\d:\d\d\S*", row[0]) if row else None
    return Quota(float(hours[1]), refresh[0] if refresh else "an unknown time")


def is_network_error(said: str) -> bool:
    """Return whether an answer reports only a fault of the network or of the servers."""
    return bool(re.search(_NETWORK, said, re.IGNORECASE))


def shorten(said: str) -> str:
    """Return an answer on one line, at most 300 characters of it."""
    text = " ".join(said.split())
    return text if len(text) <= 300 else f"{text[:300]}…"  # noqa: PLR2004


def kaggle(*arguments: str) -> str:
    """Return what `kaggle` prints with these arguments.

    Raises `Refused` if the command or its key is missing.
    """
    said = run(["kaggle", *arguments]).stdout
    for name in ("KAGGLE_KEY", "KAGGLE_API_TOKEN"):
        said = said.replace(os.environ.get(name) or "\0", "***")
    if re.search(r"authentication required|\b401 (client|unauth)", said, re.IGNORECASE):
        raise Refused(_NO_KEY)
    return said


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with stderr in its output and without input."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            timeout=PATIENCE_SECONDS,
            close_fds=False,  # it keeps the lock of `run` if that is killed
            check=False,
        )
    except subprocess.TimeoutExpired:
        limit = f"{PATIENCE_SECONDS / 60:.0f} min"
        raise Unreadable(f"`{shlex.join(command)}` did not end in {limit}") from None
    except OSError as error:
        raise Refused(f"`{command[0]}` cannot be run: {error}") from None
