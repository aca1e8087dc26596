"""A small hub: folders served as repositories of Hugging Face, with the part of its API that its clients call."""

from __future__ import annotations

import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

Files = Mapping[str, bytes]
_LARGE = (".safetensors", ".bin", ".parquet", ".tar", ".png", ".jpg", ".webp")  # which the hub keeps elsewhere
_RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
_API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)/?(.*))?")


class Hub:
    """Repositories, each with commits of its own.

    Attributes:
        endpoint: its address.
        elsewhere: that of the host of its large files.
        gated: names of repositories that are shown to those who were let in, and nobody was.
        asked: what was asked for: the verb and the path.
        answers: what keeps it answering.
    """

    def __init__(self) -> None:
        self.gated: set[str] = set()
        self.asked: list[str] = []
        self.endpoint = self.elsewhere = ""
        self.answers = ExitStack()
        self._repos: dict[tuple[str, str], dict[str, Files]] = {}

    def push(self, kind: str, name: str, folder: Path, message: str = "") -> str:
        """Commit the files of a folder to a repository of "models" or "datasets"; what the commit is called."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        told = json.dumps([name, message, {path: hashlib.sha1(data).hexdigest() for path, data in files.items()}])
        commit = hashlib.sha1(told.encode()).hexdigest()
        self._repos.setdefault((kind, name), {})[commit] = files
        return commit

    def head(self, kind: str, name: str) -> str:
        """The last commit."""
        return self.find(kind, name, "main")[0]

    def find(self, kind: str, name: str, revision: str) -> tuple[str, Files]:
        """The commit of a revision, and its files.

        Raises:
            RefusalError: there is no such repository, or no such revision.
        """
        commits = self._repos.get((kind, name))
        if commits is None:
            raise RefusalError(401, "RepoNotFound", "Repository not found")  # as if it were somebody's own
        commit = next(reversed(commits)) if revision == "main" else revision
        if commit not in commits:
            raise RefusalError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, commits[commit]

    @contextmanager
    def away(self) -> Iterator[None]:
        """Whoever connects meanwhile is refused."""
        self.answers.close()
        yield
        self.answers.enter_context(_answering(self, int(self.endpoint.rpartition(":")[2])))

    def content(self, sha256: str) -> bytes:
        """A file by the hash of its bytes."""
        all_files = (data for commits in self._repos.values() for files in commits.values() for data in files.values())
        return next(data for data in all_files if hashlib.sha256(data).hexdigest() == sha256)


class RefusalError(Exception):
    """What the hub says no to: the status, and its headers of errors."""


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.hub.asked.append(f"{self.command} {self.path}")
        try:
            self._answer(urlsplit(self.path).path)
        except RefusalError as error:
            status, code, message = error.args
            self._send(status, json.dumps({"error": message}).encode(), **{"X-Error-Code": code, "X-Error-Message": message})

    do_HEAD = do_POST = do_GET  # noqa: N815

    def _answer(self, path: str) -> None:
        if asked := re.fullmatch(r"/elsewhere/(\w{64})", path):
            self._send_file(self.hub.content(asked[1]))
        elif asked := re.fullmatch(r"/api/resolve-cache/(\w+)/([^/]+/[^/]+)/(\w+)/(.+)", path):
            self._send_kept(asked[1], asked[2], *self._file(asked[1], *map(unquote, asked.groups()[1:])))
        elif asked := _RESOLVE.fullmatch(path):
            self._resolve(asked[1] or "models", *map(unquote, asked.groups()[1:]))
        elif asked := _API.fullmatch(path):
            self._tell(*(unquote(each or "") for each in asked.groups()))
        else:
            raise RefusalError(404, "NotFound", f"there is no {path}")

    def _file(self, kind: str, name: str, revision: str, file: str) -> tuple[str, bytes]:
        commit, files = self.hub.find(kind, name, revision)
        if name in self.hub.gated:
            raise RefusalError(401, "GatedRepo", f"Access to {name} is restricted. You must be authenticated to access it.")
        if file not in files:
            self.commit = commit
            raise RefusalError(404, "EntryNotFound", "Entry not found")
        return commit, files[file]

    def _resolve(self, kind: str, name: str, revision: str, file: str) -> None:
        """Large files lie elsewhere, which is told with what they are; small ones below a commit."""
        commit, data = self._file(kind, name, revision, file)
        if file.endswith(_LARGE):
            sha256 = hashlib.sha256(data).hexdigest()
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data)), "X-Repo-Commit": commit}
            self._send(302, b"", Location=f"{self.hub.elsewhere}/elsewhere/{sha256}", **linked)
        else:
            place = f"/api/resolve-cache/{kind}/{name}/{commit}/{file}"
            self._send(307, b"", Location=place, ETag=f'"{_oid(data)}"', **{"X-Repo-Commit": commit})

    def _send_kept(self, kind: str, name: str, commit: str, data: bytes) -> None:
        self._send_file(data, ETag=f'"{_oid(data)}"', **{"X-Repo-Commit": commit})

    def _tell(self, kind: str, name: str, what: str, revision: str, below: str) -> None:
        commit, files = self.hub.find(kind, name, revision or "main")
        entries = _entries(files)
        if what == "paths-info":
            asked = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
            told: Any = [entries[path] for path in asked["paths"] if path in entries]
        elif what == "tree":
            around = f"{below.rstrip('/')}/" if below else ""
            if around and below.rstrip("/") not in entries:
                raise RefusalError(404, "EntryNotFound", f"{below} does not exist on {revision}")
            deep = "recursive=true" in self.path.lower()
            inside = {path: path.removeprefix(around) for path in entries if path.startswith(around)}
            told = [entries[path] for path, rest in inside.items() if deep or "/" not in rest]
        else:
            siblings = [{"rfilename": path} for path in files]
            told = {"id": name, "sha": commit, "private": False, "tags": [], "siblings": siblings, "downloads": 0, "likes": 0}
        self._send(200, json.dumps(told).encode(), **{"Content-Type": "application/json"})

    def _send_file(self, data: bytes, **headers: str) -> None:
        """All of a file, or the part that is asked for."""
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
            part = data[first : last + 1]
            self._send(206, part, **headers, **{"Content-Range": f"bytes {first}-{last}/{len(data)}"})
        else:
            self._send(200, data, **headers, **{"Accept-Ranges": "bytes"})

    def _send(self, status: int, data: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(data))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _oid(data: bytes) -> str:
    """What git calls a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _entries(files: Files) -> dict[str, dict[str, Any]]:
    """Files and the folders around them, as the hub tells of them."""
    found: dict[str, dict[str, Any]] = {}
    for path, data in files.items():
        parts = path.split("/")
        for n in range(1, len(parts)):
            around = "/".join(parts[:n])
            found[around] = {"type": "directory", "oid": _oid(around.encode()), "size": 0, "path": around}
        found[path] = {"type": "file", "oid": _oid(data), "size": len(data), "path": path}
        if path.endswith(_LARGE):
            found[path]["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return found


@contextmanager
def _answering(hub: Hub, port: int) -> Iterator[int]:
    handler = type("Answers", (_Answers,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", port), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers meanwhile."""
    hub = Hub()
    with hub.answers:
        port = hub.answers.enter_context(_answering(hub, 0))
        hub.endpoint, hub.elsewhere = (f"http://{host}:{port}" for host in ("127.0.0.1", "localhost"))
        yield hub


class Client:
    """A process that knows of no other hub, and has fetched nothing before; see `hub_client`."""

    def __init__(self, hub: Hub, home: Path, **environment: str) -> None:
        home.mkdir(exist_ok=True)
        ours = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(home / "fetched"), "PYTHONPATH": os.pathsep.join(sys.path)}
        theirs = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        said = (home / f"said by {len([*home.iterdir()])}.txt").open("w")
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": said}
        script = str(Path(__file__).with_name("hub_client.py"))
        self._process = subprocess.Popen(
            [sys.executable, script], env={**theirs, **ours, **environment}, cwd=home, text=True, **pipes
        )
        self._said = said

    def ask(self, what: str, *args: Any) -> Any:
        """What a function of `hub_client` returns."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps([what, args]) + "\n")
        stdin.flush()
        answer = stdout.readline()
        assert answer, self.said[-3000:]
        return json.loads(answer)

    def run(self, *args: Any) -> dict[str, Any]:
        """What comes of `hookattn ...`, which ends well: what it prints in JSON."""
        status, out, told = self.ask("run", *map(str, args), "--json")
        assert status == 0, told
        found: dict[str, Any] = json.loads(out)
        return found

    def refusal(self, *args: Any) -> str:
        """The error that it ends with."""
        status, _, told = self.ask("run", *map(str, args))
        last = str(told).rstrip("\n").split("\n")[-1]
        assert status == 1, told
        assert last.startswith("hookattn: "), told
        assert "Traceback" not in told
        return last

    @property
    def said(self) -> str:
        """What the libraries have said so far."""
        return Path(self._said.name).read_text()

    def close(self) -> None:
        self._process.kill()  # there is nothing that it has to leave in order
        self._process.communicate()
        self._said.close()


@pytest.fixture(scope="module")
def client(hub: Hub, folder: Path) -> Iterator[Client]:
    """A client of the hub that a module of tests serves, with its own folder."""
    client = Client(hub, folder / "home")
    yield client
    client.close()
