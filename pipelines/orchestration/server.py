"""The Prefect server: whether one answers, and one of the project's own where the user names none."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

from pipelines.runtime.console import log_line
from pipelines.runtime.processes import die_with, end_group, environment

_START_SECONDS = 60.0
_HEALTH_SECONDS = 2.0
"""A server that needs longer than this to say that it is well is not waited for."""

PREFECT_SETTINGS = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    # DVC is the only cache: a second one would skip writing what DVC has deleted.
    "PREFECT_TASKS_DISABLE_CACHING": "true",
    # A server that goes away must cost finished work seconds, not minutes of retries.
    "PREFECT_CLIENT_MAX_RETRIES": "1",
    "PREFECT_API_REQUEST_TIMEOUT": "10",
    # The terminal belongs to the stage; the server keeps the whole log.
    "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "CRITICAL",
    "PREFECT_LOGGING_TO_API_WHEN_MISSING_FLOW": "ignore",
}
"""Settings of every process that talks to Prefect. What the user has set goes first, but for a server of our own."""


def server_missing() -> str | None:
    """Return why no Prefect server can be used, or None if one answers."""
    url = os.environ.get("PREFECT_API_URL")
    return server_trouble(url) if url else "PREFECT_API_URL is not set"


def server_trouble(url: str) -> str | None:
    """Ask a server for its health. Return what is wrong, or None if it is well."""
    try:
        with urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_HEALTH_SECONDS) as answer:
            return None if answer.status == 200 else f"{url} answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException):
        return f"{url} does not answer"


@contextlib.contextmanager
def prefect_server(home: Path) -> Iterator[Callable[[], None]]:
    """Set PREFECT_API_URL to a server that is starting. What is yielded waits until it answers.

    A server that the user's PREFECT_API_URL names is used as it is. Otherwise one is started on the loopback
    interface, with its history in `home`, and stopped at the end. A run never fails for want of a server: one
    that does not come up costs a line, and PREFECT_API_URL is unset.
    """
    if os.environ.get("PREFECT_API_URL"):
        yield lambda: None
        return
    home.mkdir(exist_ok=True)
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    process = _start(home, port)

    def wait() -> None:
        importlib.import_module("prefect.flow_engine")  # takes as long as the server
        if not _comes_up(process, url):
            log_line(f"prefect: no server could be started (see {home / 'server.log'}); running plainly")
            del os.environ["PREFECT_API_URL"]

    try:
        with environment({**PREFECT_SETTINGS, "PREFECT_API_URL": url, "NO_PROXY": _without_proxy()}):
            yield wait
    finally:
        end_group(process)


def _start(home: Path, port: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--no-ui", "--no-services"]
    settings = {name: value for name, value in PREFECT_SETTINGS.items() if "LOGGING" not in name}
    parent = os.getpid()
    with (home / "server.log").open("wb") as output:
        return subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={**os.environ, **settings, "PREFECT_HOME": str(home.resolve())},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=lambda: die_with(parent),
        )


def _comes_up(process: subprocess.Popen[bytes], url: str) -> bool:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        if server_trouble(url) is None:
            return True
        time.sleep(0.1)
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _without_proxy() -> str:
    """Return NO_PROXY with the loopback interface in it: a proxy cannot reach this machine's own server."""
    return ",".join(filter(None, [os.environ.get("NO_PROXY", os.environ.get("no_proxy")), "127.0.0.1"]))
