"""Processes that tests look at."""

from pathlib import Path


def is_alive(pid: int) -> bool:
    """Return whether a process lives; one that has ended, but was not reaped, does not."""
    try:
        # The name, in parentheses, may contain anything.
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return False
    return stat[0] != "Z"
