"""The program as it is installed: a wheel in an environment of its own, and projects elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from tests.support.pictures import paint
from tests.support.repository import REPOSITORY

pytestmark = pytest.mark.slow

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel; what it depends on is that of the environment of the tests."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=REPOSITORY,
        check=True,
        capture_output=True,
    )
    (wheel,) = folder.glob("*.whl")
    environment = folder / "env"
    venv.create(environment, with_pip=False)
    packages = next((environment / "lib").glob("python3*/site-packages"))
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin/python")]
    subprocess.run([*pip, "install", "-q", "--no-deps", "--no-index", str(wheel)], check=True)
    return environment


@pytest.fixture(scope="module")
def call(installed: Path) -> Call:
    """Run a command of that environment in a folder."""

    def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
        others = Path(sys.executable).parent  # dvc
        path = os.pathsep.join([str(installed / "bin"), str(others), os.environ["PATH"]])
        settings = {**os.environ, "PATH": path, "PREFECT_API_URL": "http://127.0.0.1:1/api"}
        settings.pop("PYTHONPATH", None)
        return subprocess.run(command, cwd=folder, env=settings, capture_output=True, text=True, timeout=500)

    return run


@pytest.fixture(scope="module")
def projects(call: Call, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two projects that share the program; both have learned one task, made by `sdlora` commands alone."""
    found = []
    for name in ("birds", "fish"):
        folder = tmp_path_factory.mktemp("projects") / name
        done = call(folder.parent, "sdlora", "init", name)
        assert done.returncode == 0, done.stderr
        params = (folder / "params.yaml").read_text()
        (folder / "params.yaml").write_text(params.replace("epochs: 8 ", "epochs: 1 "))
        for index in range(2):
            paint(folder / f"data/raw/{name}/class{index}", index, 8)
        for command in (["add-task", f"data/raw/{name}"], ["run"]):
            done = call(folder, "sdlora", *command)
            assert done.returncode == 0, done.stderr
        found.append(folder)
    return found


def test_an_installed_program_names_its_version_and_its_code(call: Call, tmp_path: Path) -> None:
    from importlib.metadata import version

    from pipelines.project.fingerprints import program_fingerprint

    done = call(tmp_path, "sdlora", "--version")
    assert done.stdout == f"sdlora {version('sdlora')}, code {program_fingerprint()[:12]}\n"


def test_a_project_elsewhere_has_nothing_of_the_program_and_is_learned(
    projects: list[Path], call: Call
) -> None:
    folder = projects[0]
    assert not {"sdlora", "pipelines"} & {path.name for path in folder.iterdir()}
    assert (folder / "artifacts/report/report.html").is_file()
    done = call(folder, "sdlora", "run")
    assert done.stdout.startswith("all up to date: 9 stages, 1 task\n"), done.stdout
    assert call(folder, "sdlora", "audit", "verify").returncode == 0


def test_dvc_repro_looks_at_the_installed_program_and_runs_nothing_else(
    projects: list[Path], call: Call
) -> None:
    lock = YAML(typ="safe").load(projects[0] / "dvc.lock")
    done = call(projects[0], "dvc", "repro")
    assert done.returncode == 0, done.stderr
    ran = [line for line in done.stdout.splitlines() if line.startswith("Running stage")]
    assert ran == ["Running stage 'code':"]
    assert YAML(typ="safe").load(projects[0] / "dvc.lock") == lock


def test_an_upgrade_says_what_it_re_runs_and_keeps_what_was_trained(
    installed: Path, projects: list[Path], call: Call
) -> None:
    """The decision is turned around in the installed program; of two projects each decides for itself."""
    (source,) = [
        path
        for path in installed.rglob("pipelines/**/*.py")
        if 'self.magnitudes == "carried"' in path.read_text(encoding="utf-8")
    ]
    text = source.read_text(encoding="utf-8")
    model = (projects[0] / "artifacts/model/t01/step.json").read_bytes()
    source.write_text(text.replace('self.magnitudes == "carried"', 'self.magnitudes != "carried"'))
    try:
        for folder in projects:
            done = call(folder, "sdlora", "run")
            assert done.returncode == 2
            assert "error: the code of fit@t01, freeze@t01 changed" in done.stderr
            assert "Adapter" in done.stderr
        status = call(projects[0], "sdlora", "status").stdout
        assert "fit@t01: artifacts/code/fit will change" in status
        assert "evaluate@t01: artifacts" not in status

        assert call(projects[0], "sdlora", "keep").returncode == 0
        done = call(projects[0], "sdlora", "run")
        assert done.stdout.startswith("all up to date"), done.stdout + done.stderr
        assert (projects[0] / "artifacts/model/t01/step.json").read_bytes() == model
        assert call(projects[0], "sdlora", "audit", "verify").returncode == 0

        done = call(projects[1], "sdlora", "run", "--retrain")
        assert done.returncode == 0, done.stderr
        assert "fit@t01  done" in done.stdout
    finally:
        source.write_text(text)
