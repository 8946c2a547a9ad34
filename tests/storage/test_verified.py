import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from minimind_nb.storage import verified
from minimind_nb.storage.verified import (
    MANIFEST,
    DamagedFolder,
    canonical_json,
    hash_file,
    remove_leftovers,
    set_aside,
    verify,
    write_bytes,
    write_text,
    writing,
)

FILES = {"weights.bin": bytes(range(256)) * 3, "state.json": b'{"step": 4}'}
FACTS = {"step": 4, "loss": 1.25, "name": "网络"}
# Where a writer can be killed: a statement run right before a function's own work.
POINTS = {
    "before the first byte": "kill()",
    "half-way through a file": "(folder / 'a').write_bytes(b'x' * 9); kill()",
    "before the manifest": "verified._write_manifest = kill",
    "before it is flushed": "verified.flush = kill",
    "before the rename": "verified.os.rename = kill",
}
WRITER = """
import os, signal, sys
from pathlib import Path
from minimind_nb.storage import verified
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
with verified.writing(Path(sys.argv[1]), {"step": 4}) as folder:
    {point}
    (folder / "a").write_bytes(b"x" * 9)
    (folder / "b").write_bytes(b"y" * 9)
"""


@pytest.fixture
def folder(tmp_path) -> Path:
    final = tmp_path / "step_00000004"
    with writing(final, FACTS) as aside:
        for name, data in FILES.items():
            (aside / name).write_bytes(data)
    return final


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_rights_of_the_umask_whatever_wrote_them(mask, tmp_path):
    before = os.umask(mask)
    try:
        with writing(tmp_path / "step_00000004", FACTS) as aside:
            save_file({"a": torch.zeros(3)}, aside / "model.safetensors")
            (aside / "state.json").write_text("{}")
        write_text(tmp_path / "config.json", "{}")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~mask}
    assert len(files) == 4  # the manifest too


def damage(folder: Path) -> str:
    with pytest.raises(DamagedFolder) as caught:
        verify(folder)
    return str(caught.value)


def test_a_written_folder_is_whole_and_gives_back_its_facts(folder):
    assert verify(folder) == FACTS
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        **FILES,
        MANIFEST: (folder / MANIFEST).read_bytes(),
    }
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_the_manifest_is_canonical_json_sealed_by_its_own_sha256(folder):
    text = (folder / MANIFEST).read_text(encoding="utf-8")
    manifest = json.loads(text)
    digest = manifest.pop("sha256")
    preceding, _, _ = text.rpartition(',"sha256":')
    assert preceding + "}" == canonical_json(manifest)
    assert digest == hashlib.sha256(preceding.encode()).hexdigest()
    assert manifest == {
        "facts": FACTS,
        "files": {
            name: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for name, data in FILES.items()
        },
        "format": 1,
        "name": "step_00000004",
    }


def test_canonical_json_has_one_spelling_for_one_value():
    assert canonical_json({"b": [1, 2.5], "a": "中"}) == '{"a":"中","b":[1,2.5]}'


def test_the_folder_appears_with_its_facts_when_the_block_has_ended(tmp_path):
    final, facts = tmp_path / "deep" / "cache", {"documents": 0}
    with writing(final, facts) as aside:
        assert aside.name.startswith(".")
        assert not final.exists()
        facts["documents"] = 7
    assert verify(final) == {"documents": 7}


@pytest.mark.fault("F21")
@pytest.mark.parametrize(
    "error", [RuntimeError(), KeyboardInterrupt(), OSError(errno.EIO, "I/O error")]
)
def test_an_error_in_the_block_is_raised_and_leaves_nothing(error, tmp_path):
    with pytest.raises(BaseException) as caught:
        with writing(tmp_path / "cache", {}) as aside:
            (aside / "a").write_bytes(b"x")
            raise error
    assert caught.value is error
    assert not list(tmp_path.iterdir())


