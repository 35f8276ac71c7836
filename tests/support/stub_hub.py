"""A hub of the tests' own: as much of Hugging Face's HTTP surface as uploading a folder takes, over real sockets.

It keeps what it is sent: repositories, and of each the files by their names. Weights come as LFS objects, small files
in the commit itself. The Hub's newer storage, Xet, is not there: clients need HF_HUB_DISABLE_XET=1.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class StubHub(ThreadingHTTPServer):
    """The server, and what it has been sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, dict[str, Any]] = {}  # name -> what it was created with
        self.files: dict[str, dict[str, bytes]] = {}  # name -> path -> content
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.messages: list[str] = []  # of commits
        self.unknown: list[str] = []  # requests that it has no answer for


@contextmanager
def running_hub() -> Iterator[StubHub]:
    """A hub that answers until the block ends."""
    hub = StubHub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: StubHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid credentials"}, status=401)
        elif self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'somebody'}/{asked['name']}"
            self.server.repositories[name] = asked
            self.answer({"url": f"{self.server.url}/{name}", "name": name})
        elif self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif re.fullmatch(r"/api/models/(.+)/preupload/main", self.path):
            self.answer({"files": [self.upload_mode(file) for file in json.loads(body)["files"]]})
        elif re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", self.path):
            self.answer(
                {"transfer": "basic", "objects": [self.place_for(each) for each in json.loads(body)["objects"]]}
            )
        elif found := re.fullmatch(r"/api/models/(.+)/commit/main", self.path):
            self.commit(found[1], [json.loads(line) for line in body.splitlines()])
        else:
            self.unexpected()

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.objects[hashlib.sha256(content).hexdigest()] = content
        self.answer({})

    def do_GET(self) -> None:
        self.unexpected()

    def upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": None}

    def place_for(self, each: dict[str, Any]) -> dict[str, Any]:
        upload = {"href": f"{self.server.url}/lfs/{each['oid']}", "header": {}}
        return {"oid": each["oid"], "size": each["size"], "actions": {"upload": upload}}

    def commit(self, name: str, lines: list[dict[str, Any]]) -> None:
        files = self.server.files.setdefault(name, {})
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.server.messages.append(value["summary"])
            elif line["key"] == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
        url = f"{self.server.url}/{name}/commit/{COMMIT}"
        self.answer({"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def unexpected(self) -> None:
        self.server.unknown.append(f"{self.command} {self.path}")
        self.answer({"error": "not in the stub"}, status=404)

    def answer(self, content: dict[str, Any], *, status: int = 200) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on standard error."""
