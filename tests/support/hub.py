"""A Hugging Face hub on 127.0.0.1 that keeps its repositories in memory: what `huggingface_hub`
asks of the real one to make a repository, upload, list and download.
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
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import transformers.utils.hub
import yaml
from huggingface_hub import constants

TOKEN = "hf_of_a_test"


class Hub:
    """Repositories by id: files by path. ``downloaded``: paths that were asked for, in order."""

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.downloaded: list[str] = []

    def commit(self, repo: str) -> str:
        """Return the name of what a repository holds now, as git would: 40 hex digits."""
        files = sorted(self.repos[repo].items())
        return hashlib.sha1(repr(files).encode()).hexdigest()

    def put(self, repo: str, folder: Path) -> None:
        """Put all files of a folder into a repository."""
        files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
        self.repos[repo] = {name: path.read_bytes() for name, path in files.items()}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/[^/]+", path):
            repo = found[1]
            if repo in self.hub.repos:
                return self._json({"id": repo, "sha": self.hub.commit(repo), "siblings": []})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+(/.+)?", path):
            if found[1] in self.hub.repos and found[2] is None:
                return self._json(self._tree(found[1]))
            if found[1] in self.hub.repos:  # no repository here has folders to be listed alone
                return self._json({"error": "no folder"}, 404, {"X-Error-Code": "EntryNotFound"})
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            content = self.hub.repos.get(found[1], {}).get(found[2])
            if content is not None:
                return self._file(found[1], found[2], content)
            if found[1] in self.hub.repos:
                return self._json({"error": "no such file"}, 404, {"X-Error-Code": "EntryNotFound"})
        self._json({"error": "no such repository"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._json({"error": "Invalid username or password."}, 401)
        path = urlsplit(self.path).path
        if path == "/api/validate-yaml":  # of the card
            metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            wrong = [] if metadata.get("license") else [{"message": "no license"}]
            return self._json({"errors": wrong, "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization']}/{asked['name']}"
            self.hub.repos.setdefault(repo, {})
            self.hub.private.setdefault(
                repo, asked.get("visibility") == "private" or bool(asked.get("private"))
            )
            return self._json({"url": f"{self._base}/{repo}"})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/[^/]+", path):
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            return self._json({"files": [{"path": f["path"], **modes} for f in files]})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/[^/]+", path):
            repo = found[1]
            for line in body.splitlines():
                asked = json.loads(line)
                value = asked["value"]
                if asked["key"] == "file":
                    self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
                elif asked["key"] == "deletedFile":
                    del self.hub.repos[repo][value["path"]]
            commit = self.hub.commit(repo)
            url = f"{self._base}/{repo}/commit/{commit}"
            return self._json({"success": True, "commitOid": commit, "commitUrl": url})
        self._json({"error": f"no such route {path}"}, 404)

    @property
    def _base(self) -> str:
        return f"http://{self.headers['Host']}"

    def _tree(self, repo: str) -> list[dict[str, Any]]:
        return [
            {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
            for name, content in self.hub.repos[repo].items()
        ]

    def _file(self, repo: str, name: str, content: bytes) -> None:
        if self.command == "GET":
            self.hub.downloaded.append(f"{repo}/{name}")
        headers = {"ETag": f'"{_oid(content)}"', "X-Repo-Commit": self.hub.commit(repo)}
        self._send(content, 200, "application/octet-stream", headers)

    def _json(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(value).encode(), status, "application/json", headers or {})

    def _send(self, content: bytes, status: int, kind: str, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": len(content)}.items():
            self.send_header(name, str(value))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _oid(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[tuple[Hub, str]]:
    """Run a hub; give it and its address."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def lead_to(address: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lead `huggingface_hub` to a hub, with its downloads in ``cache``, and give it a token."""
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    # transformers shares a client that knows the address of its first use, and would ask a hub
    # that is gone for half a minute at every load.
    monkeypatch.setattr(transformers.utils.hub, "_hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
