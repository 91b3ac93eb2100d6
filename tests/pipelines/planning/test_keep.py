"""After an upgrade nothing is trained again unasked, and what is kept is noted in the ledger."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from pipelines.ledger.kept import read_notes
from pipelines.planning.new_project import project_files
from pipelines.project.errors import InputError
from pipelines.project.files import read_json
from pipelines.project.layout import RUN_LOCK
from pipelines.project.params import Params
from pipelines.runtime.file_lock import held
from pipelines.versioning.artifacts import read_lock
from tests.support.commands import environment, finish

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("preloaded")]

Call = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def project(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished chain, with sources of its own, which its commands run."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder, symlinks=True)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def call(project: Path) -> Call:
    """Run a command in the project with the project's own sources."""

    def run(*command: str) -> subprocess.CompletedProcess[str]:
        return finish(project, *command, PYTHONPATH=str(project))

    return run


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after, 1), encoding="utf-8")


def file_with(project: Path, text: str) -> Path:
    """The source file that has a text in it."""
    (found,) = [
        path
        for package in ("pipelines", "sdlora")
        for path in (project / package).rglob("*.py")
        if text in path.read_text(encoding="utf-8")
    ]
    return found


def test_a_comment_a_docstring_and_a_moved_module_leave_everything_up_to_date(
    project: Path, call: Call
) -> None:
    lock = (project / "dvc.lock").read_text().partition("\n  code:")
    edit(project / "sdlora" / "tensors.py", "from collections.abc", "# a comment\nfrom collections.abc")
    edit(file_with(project, "class Adapter(Section)"), '"""What a task adds', '"""All that a task adds')
    shutil.move(project / "sdlora" / "seeding.py", project / "sdlora" / "random_numbers.py")
    for path in [*(project / "sdlora").rglob("*.py"), *(project / "pipelines").rglob("*.py")]:
        path.write_text(path.read_text(encoding="utf-8").replace("sdlora.seeding", "sdlora.random_numbers"))
    done = call("sdlora", "run")
    assert done.returncode == 0, done.stderr
    assert "code  done" in done.stdout
    assert not {line for line in done.stdout.splitlines() if "  done" in line and " code " not in line}
    after = (project / "dvc.lock").read_text()
    assert after.startswith(lock[0])
    assert call("dvc", "repro").stdout.endswith("Data and pipelines are up to date.\n")


def test_an_inverted_decision_is_seen_and_nothing_is_trained_again_unasked(project: Path, call: Call) -> None:
    edit(
        file_with(project, "def settings_of("),
        'adapter.magnitudes != "restarted"',
        'adapter.magnitudes == "restarted"',
    )
    model = (project / "artifacts/model/t02/step.json").read_bytes()
    done = call("sdlora", "run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "the code of fit@t01, freeze@t01, fit@t02 and 1 more changed" in line
    assert ".settings_of" in line
    assert "sdlora keep" in line
    assert "sdlora run --retrain" in line
    assert (project / "artifacts/model/t02/step.json").read_bytes() == model

    done = call("sdlora", "status")
    assert " ".join(done.stdout.split()).count("`sdlora keep` keeps what was trained") == 1

    assert call("dvc", "repro", "code").returncode == 0
    stale = call("dvc", "status").stdout
    assert all(f"{name}:" in stale for name in ("fit@t01", "freeze@t01", "fit@t02", "freeze@t02"))
    assert "evaluate@t01:" not in stale


def test_what_is_kept_is_noted_and_the_chain_holds(project: Path, call: Call) -> None:
    edit(
        file_with(project, "def settings_of("),
        'adapter.magnitudes != "restarted"',
        'adapter.magnitudes == "restarted"',
    )
    model = (project / "artifacts/model/t02/step.json").read_bytes()
    runs = set((project / ".dvc/cache/runs").rglob("*"))
    done = call("sdlora", "keep")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2].startswith(
        "kept as they are: 4 stages (fit@t01, freeze@t01, fit@t02 and 1 more)"
    )
    (note,) = read_notes()
    assert set(note.stages) == {"fit@t01", "freeze@t01", "fit@t02", "freeze@t02"}
    assert all(stage.made_by != stage.now for stage in note.stages.values())
    # Of the run-cache, which other machines share, only the stage `code` has a new entry.
    entries = [path for path in set((project / ".dvc/cache/runs").rglob("*")) - runs if path.is_file()]
    assert all("sdlora code " in path.read_text() for path in entries)

    done = call("sdlora", "run")
    assert done.returncode == 0, done.stderr
    assert "fit@" not in done.stdout
    assert (project / "artifacts/model/t02/step.json").read_bytes() == model
    assert call("sdlora", "audit", "verify").returncode == 0
    assert "nothing to keep" in call("sdlora", "keep").stdout

    path = project / "ledger/kept/0001.json"
    path.write_text(json.dumps({**read_json(path), "stages": {}}))
    done = call("sdlora", "audit", "verify")
    assert done.returncode == 1
    assert "made by other code than artifacts/code/fit" in done.stdout


