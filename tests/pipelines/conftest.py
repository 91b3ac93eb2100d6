"""What slow tests share: one finished chain."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

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


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A project of two tasks of two classes that `sdlora run` has brought up to date, and what it printed."""
    folder = tmp_path_factory.mktemp("chain") / "project"
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
    return folder, call(folder, "sdlora", "run")
