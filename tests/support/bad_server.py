"""A Prefect server that stands behind something bad: slow, refusing, or no Prefect at all."""

from __future__ import annotations

import contextlib
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class _Handler(BaseHTTPRequestHandler):
    """Say that all is well, then do what the server is told to do; pass on what comes before that."""

    server: _Server

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        server = self.server
        if server.real and not (server.begins and server.begins.exists()):
            return self._pass_on(body)
        if self.path.endswith("/health") and server.healthy:
            return self._reply(200, b"true")
        if server.how == "slow":
            with contextlib.suppress(OSError):
                for byte in b"HTTP/1.1 200 OK\r\n" + b"X-Filler: 1\r\n" * 1000:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.2)
        elif server.how == "busy":
            self._reply(429, b"", {"Retry-After": "3600"})
        elif server.how == "strange":
            self._reply(200, b"<html>hello</html>")
        else:
            self._reply(int(server.how), b'{"exception_message":"Unauthorized"}')
        self.close_connection = True

    do_GET = do_POST = do_PATCH = do_PUT = do_DELETE = _answer

    def _pass_on(self, body: bytes) -> None:
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("host", "accept-encoding")
        }
        request = urllib.request.Request(
            f"{self.server.real}{self.path.removeprefix('/api')}", body or None, headers, method=self.command
        )
        try:
            with urllib.request.urlopen(request, timeout=20) as answer:
                self._reply(answer.status, answer.read(), {"Content-Type": "application/json"})
        except urllib.error.HTTPError as error:
            self._reply(error.code, error.read(), {"Content-Type": "application/json"})

    def _reply(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Be silent."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, how: str, healthy: bool, real: str | None, begins: Path | None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.how, self.healthy, self.real, self.begins = how, healthy, real, begins


@contextlib.contextmanager
def bad_server(
    how: str, *, healthy: bool = True, real: str | None = None, begins: Path | None = None
) -> Iterator[str]:
    """Yield the URL of an API that is `slow`, `busy`, `strange`, or answers a status.

    With `real` it passes all on to that API until the file `begins` is there.
    """
    with _Server(how, healthy, real, begins) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}/api"
        finally:
            server.shutdown()
            thread.join()
