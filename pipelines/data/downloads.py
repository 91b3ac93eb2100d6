"""Downloads that can be cut off anywhere: resumed where they were, verified against a recorded hash."""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from pipelines.project.errors import InputError, RefusedError, TransientError
from pipelines.project.files import naming, write_whole
from pipelines.runtime.console import log_line
from pipelines.runtime.deadline import within
from pipelines.runtime.file_lock import held
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    import httpx


TRIES = 6
"""So many times in a row a server may fail without a single new byte."""

FIRST_PAUSE = 1.0
"""Seconds before the second try; doubled for each further one."""

_LONGEST_PAUSE = 60.0
"""Seconds; also the most that a server's Retry-After is obeyed."""

_TIMEOUT = 60.0
"""Seconds without a byte after which a server is given up for this try."""

HEAD_SECONDS = 120.0
"""Seconds that an answer may take to begin. It is the bound on a server that sends a byte now and then."""

SLOW_SECONDS = 60.0
_SLOWEST = 1000
"""A server that sends fewer bytes a second, for so many seconds, is given up."""

LARGEST = 16 << 30
"""Bytes; the most that is taken where no size is recorded."""

_REDIRECTS = 20

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Installed:
    """Where a package of the distribution puts a gzip file, which differs from the published one in its header."""

    path: Path
    header: bytes
    """the published one, in place of the first ten bytes: distributions leave name and time out"""


@dataclass(frozen=True, kw_only=True)
class Remote:
    """A file on the web: every address in `urls` has the same bytes."""

    name: str
    urls: tuple[str, ...]
    size: int | None
    """bytes, where recorded"""
    digest: str | None
    """`sha256:`, `md5:` or `git-blob:` (the id that git gives a file) and hexadecimal digits, where recorded"""
    installed: Installed | None = None
    """where the same file may be on this machine already; only with a sha256"""


def obtain(remote: Remote, folder: Path) -> Path:
    """Return the verified file in `folder`, downloaded if it is neither there nor installed on this machine.

    What a download that was cut off left in NAME.part is continued where a hash will tell whether the halves
    fit. A download with another hash than the recorded one is thrown away; a file that was put there is left.
    """
    path = folder / remote.name
    if path.is_file():
        if fault := _mismatch(path, remote):
            raise InputError(f"{path}: {fault}; delete it, and run the same again to download it")
        return path
    folder.mkdir(parents=True, exist_ok=True)
    if (data := _installed(remote)) is not None:
        write_whole(path, data)
        return path
    part = folder / f"{remote.name}.part"
    faults = []
    with only_download(part) as file:
        for url in remote.urls:
            try:
                _fetch(url, remote, file)
            except RefusedError as refusal:
                faults.append(f"{url}: {refusal}")
                continue
            file.flush()
            os.fsync(file.fileno())
            if fault := _mismatch(part, remote):
                file.truncate(0)
                faults.append(f"{url}: {fault}; what came was thrown away")
                continue
            part.rename(path)
            return path
        kept = _length(file)
        if not kept:
            part.unlink()
    raise InputError(
        f"{remote.name}: not downloaded ({'; '.join(faults)}); run the same again"
        f"{f' to go on at byte {kept:,}' if kept else ''}, or put the file into {folder}"
    )


def _installed(remote: Remote) -> bytes | None:
    """Return the bytes of a file that a package of the distribution has put on this machine. None if there is none."""
    if remote.installed is None or not remote.installed.path.is_file():
        return None
    data = remote.installed.header + remote.installed.path.read_bytes()[10:]
    if f"sha256:{hashlib.sha256(data).hexdigest()}" != remote.digest:
        log_line(f"{remote.installed.path}: not the published file, so that is downloaded")
        return None
    log_line(f"{remote.name}: taken from {remote.installed.path}")
    return data


def _mismatch(path: Path, remote: Remote) -> str | None:
    """Return what is wrong with a file that should be `remote`, or nothing."""
    size = path.stat().st_size
    if remote.size is not None and size != remote.size:
        return f"found {size:,} bytes, expected {remote.size:,}"
    if remote.digest is None:
        return None
    kind, _, expected = remote.digest.partition(":")
    found = file_digest(path, kind)
    return None if found == expected else f"found {kind} {found}, expected {expected}"


