"""What slow tests share: one finished chain."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipelines.runtime.fork_server import fork_server
from tests.support.commands import call
from tests.support.parameters import settings
from tests.support.pictures import paint
from tests.support.repository import REPOSITORY


def load_no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the fork server of a run in this process preload nothing: stages that are shell scripts need no torch."""
    monkeypatch.setattr("pipelines.orchestration.run.fork_server", partial(fork_server, arguments=["json"]))


@pytest.fixture(scope="session")
def finished(made_once: Callable[[str, Callable[[Path], object]], Path]) -> tuple[Path, str]:
    """A project of two tasks of two classes that `sdlora run` has brought up to date, and what it printed."""
    made = made_once("chain", finish_chain)
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
