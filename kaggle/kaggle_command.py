"""The command `kaggle`: run it, and read what it prints, since its exit codes lie."""

import re
import shlex
import subprocess

BUSY = ("QUEUED", "RUNNING", "CANCEL_REQUESTED", "NEW_SCRIPT")
PATIENCE_SECONDS = 3600  # for the upload of a data set


class Refused(Exception):
    """An error with what to type instead."""


def find_state(kernel: str) -> str | None:
    """Return the state of a kernel's last version, or None if it does not exist."""
    said = kaggle("kernels", "status", kernel).stdout
    found = re.search(r'has status "(?:\w+\.)?(\w+)"', said)
    if found:
        return found[1].upper()
    # Kaggle gives the same answer for kernels that are missing and that are private.
    if re.search(r"40[34]|not found|cannot access", said, re.IGNORECASE):
        return None
    raise Refused(
        f"the state of {kernel} is unknown (kaggle said {said.strip()!r}): check your key "
        f"and `kaggle kernels status {kernel}`"
    )


def kaggle(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `kaggle` with these arguments."""
    return run(["kaggle", *arguments])


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
            check=False,
        )
    except subprocess.TimeoutExpired:
        limit = f"{PATIENCE_SECONDS / 60:.0f} min"
        raise Refused(f"`{shlex.join(command)}` did not end in {limit}") from None
    except OSError as error:
        raise Refused(f"`{command[0]}` cannot be run: {error}") from None
