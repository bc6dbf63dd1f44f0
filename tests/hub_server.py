"""A Hugging Face Hub on 127.0.0.1: what push and pull of huggingface_hub need, over real HTTP, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_test_token"
READER = "hf_read_token"  # may read everything and write nothing


@dataclass
class Repo:
    """Commits of one repo: sha -> {path: content}; branches name commits."""

    private: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    descriptions: list[str] = field(default_factory=list)  # of the commits in `log`

    def commit(self, branch: str, files: dict[str, bytes], message: str, description: str = "") -> str:
        sha = hashlib.sha1(f"{message}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha], self.branches[branch] = files, sha
        self.log.append(message)
        self.descriptions.append(description)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class Hub:
    """The server and its state.

    Args:
        lfs_above: Files of more bytes go through LFS, smaller ones inside the commit; 0 sends everything through LFS.
    """

    def __init__(self, lfs_above: int = 1_000_000):
        self.lfs_above = lfs_above
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.cut: str | None = None  # downloads of this file break off half-way
        # Beginning of a path -> what answers every question under it: status and error code, a page of a proxy, or nothing at all.
        self.trouble: dict[str, tuple[int, str] | bytes | threading.Event] = {}
        self.pull_requests = 0
        hub = self

        class Handler(_Handler):
            state = hub

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    state: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        """Quiet."""

    # ------------------------------------------------------------------ answers
    def answer(self, value: object = None, status: int = 200, headers: dict[str, str] | None = None, body: bytes | None = None) -> None:
        content = json.dumps(value).encode() if body is None else body
        self.send_response(status)
        for name, text in ({"Content-Type": "application/json", "Content-Length": str(len(content))} | (headers or {})).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, {"X-Error-Code": code, "X-Error-Message": code})

    def in_trouble(self, path: str) -> bool:
        answer = next((answer for start, answer in self.state.trouble.items() if path.startswith(start)), None)
        if isinstance(answer, threading.Event):
            answer.wait(20)  # whoever has no patience of its own is cut off then
            self.close_connection = True
        elif isinstance(answer, bytes):
            self.answer(body=answer, headers={"Content-Type": "text/html"})
        elif answer:
            self.fail(*answer)
        return answer is not None

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def signed_in(self) -> bool:
        return self.headers.get("Authorization") in (f"Bearer {TOKEN}", f"Bearer {READER}")

    @property
    def only_reads(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {READER}"

    def repo(self, kind: str, name: str) -> Repo | None:
        """The repo, if whoever asks may know of it."""
        repo = self.state.repos.get((kind, name))
        if repo is None or (repo.private and not self.signed_in):
            self.fail(404 if self.signed_in else 401, "RepoNotFound")
            return None
        return repo

    # ------------------------------------------------------------------ routes
    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append((self.command, path))
        if self.in_trouble(path):
            return
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/revision/(.+)", path):
            self.info(*match.groups())
        elif match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/tree/([^/]+)", path):
            self.tree(*match.groups())
        elif match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/auth-check/write", path):
            if self.repo(*match.groups()):
                self.answer({}) if self.signed_in and not self.only_reads else self.fail(403, "Forbidden")
        elif match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)", path):
            self.info(*match.groups(), "main")
        elif match := re.fullmatch(r"/(?:(datasets|spaces)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            kind, name, revision, file = match.groups()
            self.resolve(kind or "models", name, revision, file)
        else:
            self.fail(404, "EntryNotFound")

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.state.requests.append(("POST", path))
        body = self.body()
        if self.in_trouble(path):
            return None
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if not self.signed_in:
            return self.fail(401, "Unauthorized")
        if self.only_reads:
            return self.fail(403, "Forbidden")
        if path == "/api/repos/create":
            return self.create(json.loads(body))
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/preupload/(.+)", path):
            files = json.loads(body)["files"]
            modes = [{"path": f["path"], "uploadMode": self.mode(f["size"]), "shouldIgnore": False, "oid": None} for f in files]
            return self.answer({"files": modes})
        if match := re.fullmatch(r"/(?:datasets/|spaces/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self.batch(json.loads(body))
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/branch/(.+)", path):
            return self.branch(*match.groups())
        if match := re.fullmatch(r"/api/(models|datasets|spaces)/([^/]+/[^/]+)/commit/(.+)", path):
            return self.commit(*match.groups(), body)
        return self.fail(404, "EntryNotFound")

    def do_PUT(self) -> None:
        """An upload of one LFS object."""
        content = self.body()
        if self.in_trouble(self.path):
            return
        oid = self.path.rsplit("/", 1)[-1]
        assert hashlib.sha256(content).hexdigest() == oid
        self.state.objects[oid] = content
        self.answer({})

    def mode(self, size: int) -> str:
        return "lfs" if size > self.state.lfs_above else "regular"

    def create(self, wanted: dict) -> None:
        kind = f"{wanted.get('type') or 'model'}s"
        name = f"{wanted.get('organization') or 'me'}/{wanted['name']}"
        url = f"{self.state.url}/{'' if kind == 'models' else f'{kind}/'}{name}"
        if (kind, name) in self.state.repos:
            return self.answer({"url": url, "error": "You already created this repo"}, 409)
        repo = self.state.repos[kind, name] = Repo(bool(wanted.get("private") or wanted.get("visibility") == "private"))
        repo.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
        return self.answer({"url": url, "name": name, "id": name})

    def branch(self, kind: str, name: str, branch: str) -> None:
        if (repo := self.repo(kind, name)) is None:
            return
        if branch in repo.branches:
            return self.answer({"error": "Reference already exists"}, 409)
        repo.branches[branch] = repo.branches["main"]
        self.answer({})

    def batch(self, wanted: dict) -> None:
        def entry(item: dict) -> dict:
            known = item["oid"] in self.state.objects
            actions = {} if known else {"actions": {"upload": {"href": f"{self.state.url}/upload/{item['oid']}"}}}
            return {"oid": item["oid"], "size": item["size"], **actions}

        self.answer({"transfer": "basic", "objects": [entry(item) for item in wanted["objects"]]})

    def commit(self, kind: str, name: str, revision: str, body: bytes) -> None:
        if (repo := self.repo(kind, name)) is None:
            return
        if revision not in repo.branches:
            return self.fail(404, "RevisionNotFound")
        lines = [json.loads(line) for line in body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        files = dict(repo.files(revision) or {})
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.state.objects[value["oid"]]
        answer = {"success": True, "commitUrl": "", "hookOutput": ""}
        target = revision
        if "create_pr=1" in self.path:
            self.state.pull_requests += 1
            target = f"refs/pr/{self.state.pull_requests}"
            answer["pullRequestUrl"] = f"{self.state.url}/{name}/discussions/{self.state.pull_requests}"
        sha = repo.commit(target, files, header["summary"], header.get("description") or "")
        self.answer({**answer, "commitOid": sha, "commitUrl": f"{self.state.url}/{name}/commit/{sha}"})

    def info(self, kind: str, name: str, revision: str) -> None:
        if (repo := self.repo(kind, name)) is None:
            return
        files = repo.files(revision)
        if files is None:
            return self.fail(404, "RevisionNotFound")
        sha = repo.branches.get(revision, revision)
        self.answer({"id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": [{"rfilename": file} for file in files]})

    def tree(self, kind: str, name: str, revision: str) -> None:
        if (repo := self.repo(kind, name)) is None:
            return
        files = repo.files(revision)
        if files is None:
            return self.fail(404, "RevisionNotFound")
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]
        self.answer(entries)

    def resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        if (repo := self.repo(kind, name)) is None:
            return
        files = repo.files(revision)
        if files is None:
            return self.fail(404, "RevisionNotFound")
        sha = repo.branches.get(revision, revision)
        if file not in files:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": sha})
        content = files[file]
        headers = {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": sha, "Accept-Ranges": "bytes"}
        if self.command == "GET" and self.state.cut == file:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            self.wfile.write(content[: len(content) // 2])
            self.wfile.flush()
            self.close_connection = True
            return
        status = 200
        if (wanted := self.headers.get("Range")) and self.command == "GET":
            start, end = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted).groups()  # type: ignore[union-attr]
            stop = int(end) + 1 if end else len(content)
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(content)}"
            content, status = content[int(start) : stop], 206
        self.answer(body=content, status=status, headers={"Content-Type": "application/octet-stream", **headers})