def test_facts_that_are_no_json_leave_nothing(tmp_path):
    with pytest.raises(TypeError, match="not JSON serializable"):
        with writing(tmp_path / "cache", {"a": object()}):
            pass
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_there_is_never_written_over(folder):
    with pytest.raises(OSError, match="not empty"):
        with writing(folder, {}):
            pass
    assert verify(folder) == FACTS
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.fault("F20")
@pytest.mark.parametrize("point", POINTS)
def test_a_killed_writer_leaves_no_folder_under_the_final_name(point, tmp_path):
    final = tmp_path / "step_00000004"
    code = WRITER.replace("{point}", POINTS[point])
    writer = subprocess.run([sys.executable, "-c", code, str(final)], check=False)
    assert writer.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".")
    (tmp_path / "kept").mkdir()
    (tmp_path / ".half.1.tmp").write_bytes(b"a half-written file")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    with writing(final, {}):
        pass
    assert verify(final) == {}


def test_a_writer_killed_after_the_rename_leaves_a_whole_folder(tmp_path):
    final = tmp_path / "step_00000004"
    code = WRITER.replace(
        "{point}",
        "rename = os.rename; verified.os.rename = lambda *a: (rename(*a), kill())",
    )
    writer = subprocess.run([sys.executable, "-c", code, str(final)], check=False)
    assert writer.returncode == -signal.SIGKILL
    assert verify(final) == {"step": 4}
    assert [path.name for path in tmp_path.iterdir()] == [final.name]


@pytest.mark.fault("F22")
@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("kept", ["nothing", "a byte", "half", "all but a byte"])
def test_a_cut_file_is_found(name, kept, folder):
    file = folder / name
    size = file.stat().st_size
    left = {"nothing": 0, "a byte": 1, "half": size // 2, "all but a byte": size - 1}
    os.truncate(file, left[kept])
    said = damage(folder)
    if name == MANIFEST:
        assert "manifest.json was edited or cut: its sha256 differs" in said
    else:
        assert said == f"{name} has {left[kept]} of {size} bytes"


@pytest.mark.fault("F23")
def test_every_one_of_200_flipped_bits_is_found(folder):
    draw = random.Random(0)
    files = sorted(folder.iterdir())
    for number in range(200):
        file = files[number % len(files)]
        intact = file.read_bytes()
        flipped = bytearray(intact)
        flipped[draw.randrange(len(flipped))] ^= 1 << draw.randrange(8)
        file.write_bytes(flipped)
        said = damage(folder)
        if file.name != MANIFEST:
            assert said == f"{file.name} has the wrong sha256"
        file.write_bytes(intact)
    assert verify(folder) == FACTS


@pytest.mark.fault("F24")
@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda f: (f / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda f: (f / MANIFEST).write_bytes(b"\xff"), "manifest.json cannot be read"),
        (lambda f: (f / "state.json").unlink(), "state.json is missing"),
        (lambda f: (f / "weights.bin").rename(f / "w"), "weights.bin is missing"),
        (lambda f: f.rename(f.with_name("elsewhere")), "manifest.json is missing"),
    ],
    ids=["no manifest", "no text", "file gone", "file renamed", "no folder"],
)
def test_a_folder_with_other_files_is_found(edit, text, folder):
    edit(folder)
    assert text in damage(folder)


def test_what_the_manifest_does_not_name_is_ignored(folder):
    for name in (".DS_Store", "desktop.ini", "._weights.bin"):
        (folder / name).write_bytes(b"of a desktop")
    (folder / ".ipynb_checkpoints").mkdir()
    assert verify(folder) == FACTS


@pytest.mark.fault("F24")
@pytest.mark.parametrize(
    ("old", "new"),
    [('"step":4', '"step":5'), ('"format":1', '"format":2'), ("}\n", "}\r\n")],
)
def test_an_edited_manifest_is_found(old, new, folder):
    manifest = folder / MANIFEST
    text = manifest.read_text(encoding="utf-8")
    assert old in text
    manifest.write_bytes(text.replace(old, new).encode())
    assert damage(folder) == "manifest.json was edited or cut: its sha256 differs"


def test_a_file_that_cannot_be_read_is_found(folder, monkeypatch):
    def refuse(_path):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(verified, "hash_file", refuse)
    assert damage(folder) == (
        "state.json cannot be read ([Errno 5] Input/output error)"
    )


