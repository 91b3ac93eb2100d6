"""The order of dvc.lock is that of a plain `dvc repro`, found without DVC's graph."""

from __future__ import annotations

import random
import warnings
from pathlib import Path

import pytest
from dvc.repo import Repo
from dvc.repo.graph import build_graph
from dvc.repo.reproduce import plan_repro
from ruamel.yaml import YAML

from pipelines.versioning.lock_order import dvc_order
from tests.support.repository import REPOSITORY


def orders(folder: Path) -> tuple[list[str], list[str]]:
    """What DVC and what we find, of the dvc.yaml in a folder."""
    with warnings.catch_warnings(), Repo(str(folder)) as repo:
        warnings.simplefilter("ignore", DeprecationWarning)
        stages = repo.stage.load_all(str(folder / "dvc.yaml"))
        planned = [stage.addressing.rpartition(":")[2] for stage in plan_repro(build_graph(stages))]
        names = [stage.addressing.rpartition(":")[2] for stage in stages]
    outs = {name: [out.def_path for out in stage.outs] for name, stage in zip(names, stages, strict=True)}
    deps = {name: [dep.def_path for dep in stage.deps] for name, stage in zip(names, stages, strict=True)}
    return planned, dvc_order(outs, deps)


def test_the_chain_of_this_project_has_the_order_of_dvc(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Repo.init(str(tmp_path), no_scm=True)
    for name in ("dvc.yaml", "params.yaml"):
        (tmp_path / name).write_bytes((REPOSITORY / name).read_bytes())
    monkeypatch.chdir(tmp_path)
    theirs, ours = orders(tmp_path)
    assert len(ours) > 25
    assert ours == theirs


@pytest.mark.parametrize("seed", range(12))
def test_any_graph_has_the_order_of_dvc(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stages read whole outputs, parts of them, and folders that hold outputs of several stages."""
    draw = random.Random(seed)
    made: list[str] = []
    stages: list[tuple[str, dict[str, object]]] = []
    for number in range(25):
        outs = [
            f"{draw.choice('abc')}/{draw.choice('de')}/{number}{part}" for part in range(draw.randint(1, 2))
        ]
        read = draw.sample(made, min(len(made), draw.randint(0, 3)))
        deps = {f"{path}/file" if draw.random() < 0.3 else path for path in read}
        if draw.random() < 0.2:
            # A folder that no stage from here on writes to, so that there is no circle.
            outs = [f"last/{number}"]
            deps.add(draw.choice(["a", "b/d", "c"]))
        else:
            made += outs
        stages.append(
            (f"s{number}", {"cmd": "true", "deps": sorted(deps, key=lambda _: draw.random()), "outs": outs})
        )
    draw.shuffle(stages)
    Repo.init(str(tmp_path), no_scm=True)
    YAML().dump({"stages": dict(stages)}, tmp_path / "dvc.yaml")
    monkeypatch.chdir(tmp_path)
    theirs, ours = orders(tmp_path)
    assert ours == theirs
