"""The comparison of all methods: what its page says of a set's headroom, and what learning at once is."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import compare
from pipelines.project.params import Params
from sdlora.backbones import create_backbone
from sdlora.choices import adapted_targets
from sdlora.methods import METHODS
from tests.support.repository import REPOSITORY

SUITE = compare.SUITES["scene"]


def result(label: str, *, seed: int = 1993, held_out: bool = False, **right: list[int]) -> dict[str, Any]:
    """A finished chain whose heads name so many of eight images right; `right` has a list of bits for each head."""
    return {
        "run": {
            "data": SUITE.data,
            "tasks": SUITE.tasks,
            "seed": seed,
            "validation": held_out,
            "penalty": None,
            "formulation_choices": {},
            "rank": 10,
            "backbone": "glyph_vit",
            **compare.VARIANTS[label].key,
        },
        "trained_parameters": 1,
        "heads": {
            head: {**compare.summary([np.array(bits, dtype=bool)]), "stored_numbers": 1, "seconds": 1.0}
            for head, bits in right.items()
        },
    }


def test_the_distilled_rows_are_trained_as_the_shipped_parameters_say() -> None:
    params = Params.load(REPOSITORY / "params.yaml")
    recipe = compare.RECIPES["Adam 0.002, distilled"]
    trained = asdict(recipe.schedule)
    shipped = {"decay": params.training.schedule, **params.training.model_dump()}

    assert {key: shipped[key] for key in trained} == trained
    assert adapted_targets(params.adapter.targets, METHODS["sdlora"]) == recipe.targets


def of_eight(number: int) -> list[int]:
    return [1] * number + [0] * (8 - number)


LOW, MIDDLE, HIGH = (f"joint at once, Adam {rate}" for rate in (0.0003, 0.001, 0.003))
HELD_OUT = [
    result("frozen", held_out=True, lda=of_eight(3), aligned=of_eight(2)),
    result(LOW, held_out=True, lda=of_eight(4)),
    result(MIDDLE, held_out=True, lda=of_eight(6), aligned=of_eight(5)),
]


def test_the_ends_of_the_headroom_are_chosen_on_held_out_images_whatever_the_test_images_say() -> None:
    tests = [result("frozen", lda=of_eight(1), aligned=of_eight(8)), result(LOW, lda=of_eight(8))]

    tests += [result(HIGH, held_out=True, seed=1994, lda=of_eight(8))]

    assert compare.ends_of(HELD_OUT + tests, SUITE) == [("frozen", "lda"), (MIDDLE, "lda")]


def test_the_share_of_a_row_is_counted_on_the_seeds_that_both_ends_have() -> None:
    tests = [result("frozen", seed=seed, lda=of_eight(2)) for seed in (1, 2)]
    tests += [result(MIDDLE, seed=seed, lda=of_eight(6)) for seed in (1, 2)]
    tests += [
        result("sdlora continuous", seed=seed, lda=of_eight(right))
        for seed, right in ((1, 3), (2, 5), (3, 8))
    ]
    ends = compare.headroom(HELD_OUT + tests, SUITE)
    rows = compare.table_rows(HELD_OUT + tests, SUITE)

    assert "**Headroom: 50.0 points** (seeds 1, 2)." in compare.headroom_text(HELD_OUT + tests, SUITE)
    assert compare.share(rows["sdlora continuous", "lda"], ends) == "50 %"
    assert compare.share(rows["frozen", "lda"], ends) == "0 %"


def test_a_set_without_headroom_says_so_and_gives_no_shares() -> None:
    results = [*HELD_OUT, result("frozen", lda=of_eight(6)), result(MIDDLE, lda=of_eight(6))]
    text = "\n".join([*compare.headroom_text(results, SUITE), *compare.table(results, SUITE)])

    assert "**Headroom: 0.0 points**" in text
    assert "Under 2 points: this set tells methods apart only by their classifier." in text
    assert " % |" not in text


def test_a_set_whose_ends_were_not_measured_has_no_headroom() -> None:
    tests = [result("frozen", lda=of_eight(6)), result(MIDDLE, seed=2, lda=of_eight(6))]

    assert compare.headroom(HELD_OUT + tests, SUITE) is None
    assert compare.headroom(tests, SUITE) is None


def test_rows_are_compared_with_the_best_over_all_its_seeds_and_a_row_of_fewer_is_not() -> None:
    best = {1: [1, 1, 1, 1, 1, 1, 0, 1], 2: [1] * 8}
    other = {1: [0, 0, 1, 1, 1, 1, 1, 1], 2: [0] * 4 + [1] * 4}
    tests = [result("sdlora continuous", seed=seed, lda=best[seed]) for seed in (1, 2)]
    tests += [result("frozen", seed=seed, lda=other[seed]) for seed in (1, 2)]
    tests += [result("finetune", seed=1, lda=other[1])]
    rows = compare.table_rows(tests, SUITE)

    pairs = compare.against(rows, rows["sdlora continuous", "lda"])

    assert pairs == {("frozen", "lda"): "−6 +1, 0.12"}


def test_finished_chains_are_found_again_by_their_settings() -> None:
    results = compare.stored(compare.RESULTS)

    assert len(compare.rows_of(results, compare.SUITES["digits-5"], "sdlora continuous")) == 5
    assert not compare.rows_of(results, compare.SUITES["digits-5"], "sdlora continuous, Adam 0.001")


@pytest.mark.slow
def test_learning_at_once_for_no_epoch_leaves_the_rows_that_statistics_of_frozen_features_give(
    tmp_path: Path,
) -> None:
    images = compare.Images("digits", create_backbone("glyph_vit"), tmp_path, validation=False)
    common = {
        "data": "digits",
        "tasks": 5,
        "seed": 1993,
        "rank": 10,
        "penalty": None,
        "formulation_choices": {},
    }
    once, frozen = compare.VARIANTS[MIDDLE], compare.VARIANTS["frozen"]
    runs = [common | {"backbone": "glyph_vit"} | variant.key for variant in (once, frozen)]
    for run in runs:
        run["schedule"] = run["schedule"] | {"epochs": 0}

    at_once = compare.run_at_once(images, runs[0], once.heads)["heads"]
    chain = compare.run_chain(images, runs[1], frozen.heads)["heads"]

    for head in ("ncm", "lda"):
        assert at_once[head]["right"] == chain[head]["right"]