def test_retrain_trains_again(project: Path, call: Call) -> None:
    edit(project / "sdlora" / "head.py", "torch.", "torch .")  # formatting
    assert call("sdlora", "run", "--retrain").returncode == 0
    edit(
        file_with(project, "def settings_of("),
        'adapter.magnitudes != "restarted"',
        'adapter.magnitudes == "restarted"',
    )
    done = call("sdlora", "run", "--retrain")
    assert done.returncode == 0, done.stderr
    assert "fit@t02  done" in done.stdout
    assert not (project / "ledger/kept").exists()


def test_a_stage_does_not_run_with_other_code_than_dvc_has_hashed(project: Path, call: Call) -> None:
    settings = environment()
    assert "PYTHONPATH" not in settings or str(project) not in settings["PYTHONPATH"].split(os.pathsep)
    edit(project / "sdlora" / "tensors.py", "from collections.abc", "# a comment\nfrom collections.abc")
    for command in (["sdlora", "run"], ["dvc", "repro", "-f", "code"]):
        done = subprocess.run(command, cwd=project, env=settings, capture_output=True, text=True, timeout=100)
        assert done.returncode != 0
        assert "dvc.yaml watches the sources here, and the sdlora that runs has others" in done.stderr


def test_nothing_is_kept_while_a_run_is_at_work(project: Path, call: Call) -> None:
    with held(RUN_LOCK):
        done = call("sdlora", "keep")
    assert done.returncode == 2
    assert "another sdlora run is at work" in done.stderr
    assert not (project / "ledger/kept").exists()


def test_damaged_names_of_definitions_cost_their_names_alone(project: Path, call: Call) -> None:
    edit(
        file_with(project, "def settings_of("),
        'adapter.magnitudes != "restarted"',
        'adapter.magnitudes == "restarted"',
    )
    (project / "artifacts/code/names.json").write_text("{")
    done = call("sdlora", "run")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert "changed (artifacts/code has no older fingerprints)" in line


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="no-json"),
        pytest.param('{"at": "2026-01-01T00:00:00Z", "stages": {}}', id="a-key-less"),
        pytest.param(
            '{"at": "2026-01-01T00:00:00Z", "previous": "' + "0" * 64 + '", "stages": {}}',
            id="another-note-before",
        ),
    ],
)
def test_a_damaged_note_is_named(project: Path, text: str) -> None:
    (project / "ledger/kept").mkdir(parents=True)
    (project / "ledger/kept/0001.json").write_text(text)
    with pytest.raises(InputError, match=r"ledger/kept/0001\.json: .*restore"):
        list(read_notes())


