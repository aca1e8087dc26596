"""Stores of objects that are served here: what the clients of S3 and of Google Cloud Storage reach, in place of a cloud."""

from __future__ import annotations

import http.server
import json
import os
import signal
import socketserver
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import fsspec
import pytest

WRITING = ("PUT", "POST", "DELETE")
Heard = Callable[[str], object]
"""Is told the method of each request, before it is done."""


class Cloud(NamedTuple):
    """A store of objects with the bucket "bucket", and one client of it.

    Attributes:
        scheme: of its addresses.
        server: serves it.
        files: a client of somebody else, who remembers nothing of folders.
    """

    scheme: str
    server: Any
    files: Any

    def address(self, path: str) -> str:
        return f"{self.scheme}://bucket/{path}"

    @contextmanager
    def hearing(self, heard: Heard) -> Iterator[None]:
        """Tell something of each request."""
        self.server.heard = heard
        try:
            yield
        finally:
            self.server.heard = _ignore

    @contextmanager
    def away(self, writes: int = 0) -> Iterator[None]:
        """Let it answer nobody, after so many requests that write."""
        left = iter(range(writes))

        def break_off(method: str) -> None:
            if self.server.is_away or (method in WRITING and next(left, None) is None):
                self.server.is_away = True
                raise ConnectionResetError

        with self.hearing(break_off):
            self.server.is_away = not writes
            try:
                yield
            finally:
                self.server.is_away = False

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Let it refuse everybody."""
        self.server.refuse(True)
        try:
            yield
        finally:
            self.server.refuse(False)


def _ignore(_: str) -> None:
    pass


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    """Serves until the block ends; one request at a time, of many that may wait."""

    request_queue_size, daemon_threads, is_away = 128, True, False
    heard: Heard = staticmethod(_ignore)

    def __init__(self, handler: Any) -> None:
        super().__init__(("127.0.0.1", 0), handler)
        self.one = threading.Lock()

    def __enter__(self) -> Any:
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.server_close()

    def handle_error(self, *_: object) -> None:
        """Nothing: clients that are killed close no connection."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


def _import_moto() -> Any:
    pytest.importorskip("moto")
    pytest.importorskip("flask", reason='moto serves by flask: pip install "moto[server]"')
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what moto imports
        from moto.moto_server import werkzeug_app
    return werkzeug_app


