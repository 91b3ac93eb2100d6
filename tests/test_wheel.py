"""The program as it is installed: a wheel in an environment of its own, and projects elsewhere."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType

import pytest
from ruamel.yaml import YAML

from pipelines.project.environment import DVC_SOCKET, STAGE_SOCKET
from pipelines.runtime.fork_server import STAGE_ENTRY, fork_server
from pipelines.versioning.dvc_server import dvc_server
from tests.support.pictures import paint
from tests.support.repository import REPOSITORY

pytestmark = pytest.mark.slow

Call = Callable[..., subprocess.CompletedProcess[str]]
WITH_SERVERS = """
import os
os.environ.update(servers)
from pipelines.cli.app import main
main()
"""
"""What `sdlora` runs, with fork servers that are there already."""


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

    def run(
        folder: Path, *command: str, servers: Mapping[str, str] = MappingProxyType({})
    ) -> subprocess.CompletedProcess[str]:
        others = Path(sys.executable).parent  # dvc
        path = os.pathsep.join([str(installed / "bin"), str(others), os.environ["PATH"]])
        settings = {**os.environ, "PATH": path, "PREFECT_API_URL": "http://127.0.0.1:1/api"}
        settings.pop("PYTHONPATH", None)
        words = list(command)
        if servers:  # named in the environment of `sdlora` they would be given the whole command
            words[:1] = [
                str(installed / "bin/python"),
                "-P",
                "-c",
                f"servers = {dict(servers)}\n{WITH_SERVERS}",
            ]
        return subprocess.run(words, cwd=folder, env=settings, capture_output=True, text=True, timeout=500)

    return run


@pytest.fixture(scope="module")
def kept(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The fork servers of that environment, kept while tests run. Return the variables that name them."""
    with pytest.MonkeyPatch.context() as patch, ExitStack() as servers:
        patch.chdir(tmp_path_factory.mktemp("servers"))
        patch.delenv("PYTHONPATH", raising=False)
        patch.setattr(sys, "executable", str(installed / "bin/python"))
        servers.enter_context(fork_server(STAGE_ENTRY, STAGE_SOCKET))
        servers.enter_context(dvc_server())
        patch.undo()
        yield {name: os.environ.pop(name) for name in (STAGE_SOCKET, DVC_SOCKET)}


@pytest.fixture(scope="module")
def projects(call: Call, kept: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two projects that share the program; both have learned one task, made by `sdlora` commands alone."""
    found: list[Path] = []
    for name in ("birds", "fish"):
        folder = tmp_path_factory.mktemp("projects") / name
        done = call(folder.parent, "sdlora", "init", name)
        assert done.returncode == 0, done.stderr
        params = (folder / "params.yaml").read_text()
        (folder / "params.yaml").write_text(params.replace("epochs: 8 ", "epochs: 1 "))
        for index in range(2):
            paint(folder / f"data/raw/{name}/class{index}", index, 8)
        assert call(folder, "sdlora", "add-task", f"data/raw/{name}").returncode == 0
        done = call(folder, "sdlora", "run", servers=kept if found else {})  # the first starts its own
        assert done.returncode == 0, done.stderr
        found.append(folder)
    return found


def test_an_installed_program_names_its_version_and_its_code(call: Call, tmp_path: Path) -> None:
    from importlib.metadata import version

    from pipelines.project.fingerprints import program_fingerprint

    done = call(tmp_path, "sdlora", "--version")
    assert done.stdout == f"sdlora {version('sdlora')}, code {program_fingerprint()[:12]}\n"


def test_a_project_elsewhere_has_nothing_of_the_program_and_is_learned(
    projects: list[Path], call: Call, kept: dict[str, str]
) -> None:
    folder = projects[0]
    assert not {"sdlora", "pipelines"} & {path.name for path in folder.iterdir()}
    assert (folder / "artifacts/report/report.html").is_file()
    done = call(folder, "sdlora", "run", servers=kept)
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
    installed: Path, projects: list[Path], call: Call, kept: dict[str, str]
) -> None:
    """The decision is turned around in the installed program; of two projects each decides for itself."""
    (source,) = [
        path
        for path in installed.rglob("sdlora/**/*.py")
        if 'adapter.magnitudes != "restarted"' in path.read_text(encoding="utf-8")
    ]
    text = source.read_text(encoding="utf-8")
    model = (projects[0] / "artifacts/model/t01/step.json").read_bytes()
    source.write_text(text.replace('adapter.magnitudes != "restarted"', 'adapter.magnitudes == "restarted"'))
    try:
        for folder in projects:
            done = call(folder, "sdlora", "run", servers=kept)
            assert done.returncode == 2
            assert "error: the code of fit@t01, freeze@t01 changed" in done.stderr
            assert "settings_of" in done.stderr
        status = call(projects[0], "sdlora", "status").stdout
        assert "fit@t01: artifacts/code/fit will change" in status
        assert "evaluate@t01: artifacts" not in status

        assert call(projects[0], "sdlora", "keep", servers=kept).returncode == 0
        done = call(projects[0], "sdlora", "run", servers=kept)
        assert done.stdout.startswith("all up to date"), done.stdout + done.stderr
        assert (projects[0] / "artifacts/model/t01/step.json").read_bytes() == model
        assert call(projects[0], "sdlora", "audit", "verify").returncode == 0

        done = call(projects[1], "sdlora", "run", "--retrain", servers=kept)
        assert done.returncode == 0, done.stderr
        assert "fit@t01  done" in done.stdout
    finally:
        source.write_text(text)
