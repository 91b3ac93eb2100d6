"""The paper's own evidence: its rows are what the parameter sets say, and its figures measure what they name."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import compare, paper_evidence
from pipelines.planning.experiments import lay_over
from pipelines.project.params import Params
from pipelines.stages.fit import _schedule_of
from sdlora.change import Pair, Update
from sdlora.choices import settings_of
from sdlora.classifier import ModelState, merged_classifier
from sdlora.preprocessing import normalise
from tests.support.repository import REPOSITORY
from tests.support.tiny_model import learn, tiny_task, tiny_vit

SETS = {"paper": "scene_paper", "recipe": "scene_recipe"}
KEYS: Mapping[str, Mapping[str, Any]] = {
    paper_evidence.ALL: {},
    "the new magnitude": {"magnitudes": "fixed"},
    "the first direction alone": {"method": "sdlora-rr", "rank_schedule": {"t01": 10, "t02": 0}},
    paper_evidence.ONE: {"method": "finetune"},
}
"""Row → what the page says to change of a set's `adapter`."""


@pytest.mark.parametrize("row", KEYS)
@pytest.mark.parametrize("way", SETS)
def test_a_parameter_set_with_the_keys_of_a_row_is_what_the_benchmark_runs(
    way: str, row: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("params.yaml").write_bytes((REPOSITORY / "params.yaml").read_bytes())
    lay_over(REPOSITORY / "experiments" / "evidence" / f"{SETS[way]}.yaml", force=True)
    params = Params.load()
    adapter = params.adapter.model_copy(update=KEYS[row])
    run = paper_evidence.run_of(way, row, "glyphs100-scene", 1993, validation=False)

    assert asdict(_schedule_of(params.training)) == run["schedule"]
    chosen, expected = settings_of(adapter), compare.settings_of(run)
    assert (chosen.formulation, chosen.rank, chosen.rank_schedule) == (
        expected.formulation,
        expected.rank,
        expected.rank_schedule,
    )
    assert adapter.method == run["method"]
    assert adapter.head == paper_evidence.WAYS[way].head
    assert (list(adapter.targets) if adapter.targets else None) == run.get("targets")
    assert len(params.tasks) == run["tasks"]


def features(learned: ModelState) -> Tensor:
    images = normalise(tiny_task(3)[0], mean=[0.5], std=[0.5])
    with torch.no_grad():
        return merged_classifier(tiny_vit(), learned).features(images)


@pytest.mark.parametrize("method", ["sdlora", "finetune"])
def test_a_line_between_two_steps_begins_at_the_one_and_ends_at_the_other(method: str) -> None:
    before, after = (learn(steps, method=method) for steps in (2, 3))
    start, middle, end = (paper_evidence.between(before, after, share) for share in (0.0, 0.5, 1.0))

    torch.testing.assert_close(features(start), features(before), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(features(end), features(after), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(features(middle), features(end), rtol=1e-5, atol=1e-5)
    assert start.head is after.head


def solution(*columns: int) -> Update:
    """An update whose columns of a 4×4 weight are unit vectors of their own."""
    up = np.eye(4)[:, list(columns)]
    return Update(
        targets=("q",), directions={"t01": {"q": Pair(up, up.T)}}, magnitudes={"t01": np.array([2.0])}
    )


def test_solutions_that_are_perpendicular_are_the_root_of_two_apart_and_equal_ones_are_not_apart() -> None:
    apart = paper_evidence.distances([solution(0), solution(1)])
    equal = paper_evidence.distances([solution(0, 1), solution(0, 1)])

    assert (apart["relative_distance"], apart["cosine"], apart["length"]) == (1.4142, 0.0, 2.0)
    assert (equal["relative_distance"], equal["cosine"]) == (0.0, 1.0)


def test_a_rise_is_counted_from_the_end_of_each_tasks_own_step() -> None:
    losses = {0.0: [9], 0.5: [8], 1.0: [2], 1.5: [3, 7], 2.0: [4, 5], 2.5: [4, 8, 9], 3.0: [2, 5, 1]}
    points = [{"at": at, "tasks": [(loss, 0.0) for loss in of]} for at, of in losses.items()]

    assert paper_evidence.rise(points) == ([1.5, 2.0, 2.5, 3.0], [1.0, 2.0, 2.5, 0.0])


def result(row: str, seed: int, right: list[int]) -> dict[str, Any]:
    """A finished chain of the recipe on scene."""
    head = {**compare.summary([np.array(right, dtype=bool)]), "average": 0.5}
    run = paper_evidence.run_of("recipe", row, "glyphs100-scene", seed, validation=False)
    return {"run": run, "heads": {"linear": head, "rgda": head}}


def test_rows_are_compared_on_the_seeds_that_all_of_them_have() -> None:
    results = [
        result(paper_evidence.ALL, 1993, [0] * 8),
        result(paper_evidence.ALL, 1994, [1] * 8),
        result(paper_evidence.ONE, 1994, [0] * 6 + [1] * 2),
    ]
    lines = paper_evidence.table(
        results, "recipe", "glyphs100-scene", (paper_evidence.ALL, "the new magnitude", paper_evidence.ONE)
    )

    assert lines == [
        "| trained (seeds 1994) | last | average | against the first row |",
        "| --- | --- | --- | --- |",
        "| all magnitudes | 100.0 | 50.0 | – |",
        "| one direction, on and on | 25.0 | 50.0 | −6 +0, p = 0.031 |",
    ]


def test_a_chain_of_the_comparison_is_not_run_again() -> None:
    wanted = list(paper_evidence.wanted(paper_evidence.stored(Path("none")), ["glyphs100-scene"]))

    rows = [(asked.way, row) for asked, _, row in wanted if asked.kind == "heads"]
    assert ("recipe", paper_evidence.ONE) in rows
    assert ("recipe", paper_evidence.ALL) not in rows
