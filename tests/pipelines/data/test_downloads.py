"""The downloader against a server on this machine that does all that servers do."""

from __future__ import annotations

import contextvars
import hashlib
import http.server
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.data import downloads
from pipelines.data.downloads import Remote, file_digest, obtain
from pipelines.project.errors import InputError
from pipelines.runtime.progress import show_progress
from pipelines.runtime.progress_bar import ProgressBar
from tests.support.bad_server import bad_server
from tests.support.repository import REPOSITORY

CONTENT = bytes(range(256)) * 2000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Answers with `content`; how, is told by the flags and by the answers to come before a good one."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.content = CONTENT
        self.ranges = True
        self.before: list[tuple[int, dict[str, str]]] = []
        """answers, status and headers, that come first"""
        self.cuts: list[int] = []
        """after so many bytes of a body the connection ends"""
        self.pace = 0.0
        """seconds to wait after each piece"""
        self.piece = 10_000
        self.announce = True
        """whether an answer has its length in its head"""
        self.asked: list[str | None] = []
        """the Range of each request"""

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ANN401 - the base class's own
        """A client that went away is what some tests do; anything else is printed as usual."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)

    def url(self, path: str = "file.bin") -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{path}"


class Handler(http.server.BaseHTTPRequestHandler):
    """One request; `/missing` is not there, `/moved` is elsewhere."""

    server: Server

    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.headers.get("Range"))
        if self.path == "/missing":
            return self.send_error(404)
        if self.path == "/moved":
            return self.reply(302, {"Location": "/file.bin"})
        if server.before:
            return self.reply(*server.before.pop(0))
        start = 0
        wanted = self.headers.get("Range")
        if server.ranges and wanted:
            start = int(wanted.removeprefix("bytes=").removesuffix("-"))
            if start >= len(server.content):
                return self.reply(416, {"Content-Range": f"bytes */{len(server.content)}"})
        body = server.content[start:]
        headers = {"Content-Length": str(len(body))} if server.announce else {}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(server.content) - 1}/{len(server.content)}"
        self.head(206 if start else 200, headers)
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        for position in range(0, len(body), server.piece):
            self.wfile.write(body[position : position + server.piece])
            time.sleep(server.pace)
        self.close_connection = True

    def reply(self, status: int, headers: dict[str, str]) -> None:
        self.head(status, {"Content-Length": "0", **headers})

    def head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Be silent."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.01)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(*urls: str, size: int | None = len(CONTENT), digest: str | None = f"sha256:{SHA256}") -> Remote:
    return Remote(name="file.bin", urls=urls, size=size, digest=digest)


def test_a_file_is_downloaded_once(server: Server, tmp_path: Path) -> None:
    path = obtain(remote(server.url()), tmp_path / "set")

    assert path.read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "set").iterdir()] == ["file.bin"]
    assert obtain(remote(server.url()), tmp_path / "set") == path
    assert server.asked == [None]


def test_a_cut_off_download_goes_on_where_it_was(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT[:100_000])

    assert obtain(remote(server.url()), tmp_path).read_bytes() == CONTENT
    assert server.asked == ["bytes=100000-"]


def test_a_server_that_breaks_off_again_and_again_is_asked_for_the_rest(
    server: Server, tmp_path: Path
) -> None:
    server.cuts = [50_000] * 9  # more often than it may fail without a new byte

    assert obtain(remote(server.url()), tmp_path).read_bytes() == CONTENT
    assert server.asked[:3] == [None, "bytes=50000-", "bytes=100000-"]


def test_a_server_without_ranges_is_read_from_the_beginning(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    (tmp_path / "file.bin.part").write_bytes(b"another file's first half")

    assert obtain(remote(server.url()), tmp_path).read_bytes() == CONTENT


def test_a_server_that_breaks_off_at_the_same_byte_is_given_up(server: Server, tmp_path: Path) -> None:
    server.ranges = False
    server.cuts = [50_000] * 99

    with pytest.raises(
        InputError, match=r"file.bin: not downloaded .*run the same again to go on at byte 50,000"
    ):
        obtain(remote(server.url()), tmp_path)
    assert len(server.asked) == downloads.TRIES
    assert (tmp_path / "file.bin.part").read_bytes() == CONTENT[:50_000]


def test_halves_of_a_file_without_a_hash_are_not_put_together(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"x" * 100)
    server.cuts = [50_000]

    assert obtain(remote(server.url(), size=None, digest=None), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, None]


def test_a_download_of_unknown_size_that_was_whole_already_is_only_verified(
    server: Server, tmp_path: Path
) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT)

    assert obtain(remote(server.url(), size=None), tmp_path).read_bytes() == CONTENT
    assert server.asked == [f"bytes={len(CONTENT)}-"]


def test_a_part_that_is_longer_than_the_file_is_begun_anew(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(CONTENT + b"more")

    assert obtain(remote(server.url()), tmp_path).read_bytes() == CONTENT


def test_a_wrong_hash_says_what_was_expected_and_found_and_keeps_nothing(
    server: Server, tmp_path: Path
) -> None:
    server.content = CONTENT[:-1] + b"!"
    found = hashlib.sha256(server.content).hexdigest()

    with pytest.raises(
        InputError, match=f"found sha256 {found}, expected {SHA256}; what came was thrown away"
    ):
        obtain(remote(server.url()), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_first_half_is_found_out_by_the_hash(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.bin.part").write_bytes(b"?" + CONTENT[1:100])

    with pytest.raises(InputError, match="thrown away"):
        obtain(remote(server.url()), tmp_path)
    assert obtain(remote(server.url()), tmp_path).read_bytes() == CONTENT


def test_more_bytes_than_expected_are_not_taken(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="sends more than the expected 100 bytes"):
        obtain(remote(server.url(), size=100), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_file_is_not_asked_for_twice_and_the_mirror_is_tried(
    server: Server, tmp_path: Path
) -> None:
    assert obtain(remote(server.url("missing"), server.url()), tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 2


def test_an_address_that_has_nothing_is_one_line_with_a_way_out(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    with pytest.raises(InputError) as found:
        obtain(remote(server.url("missing")), folder)
    assert str(found.value) == (
        f"file.bin: not downloaded ({server.url('missing')}: the server answers 404 Not Found);"
        f" run the same again, or put the file into {folder}"
    )
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_server_that_is_busy_is_asked_again(
    server: Server, tmp_path: Path, status: int, capsys: pytest.CaptureFixture[str]
) -> None:
    server.before = [(status, {}), (status, {"Retry-After": "0"})]

    assert obtain(remote(server.url()), tmp_path).read_bytes() == CONTENT
    assert len(server.asked) == 3
    assert f"download file.bin: the server answers {status} " in capsys.readouterr().err


def test_a_server_that_is_not_there_is_given_up(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"not downloaded \(http://127\.0\.0\.1:1/x: .*refused"):
        obtain(remote("http://127.0.0.1:1/x"), tmp_path)


def test_redirects_are_followed(server: Server, tmp_path: Path) -> None:
    assert obtain(remote(server.url("moved")), tmp_path).read_bytes() == CONTENT


def test_the_usual_proxy_variables_are_obeyed(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", server.url().removesuffix("/file.bin"))
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)

    assert obtain(remote("http://nowhere.invalid/file.bin"), tmp_path).read_bytes() == CONTENT


def test_a_file_that_was_put_there_is_used_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(CONTENT)

    assert obtain(remote("http://127.0.0.1:1/x"), tmp_path) == tmp_path / "file.bin"


def test_another_file_that_was_put_there_is_refused_and_left(tmp_path: Path) -> None:
    (tmp_path / "file.bin").write_bytes(b"mine")

    with pytest.raises(InputError, match=r"file\.bin: found 4 bytes, expected 512,000; delete it, and run"):
        obtain(remote("http://127.0.0.1:1/x"), tmp_path)
    assert (tmp_path / "file.bin").read_bytes() == b"mine"


def test_a_killed_download_goes_on_and_gives_the_same_bytes(server: Server, tmp_path: Path) -> None:
    server.pace = 0.01
    program = f"""
