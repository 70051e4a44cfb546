"""A model hub on loopback, for tests of uploads: what huggingface_hub asks for, and no more."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs

import pytest
from huggingface_hub import constants

TOKEN = "hf_a_token_of_the_tests"


@dataclass
class FakeHub:
    """What a hub holds and what it was sent.

    Attributes:
        files: repository -> path -> content.
        private: repository -> what was asked for; None leaves it to the owner's settings.
        sent: number of bytes of the contents that arrived, large files and small ones.
        commits: number of commits.
        refuse: HTTP status of every answer, None for real answers.
        refuse_large: large files are refused.
    """

    url: str = ""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool | None] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    sent: int = 0
    commits: int = 0
    refuse: int | None = None
    refuse_large: bool = False


@contextmanager
def fake_hub(patch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """Run a hub, and let huggingface_hub of this process know it and a token for it."""
    hub = FakeHub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    patch.setattr(constants, "ENDPOINT", hub.url)
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # a protocol of its own
    patch.setenv("HF_TOKEN", TOKEN)
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def log_message(self, *_: Any) -> None:
        pass

    def do_PUT(self) -> None:  # a large file
        content = self._body()
        if self.hub.refuse_large:
            self._answer({"error": "refused"}, 403)
            return
        self.hub.objects[hashlib.sha256(content).hexdigest()] = content
        self.hub.sent += len(content)
        self._answer({})

    def do_POST(self) -> None:
        body = self._body()
        if self.hub.refuse is not None:
            self._answer({"error": "refused"}, self.hub.refuse)
            return
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "no token"}, 401)
            return
        place = self.path.partition("?")[0]
        if place == "/api/repos/create":
            self._create(json.loads(body))
        elif place == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif place.endswith(".git/info/lfs/objects/batch"):
            self._lfs(json.loads(body))
        else:
            _, _, repo = place.partition("/api/models/")
            owner, name, verb, *_ = repo.split("/")
            getattr(self, f"_{verb.replace('-', '_')}")(f"{owner}/{name}", body)

    def _create(self, wish: dict[str, Any]) -> None:
        owner = wish.get("organization") or "me"
        repo = f"{owner}/{wish['name']}"
        if repo in self.hub.files:
            self._answer({"error": "exists", "url": f"{self.hub.url}/{repo}"}, 409)
            return
        self.hub.files[repo] = {}
        # what the wish leaves out is decided by the owner's settings
        self.hub.private[repo] = {"private": True, "public": False}.get(wish.get("visibility"))
        self._answer({"url": f"{self.hub.url}/{repo}"})

    def _paths_info(self, repo: str, body: bytes) -> None:
        there = self.hub.files[repo]
        answer = []
        for path in parse_qs(body.decode()).get("paths", []):
            if path in there:
                content = there[path]
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                entry = {"type": "file", "path": path, "size": len(content), "oid": blob}
                if path.endswith(".safetensors"):
                    oid = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"oid": oid, "size": len(content), "pointerSize": 130}
                answer.append(entry)
        self._answer(answer)

    def _preupload(self, repo: str, body: bytes) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                "shouldIgnore": False,
            }
            for file in json.loads(body)["files"]
        ]
        self._answer({"files": files})

    def _lfs(self, wish: dict[str, Any]) -> None:
        objects = []
        for entry in wish["objects"]:
            actions = {"upload": {"href": f"{self.hub.url}/large", "header": {}}}
            objects.append({"oid": entry["oid"], "size": entry["size"], "actions": actions})
        self._answer({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                content = base64.b64decode(value["content"])
                self.hub.sent += len(content)
                self.hub.files[repo][value["path"]] = content
            elif entry["key"] == "lfsFile":
                self.hub.files[repo][value["path"]] = self.hub.objects[value["oid"]]
        self.hub.commits += 1
        url = f"{self.hub.url}/{repo}/commit/{'a' * 40}"
        self._answer({"success": True, "commitUrl": url, "commitOid": "a" * 40})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        content = b""
        while size := int(self.rfile.readline(), 16):
            content += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return content

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
