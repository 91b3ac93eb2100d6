"""What slow tests share: one finished chain."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipelines.warm import warm_process
from tests.pipelines.test_steps import paint, settings

REPOSITORY = Path(__file__).resolve().parents[2]


def environment() -> dict[str, str]:
    """A server is named that does not answer, so everything runs plainly and fast."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "PREFECT_API_URL": "http://127.0.0.1:1/api"}


def call(folder: Path, *command: str) -> str:
    """Run a command of the environment; return what it printed."""
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def load_no_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the warm process of a run in this process load nothing: stages that are shell scripts need no torch."""
    monkeypatch.setattr("pipelines.run.warm_process", partial(warm_process, libraries=()))


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
