"""A stand-in for the Hugging Face Hub on 127.0.0.1: what huggingface_hub asks of it."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

TOKEN = "hf_this_is_nobodys_business"


class Hub(ThreadingHTTPServer):
    """`files` are the files of each repository, `commits` the parts of each commit.

    `mood` is "well", "deaf" (takes requests and never answers), a status that it
    answers everything with, or "dying": it closes at the first upload.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Requests)
        self.address = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.blobs: dict[str, bytes] = {}
        self.commits: list[list[dict[str, Any]]] = []
        self.mood: Any = "well"
        self.asked: list[str] = []
        self.closing = threading.Event()

    def commit_of(self, name: str) -> str:
        content = sorted((k, sha1(v).hexdigest()) for k, v in self.files[name].items())
        return sha1(repr(content).encode()).hexdigest()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing of clients that have gone."""


class Requests(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing."""

    def answer(self, body: Any, status: int = 200, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        hub, path = self.server, self.path.partition("?")[0].strip("/")
        size = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(size)
        hub.asked.append(f"{self.command} {path}")
        if hub.mood == "deaf":
            hub.closing.wait(60)
        if hub.mood == "dying" and self.command == "PUT":
            hub.socket.close()
            self.close_connection = True
        elif isinstance(hub.mood, int):
            self.answer({"error": "no"}, hub.mood)
        elif path.startswith("blobs/"):
            assert path == f"blobs/{sha256(body).hexdigest()}"
            hub.blobs[path[6:]] = body
            self.answer({})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, 401)
        else:
            self.serve(path, body)

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - names of the base class

    def serve(self, path: str, body: bytes) -> None:
        hub, parts = self.server, path.removeprefix("api/models/").split("/")
        name, verb = "/".join(parts[:2]).removesuffix(".git"), "/".join(parts[2:3])
        if path == "api/validate-yaml":
            self.answer({})
        elif path == "api/repos/create":
            self.create(json.loads(body))
        elif name not in hub.files:
            self.answer({}, 404, X_Error_Code="RepoNotFound")
        elif verb == "preupload":
            self.answer({"files": [mode(file) for file in json.loads(body)["files"]]})
        elif verb == "info":
            objects = [self.upload(each) for each in json.loads(body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        elif verb == "commit":
            self.commit(name, [json.loads(line) for line in body.splitlines()])
        elif verb == "resolve":
            data, commit = hub.files[name]["/".join(parts[4:])], hub.commit_of(name)
            etag = f'"{sha1(data).hexdigest()}"'
            self.answer(data, X_Repo_Commit=commit, ETag=etag)
        else:
            sizes = {file: len(data) for file, data in hub.files[name].items()}
            files = [{"rfilename": file, "size": sizes[file]} for file in sizes]
            self.answer({"id": name, "sha": hub.commit_of(name), "siblings": files})

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.server.files else 200
        if status == 200:
            self.server.files[name] = {".gitattributes": b""}
            self.server.private[name] = wanted.get("visibility") == "private"
        self.answer({"url": f"{self.server.address}/{name}"}, status)

    def upload(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.blobs:
            return wanted
        href = f"{self.server.address}/blobs/{wanted['oid']}"
        return {**wanted, "actions": {"upload": {"href": href}}}

    def commit(self, name: str, parts: list[dict[str, Any]]) -> None:
        hub, files = self.server, self.server.files[name]
        if parts[0]["value"]["parentCommit"] != hub.commit_of(name):
            return self.answer({"error": "a commit has happened since"}, 412)
        hub.commits.append(parts)
        for part in parts[1:]:
            value = part["value"]
            if part["key"] == "deletedFile":
                del files[value["path"]]
            elif part["key"] == "lfsFile":
                files[value["path"]] = hub.blobs[value["oid"]]
            else:
                files[value["path"]] = base64.b64decode(value["content"])
        oid = hub.commit_of(name)
        url = f"{hub.address}/{name}/commit/{oid}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": url})


def mode(file: dict[str, Any]) -> dict[str, Any]:
    """Say how a file is to be uploaded."""
    large = file["path"].endswith((".safetensors", ".png"))
    how = {"uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
    return {"path": file["path"], **how}


@contextlib.contextmanager
def standing_in() -> Iterator[Hub]:
    """A hub that serves in the block; the user's environment points at it."""
    hub = Hub()
    threading.Thread(target=hub.serve_forever, args=(0.05,), daemon=True).start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_ENDPOINT", hub.address)
        patch.setenv("HF_TOKEN", TOKEN)
        patch.setenv("HF_HUB_DISABLE_XET", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        try:
            yield hub
        finally:
            hub.closing.set()
            hub.shutdown()
            hub.server_close()
