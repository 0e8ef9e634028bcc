"""A local hub: the part of the Hub's HTTP interface that huggingface_hub's client uses, for a folder of files."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
REPO = "acme/Tiny-VL-2B-Instruct"
TOKEN = "hf_right"


class Hub(ThreadingHTTPServer):
    """Serves ``folder`` as :data:`REPO`, with revisions main and v1; ``requests`` are those that came."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: list[str] = []
        self.gated = False  # wants TOKEN for its files
        self.broken_after: int | None = None  # bytes of weights after which the connection is cut; later ones get no answer
        self.cut = False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        api, file = f"/api/models/{REPO}", f"/{REPO}/resolve/"
        if not path.startswith((api, file)):
            self.refuse(404, "RepoNotFound", body)
        elif path.startswith(api):
            what, _, revision = path.removeprefix(api).strip("/").partition("/")
            if revision and revision not in ("main", "v1", COMMIT):
                self.refuse(404, "RevisionNotFound", body)
            elif what == "tree":
                self.send(json.dumps([self.entry(path) for path in sorted(self.server.folder.iterdir())]).encode(), body)
            else:
                self.send(json.dumps({"id": REPO, "sha": COMMIT, "siblings": []}).encode(), body)
        elif self.server.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.refuse(403 if "Authorization" in self.headers else 401, "GatedRepo", body)
        else:
            self.send_file(self.server.folder / path.removeprefix(file).partition("/")[2], body)

    def entry(self, path: Path) -> dict[str, object]:
        return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": digest(path)}

    def send_file(self, path: Path, body: bool) -> None:
        if body and self.server.cut and path.suffix == ".safetensors":
            self.close_connection = True
            return
        content = path.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0]) if body else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{digest(path)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body and self.server.broken_after is not None and path.suffix == ".safetensors":
            self.wfile.write(content[start : start + self.server.broken_after])
            self.wfile.flush()
            self.server.cut = self.close_connection = True
        elif body:
            self.wfile.write(content[start:])

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def refuse(self, status: int, code: str, body: bool) -> None:
        content = json.dumps({"error": code}).encode()
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def served(folder: Path) -> Iterator[Hub]:
    """A hub that serves ``folder`` during the block."""
    with Hub(folder) as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
