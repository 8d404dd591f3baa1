"""A hub on this machine: as much of the Hugging Face hub's HTTP as the libraries need to read.

    ROOT/models/org/name/...      files of a model
    ROOT/datasets/org/name/...    files of a data set

A repository has one commit, which changes with its files; those in `gated` answer as gated ones do
without a token. `requests` has whatever was asked for: "GET /org/name/resolve/main/config.json".
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

NAME = r"([^/]+(?:/[^/]+)?)"
FILE = re.compile(rf"/(?:(datasets)/)?{NAME}/resolve/([^/]+)/(.+)$")
API = re.compile(
    rf"/api/(models|datasets)/{NAME}(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?$"
)


class FakeHub:
    """Serves the repositories below `root` while it is open."""

    def __init__(self, root: Path):
        self.root, self.gated, self.requests = root, set[str](), list[str]()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("_", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> FakeHub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fetched(self, name: str) -> set[str]:
        """Files of a repository of which at least a part was sent."""
        found = (FILE.match(line.removeprefix("GET ")) for line in self.requests)
        return {match[4] for match in found if match and match[2] == name}

    def commit(self, kind: str, name: str) -> str:
        files = sorted((self.root / kind / name).rglob("*"))
        return hashlib.sha1("".join(map(_blob, files)).encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        if found := FILE.match(path):
            kind, name, revision, file = found.groups()
            if directory := self._find(kind or "models", name, revision):
                self._send_file(directory, name, file)
        elif found := API.match(path):
            kind, name, what, revision, place = found.groups()
            if directory := self._find(kind, name, revision):
                self._send_facts(directory, what, place, parse_qs(body).get("paths", []))
        else:
            self._send(404)

    do_HEAD = do_POST = do_GET

    def _find(self, kind: str, name: str, revision: str | None) -> Path | None:
        directory = self.hub.root / kind / name
        if not (directory.is_dir() and any(file.is_file() for file in directory.iterdir())):
            self._send(401, error="RepoNotFound")  # it might be private: the hub does not tell
        elif revision not in (None, "main", self.hub.commit(kind, name)):
            self._send(404, error="RevisionNotFound")
        else:
            self.commit = self.hub.commit(kind, name)
            return directory
        return None

    def _send_facts(self, directory: Path, what: str, place: str | None, paths: list[str]) -> None:
        base = directory / (place or "")
        if what == "tree" and not base.is_dir():
            return self._send(404, error="EntryNotFound")
        if what == "tree":
            found = base.rglob("*") if "recursive=True" in self.path else base.iterdir()
            answer: object = [_entry(directory, path) for path in sorted(found)]
        elif what == "paths-info":
            chosen = (directory / path for path in paths)
            answer = [_entry(directory, path) for path in chosen if path.exists()]
        else:
            name = directory.relative_to(self.hub.root).as_posix().partition("/")[2]
            answer = {"id": name, "sha": self.commit}
        return self._send(200, json.dumps(answer).encode())

    def _send_file(self, directory: Path, name: str, file: str) -> None:
        place = directory / file
        if name in self.hub.gated:
            return self._send(401, error="GatedRepo")
        if not place.is_file():
            return self._send(404, error="EntryNotFound", X_Repo_Commit=self.commit)
        content, status, part = place.read_bytes(), 200, {}
        if wanted := re.match(r"bytes=(\d+)-(\d*)$", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or len(content)), len(content) - 1)
            part = {"Content_Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        return self._send(status, content, X_Repo_Commit=self.commit, ETag=_blob(place), **part)

    def _send(self, status: int, body: bytes = b"{}", error: str = "", **headers: str) -> None:
        self.send_response(status)
        more = {"X_Error_Code": error} if error else {}
        for key, value in {"Content_Length": str(len(body)), **headers, **more}.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def _entry(directory: Path, path: Path) -> dict[str, object]:
    kind = "directory" if path.is_dir() else "file"
    name, size = path.relative_to(directory).as_posix(), path.stat().st_size
    return {"type": kind, "path": name, "size": size, "oid": _blob(path)}


def _blob(path: Path) -> str:
    stat = path.stat()
    return hashlib.sha1(f"{path} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