def test_a_dvc_yaml_of_another_version_is_renewed_and_what_was_made_stays(project: Path, call: Call) -> None:
    """It calls evaluate otherwise, and names other parts of the outputs that are read."""
    for name in ("pipelines", "sdlora"):  # as where the tool is installed
        shutil.rmtree(project / name)
    stages, new = project / "dvc.yaml", project_files("mine", example=False)["dvc.yaml"]
    stages.write_text(new)
    edit(
        stages,
        "--split artifacts/split/${key} --out artifacts/e",
        "--test artifacts/split/${key} --out artifacts/e",
    )
    edit(stages, "      - artifacts/model/${key}/step.json\n", "      - artifacts/model/${key}\n")
    whole = "      - artifacts/model/${item.after}"
    edit(stages, f"{whole}/step.json\n", f"{whole}\n")
    changed = ["evaluate@t01", "evaluate@t02", "fit@t01", "fit@t02"]
    assert call("dvc", "commit", "-f", *changed).returncode == 0
    made_by = read_lock(Params.load()).deps
    for name in changed:
        kind = name.partition("@")[0]
        edit(project / "dvc.lock", f"md5: {made_by[name][f'artifacts/code/{kind}']}", f"md5: {'a' * 32}")
    lock = (project / "dvc.lock").read_bytes()

    done = call("sdlora", "run")
    assert done.returncode == 2
    assert (
        "dvc.yaml is of another version of sdlora (stage evaluate: --split, --test); `sdlora keep`"
        in done.stderr
    )
    done = call("sdlora", "keep")
    assert done.returncode == 2
    assert "Git has not all of it; commit it" in done.stderr
    assert (project / "dvc.lock").read_bytes() == lock

    commit = ["-c", "user.name=Ana", "-c", "user.email=ana@example.org", "commit", "-qam", "Older stages"]
    assert not any(call("git", *words).returncode for words in (["init", "-q"], ["add", "dvc.yaml"], commit))
    done = call("sdlora", "keep")
    assert done.returncode == 0, done.stderr
    first, second, *_ = done.stdout.splitlines()[-3:]
    assert first.startswith("dvc.yaml: written as this version has it")
    assert second.startswith("kept as they are: 4 stages (")
    assert stages.read_text() == new
    assert call("sdlora", "run").returncode == 0
    assert all(f"{name}" not in call("sdlora", "status").stdout for name in changed)


def test_params_of_a_version_that_knew_fewer_keys_keep_what_they_trained(project: Path, call: Call) -> None:
    """The new key is added as null, and nothing is trained again. Where it is chosen then, that trains."""
    for name in ("pipelines", "sdlora"):  # as where the tool is installed
        shutil.rmtree(project / name)
    keys = ["magnitude_rate"]
    stages, params = project / "dvc.yaml", project / "params.yaml"
    new = project_files("mine", example=False)["dvc.yaml"]
    old = YAML(typ="safe").load(new)
    watched = old["stages"]["fit"]["do"]["params"]
    old["stages"]["fit"]["do"]["params"] = [
        key for key in watched if key.removeprefix("training.") not in keys
    ]
    YAML().dump(old, stages)
    made_by = read_lock(Params.load()).deps
    for name in ("fit@t01", "fit@t02"):
        edit(project / "dvc.lock", f"md5: {made_by[name]['artifacts/code/fit']}", f"md5: {'a' * 32}")
    for path in (params, project / "dvc.lock"):
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text(
            "".join(line for line in lines if not re.match(rf" +(training\.)?({'|'.join(keys)}):", line))
        )
    assert not any(Params.load().training.model_dump()[key] for key in keys)
    commit = ["-c", "user.name=Ana", "-c", "user.email=ana@example.org", "commit", "-qam", "Older stages"]
    assert not any(call("git", *words).returncode for words in (["init", "-q"], ["add", "dvc.yaml"], commit))
    model = (project / "artifacts/model/t02/step.json").read_bytes()

    names = ", ".join(f"training.{key}" for key in keys)
    assert f"of another version of sdlora (stage fit: {names[:30]}" in call("sdlora", "run").stderr
    stages.write_text(new)
    assert f"params.yaml: {names}: of another version than dvc.yaml" in call("sdlora", "run").stderr
    assert call("git", "checkout", "-q", "dvc.yaml").returncode == 0
    done = call("sdlora", "keep")
    assert done.returncode == 0, done.stderr
    assert f"params.yaml: {names} added as null, which is as before" in done.stdout
    assert "kept as they are: 2 stages (fit@t01, fit@t02)" in done.stdout
    done = call("sdlora", "run")
    assert done.returncode == 0, done.stderr
    assert "fit@" not in done.stdout
    assert (project / "artifacts/model/t02/step.json").read_bytes() == model
    assert call("sdlora", "audit", "verify").returncode == 0

    edit(params, "\n  magnitude_rate:", "\n  magnitude_rate: 0.5")
    assert "training.magnitude_rate changed" in " ".join(call("sdlora", "status").stdout.split())
