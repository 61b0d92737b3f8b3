"""A hub on loopback: repositories of files, behind what of the Hugging Face hub's HTTP interface fetching needs.

The client is the real huggingface_hub; only the far end is ours, because tests have no internet.
"""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


@dataclass
class Repository:
    """Files of one commit; `main` is that commit."""

    files: dict[str, bytes]
    gated_by: str | None = None
    """The token without which nothing is given."""

    @property
    def commit(self) -> str:
        told = sorted((name, hashlib.sha1(content).hexdigest()) for name, content in self.files.items())
        return hashlib.sha1(json.dumps(told).encode()).hexdigest()

    @classmethod
    def of_folder(cls, folder: Path) -> "Repository":
        return cls({str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()})


@dataclass
class Hub:
    """`models/org/name` or `datasets/org/name` to its repository; what was asked for is kept."""

    url: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    fetched: list[str] = field(default_factory=list)
    """Paths of files whose bytes were given, in order."""


@contextmanager
def started() -> Iterator[Hub]:
    hub = Hub()

    class Handler(_Handler):
        asked = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)  # seconds until it sees the end
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    asked: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def log_message(self, *_: object) -> None:
        """Nothing on the console."""

    def _answer(self, *, with_body: bool) -> None:
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        parts = parts[1:] if is_api else parts
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = f"{kind}/{'/'.join(parts[:2])}", parts[2:]
        repository = self.asked.repositories.get(name)
        if repository is None:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, with_body)
        elif repository.gated_by not in (None, self.headers.get("Authorization", "").removeprefix("Bearer ")):
            self._send(401, b'{"error": "gated"}', {"X-Error-Code": "GatedRepo"}, with_body)
        elif len(rest) > 1 and rest[1] not in ("main", repository.commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, with_body)
        elif is_api:
            self._send(200, json.dumps(_described(name, repository, rest)).encode(), {}, with_body)
        else:
            self._send_file(repository, f"{name}/{'/'.join(rest[2:])}", "/".join(rest[2:]), with_body)

    def _send_file(self, repository: Repository, path: str, name: str, with_body: bool) -> None:
        content = repository.files.get(name)
        headers = {"X-Repo-Commit": repository.commit}
        if content is None:
            self._send(404, b"", headers | {"X-Error-Code": "EntryNotFound"}, with_body)
            return
        if with_body:
            self.asked.fetched.append(path)
        self._send(200, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, with_body)

    def _send(self, code: int, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        self.send_response(code)
        for header, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


def _described(name: str, repository: Repository, rest: list[str]) -> object:
    """What the interface says of a repository (`revision/…`), or of its files (`tree/…`)."""
    if rest[:1] == ["tree"]:
        return [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in repository.files.items()
        ]
    identity = name.partition("/")[2]
    return {"_id": "0", "id": identity, "modelId": identity, "sha": repository.commit, "private": False, "tags": []}
