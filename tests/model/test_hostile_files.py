"""Files from strangers that were made to do harm: refused, soon, and harmless."""

import json
import os
import pickle
import struct
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.chats import chat

from minimind_nb.data import chat_template
from minimind_nb.data.chat_template import ChatEncoder
from minimind_nb.data.tokenizer import read_tokenizer
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.model.loading import load
from minimind_nb.storage import verified

pytestmark = pytest.mark.fault("F64")
SECONDS, MIB = 2.0, 200
CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
]


class Evil:
    """Touches a file where it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


@pytest.fixture(autouse=True)
def harmless(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing outside was written, no time was lost, and no memory taken."""
    monkeypatch.chdir(tmp_path)
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before, began = peak_mib(), time.process_time()
    yield
    assert time.process_time() - began < SECONDS
    assert peak_mib() - before < MIB
    assert not [*tmp_path.rglob("pwned*")] and not [*tmp_path.parent.glob("pwned*")]


def peak_mib() -> float:
    """The most memory that this process has had since the peak was forgotten."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if "VmHWM" in line).split()[1]) / 1024


def own_folder(place: Path) -> Path:
    """A folder that opens, to be spoiled."""
    shape = MiniMindConfig(hidden_size=32, num_hidden_layers=1)
    MiniMindForCausalLM(shape).save_pretrained(place)
    return place


@pytest.mark.parametrize("protocol", [0, 2, 4, None])
def test_a_pickle_is_not_run_bare_or_in_torchs_archive(protocol: int | None) -> None:
    if protocol is None:
        torch.save({"model.embed_tokens.weight": Evil()}, "evil.pth")
    else:
        Path("evil.pth").write_bytes(pickle.dumps({"a": Evil()}, protocol))
    with pytest.raises(ValueError, match="is damaged or not a weights file"):
        load("evil.pth")


@pytest.mark.parametrize(
    "name", ["../pwned", "/tmp/pwned_by_minimind", "a/../../pwned"]
)
def test_an_archive_writes_nothing_elsewhere(name: str) -> None:
    torch.save({"a": torch.zeros(2)}, "evil.pth")
    with zipfile.ZipFile("evil.pth", "a") as archive:
        archive.writestr(name, b"pwned")
    with pytest.raises(ValueError):
        load("evil.pth")
    assert not Path("/tmp/pwned_by_minimind").exists()


def test_an_archive_that_unfolds_to_gigabytes_is_not_unfolded() -> None:
    with zipfile.ZipFile("evil.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * (64 << 20))
        archive.writestr("archive/version", b"3")
    with pytest.raises(ValueError, match="is damaged or not a weights file"):
        load("evil.pth")


@pytest.mark.parametrize(
    "header",
    [
        struct.pack("<Q", 1 << 40) + b"{}",
        struct.pack("<Q", 60) + b'{"a":{"dtype":"F32","shape":[1099511627776],"data_o',
        b"\xff" * 64,
        b"",
    ],
    ids=["1 TiB of header", "cut within", "no number", "empty"],
)
def test_a_safetensors_header_that_lies_is_refused(header: bytes) -> None:
    folder = own_folder(Path("folder"))
    (folder / "model.safetensors").write_bytes(header)
    with pytest.raises(ValueError, match="model.safetensors is damaged"):
        load(folder)


def test_a_configuration_that_claims_a_billion_layers_is_refused() -> None:
    folder = own_folder(Path("folder"))
    fields = json.loads((folder / "config.json").read_bytes())
    for name in ("num_hidden_layers", "hidden_size", "vocab_size"):
        (folder / "config.json").write_text(json.dumps({**fields, name: 1_000_000_000}))
        with pytest.raises(ValueError, match="1000000000"):
            load(folder)


def test_code_beside_the_weights_is_not_run() -> None:
    folder = own_folder(Path("folder"))
    fields = json.loads((folder / "config.json").read_bytes())
    code = {"auto_map": {"AutoModelForCausalLM": "evil.Evil", "AutoConfig": "evil.E"}}
    (folder / "evil.py").write_text("import os; os.system('touch pwned')")
    (folder / "config.json").write_text(json.dumps({**fields, **code}))
    load(folder)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch pwned') }}",
    ],
    ids=["endless", "classes", "globals"],
)
def test_a_chat_template_does_no_harm(
    template: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(chat_template, "_SECONDS", 0.5)
    Path("t").mkdir()
    spec = read_tokenizer()
    (Path("t") / "tokenizer.json").write_text(spec.json)
    (Path("t") / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template})
    )
    with pytest.raises((ValueError, TimeoutError)):
        ChatEncoder(read_tokenizer("t")).encode(chat(CONVERSATION))


def test_a_manifest_that_names_files_elsewhere_proves_nothing(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    with verified.writing(tmp_path / "step", {}) as aside:
        (aside / "a").write_text("a")
    manifest = tmp_path / "step" / verified.MANIFEST
    listed = json.loads(manifest.read_bytes())
    listed["files"]["../secret"] = {
        "size": 1,
        "sha256": verified.hash_file(tmp_path / "secret"),
    }
    del listed["sha256"]
    manifest.write_text(verified._seal(verified.canonical_json(listed)))
    with pytest.raises(verified.DamagedFolder, match="secret is missing"):
        verified.verify(tmp_path / "step")
