"""The fork server of DVC: it has loaded DVC, remembers dvc.lock, and forks for each command.

A forked command is `dvc …` as it would be in a process of its own: it leads a session, takes and releases DVC's locks,
reads dvc.yaml and params.yaml as they are then, and may be killed without harm to the next.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from pipelines.project.environment import DVC_SOCKET
from pipelines.project.layout import DVC, LOCK
from pipelines.runtime.fork_server import end_as, fork_server, receive
from pipelines.versioning.patches import apply_patches, plain_dvc

_LIBRARIES = (
    "configobj",
    "diskcache",
    "dpath",
    "dulwich.worktree",
    "dvc._debug",
    "dvc.cachemgr",
    "dvc.cli.parser",
    "dvc.data_cloud",
    "dvc.lock",
    "dvc.parsing.interpolate",
    "dvc.repo.artifacts",
    "dvc.repo.datasets",
    "dvc.repo.metrics",
    "dvc.repo.open_repo",
    "dvc.repo.params",
    "dvc.repo.plots",
    "dvc.repo.reproduce",
    "dvc.repo.stage",
    "dvc.stage.cache",
    "dvc.stage.loader",
    "dvc.stage.run",
    "dvc.utils.strictyaml",
    "dvc_data.hashfile.checkout",
    "dvc_data.hashfile.db.local",
    "dvc_data.hashfile.transfer",
    "dvc_data.index",
    "dvc_http",
    "dvc_render",
    "flatten_dict",
    "fsspec.implementations.memory",
    "pipelines.versioning.patches.__main__",
    "platformdirs",
    "psutil",
    "pyparsing",
    "scmrepo.git",
)
_S3_LIBRARIES = ("aiobotocore.session", "dvc_s3", "s3fs")
"""What each command that speaks to a remote on S3 would load."""


def dvc_server() -> AbstractContextManager[None]:
    """Keep a fork server for DVC's commands, or nothing where DVC is to be plain."""
    return (
        contextlib.nullcontext()
        if plain_dvc()
        else fork_server("pipelines.versioning.dvc_server", DVC_SOCKET)
    )


def _serve(arguments: Sequence[str]) -> None:
    request = receive(arguments, [*_LIBRARIES, *(_S3_LIBRARIES if _names_s3() else ())], prepare=_remember)
    os.setsid()
    os.environ.pop(DVC_SOCKET, None)
    from pipelines.versioning.patches.__main__ import main

    sys.argv = ["dvc", *request["arguments"]]
    words = [word for word in sys.argv if not word.startswith("-")]
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(" ".join(words[:2]))  # what `ps` and `top` call it
    end_as(lambda: main(request["arguments"]))


def _names_s3() -> bool:
    """Return whether DVC's settings of the project name anything on S3."""
    files = (DVC / name for name in ("config", "config.local"))
    return any(b"s3://" in path.read_bytes() for path in files if path.is_file())


def _remember() -> None:
    """Read what is new in dvc.lock, so that what is forked need not."""
    if "lockfile" in apply_patches():
        from pipelines.versioning.patches.lockfile import read_entries

        read_entries(LOCK)


if __name__ == "__main__":
    _serve(sys.argv[1:])
