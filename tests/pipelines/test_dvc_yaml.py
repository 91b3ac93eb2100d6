"""dvc.yaml says the truth: every stage depends on just the code and the parameters that make its bytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import modify_yaml
from ruamel.yaml import YAML

from pipelines.planning.new_project import project_files
from pipelines.project.layout import CODE, CODE_STAGE
from pipelines.project.layout import STAGES as KINDS
from tests.support.command_line import command_of
from tests.support.repository import REPOSITORY

STAGES: dict[str, dict[str, Any]] = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["stages"]

NOT_OF_THE_RESULT = {"checkpoint_seconds", "checkpoint_store"}
"""Training keys that change when and where a fit saves itself, and nothing of what it learns."""


def stage(name: str) -> dict[str, Any]:
    return STAGES[name].get("do", STAGES[name])


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_depends_on_its_own_code_and_on_no_source_file(name: str) -> None:
    """Only `code`, which makes the fingerprints, reads sources."""
    deps = stage(name)["deps"]
    sources = {dep for dep in deps if dep.split("/")[0] in ("pipelines", "sdlora")}
    if name == CODE_STAGE:
        assert sources == {"pipelines", "sdlora"}
    else:
        assert not sources
        assert next(dep for dep in deps if dep.startswith(f"{CODE}/")) == f"{CODE}/{name}"


def test_dvc_yaml_has_the_stages_that_have_fingerprints() -> None:
    assert list(STAGES) == [CODE_STAGE, *KINDS]


def test_every_data_set_that_fetch_knows_and_reads_from_the_package_has_a_hash() -> None:
    from pipelines.project.fingerprints import code_files
    from pipelines.stages.fetch import KNOWN

    assert f"{CODE}/embedded/${{key}}" in stage("fetch")["deps"]
    assert set(KNOWN) == {
        name.removeprefix("embedded/") for name in code_files() if name.startswith("embedded/")
    }


def test_dvc_yaml_is_short() -> None:
    assert len((REPOSITORY / "dvc.yaml").read_text().splitlines()) <= 150


@pytest.mark.parametrize("name", ["params.yaml", "dvc.yaml"])
def test_dvc_would_write_the_file_as_it_is(name: str, tmp_path: Path) -> None:
    """So `dvc freeze` and `dvc exp run -S` change no line that they need not, in a new project's files neither."""
    for text in ((REPOSITORY / name).read_text(), project_files("birds", example=False)[name]):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        with modify_yaml(path):
            pass
        assert path.read_text(encoding="utf-8") == text


def test_an_experiment_changes_one_line(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    before = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
    path.write_text(before, encoding="utf-8")
    apply_overrides(path, ["seed=1", "adapter.penalty=0.5"])
    pairs = zip(before.splitlines(), path.read_text(encoding="utf-8").splitlines(), strict=True)
    assert [new.split()[:2] for old, new in pairs if old != new] == [["seed:", "1"], ["penalty:", "0.5"]]


def test_a_fit_is_keyed_by_every_training_parameter_that_matters_and_no_other() -> None:
    from pipelines.project.settings import Training

    listed = {key.removeprefix("training.") for key in stage("fit")["params"] if key.startswith("training.")}
    assert listed == set(Training.model_fields) - NOT_OF_THE_RESULT


def test_a_fit_is_keyed_by_every_adapter_parameter_but_those_of_the_freezing() -> None:
    from pipelines.project.settings import AT_FREEZING, Adapter

    listed = {key.removeprefix("adapter.") for key in stage("fit")["params"] if key.startswith("adapter.")}
    assert listed == set(Adapter.model_fields) - AT_FREEZING
    assert "adapter" in stage("freeze")["params"]


def test_every_section_of_params_is_a_param_of_some_stage() -> None:
    from pipelines.project.params import Params

    listed = {key.partition(".")[0] for name in STAGES for key in stage(name).get("params", [])}
    assert listed == set(Params.model_fields) - {"workers"}  # who runs the chain, and when, changes no stage


def test_no_stage_names_a_whole_section_that_a_new_task_would_change() -> None:
    """Else adding a task would run the earlier ones again; only the report is of all tasks."""
    assert [name for name in STAGES if "tasks" in stage(name).get("params", [])] == ["report"]


@pytest.mark.parametrize("name", STAGES)
def test_a_stage_takes_part_in_the_run_cache(name: str) -> None:
    """DVC leaves out, without a word, stages without deps, and outputs that persist or are not cached."""
    assert stage(name)["deps"]
    assert all(isinstance(out, str) for out in stage(name)["outs"])


def test_the_commands_are_those_of_the_command_line() -> None:
    for name in STAGES:
        program, command, *rest = stage(name)["cmd"].split()
        assert (program, command) == ("sdlora", name)
        flags = {word for word in rest if word.startswith("--")}
        options = [p for p in command_of(name).params if p.param_type_name == "option"]
        assert flags == {flag for option in options for flag in option.opts}


def test_the_plots_are_of_files_that_the_report_leaves() -> None:
    plots = YAML(typ="safe").load((REPOSITORY / "dvc.yaml").read_text())["plots"]
    for plot in plots:
        ((path, settings),) = plot.items()
        assert path.startswith("artifacts/report/plots/")
        template = settings.get("template")
        if template not in (None, "confusion", "linear"):
            assert (REPOSITORY / ".dvc" / "plots" / f"{template}.json").is_file()
