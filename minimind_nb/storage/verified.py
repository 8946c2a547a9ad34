"""Folders written aside, listed in a manifest, renamed, and verified on reading.

Checkpoints and token caches are both such folders. A folder under its final name is
complete: whatever died while it was written left a name that starts with a dot.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

FORMAT = 1
MANIFEST = "manifest.json"
_SEAL = ',"sha256":'
_MOST_BYTES = 1 << 24  # of a manifest


class DamagedFolder(Exception):
    """A verified folder that is not what was written; the text says how it differs."""


@contextlib.contextmanager
def beside(final: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a folder beside `final` to write into; what is left in it at the end goes.

    Where fewer than `needed` bytes are free nothing is begun. That, and a disk that is
    full while it is written to, is an `OSError` that says how much there is.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    if shutil.disk_usage(final.parent).free < needed:
        raise _full_disk(final, needed, "")
    aside.mkdir()
    try:
        yield aside
    except BaseException as error:
        if not is_full_disk(error):
            raise
        written = sum(path.stat().st_size for path in aside.rglob("*"))
        more = "" if needed else "more than "
        raise _full_disk(final, needed or written, more) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def writing(final: Path, facts: Mapping[str, Any], needed: int = 0) -> Iterator[Path]:
    """Yield a folder to write into, and make it `final` when the block ends well.

    Every file and the folder are flushed to the disk before the rename, so `final`
    exists either whole or not at all. `facts`, as they are when the block ends, go
    into the manifest. An exception in the block removes what was written and goes on;
    a disk without `needed` bytes is what it is in `beside`.
    """
    with beside(final, needed) as aside:
        yield aside
        _write_manifest(aside, final.name, facts)
        rename_flushed(aside, final)


def rename_flushed(aside: Path, final: Path) -> None:
    """Give a file or a folder of files its name once its bytes are on the disk."""
    within = aside.iterdir() if aside.is_dir() else ()
    for path in (*filter(Path.is_file, within), aside):
        _flush(path)
    os.rename(aside, final)
    _flush(final.parent)


def verify(folder: Path) -> dict[str, Any]:
    """Check every byte of a folder against its manifest and return the facts in it.

    Files that the manifest does not name, such as a desktop's own, are ignored. Raises
    `DamagedFolder` for the first difference found: a manifest that is missing, edited
    or of another folder name; a file missing, unreadable, cut or changed.
    """
    manifest = _read_manifest(folder)
    if manifest["name"] != folder.name:
        raise DamagedFolder(f"it was written as {manifest['name']}, so it was renamed")
    listed = manifest["files"]
    present = {path.name for path in folder.iterdir()}
    for name in sorted(listed):
        if name not in present:
            raise DamagedFolder(f"{name} is missing")
        try:
            state = (folder / name).lstat()
            if not stat.S_ISREG(state.st_mode):
                raise DamagedFolder(f"{name} is a link, or no file")
            size, expected = state.st_size, listed[name]["size"]
            if size != expected:
                raise DamagedFolder(f"{name} has {size} of {expected} bytes")
            digest = hash_file(folder / name)
        except OSError as error:
            raise DamagedFolder(f"{name} cannot be read ({error})") from None
        if digest != listed[name]["sha256"]:
            raise DamagedFolder(f"{name} does not have the sha256 it was written with")
    return manifest["facts"]


def set_aside(folder: Path, reason: str) -> Path:
    """Rename a damaged folder to `{name}.corrupt` and return the new path.

    A file `{name}.corrupt.txt` beside it keeps the reason. Nothing is deleted.
    """
    numbers = itertools.chain([""], itertools.count(2))
    names = (f"{folder.name}.corrupt{number}" for number in numbers)
    target = folder.rename(first_free(folder, names))
    target.with_name(f"{target.name}.txt").write_text(f"{reason}\n", encoding="utf-8")
    return target


def first_free(path: Path, names: Iterable[str]) -> Path:
    """The first of the names beside `path` under which nothing lies."""
    return next(p for p in map(path.with_name, names) if not p.exists())


def remove_leftovers(parent: Path, name: str = "") -> None:
    """Remove what a process that died while writing left in `parent`, of a name or all.

    Only for a caller that holds the lock under which it is written.
    """
    what = rf"\.{re.escape(name)}\.\d+\.tmp" if name else r"\..*\.tmp"
    for path in (p for p in parent.glob(".*.tmp") if re.fullmatch(what, p.name)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Replace a file's text at once: readers see the old text or the new one."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Replace a file's bytes at once: readers see the old bytes or the new ones."""
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_bytes(data)
        _flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """The sha256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """JSON with one spelling for one value, so that it can be hashed and compared."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def is_full_disk(error: BaseException) -> bool:
    """Whether a disk, or a quota on it, has no room left.

    safetensors raises an error of its own, with the number in its text only.
    """
    number = error.errno if isinstance(error, OSError) else None
    codes = (errno.ENOSPC, errno.EDQUOT)
    return any(number == n or f"(os error {n})" in str(error) for n in codes)


def _write_manifest(folder: Path, name: str, facts: Mapping[str, Any]) -> None:
    files = {
        path.name: {"size": path.stat().st_size, "sha256": hash_file(path)}
        for path in folder.iterdir()
    }
    body = {"facts": dict(facts), "files": files, "format": FORMAT, "name": name}
    (folder / MANIFEST).write_text(_seal(canonical_json(body)), encoding="utf-8")


def _seal(body: str) -> str:
    """Append to a JSON object the sha256 of all its bytes before that last key."""
    preceding = body.removesuffix("}")
    digest = hashlib.sha256(preceding.encode("utf-8")).hexdigest()
    return f'{preceding}{_SEAL}"{digest}"}}\n'


def _read_manifest(folder: Path) -> dict[str, Any]:
    try:
        with open(folder / MANIFEST, "rb", opener=_open_now) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DamagedFolder(f"{MANIFEST} is no file")
            text = file.read(_MOST_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DamagedFolder(f"{MANIFEST} cannot be read ({error})") from None
    preceding = text.rpartition(_SEAL)[0]
    if text != _seal(preceding + "}"):
        raise DamagedFolder(f"{MANIFEST} was edited or cut: its sha256 differs")
    manifest = json.loads(text)
    if manifest.get("format") != FORMAT:
        raise DamagedFolder(
            f"format {manifest.get('format')} is not the format {FORMAT} known here; "
            "it needs another version of minimind_nb"
        )
    kinds = {"facts": dict, "files": dict, "name": str}
    if wrong := [
        k for k, kind in kinds.items() if not isinstance(manifest.get(k), kind)
    ]:
        raise DamagedFolder(f"{MANIFEST} has no {', '.join(wrong)}")
    return manifest


def _open_now(path: str, flags: int) -> int:
    """Open without waiting for the other end of a pipe, and no link."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_NOFOLLOW)


def _flush(path: Path) -> None:
    """fsync a file, or a folder's list of names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _full_disk(final: Path, needed: int, more: str) -> OSError:
    free = shutil.disk_usage(final.parent).free
    return OSError(
        errno.ENOSPC,
        f"the disk is full: {final.name} needs {more}{needed / 2**20:.1f} MiB, and "
        f"{free / 2**20:.1f} MiB are free; make room there",
        str(final),
    )
