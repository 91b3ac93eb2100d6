"""What slow tests share: one finished chain."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pipelines.project.environment import DVC_SOCKET, STAGE_SOCKET
from pipelines.runtime.processes import environment
from tests.support.commands import COMMAND_ENTRY, DVC_ENTRY, call
from tests.support.forked_python import COMMAND_SOCKET, PYTHON
from tests.support.parameters import settings
from tests.support.pictures import paint
from tests.support.repository import REPOSITORY


@pytest.fixture(scope="session")
def servers(kept_server: Callable[[str], str], forked_python: str) -> dict[str, str]:
    """The fork servers of a run, kept while tests run. Return the variables that name them."""
    commands = kept_server(COMMAND_ENTRY)
    return {
        STAGE_SOCKET: commands,
        COMMAND_SOCKET: commands,
        DVC_SOCKET: kept_server(DVC_ENTRY),
        PYTHON: forked_python,
    }


@pytest.fixture(scope="module")
def preloaded(servers: dict[str, str]) -> Iterator[None]:
    """Have all that a module runs use the servers of the session: no command loads its libraries by itself."""
    with environment(servers):
        yield


@pytest.fixture(scope="session")
def finished(
    made_once: Callable[[str, Callable[[Path], object]], Path], servers: dict[str, str]
) -> tuple[Path, str]:
    """A project of two tasks of two classes that `sdlora run` has brought up to date, and what it printed."""
    with environment(servers):
        made = made_once("chain", finish_chain)
    return made / "project", (made / "printed.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def grown(
    finished: tuple[Path, str],
    made_once: Callable[[str, Callable[[Path], object]], Path],
    servers: dict[str, str],
) -> tuple[Path, str]:
    """A copy of it to which a third task was added, and what the run printed that learned that task."""

    def grow(root: Path) -> None:
        folder = shutil.copytree(finished[0], root / "project")
        call(folder, "sdlora", "add-task", "more")
        (root / "printed.txt").write_text(call(folder, "sdlora", "run"), encoding="utf-8")

    with environment(servers):
        made = made_once("grown", grow)
    return made / "project", (made / "printed.txt").read_text(encoding="utf-8")


def finish_chain(root: Path) -> None:
    folder = root / "project"
    skip = shutil.ignore_patterns("__pycache__")
    for name in ("pipelines", "sdlora", ".dvc/config", ".dvc/plots", ".dvcignore", ".gitignore", "dvc.yaml"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=skip)
        else:
            shutil.copy(source, folder / name)
    for index, name in enumerate("abcdef"):
        source = "pictures" if name < "e" else "more"
        paint(folder / source / "train" / name, index, 6)
        paint(folder / source / "test" / name, 10 + index, 2)
    text = settings(epochs="12")
    text = re.sub(r"^fetch:\n(  .*\n)+", "fetch: {}\n", text, flags=re.MULTILINE)
    (folder / "params.yaml").write_text(text, encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    (root / "printed.txt").write_text(call(folder, "sdlora", "run"), encoding="utf-8")
