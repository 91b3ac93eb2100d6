"""The Hugging Face hub as far as a data set is read from it: a server on the loopback interface."""

from __future__ import annotations

import contextlib
import json
import threading
import urllib.parse
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def _answer(self) -> None:
        place = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        files = self.server.files
        if place.startswith("/api/datasets/own/birds/revision/"):
            self._reply(json.dumps({"id": "own/birds", "sha": COMMIT, "tags": [], "siblings": []}).encode())
        elif place.startswith(f"/api/datasets/own/birds/tree/{COMMIT}"):
            folders = sorted({name.split("/")[0] for name in files if "/" in name})
            found = [{"type": "directory", "path": name, "oid": "0" * 40} for name in folders]
            found += [
                {"type": "file", "path": name, "size": len(data), "oid": "0" * 40}
                for name, data in files.items()
            ]
            self._reply(json.dumps(found).encode())
        else:
            name = place.removeprefix(f"/datasets/own/birds/resolve/{COMMIT}/").lstrip("/")
            self._reply(files.get(name))

    do_GET = do_HEAD = do_POST = _answer

    def _reply(self, data: bytes | None) -> None:
        status = 404 if data is None else 200
        data = data or b""
        if data and (asked := self.headers.get("Range")):
            first, last = asked.removeprefix("bytes=").split("-")
            whole, data, status = len(data), data[int(first) : int(last or len(data)) + 1], 206
        self.send_response(status)
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{whole}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


class _Server(ThreadingHTTPServer):
    files: dict[str, bytes]


@contextlib.contextmanager
def hub(files: Mapping[str, bytes]) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Serve the files of a data set own/birds. Yield the address, which has them at its top too, and the files."""
    with _Server(("127.0.0.1", 0), _Handler) as server:
        server.files = dict(files)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", server.files
        server.shutdown()
