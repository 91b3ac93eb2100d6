"""Where DVC is not as the patches know it they stay away with one line, and DVC does the work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import dvc
import pytest
from dvc.stage import Stage

from pipelines.project.environment import PLAIN_DVC
from pipelines.versioning.patches.known import PATCHES, unknown_of, unknown_version
from tests.support.commands import NO_SERVER
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import DVC_YAML, EVALUATE, FIT, NO_LIBRARIES, REPORT, ran

RENAMING = """
import importlib.abc, importlib.machinery, os, re, sys

NAME = re.compile(rf"\\b{os.environ['RENAMED']}\\b")

class Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname):
        source = self.get_source(fullname)
        if NAME.search(source):
            return compile(NAME.sub("_of_another_name", source), self.path, "exec")
        return super().get_code(fullname)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in ("dvc", "dvc_data", "dvc_objects"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = Loader(spec.loader.name, spec.loader.path)
        return spec

sys.meta_path.insert(0, Finder())
"""
"""What Python loads at its start: DVC and its libraries in a version that calls one thing otherwise, everywhere."""
COMMANDS = """
import os, signal, sys
import dvc.cli.parser, dvc.repo.reproduce, dvc.stage.cache, dvc_data.index
import pipelines.orchestration.run, pipelines.orchestration.status
from pipelines.runtime.fork_server import listening
from pipelines.versioning.dvc_server import _serve

folder, served, *commands = sys.argv[1:]
server = None
if served:
    os.environ["SDLORA_DVC_SERVER"] = f"{folder}/server"
    with listening(f"{folder}/server") as listener:
        server = os.fork()
        if server == 0:
            _serve([str(os.dup(listener.fileno())), ""])
for number, command in enumerate(commands):
    child = os.fork()
    if child == 0:
        for stream in (1, 2):
            os.dup2(os.open(f"{folder}/{number}.{stream}", os.O_CREAT | os.O_WRONLY), stream)
        sys.argv = ["sdlora", command]
        from pipelines.__main__ import main
        main()
    if os.waitpid(child, 0)[1]:
        sys.exit(f"{command} failed")
if server:
    os.kill(server, signal.SIGTERM)
"""
"""Commands one after the other, each in a process of its own that has DVC loaded already, and so has DVC's server.

Where it is not served a run starts a server of DVC itself, as runs do.
"""

PARTS = [part for names in PATCHES.values() for name in names for part in name.partition("(")[0].split(":")]
PRIVATE = sorted(
    {word for part in PARTS for word in part.split(".") if word.startswith("_") and word[1] != "_"}
)


@pytest.fixture
def project(make_project: Callable[[dict[str, str]], Path]) -> Path:
    """A chain of two tasks whose stages are shell scripts."""
    params = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0]
    params += 'tasks:\n  t01: {after: t00, source: images, classes: ["a"]}\n'
    params += '  t02: {after: t01, source: images, classes: ["b"]}\n'
    scripts = {"fit": FIT, "evaluate": EVALUATE, "report": REPORT}
    files = {"dvc.yaml": DVC_YAML, "params.yaml": params, "code": "#", "images/readme": "", **scripts}
    folder = make_project({**files, ".gitignore": "/ran\n/artifacts/\n/.sdlora/\n"})
    for name in scripts:
        (folder / name).chmod(0o755)
    return folder


def sdlora(*arguments: str, **settings: str) -> tuple[str, list[str]]:
    """Run a command, with nobody to watch; return what it printed, and its lines about DVC."""
    done = subprocess.run(
        [sys.executable, "-m", "pipelines", *arguments],
        env={**os.environ, "PREFECT_API_URL": NO_SERVER, **settings},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if line.startswith("DVC ")]


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIVATE)
def test_with_a_private_name_of_dvc_gone_all_works_and_one_line_says_so(
    name: str, project: Path, tmp_path: Path
) -> None:
    whole = name == "_localfs_info"
    if not whole:  # a chain of one stage
        (project / "dvc.yaml").write_text("stages:\n  report:\n    cmd: ./report\n    outs: [metrics.json]\n")
        for key in ("t01", "t02"):
            subprocess.run(["./evaluate", key], check=True)
    (tmp_path / "renaming").mkdir()
    nothing_preloaded = (NO_LIBRARIES / "sitecustomize.py").read_text()
    (tmp_path / "renaming/sitecustomize.py").write_text(nothing_preloaded + RENAMING)
    path = os.pathsep.join([str(tmp_path / "renaming"), str(REPOSITORY)])
    settings = {"PREFECT_API_URL": NO_SERVER, "PYTHONPATH": path, "RENAMED": name}
    served = "" if whole else "served"
    commands = [sys.executable, "-c", COMMANDS, str(tmp_path), served, "status", "run", "status"]
    subprocess.run(commands, env={**os.environ, **settings}, timeout=120)
    for number, done in enumerate(("never run", "average accuracy", "all up to date")):
        printed, said = ((tmp_path / f"{number}.{stream}").read_text() for stream in (1, 2))
        assert done in printed, said
        assert "Traceback" not in said
        (line,) = [line for line in said.splitlines() if line.startswith("DVC ")]
        assert line.startswith(f"DVC {dvc.__version__}: dvc")
        assert f".{name} " in line or f".{name}, " in line
        assert line.endswith(" not known here; DVC's own code is used, slower")
    fits = ["fit t01", "evaluate t01", "fit t02", "evaluate t02"]
    assert ran(project) == [*(fits if whole else fits[1::2]), "report"]


@pytest.mark.slow
def test_plain_dvc_and_the_patches_leave_the_same(project: Path) -> None:
    settings = {"PYTHONPATH": os.pathsep.join([str(NO_LIBRARIES), str(REPOSITORY)])}
    assert sdlora("run", **settings)[1] == []
    lock = (project / "dvc.lock").read_bytes()
    assert sdlora("status", **settings, **{PLAIN_DVC: "1"})[0] == sdlora("status", **settings)[0]
    (project / "dvc.lock").unlink()
    assert sdlora("run", **settings, **{PLAIN_DVC: "1"})[1] == []
    assert (project / "dvc.lock").read_bytes() == lock


def test_all_that_the_patches_rely_on_is_known() -> None:
    """Asked in a process of its own: in this one tests may have patched something."""
    ask = "from pipelines.versioning.patches import apply_patches; print(*sorted(apply_patches()))"
    done = subprocess.run([sys.executable, "-c", ask], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.stdout.split() == sorted(PATCHES)
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("dvc.stage:Stage.status.__wrapped__(self, check_updates, filter_info)", None),
        ("dvc.stage:Stage.status.__wrapped__(self, check_updates)", "dvc.stage.Stage.status.__wrapped__"),
        ("dvc.output:Output.__init__.use_cache", None),
        ("dvc.output:Output.__init__.use_no_cache", "dvc.output.Output.__init__.use_no_cache"),
        ("dvc.no_module:name", "dvc.no_module.name"),
        ("dvc.output:Output.IS_DEPENDENCY(self)", "dvc.output.Output.IS_DEPENDENCY"),
    ],
)
def test_another_name_other_parameters_and_no_function_are_not_known(name: str, shown: str | None) -> None:
    assert unknown_of([name]) == ([shown] if shown else [])
    assert Stage.status.__wrapped__


@pytest.mark.parametrize("version", ["3.65.9", "3.68.0", "4.0", "2.63.1", "UNKNOWN"])
def test_other_versions_are_not_known(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unknown_version() is None
    monkeypatch.setattr(dvc, "__version__", version)
    assert unknown_version() == version