def test_leftovers_of_one_name_are_not_those_of_a_longer_one(tmp_path):
    for name in (".v1.7.tmp", ".v1.5.7.tmp", ".v1.5.pth.7.tmp"):
        (tmp_path / name).touch()
    verified.remove_leftovers(tmp_path, "v1")
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        ".v1.5.7.tmp",
        ".v1.5.pth.7.tmp",
    ]
    verified.remove_leftovers(tmp_path)
    assert not [*tmp_path.iterdir()]


@pytest.mark.fault("F64")
@pytest.mark.parametrize("name", ["state.json", MANIFEST])
@pytest.mark.parametrize("what", ["pipe", "link", "folder"])
def test_what_is_no_plain_file_is_not_read(name, what, folder):
    (folder / name).unlink()
    if what == "pipe":
        os.mkfifo(folder / name)
    elif what == "link":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    assert damage(folder) == f"{name} is missing, or a link, or no file"


@pytest.mark.fault("F24")
def test_a_renamed_folder_is_found(folder):
    renamed = folder.rename(folder.with_name("step_00000008"))
    assert damage(renamed) == "it was written as step_00000004, so it was renamed"


@pytest.mark.fault("F36")
def test_a_folder_of_another_format_names_both(folder, monkeypatch):
    monkeypatch.setattr(verified, "FORMAT", 2)
    assert damage(folder) == (
        "format 1 is not the format 2 known here; it needs another version of "
        "minimind_nb"
    )


@pytest.mark.fault("F27")
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_says_what_was_written_and_what_is_free(
    code, folder, tmp_path, monkeypatch
):
    def refuse(self, _data):
        raise OSError(code, os.strerror(code), str(self))

    with pytest.raises(OSError) as caught:
        with writing(tmp_path / "step_00000008", {}) as aside:
            (aside / "a").write_bytes(b"x" * 2**20)
            with monkeypatch.context() as full:
                full.setattr(Path, "write_bytes", refuse)
                (aside / "b").write_bytes(b"y")
    assert caught.value.errno == errno.ENOSPC
    said = str(caught.value.strerror)
    assert said.startswith("the disk is full: step_00000008 needs at least 1.0 MiB, ")
    assert said.endswith("MiB are free; make room there")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    assert verify(folder) == FACTS


def test_a_full_disk_is_known_by_what_safetensors_says_of_it(tmp_path):
    with pytest.raises(OSError, match="the disk is full: step_00000008 needs"):
        with writing(tmp_path / "step_00000008", {}):
            raise SafetensorError("I/O error: No space left on device (os error 28)")
    assert not list(tmp_path.iterdir())


def test_an_error_after_the_rename_is_the_one_that_is_seen(tmp_path, monkeypatch):
    flush = verified.flush

    def refuse(path):
        if path == tmp_path:
            raise OSError(errno.EINVAL, "this folder cannot be flushed")
        flush(path)

    monkeypatch.setattr(verified, "flush", refuse)
    with pytest.raises(OSError, match="this folder cannot be flushed"):
        with writing(tmp_path / "cache", {}):
            pass


def test_setting_aside_deletes_nothing_and_keeps_the_reason(folder):
    (folder / "state.json").write_bytes(b"broken")
    first = set_aside(folder, "state.json has 6 of 11 bytes")
    assert first == folder.with_name("step_00000004.corrupt")
    assert {path.name for path in first.iterdir()} == {*FILES, MANIFEST}
    assert (first / "state.json").read_bytes() == b"broken"
    reason = first.with_name("step_00000004.corrupt.txt")
    assert reason.read_text(encoding="utf-8") == "state.json has 6 of 11 bytes\n"
    names = []
    for _ in range(2):
        folder.mkdir()
        names.append(set_aside(folder, "empty").name)
    assert names == ["step_00000004.corrupt1", "step_00000004.corrupt2"]
    assert (first / "state.json").read_bytes() == b"broken"
    assert reason.read_text(encoding="utf-8") == "state.json has 6 of 11 bytes\n"


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    def halt(_path):
        raise RuntimeError("halt")

    file = tmp_path / "config.json"
    write_text(file, "旧")
    write_bytes(file, b"new")
    assert file.read_bytes() == b"new"
    monkeypatch.setattr(verified, "flush", halt)
    with pytest.raises(RuntimeError, match="halt"):
        write_bytes(file, b"half")
    assert file.read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_a_hash_is_sha256_of_the_bytes(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert hash_file(tmp_path / "a") == digest
