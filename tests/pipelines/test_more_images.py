"""A chain that gets more images of known classes, from `add-task` to what an auditor reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.support.commands import call, call_here, finish
from tests.support.finished_chain import hashes, stages_run
from tests.support.pictures import paint
from tests.support.repository import REPOSITORY

pytestmark = pytest.mark.slow


@pytest.mark.usefixtures("preloaded")
def test_a_chain_with_more_images_of_known_classes_keeps_every_promise(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    project = Path(shutil.copytree(finished[0], tmp_path / "project"))
    for seed, (source, name) in enumerate((("late", "b"), ("late", "x"), ("later", "y"))):
        paint(project / source / "train" / name, 50 + seed, 4)
        paint(project / source / "test" / name, 60 + seed, 2)
    before = hashes(project)

    refused = finish(project, "sdlora", "add-task", "late", "--class", "b")
    assert refused.returncode == 2
    assert "class 'b' is already in t01 of params.yaml; leave it out, or add --kind more" in refused.stderr
    assert "added t03, 2 classes, 1 of them known" in call(
        project, "sdlora", "add-task", "late", "--kind", "more"
    )
    call(project, "sdlora", "add-task", "later")
    ran = stages_run(call(project, "sdlora", "run"))

    assert {stage.partition("@")[2] for stage in ran} == {"t03", "t04", ""}
    after = hashes(project)
    of_steps = {name for name in before if "/t0" in name}
    assert {name: after[name] for name in of_steps} == {name: before[name] for name in of_steps}
    assert "the chain holds" in call(project, "sdlora", "audit", "verify", "--recompute")
    call(project, "sdlora", "audit", "bundle", "chain.jsonl")
    verifier = str(REPOSITORY / "docs/reference/verify_bundle.py")
    assert "the bundle holds" in call(project, "python", verifier, "chain.jsonl")
    history = json.loads(call_here(project, "audit", "show", "--class", "b", "--json"))
    assert (history["task"], [row["images"] for row in history["steps"]]) == ("t01", [2, 2, 4, 4])
    image = json.loads(call_here(project, "audit", "show", "--files", "late/train/b"))["files"]["0.png"]
    assert [(step["step"], step["trained_on_it"]) for step in image["known"][0]["went_into"]] == [
        ("t03", True), ("t04", False),
    ]  # fmt: skip
    assert "more images of <bdi>b</bdi> (+4)" in (project / "artifacts/report/report.html").read_text()
    call_here(project, "export", "onnx", "served")
    served = json.loads((project / "served/classes.json").read_text())["classes"]
    assert [entry["name"] for entry in served] == list("abcdxy")

    call(project, "sdlora", "retire", "t03", "--by", "Zoë", "--why", "a test", "--yes")
    assert "retired" in call(project, "sdlora", "audit", "verify")
