"""An in-process stand-in for the Hugging Face hub: the HTTP endpoints with which huggingface_hub uploads and downloads a folder."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Model repositories: files by name, for each branch of each repository.

    Attributes:
        branches: (repository, branch) -> files; a new branch starts with the files of `main`.
        asked: method and path of each request, in order.
        tokens: the tokens sent with the requests.
        url: address of the server.
    """

    def __init__(self) -> None:
        self.branches: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.url = ""

    def commit(self, repo: str, revision: str) -> str:
        """Return the commit hash of a branch; a commit given by its hash is returned unchanged."""
        return hashlib.sha1(repr(sorted(self.files(repo, revision).items())).encode()).hexdigest()

    def files(self, repo: str, revision: str) -> dict[str, bytes]:
        """Return the files of a branch, or of a commit given by its hash. Raise KeyError if it does not exist."""
        if (repo, revision) in self.branches:
            return self.branches[repo, revision]
        for name, branch in self.branches:
            if name == repo and self.commit(repo, branch) == revision:
                return self.branches[repo, branch]
        raise KeyError(f"{repo} has no {revision}")

    def answer(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Return status, headers and content. Raise KeyError if the repository, branch or file does not exist."""
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        if parts[0] != "api":
            # organisation/name/resolve/revision/file
            repo, revision, name = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
            content = self.files(repo, revision)[name]
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return 200, {"ETag": etag, "X-Repo-Commit": self.commit(repo, revision)}, content
        if parts[1:] == ["repos", "create"]:
            asked = json.loads(body)
            repo = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            self.branches.setdefault((repo, "main"), {})
            return _json({"url": f"{self.url}/{repo}", "name": repo, "id": "1"})
        if parts[1] == "validate-yaml":
            return _json({"errors": [], "warnings": []})
        what, revision = (parts[4:] or ["revision", "main"])[:2]
        return self._of_repo("/".join(parts[2:4]), what, revision, body)

    def _of_repo(self, repo: str, what: str, revision: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if what == "branch":
            self.branches[repo, revision] = dict(self.files(repo, "main"))
            return _json({})
        files = self.files(repo, revision)
        if what == "preupload":
            asked = json.loads(body)["files"]
            return _json({"files": [{"path": each["path"], "uploadMode": "regular", "shouldIgnore": False} for each in asked]})
        if what == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            files.update({v["value"]["path"]: base64.b64decode(v["value"]["content"]) for v in lines if v["key"] == "file"})
            oid = self.commit(repo, revision)
            return _json({"success": True, "commitOid": oid, "commitUrl": f"{self.url}/{repo}/commit/{oid}", "hookOutput": ""})
        if what == "tree":
            found = [{"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()} for n, c in files.items()]
            return _json(found)
        siblings = [{"rfilename": name} for name in files]
        return _json({"id": repo, "modelId": repo, "sha": self.commit(repo, revision), "siblings": siblings, "tags": []})


def _json(value: Any) -> tuple[int, dict[str, str], bytes]:
    return 200, {"Content-Type": "application/json"}, json.dumps(value).encode()


@contextmanager
def serving_hub() -> Iterator[Hub]:
    """Serve a hub at `hub.url` for the duration of the context."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append(f"{self.command} {self.path}")
            if (token := self.headers.get("Authorization")) is not None:
                hub.tokens.add(token.removeprefix("Bearer "))
            try:
                status, headers, content = hub.answer(self.path, body)
            except KeyError as error:
                kind = "EntryNotFound" if "/resolve/" in self.path and "has no" not in str(error) else "RevisionNotFound"
                status, headers, content = 404, {"X-Error-Code": kind, "X-Error-Message": str(error)}, b""
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