from pathlib import Path
from typing import Any
from pipelines.data.downloads import Remote, obtain
remote = Remote(name="file.bin", urls=({server.url()!r},), size={len(CONTENT)}, digest="sha256:{SHA256}")
obtain(remote, Path({str(tmp_path)!r}))
"""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen([sys.executable, "-c", program], env=environment, stderr=subprocess.DEVNULL)
    part = tmp_path / "file.bin.part"
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (part.is_file() and part.stat().st_size > 100_000):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = part.stat().st_size
    assert 100_000 < kept < len(CONTENT)

    server.pace = 0
    assert obtain(remote(server.url()), tmp_path).read_bytes() == CONTENT
    assert server.asked == [None, f"bytes={kept}-"]


def test_two_downloads_of_one_file_do_not_mix(server: Server, tmp_path: Path) -> None:
    with (
        downloads.only_download(tmp_path / "file.bin.part"),
        pytest.raises(InputError, match=r"file\.bin\.part: another process is downloading it"),
    ):
        obtain(remote(server.url()), tmp_path)


def test_progress_is_shown_in_lines_where_there_is_no_terminal(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> None:
        show_progress(ProgressBar)
        obtain(remote(server.url()), tmp_path)

    contextvars.copy_context().run(work)
    assert capsys.readouterr().err.startswith("download file.bin: 512/512 kB in ")


def test_the_id_that_git_gives_a_file_is_a_hash_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"hello\n")

    assert file_digest(tmp_path / "a", "git-blob") == "ce013625030ba8dba906f756967f9e9ca394464a"
    assert file_digest(tmp_path / "a", "md5") == hashlib.md5(b"hello\n").hexdigest()


def test_a_redirect_into_this_machine_or_network_is_refused_once(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy stands for the internet: what it is asked for is a public address."""
    monkeypatch.setenv("http_proxy", server.url().removesuffix("/file.bin"))
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for host in (
        "127.0.0.1",
        "localhost",
        "[::1]",
        "10.0.0.7",
        "169.254.169.254",
        "2130706433",
        "[::ffff:7f00:1]",
    ):
        server.asked.clear()
        server.before = [(302, {"Location": f"http://{host}:1/secret"})]
        with pytest.raises(InputError, match=r"redirects to .*, which is no public address"):
            obtain(remote("http://nowhere.invalid/file.bin"), tmp_path)
        assert len(server.asked) == 1
    server.before = [(302, {"Location": "http://elsewhere.invalid/file.bin"})]
    assert obtain(remote("http://nowhere.invalid/file.bin"), tmp_path).read_bytes() == CONTENT


