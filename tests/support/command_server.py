"""The fork server of tests: `sdlora` and `dvc` with all that they load, this project's own modules too.

It is the fork server of stages, with more in it: the sources of this project do not change while tests run. It also
runs what is no stage, which finds the servers still, and plain `dvc`.
"""

from __future__ import annotations

import os
import pkgutil
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import pipelines
import sdlora
from pipelines.cli.preloaded import _LIBRARIES as STAGE_LIBRARIES
from pipelines.project.environment import STAGE_SOCKET
from pipelines.project.fingerprints import program_fingerprint
from pipelines.project.layout import CODE_STAGE, STAGES
from pipelines.runtime.fork_server import end_as, receive
from pipelines.versioning.dvc_server import _LIBRARIES as DVC_LIBRARIES
from tests.support.forked_python import PYTHON, run_python

_LATE = (
    "imagehash",
    "jinja2",
    "matplotlib.backends.backend_agg",
    "matplotlib.backends.backend_svg",
    "matplotlib.figure",
    "networkx",
    "pyarrow.compute",
    "scipy.fftpack",
    "tabulate",
)
"""What is loaded by functions alone."""
_PREFECT = ("pipelines.orchestration.worker_", "pipelines.sweeps.flow")
"""Modules of this project that load Prefect, which few commands need."""


def _serve(arguments: Sequence[str]) -> None:
    own = [
        module.name
        for package in (sdlora, pipelines)
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        if not module.name.startswith(_PREFECT) and not module.name.endswith("__main__")
    ]
    libraries = [name for name in (*STAGE_LIBRARIES, *DVC_LIBRARIES) if "prefect" not in name]
    request = receive(arguments, [*libraries, *own, *_LATE], prepare=_prepare)
    sys.executable = os.environ.get(PYTHON, sys.executable)
    _take_named_sources()
    program, *words = request["arguments"]
    if program == "python":
        end_as(lambda: run_python(words))
    if program == "dvc":
        from dvc.cli import main as dvc

        sys.argv = ["dvc", *words]
        end_as(lambda: dvc(words))
    if program in (CODE_STAGE, *STAGES):
        os.environ.pop(STAGE_SOCKET, None)
    sys.argv = ["sdlora", program, *words]
    from pipelines.cli.app import main

    end_as(main)


def _prepare() -> None:
    """Find out what each forked process would: which formats there are, and the fingerprints of the code."""
    Image.preinit()
    program_fingerprint()


def _take_named_sources() -> None:
    """Forget this project's modules where PYTHONPATH names other sources of it, as a new process would find them."""
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if any(folder and Path(folder, "pipelines").is_dir() for folder in named):
        sys.path[:0] = named
        for name in [*sys.modules]:
            if name.partition(".")[0] in ("pipelines", "sdlora"):
                del sys.modules[name]


if __name__ == "__main__":
    _serve(sys.argv[1:])
