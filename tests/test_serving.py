"""An exported folder behind transformers' own server, asked by an OpenAI client."""

import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from minimind_nb.data.tokenizer import read_tokenizer, write_tokenizer
from minimind_nb.model.architecture import MiniMindConfig, MiniMindForCausalLM
from minimind_nb.model.export import export
from minimind_nb.model.generation import generate
from minimind_nb.model.loading import load

openai = pytest.importorskip("openai")
pytest.importorskip("uvicorn")
pytest.importorskip("fastapi")

START_SECONDS = 90
CONVERSATION = [{"role": "user", "content": "How much do 3 and 4 make?"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights, exported as Llama."""
    root = tmp_path_factory.mktemp("served")
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 1}
    MiniMindForCausalLM(MiniMindConfig(**shape)).save_pretrained(root / "ours")
    write_tokenizer(read_tokenizer(), root / "ours")
    return export(root / "ours", root / "llama", format="llama")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    """The address of the documented server, which is ended by its process id."""
    port, home = free_port(), folder.parent
    page = Path(__file__).parents[1] / "docs" / "weights.md"
    lines = re.search(
        r"^mkdir -p (.*)\n(HF_\w+)=1 transformers (serve .* --port )8000$",
        page.read_text(encoding="utf-8"),
        re.M,
    )
    assert lines
    made, offline, options = lines.groups()
    (home / made.removeprefix("~/")).mkdir(parents=True)
    environment = {k: v for k, v in os.environ.items() if "proxy" not in k.lower()}
    environment |= {"HOME": str(home), offline: "1", "OMP_NUM_THREADS": "1"}
    command = [str(Path(sys.executable).with_name("transformers")), *options.split()]
    log = folder.parent / "serve.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [*command, str(port)],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        try:
            server.wait(10)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def wait_for(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            if opener.open(url, timeout=5).status == 200:
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    pytest.fail(f"the server did not come up:\n{log.read_text()[-2000:]}")


def test_the_served_model_answers_as_ours_does(folder: Path, address: str) -> None:
    model, tokenizer = load(folder)
    (expected,) = generate(
        model, tokenizer, [CONVERSATION], temperature=0, max_new_tokens=16
    )
    client = openai.OpenAI(base_url=address, api_key="none", timeout=60, max_retries=0)
    ask: dict[str, Any] = {
        "model": str(folder),
        "messages": CONVERSATION,
        "temperature": 0,
        "max_tokens": 16,
    }
    whole = client.chat.completions.create(**ask).choices[0].message.content
    assert whole == expected
    parts = [
        choice.delta.content or ""
        for chunk in client.chat.completions.create(**ask, stream=True)
        for choice in chunk.choices
    ]
    assert "".join(parts) == expected
    assert len(parts) > 2
