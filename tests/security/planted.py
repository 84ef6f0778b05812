"""An HTTP server on loopback, as a stranger may own one: it records what it receives and answers as services do."""

import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

import ray

_RUN = {
    "info": {
        "run_id": "1" * 32,
        "run_uuid": "1" * 32,
        "experiment_id": "1",
        "status": "RUNNING",
        "artifact_uri": "mlflow-artifacts:/1",
        "lifecycle_stage": "active",
    },
    "data": {},
}
_MLFLOW: dict[str, Any] = {
    "experiment_id": "1",
    "experiment": {
        "experiment_id": "1",
        "name": "maskformer",
        "artifact_location": "mlflow-artifacts:/1",
        "lifecycle_stage": "active",
    },
    "experiments": [],
    "run": _RUN,
    "runs": [],
}
_RAY = {"version": "4", "ray_version": ray.__version__, "ray_commit": "0"}
_BUCKET = (
    b'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/"><IsTruncated>false'
    b"</IsTruncated><KeyCount>0</KeyCount></ListBucketResult>"
)


@dataclass(frozen=True)
class Received:
    """A request."""

    line: str
    headers: dict[str, str]
    body: bytes

    @property
    def text(self) -> str:
        """All of it."""
        return f"{self.line}\n{self.headers}\n{self.body!r}"


@dataclass
class Planted:
    """The server, as a context.

    Attributes:
        redirect: address to redirect every request to, except those for `answered`.
        answered: beginnings of paths that are answered all the same.
    """

    redirect: str = ""
    answered: tuple[str, ...] = ()
    received: list[Received] = field(default_factory=list)

    @property
    def address(self) -> str:
        """Host and port."""
        return f"127.0.0.1:{self._server.server_port}"

    @property
    def url(self) -> str:
        return f"http://{self.address}"

    def __enter__(self) -> Self:
        planted = self

        class Handler(_Handler):
            server_state = planted

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    server_state: Planted
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        state = self.server_state
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        state.received.append(Received(self.requestline, dict(self.headers), body))
        if state.redirect and not self.path.startswith(state.answered or ("\0",)):
            self.send_response(307)
            self.send_header("Location", state.redirect + self.path)
            content = b""
        else:
            self.send_response(200)
            content = _content(self.path)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def log_message(self, format: str, *args: Any) -> None: ...


def _content(path: str) -> bytes:
    if path == "/health":
        return b"OK"
    if path.startswith("/api/version"):
        return json.dumps(_RAY).encode()
    if path.startswith(("/api/2.0/mlflow", "/api/3.0/mlflow")):
        return json.dumps(_MLFLOW).encode()
    return b"{}" if path.startswith("/api/") else _BUCKET