@contextmanager
def amazon(patch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """S3, as moto serves it."""
    clients = pytest.importorskip("s3fs").S3FileSystem
    app = _import_moto()
    from moto import settings
    from moto.backends import get_backend
    from werkzeug.serving import WSGIRequestHandler

    dispatch = app.DomainDispatcherApplication(app.create_backend_app)

    def answer(environ: Any, start: Any) -> Any:
        server.heard(environ["REQUEST_METHOD"])
        with server.one:
            return list(dispatch(environ, start))

    class Handler(WSGIRequestHandler):
        def log(self, *_: object) -> None:
            pass

    class Server(_Server):
        # what werkzeug's handler asks of its server
        app, ssl_context, passthrough_errors, multithread, multiprocess = staticmethod(answer), None, True, True, False

        def refuse(self, refuses: bool) -> None:
            settings.INITIAL_NO_AUTH_ACTION_COUNT = 0 if refuses else float("inf")

    for name, value in {"ACCESS_KEY_ID": "me", "SECRET_ACCESS_KEY": "secret", "DEFAULT_REGION": "us-east-1"}.items():
        patch.setenv(f"AWS_{name}", value)
    for name in ("CONFIG_FILE", "SHARED_CREDENTIALS_FILE"):
        patch.setenv(f"AWS_{name}", "/nowhere")
    patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    patch.setattr(clients, "retries", 1)
    patch.setenv("AWS_MAX_ATTEMPTS", "1")
    with Server(Handler) as server:
        patch.setenv("AWS_ENDPOINT_URL", server.address)
        cloud = Cloud("s3", server, clients(use_listings_cache=False))
        cloud.files.mkdir("bucket")
        yield cloud
        get_backend("s3")["123456789012"]["aws"].reset()


@contextmanager
def google(patch: pytest.MonkeyPatch) -> Iterator[Cloud]:
    """Google Cloud Storage, as gcp-storage-emulator serves it, and with what it gets wrong or does not know."""
    patch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # which asks by gRPC, that nobody answers here
    gcsfs = pytest.importorskip("gcsfs")
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    from gcp_storage_emulator.handlers import buckets
    from gcp_storage_emulator.storage import Storage

    read = emulator._read_data

    def read_whole(request: Any, query: Any) -> Any:
        """What was sent, also where it ends in a carriage return, which the emulator takes for a part of what follows."""
        kind, _, boundary = request.headers.get("Content-Type", "").partition("boundary=")
        if not kind.startswith("multipart/related"):
            return read(request, query)
        parts = emulator._read_raw_data(request).split(b"--" + boundary.strip("\"'").encode())
        meta, content = (part.partition(b"\n\n")[2][:-1] for part in parts[1:3])
        return {"meta": json.loads(meta), "content": content, "content-type": "application/octet-stream"}

    patch.setattr(emulator, "_read_data", read_whole)

    class Asked(emulator.Request):  # type: ignore[misc, name-defined]
        def get_header(self, key: str, default: Any = None) -> Any:
            """One that was sent; the emulator does not know of ranges of so many bytes at the end."""
            told = super().get_header(key, default)
            return f"bytes={max(0, held.size + int(told[6:]))}-" if str(told).startswith("bytes=-") else told

    patch.setattr(emulator, "Request", Asked)

    class Held(Storage):  # type: ignore[misc]
        only_new, size = False, 0

        def get_file(self, *args: Any, **kwargs: Any) -> Any:
            found = super().get_file(*args, **kwargs)
            self.size = len(found)
            return found

        def _write_config_to_file(self) -> None:
            pass

        def create_file(self, bucket: str, name: str, *args: Any, **kwargs: Any) -> Any:
            if self.only_new and name in self.objects.get(bucket, {}):
                raise FileExistsError
            return super().create_file(bucket, name, *args, **kwargs)

    class Handler(emulator.RequestHandler):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any) -> None:
            super().__init__(held, *args)

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            server.heard(self.command)
            with server.one:
                if server.refuses:
                    self.refuse(401, "Anonymous caller does not have storage.objects.get access")
                    return
                held.only_new = "ifGenerationMatch=0" in self.path
                try:
                    emulator.Router(self).handle(self.command)
                except FileExistsError:
                    self.refuse(412, "At least one of the pre-conditions you specified did not hold.")

        def refuse(self, code: int, message: str) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0) if code == 401 else 0)
            told = json.dumps({"error": {"code": code, "message": message}}).encode()
            self.send_response(code)
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = answer  # noqa: N815

    class Server(_Server):
        refuses = False

        def refuse(self, refuses: bool) -> None:
            self.refuses = refuses

    patch.setattr(gcsfs.retry, "min", lambda *_: 0, raising=False)  # seconds before it asks again
    held = Held(use_memory_fs=True)
    buckets.create_bucket("bucket", held)
    with Server(Handler) as server:
        patch.setenv("STORAGE_EMULATOR_HOST", server.address)
        patch.setenv("FSSPEC_GS_TOKEN", "anon")  # of processes that are started
        patch.setitem(fsspec.config.conf, "gs", {"token": "anon"})
        yield Cloud("gs", server, gcsfs.GCSFileSystem(token="anon", use_listings_cache=False))


CLOUDS = {"s3": amazon, "gs": google}
_KEPT: list[Any] = []
"""Clients, which warn of what they have open where they are not there at the end."""


@contextmanager
def serve(scheme: str) -> Iterator[Cloud]:
    """One of them, while the block lasts; clients that were made in it are forgotten."""
    with pytest.MonkeyPatch.context() as patch, CLOUDS[scheme](patch) as cloud:
        clients = type(cloud.files)
        clients.clear_instance_cache()
        yield cloud
        _KEPT.extend(clients._cache.values())
        clients.clear_instance_cache()


def kill_at(cloud: Cloud, request: int, job: Callable[[], object]) -> int:
    """Do a job in a process that is killed where it writes for the so-manieth time, if it does; how often it has written."""
    if (child := os.fork()) == 0:
        try:
            job()
        finally:
            os._exit(0)
    written = 0

    def kill(method: str) -> None:
        nonlocal written
        written += method in WRITING
        if method in WRITING and written == request:
            os.kill(child, signal.SIGKILL)
            raise ConnectionResetError

    with cloud.hearing(kill):
        assert os.WIFSIGNALED(os.waitpid(child, 0)[1]) == (written >= request)
    return written