def file_digest(path: Path, kind: str) -> str:
    """Return the hash of a file's bytes in hexadecimal: sha256, md5, or the id that git gives a file (git-blob)."""
    if kind == "git-blob":
        digest = hashlib.sha1(f"blob {path.stat().st_size}\0".encode(), usedforsecurity=False)
    else:
        digest = hashlib.new(kind, usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@contextmanager
def only_download(part: Path) -> Iterator[IO[bytes]]:
    """Open the file of a download under way for this process alone."""
    with held(part, busy=f"{part}: another process is downloading it; wait for it or stop it") as file:
        yield file


def _fetch(url: str, remote: Remote, file: IO[bytes]) -> None:
    """Bring the whole of `url` into `file`, from where the file ends, with patience for a failing server."""
    if remote.size is not None and _length(file) > remote.size:
        file.truncate(0)
    failures, most = 0, _length(file)
    while remote.size is None or _length(file) != remote.size:
        if remote.digest is None:  # nothing could tell whether two halves are of one file
            file.truncate(0)
        try:
            return _request(url, remote, file)
        except TransientError as trouble:
            failures = 1 if _length(file) > most else failures + 1
            most = max(most, _length(file))
            if failures == TRIES:
                raise RefusedError(str(trouble)) from None
            pause = trouble.pause if trouble.pause is not None else FIRST_PAUSE * 2 ** (failures - 1)
            pause = min(pause, _LONGEST_PAUSE)
            log_line(f"download {remote.name}: {trouble}; trying again in {pause:.0f} s")
            time.sleep(pause)


def _request(url: str, remote: Remote, file: IO[bytes]) -> None:
    """Ask once, for what is missing. Return when the server has sent all that it announced."""
    import httpx

    start = _length(file)
    headers = {"Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        with (
            httpx.Client(timeout=_TIMEOUT) as client,
            closing(_ask(client, url, headers)) as answer,
        ):
            if not _has_body(answer, file, start):
                return
            start = _length(file)
            announced = _number(answer.headers.get("Content-Length"))
            total = remote.size or (0 if announced is None else start + announced)
            _copy(answer, file, title=f"download {remote.name}", total=total, size=remote.size)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        raise RefusedError(str(error)) from None
    except TimeoutError:
        raise RefusedError(f"did not begin to answer within {HEAD_SECONDS:g} s") from None
    except httpx.TransportError as error:
        raise TransientError(" ".join(str(error).split()) or type(error).__name__) from None
    if remote.size is not None and _length(file) < remote.size:
        raise TransientError(f"the server stopped at byte {_length(file):,} of {remote.size:,}")


def _ask(client: httpx.Client, url: str, headers: Mapping[str, str]) -> httpx.Response:
    """Ask for a file, wherever it has moved to, and return the answer without its body.

    A server may not send us to an address of this machine, or of the network that it is in.
    """
    request = client.build_request("GET", url, headers=dict(headers))
    for _ in range(_REDIRECTS):
        with within(HEAD_SECONDS):
            answer = client.send(request, stream=True)
        if answer.next_request is None:
            return answer
        answer.close()
        host, asked = answer.next_request.url.host, request.url.host
        if host != asked and not _is_public(host):
            raise RefusedError(f"redirects to {host}, which is no public address")
        request = answer.next_request
    raise RefusedError("redirects without end")


def _is_public(host: str) -> bool:
    """Return whether all addresses of a host are of the internet. One that only a proxy knows is taken for such."""
    try:
        found = {info[4][0] for info in socket.getaddrinfo(host, None)}
    except (OSError, UnicodeError):
        return True
    addresses = [ipaddress.ip_address(str(text).partition("%")[0]) for text in found]
    return all((getattr(address, "ipv4_mapped", None) or address).is_global for address in addresses)


def _number(text: str | None) -> int | None:
    """Return the number in a header, None where it is not one in decimal digits."""
    return int(text) if text and re.fullmatch(r"[0-9]{1,15}", text) else None


def _has_body(answer: httpx.Response, file: IO[bytes], start: int) -> bool:
    """Make the file ready for the body of an answer. False if nothing is missing. An error if there is none."""
    status = answer.status_code
    if status == 206:
        if not answer.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
            file.truncate(0)
            raise TransientError("the server sent another part than was asked for")
    elif status == 200:
        file.truncate(0)  # it knows no ranges: from the beginning
    elif status == 416 and answer.headers.get("Content-Range") == f"bytes */{start}":
        return False
    elif status == 416 and start:
        file.truncate(0)
        raise TransientError("the server has fewer bytes than are here")
    elif status in (408, 425, 429) or status >= 500:
        raise TransientError(
            f"the server answers {status} {answer.reason_phrase}", _number(answer.headers.get("Retry-After"))
        )
    else:
        raise RefusedError(f"the server answers {status} {answer.reason_phrase}")
    return True


def _copy(answer: httpx.Response, file: IO[bytes], *, title: str, total: int, size: int | None) -> None:
    """Append the body of an answer, as it comes, to the file."""
    done = _length(file)
    most = LARGEST if size is None else size
    if size is None and total > most:
        raise RefusedError(f"announces {total:,} bytes, more than the {most:,} that are taken")
    before, since = done, time.monotonic()
    unit, divisor = ("MB", 1_000_000) if total >= 10_000_000 else ("kB", 1_000)
    with progress(title, total=-(-total // divisor), unit=unit) as bar:
        bar.update(done // divisor)
        for chunk in answer.iter_raw():
            done += len(chunk)
            if done > most:
                file.truncate(0)
                raise RefusedError(
                    f"sends more than the {'allowed' if size is None else 'expected'} {most:,} bytes"
                )
            with naming(Path(file.name)):
                file.write(chunk)
                file.flush()
            bar.update(-(-done // divisor))
            seconds = time.monotonic() - since
            if seconds > SLOW_SECONDS:
                if done - before < _SLOWEST * seconds:
                    raise RefusedError(f"sends less than {_SLOWEST:,} bytes a second")
                before, since = done, time.monotonic()


def _length(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size
