"""The Prefect server: whether one answers, and one of the project's own where the user names none."""

from __future__ import annotations

import contextlib
import http.client
import importlib
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.project.environment import PREFECT_SECONDS
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.runtime.console import log_line
from pipelines.runtime.deadline import within
from pipelines.runtime.processes import die_with, end_group, environment

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_START_SECONDS = 60.0
_HEALTH_SECONDS = 2.0
"""A server that needs longer than this to say that it is well is not waited for."""
_PATIENCE_SECONDS = "30"

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
        with (
            within(_HEALTH_SECONDS),
            urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=_HEALTH_SECONDS) as answer,
        ):
            return None if answer.status == 200 else f"{url} answers {answer.status}"
    except urllib.error.HTTPError as error:
        return f"{url} answers {error.code}"
    except (OSError, ValueError, http.client.HTTPException):
        return f"{url} does not answer"


def patience() -> float:
    """Return how many seconds a server may take for what it is asked at one time.

    Raises:
        InputError: the environment variable holds no such number.
    """
    text = os.environ.get(PREFECT_SECONDS, "").strip() or _PATIENCE_SECONDS
    with contextlib.suppress(ValueError):
        seconds = float(text)
        if 0 < seconds < float("inf"):
            return seconds
    raise InputError(f"{PREFECT_SECONDS}: {text!r} is no number of seconds; set one above 0")


@contextlib.contextmanager
def prefect_client() -> Iterator[SyncPrefectClient]:
    """Talk to the server of PREFECT_API_URL, as long as it may take on the whole."""
    from prefect.client.orchestration import get_client

    with within(patience()), get_client(sync_client=True) as client:
        yield client


@contextlib.contextmanager
def refusals_in_one_line(what: str) -> Iterator[None]:
    """Make an `InputError` of what a server, or something that is none, answers to what cannot do without it."""
    import httpx
    from pydantic import ValidationError

    url = os.environ.get("PREFECT_API_URL")
    try:
        yield
    except httpx.HTTPStatusError as error:
        status = f"{error.response.status_code} {error.response.reason_phrase}".strip()
        todo = (
            "set PREFECT_API_AUTH_STRING to the server's PREFECT_SERVER_API_AUTH_STRING, and PREFECT_API_KEY to none"
            if error.response.status_code in (401, 403)
            else f"look at its log ({_shortened(error.response.text)})"
        )
        raise InputError(f"{what}: the Prefect server {url} answers {status}; {todo}") from None
    except (httpx.HTTPError, TimeoutError) as error:
        raise InputError(
            f"{what}: the Prefect server {url} failed ({_shortened(one_line(error))});"
            " run the same again when it is well"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, ValidationError):
        raise InputError(
            f"{what}: what answers at {url} is no Prefect server of a version that is known; correct PREFECT_API_URL"
        ) from None


def _shortened(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else f"{line[:97]}..."


@contextlib.contextmanager
def prefect_server(
    home: Path, *, port: int | None = None, pages: bool = False
) -> Iterator[Callable[[], None]]:
    """Set PREFECT_API_URL to a server that is starting. What is yielded waits until it answers.

    It is started on the loopback interface, with its history in `home`, and stopped at the end. One that does not
    come up costs a line, and PREFECT_API_URL is unset.

    Args:
        home: The folder of its database.
        port: Where it listens; a free port if not given.
        pages: Whether it has pages to look at.
    """
    home.mkdir(exist_ok=True)
    port = port or _free_port()
    url = f"http://127.0.0.1:{port}/api"
    process = _start(home, port, pages=pages)

    def wait() -> None:
        importlib.import_module("prefect.flow_engine")  # takes as long as the server
        if not _comes_up(process, url):
            log_line(f"prefect: no server could be started (see {home / 'server.log'})")
            del os.environ["PREFECT_API_URL"]

    try:
        with environment({**PREFECT_SETTINGS, "PREFECT_API_URL": url, "NO_PROXY": _without_proxy()}):
            yield wait
    finally:
        end_group(process)


def _start(home: Path, port: int, *, pages: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-P", "-m", "prefect", "server", "start", "--no-services"]
    command += ["--ui" if pages else "--no-ui"]
    settings = {name: value for name, value in PREFECT_SETTINGS.items() if "LOGGING" not in name}
    parent = os.getpid()
    with (home / "server.log").open("wb") as output:
        return subprocess.Popen(
            [*command, "--host", "127.0.0.1", "--port", str(port)],
            env={
                **os.environ,
                **settings,
                "PREFECT_HOME": str(home.resolve()),
                "PREFECT_SERVER_UI_API_URL": f"http://127.0.0.1:{port}/api",
            },
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