def test_redirects_without_end_are_given_up(server: Server, tmp_path: Path) -> None:
    server.before = [(302, {"Location": "/file.bin"})] * 99
    with pytest.raises(InputError, match="redirects without end"):
        obtain(remote(server.url()), tmp_path)


def test_a_server_that_sends_a_byte_now_and_then_is_given_up_and_what_came_is_kept(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(downloads, "SLOW_SECONDS", 0.2)
    server.content, server.pace, server.piece = CONTENT, 0.05, 10
    with pytest.raises(InputError, match=r"sends less than 1,000 bytes a second\); .* to go on at byte \d+"):
        obtain(remote(server.url()), tmp_path)
    assert len(server.asked) == 1
    assert (tmp_path / "file.bin.part").stat().st_size > 10


def test_an_answer_that_does_not_begin_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "HEAD_SECONDS", 0.5)
    with (
        bad_server("slow") as url,
        pytest.raises(InputError, match=r"did not begin to answer within 0\.5 s"),
    ):
        obtain(remote(f"{url}/file.bin"), tmp_path)


@pytest.mark.parametrize("wait", ["\u00b2", "-1", "1e9", "9" * 5000, "Fri, 31 Dec 1999 23:59:59 GMT"])
def test_a_time_to_wait_that_is_no_number_is_ignored(server: Server, tmp_path: Path, wait: str) -> None:
    server.before = [(503, {"Retry-After": wait})]
    assert obtain(remote(server.url()), tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize("announced", [True, False])
def test_a_file_of_unknown_size_has_a_bound(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, announced: bool
) -> None:
    monkeypatch.setattr(downloads, "LARGEST", 1000)
    server.announce = announced
    said = (
        "announces 512,000 bytes, more than the 1,000"
        if announced
        else "sends more than the allowed 1,000 bytes"
    )
    with pytest.raises(InputError, match=said):
        obtain(remote(server.url(), size=None), tmp_path)
    assert list(tmp_path.iterdir()) == []
