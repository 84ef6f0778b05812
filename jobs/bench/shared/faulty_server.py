"""An HTTP proxy on loopback that can be told to fail, in front of an S3 server or an MLflow server.

with FaultyServer("http://127.0.0.1:9000") as server:
    server.mode = "503"
"""

import itertools
import random
import re
import select
import socket
import threading
import time
from collections import Counter
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Mode = Literal["ok", "500", "503", "slow", "silent", "refuse", "cut", "flaky"]

_FAULTS: list[Mode] = ["500", "503", "slow", "refuse", "cut"]

_OF_ONE_CONNECTION = {
    "connection",
    "keep-alive",
    "transfer-encoding",
    "te",  # codespell:ignore te
    "trailer",
    "upgrade",
    "expect",
}
_ERRORS = {
    "500": b"<Error><Code>InternalError</Code><Message>We encountered an internal error.</Message></Error>",
    "503": b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>",
}
_SLOW_SECONDS = 0.3


class FaultyServer:
    """Forward HTTP requests to `target`, an address such as http://127.0.0.1:9000, or fail as `mode` says.

    The modes:
        ok: forward the request and its answer.
        500, 503: answer 500 InternalError or 503 SlowDown at once.
        slow: wait 0.3 s before forwarding the request.
        silent: read the request and answer nothing until the mode changes or the client leaves.
        refuse: close the connection without an answer.
        cut: forward the request, and break the body of the answer off in the middle.
        flaky: one of six requests, at random, meets 500, 503, slow, refuse or cut, in turn.

    Attributes:
        counts: requests received in each mode. What is received while `flaky` counts there and in its own mode.
    """

    def __init__(self, target: str) -> None:
        self.mode: Mode = "ok"
        self._received = threading.Condition()
        self.counts: Counter[Mode] = Counter()
        self._faults = itertools.cycle(_FAULTS)
        self._random = random.Random(0)
        self._next: tuple[re.Pattern[str], Mode] | None = None

        class Handler(_Handler):
            server_state = self
            target_address = urlsplit(target).netloc

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), name="faulty server")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Stop listening. Requests in progress are broken off at the end of the process at the latest."""
        self.mode = "refuse"  # ends the silent requests
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> "FaultyServer":
        self.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()

    def fail_at(self, request: str, mode: Mode) -> None:
        """Change to `mode` as soon as a request arrives whose method and path match, such as `GET /bucket/train/`."""
        with self._received:
            self._next = re.compile(request), mode

    def receive(self, request: str) -> Mode:
        """Count a request; return the mode that it meets."""
        with self._received:
            if self._next is not None and self._next[0].search(request):
                self.mode, self._next = self._next[1], None
            mode = self.mode
            self.counts[mode] += 1
            if mode == "flaky":
                mode = "ok" if self._random.random() > 1 / 6 else next(self._faults)
                self.counts[mode] += 1
            self._received.notify_all()
            return mode

    def wait_until(self, mode: Mode, timeout: float) -> bool:
        """Wait until a request has met `mode`; return whether one did, within `timeout` seconds."""
        with self._received:
            met = self._received.wait_for(lambda: self.mode == mode, timeout)
            self._next = None
            return met

    def wait_for(self, mode: Mode, requests: int, timeout: float = 60) -> bool:
        """Wait until so many requests were received in `mode`; return whether they were, within `timeout` seconds."""
        with self._received:
            return self._received.wait_for(lambda: self.counts[mode] >= requests, timeout)


class _Handler(BaseHTTPRequestHandler):
    server_state: FaultyServer
    target_address: str
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def _handle(self) -> None:
        mode = self.server_state.receive(f"{self.command} {self.path}")
        if mode == "refuse":
            self._break_off()
            return
        body = self._body()
        if mode in _ERRORS:
            self.send_response(int(mode))
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(_ERRORS[mode])))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(_ERRORS[mode])
            return
        if mode == "slow":
            time.sleep(_SLOW_SECONDS)
        while self.server_state.mode == "silent":
            if select.select([self.connection], [], [], 0.05)[0]:  # nothing but the end can arrive here
                self.close_connection = True
                return
        if self.server_state.mode == "refuse":
            self._break_off()
            return
        self._forward(body, cut=mode == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = do_OPTIONS = _handle  # the names http.server calls

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", "").lower():
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass  # trailers
        return b"".join(chunks)

    def _forward(self, body: bytes, cut: bool) -> None:
        target = HTTPConnection(self.target_address, timeout=120)
        try:
            target.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in _OF_ONE_CONNECTION | {"content-length"}:
                    target.putheader(name, value)
            if body or self.command in ("PUT", "POST", "PATCH"):
                target.putheader("Content-Length", str(len(body)))
            target.endheaders(body or None)
            answer = target.getresponse()
            self.send_response_only(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in _OF_ONE_CONNECTION:
                    self.send_header(name, value)
            bodyless = self.command == "HEAD" or answer.status in (204, 304)
            chunked = answer.length is None and not bodyless
            if chunked:
                self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            if cut and not bodyless:
                data = answer.read()
                self.wfile.write(data[: len(data) // 2])
                self._break_off()
                return
            while data := answer.read(1 << 16):
                self.wfile.write(b"%x\r\n%b\r\n" % (len(data), data) if chunked else data)
            if chunked:
                self.wfile.write(b"0\r\n\r\n")
        except ConnectionError:  # of the client or of the target
            self._break_off()
        finally:
            target.close()

    def _break_off(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)

    def log_message(self, format: str, *args: object) -> None:
        pass
