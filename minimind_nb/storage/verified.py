"""Folders written aside, listed in a manifest, renamed, and verified on reading.

Checkpoints and token caches are such folders. A folder under its final name is
complete: a writer that died left a name that starts with a dot.
"""

import contextlib
import errno
import hashlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .file_system import flush, free_bytes

FORMAT = 1
MANIFEST = "manifest.json"
_SEAL = ',"sha256":'
_PROBE_BYTES = 1 << 16


class DamagedFolder(Exception):
    """A verified folder that is not what was written; the text says how it differs."""


def check_writable(folder: Path) -> None:
    """Make a folder. Raises `OSError` if nothing can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
            file.write(bytes(_PROBE_BYTES))
    except OSError as error:
        raise type(error)(
            f"{folder} cannot be written ({error.strerror}): choose another folder with "
            "out_dir=…, move away a file of that name, or free some space"
        ) from error


@contextlib.contextmanager
def beside(final: Path, needed: int = 0) -> Iterator[Path]:
    """Yield a folder beside `final` to write into; it is removed at the end.

    Raises an `OSError` that says how much space is free if that is less than `needed`
    bytes, or if the disk fills up meanwhile.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        if free_bytes(final.parent) < needed:
            raise OSError(errno.ENOSPC, "too little is free")
        aside.mkdir()
        yield aside
    except BaseException as error:
        if not is_full_disk(error):
            raise
        written = sum(path.stat().st_size for path in aside.rglob("*"))
        wanted = max(needed, written) / 2**20
        free = shutil.disk_usage(final.parent).free / 2**20
        text = (
            f"the disk is full: {final.name} needs at least {wanted:.1f} MiB, and "
            f"{free:.1f} MiB are free; make room there"
        )
        raise OSError(errno.ENOSPC, text, str(final)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def writing(final: Path, facts: Mapping[str, Any], needed: int = 0) -> Iterator[Path]:
    """Yield a folder to write into, and rename it to `final` when the block ends well.

    All files are flushed to the disk before the rename, so `final` exists whole or not
    at all. `facts`, as they are when the block ends, go into the manifest. If the block
    raises, what was written is removed. Raises `OSError` as `beside` does.
    """
    with beside(final, needed) as aside:
        yield aside
        _write_manifest(aside, final.name, facts)
        rename_flushed(aside, final)


def rename_flushed(aside: Path, final: Path) -> None:
    """Rename a file, or a folder of files, once its bytes are on the disk."""
    within = aside.iterdir() if aside.is_dir() else ()
    for path in filter(Path.is_file, within):
        with contextlib.suppress(OSError):  # safetensors makes its files private
            path.chmod(aside.stat().st_mode & 0o666)
        flush(path)
    flush(aside)
    os.rename(aside, final)
    flush(final.parent)


def verify(folder: Path) -> dict[str, Any]:
    """Check every byte of a folder against its manifest and return the facts in it.

    Files that the manifest does not name, such as a desktop's own, are ignored, and links
    are not followed. Raises `DamagedFolder` for the first difference found.
    """
    manifest = _read_manifest(folder)
    if manifest["name"] != folder.name:
        raise DamagedFolder(f"it was written as {manifest['name']}, so it was renamed")
    for name, listed in sorted(manifest["files"].items()):
        file = folder / Path(name).name  # never one elsewhere
        try:
            _check_plain(file)
            if (size := file.stat().st_size) != listed["size"]:
                raise DamagedFolder(f"{name} has {size} of {listed['size']} bytes")
            if hash_file(file) != listed["sha256"]:
                raise DamagedFolder(f"{name} has the wrong sha256")
        except OSError as error:
            raise DamagedFolder(f"{name} cannot be read ({error})") from None
    return manifest["facts"]


def set_aside(folder: Path, reason: str) -> Path:
    """Rename a damaged folder to `{name}.corrupt`, with the reason in a `.txt` beside."""
    target = rename_aside(folder, "corrupt", 0)
    target.with_name(f"{target.name}.txt").write_text(f"{reason}\n", encoding="utf-8")
    return target


def rename_aside(path: Path, suffix: str, number: int) -> Path:
    """Rename to `{name}.{suffix}{number}`, a 0 left out, or the next number free."""
    names = (f"{path.name}.{suffix}{n or ''}" for n in itertools.count(number))
    return path.rename(next(p for p in map(path.with_name, names) if not p.exists()))


def remove_leftovers(parent: Path, name: str = "") -> None:
    """Remove what a process that died while writing left in `parent`, of a name or all.

    Only for a caller that holds the lock under which it is written.
    """
    for path in parent.glob(".*.tmp"):
        if name and path.name.rsplit(".", 2)[0] != f".{name}":
            continue
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
        flush(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def hash_file(path: Path) -> str:
    """Return the sha256 of a file's bytes, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def canonical_json(value: Any) -> str:
    """Return JSON with one spelling for one value, to be hashed and compared."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def is_full_disk(error: BaseException) -> bool:
    """Return whether a disk, or a quota on it, has no room left.

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
    """Return the manifest of a folder; its seal proves that it has all its keys."""
    file = folder / MANIFEST
    try:
        _check_plain(file)
        text = file.read_bytes().decode("utf-8")
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
    return manifest


def _check_plain(path: Path) -> None:
    if path.is_symlink() or not path.is_file():
        raise DamagedFolder(f"{path.name} is missing, or a link, or no file")
