"""Lock, flush and measure free space, also on drives mounted in a notebook.

Such file systems may lack any of these; it is skipped then, with one warning.
"""

import errno
import fcntl
import functools
import logging
import math
import os
import shutil
from pathlib import Path

_UNSUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
_warn_once = functools.cache(logging.getLogger(__name__).warning)


def lock(descriptor: int, operation: int) -> bool:
    """Lock or unlock a file as `flock` does; return False if another holds it."""
    try:
        fcntl.flock(descriptor, operation)
    except BlockingIOError:
        return False
    except OSError as error:
        text = "this file system has no file locks: start only one run in a folder"
        _skip(error, text)
    return True


def flush(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        text = "this file system cannot flush: a power failure may lose the last files"
        _skip(error, text)
    finally:
        os.close(descriptor)


def free_bytes(folder: Path) -> float:
    """Return the bytes that are free, infinite if the file system states no size."""
    usage = shutil.disk_usage(folder)
    if usage.total:
        return usage.free
    _warn_once("this file system states no size: the free space is not checked")
    return math.inf


def _skip(error: OSError, warning: str) -> None:
    """Warn of an unsupported operation; raise any other error."""
    if error.errno not in _UNSUPPORTED:
        raise error
    _warn_once(warning)
