"""Benchmarks in the papers' class order, and parameter sets that are laid over params.yaml."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from pipelines.data.catalog import LAYOUTS, load_benchmark
from pipelines.planning.experiments import lay_over, plan_benchmark
from pipelines.planning.tasks import shuffled
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from pipelines.project.params_text import with_value, yaml_nodes
from pipelines.project.yaml_text import read_yaml, value_at
from pipelines.stages.fetch import KNOWN
from tests.support.repository import REPOSITORY

SHIPPED = REPOSITORY / "params.yaml"
EXPERIMENTS = sorted((REPOSITORY / "experiments").glob("*.yaml"))


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose params.yaml is committed."""
    folder = tmp_path / "project"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("params.yaml").write_bytes(SHIPPED.read_bytes())
    git("init", "-q")
    commit()
    return folder


def git(*arguments: str) -> None:
    subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True)


def commit() -> None:
    git("add", "params.yaml")
    git("commit", "-q", "-m", "state")


def text() -> str:
    return Path("params.yaml").read_text(encoding="utf-8")


def write(content: str) -> None:
    Path("params.yaml").write_text(content, encoding="utf-8")


def overlay(content: str) -> Path:
    Path("set.yaml").write_text(content, encoding="utf-8")
    return Path("set.yaml")


def classes() -> list[str]:
    return [name for task in Params.load().tasks.values() for name in task.classes]


# The papers' class order. These beginnings stand in the logs of SD-LoRA's repository.


@pytest.mark.parametrize(
    ("number", "seed", "logged"),
    [
        pytest.param(100, 1994, [72, 6, 33, 96, 60, 94, 29, 40, 45, 66], id="C100.log"),
        pytest.param(200, 1993, [168, 136, 51, 9, 183, 101, 171, 99, 42, 159], id="InA.log"),
        pytest.param(200, 1995, [146, 198, 169, 126, 142, 183, 108, 86, 79, 35], id="InR-T5.log"),
        pytest.param(200, 1996, [92, 182, 15, 79, 26, 173, 109, 188, 27, 157], id="InR-T20.log"),
    ],
)
def test_the_order_of_a_seed_is_that_of_the_authors_logs(number: int, seed: int, logged: list[int]) -> None:
    assert shuffled([str(i) for i in range(number)], seed)[:10] == [str(i) for i in logged]


def test_a_benchmark_is_planned_before_its_images_are_here() -> None:
    lines = plan_benchmark("imagenet-r", tasks=10, seed=1996)

    params = Params.load()
    labels = load_benchmark("imagenet-r").classes
    assert [len(task.classes) for task in params.tasks.values()] == [20] * 10
    assert (
        classes()[:3]
        == [labels[92], labels[182], labels[15]]
        == ["fox_squirrel", "head_cabbage", "Indian_cobra"]
    )
    assert {task.source for task in params.tasks.values()} == {"data/raw/imagenet-r"}
    assert lines[:2] == [
        "params.yaml: 200 classes of imagenet-r in 10 tasks, in the order of seed 1996",
        "params.yaml: fetch: added imagenet-r: {split: coda-prompt}",
    ]


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_benchmark_can_be_planned_and_is_fetched_then(name: str) -> None:
    plan_benchmark(name, tasks=5)

    params = Params.load()
    assert params.fetch.entry(name) is not None
    assert params.fetch.digits is not None
    assert sorted(classes()) == sorted(load_benchmark(name).classes)


def test_planning_changes_only_the_tasks_and_one_line_of_fetch() -> None:
    before = text()

    plan_benchmark("cifar100", classes_per_task=10)
    once = text()
    plan_benchmark("cifar100", classes_per_task=10)

    assert text() == once
    entry = "  cifar100: {}\n"
    assert once[: once.index("tasks:\n")].replace(entry, "") == before[: before.index("tasks:\n")]
    assert once.count(entry) == 1


def test_labels_of_domainnet_are_those_of_its_lists_and_not_of_a_sort() -> None:
    plan_benchmark("domainnet", tasks=5, seed=1993)

    assert classes()[:3] == [load_benchmark("domainnet").classes[i] for i in numpy_order(345, 1993)[:3]]
    assert load_benchmark("domainnet").classes.index("The_Mona_Lisa") == 310


def numpy_order(number: int, seed: int) -> list[int]:
    import numpy as np

    return list(np.random.RandomState(seed).permutation(number))


def own_folder(*names: str) -> None:
    for name in names:
        Path("data/raw/cifar100/train", name).mkdir(parents=True)


def test_images_that_are_here_already_are_not_fetched() -> None:
    own_folder(*load_benchmark("cifar100").classes)

    plan_benchmark("cifar100", tasks=10, seed=1994)

    assert Params.load().fetch.entry("cifar100") is None
    assert classes()[0] == load_benchmark("cifar100").classes[72]


def test_folders_that_are_named_as_in_the_archive_keep_their_names() -> None:
    folders = list(load_benchmark("imagenet-a").folders)
    for name in folders:
        Path("data/raw/imagenet-a/train", name).mkdir(parents=True)

    plan_benchmark("imagenet-a", tasks=10, seed=1993)

    assert classes()[:2] == [folders[168], folders[136]]


def test_folders_of_other_classes_are_refused() -> None:
    own_folder("cat", "dog")

    with pytest.raises(
        InputError, match=r"data/raw/cifar100/train: its 2 class folders are not the 100 of CIFAR-100"
    ):
        plan_benchmark("cifar100", tasks=10)
    assert text() == SHIPPED.read_text(encoding="utf-8")


def test_an_unknown_benchmark_is_refused_with_the_known_ones() -> None:
    with pytest.raises(
        InputError, match=r"plan: 'cifar10' is not a known benchmark; known are cifar100, cub200"
    ):
        plan_benchmark("cifar10", tasks=5)


def test_tasks_that_are_trained_are_replaced_only_by_force() -> None:
    Path("artifacts/model/t01").mkdir(parents=True)

    with pytest.raises(InputError, match="t01 already computed"):
        plan_benchmark("mnist", tasks=5)
    plan_benchmark("mnist", tasks=5, force=True)
    plan_benchmark("mnist", tasks=5)  # nothing to replace
    assert len(classes()) == 10


# The shipped parameter sets.


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_a_shipped_set_gives_valid_params_and_once_only(path: Path) -> None:
    lines = lay_over(path)
    params = Params.load()

    name, tasks, kind = path.stem.split("_")
    assert len(params.tasks) == int(tasks)
    assert params.fetch.entry(name) is not None
    assert params.adapter.formulation == {"reference": "reference", "default": "continuous"}[kind]
    assert f"params.yaml: fetch: added {name}: " in "\n".join(lines)
    written = text()
    assert lay_over(path) == [f"params.yaml: is as {path} has it already"]
    assert text() == written


def test_there_is_a_set_of_either_kind_for_every_table_of_the_paper() -> None:
    tables = ["imagenet-r_5", "imagenet-r_10", "imagenet-r_20"]
    tables += ["imagenet-a_10", "cifar100_10", "cub200_10", "domainnet_5"]
    assert {path.stem for path in EXPERIMENTS} == {
        f"{t}_{k}" for t in tables for k in ("reference", "default")
    }


@pytest.mark.parametrize("table", ["imagenet-r_10", "cub200_10"])
def test_a_set_does_not_depend_on_the_one_before(table: str) -> None:
    reference, default = (
        REPOSITORY / "experiments" / f"{table}_{kind}.yaml" for kind in ("reference", "default")
    )
    lay_over(default)
    fresh = text()
    write(SHIPPED.read_text(encoding="utf-8"))

    lay_over(reference)
    lay_over(default, force=True)

    assert read_yaml(text(), origin="now") == read_yaml(fresh, origin="fresh")


def test_both_kinds_of_a_set_say_the_same_keys_but_for_the_head_that_reads_one_more() -> None:
    def keys(path: Path) -> set[tuple[str, ...]]:
        return set(yaml_nodes(path.read_text(encoding="utf-8")))

    found = {frozenset(keys(path) - {("adapter", "covariance_rank")}) for path in EXPERIMENTS}
    assert len(found) == 1


def test_a_set_names_every_choice_of_its_training() -> None:
    """A key that it left out would be whatever stood there before."""
    known = Params.load(SHIPPED)
    for path in EXPERIMENTS:
        named = read_yaml(path.read_text(encoding="utf-8"), origin=str(path))
        assert known.training.of_the_fit.keys() - named["training"].keys() <= {"deterministic"}, path


# Laying a set over.


def test_every_changed_key_is_printed_and_no_other_byte_changes() -> None:
    lines = lay_over(overlay("training: {epochs: 20, flip: false}\nadapter:\n  targets: [q, k]\n"))

    assert lines == [
        "params.yaml: training.epochs: 8 → 20",
        "params.yaml: adapter.targets: all → [q, k]",
    ]
    lines_of = SHIPPED.read_text(encoding="utf-8").splitlines()
    new = [line for line, old in zip(text().splitlines(), lines_of, strict=True) if line != old]
    assert [line.partition("#")[0] for line in new] == [
        "  targets: [q, k]             ",
        "  epochs: 20                  ",
    ]


def test_another_seed_is_of_the_class_order_and_of_the_run() -> None:
    lay_over(overlay("plan: {benchmark: cifar100, tasks: 10, seed: 1993}\nseed: 1993\n"), seed=1994)

    assert Params.load().seed == 1994
    assert classes()[0] == load_benchmark("cifar100").classes[72]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        pytest.param("training: {epoch: 3}", "training.epoch: unknown key; did you mean epochs", id="key"),
        pytest.param("training: {epochs: many}", "training.epochs: expected a whole number", id="value"),
        pytest.param("nonsense: 3", "nonsense: unknown key", id="section"),
        pytest.param("plan: {benchmark: mnist}", r"set.yaml: plan: expected \{benchmark: NAME, tasks", id="plan"),
        pytest.param("plan: {benchmark: mnist, tasks: x, seed: 1}", "tasks and seed are whole numbers", id="type"),
        pytest.param("plan: {benchmark: pets, tasks: 2, seed: 1}", "'pets' is not a known benchmark", id="name"),
        pytest.param("plan: {benchmark: mnist, tasks: 11, seed: 1}", "11 tasks for 10 classes", id="size"),
        pytest.param("", "set.yaml: the file is empty", id="empty"),
        pytest.param("a: [", "set.yaml: line 1: not valid YAML", id="syntax"),
    ],
)  # fmt: skip
def test_a_set_that_is_not_valid_changes_nothing(content: str, fault: str) -> None:
    with pytest.raises(InputError, match=fault):
        lay_over(overlay(content))
    assert text() == SHIPPED.read_text(encoding="utf-8")


def test_a_missing_set_is_one_line() -> None:
    with pytest.raises(InputError, match=r"experiments/none\.yaml: the file is missing"):
        lay_over(Path("experiments/none.yaml"))


def test_what_is_not_committed_is_overwritten_only_by_force() -> None:
    mine = text().replace("epochs: 8", "epochs: 11")
    write(mine)
    changes = overlay("training: {epochs: 20}")

    with pytest.raises(
        InputError, match=r"params\.yaml: has changes that are not committed .* go on with --force"
    ):
        lay_over(changes)
    assert text() == mine

    assert lay_over(changes, force=True) == ["params.yaml: training.epochs: 11 → 20"]
    assert lay_over(changes) == ["params.yaml: is as set.yaml has it already"]


def test_without_git_there_is_nothing_that_could_be_lost(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project))
    (project / ".git").rename(project / "not-git")

    assert lay_over(overlay("training: {epochs: 20}"))


def test_trained_tasks_of_another_plan_stay_unless_forced() -> None:
    Path("artifacts/model/t01").mkdir(parents=True)
    other = overlay("plan: {benchmark: mnist, tasks: 5, seed: 1}\n")

    with pytest.raises(InputError, match="t01 already computed"):
        lay_over(other)
    lay_over(other, force=True)
    lay_over(other)


# Editing text.


@pytest.mark.parametrize(
    ("before", "keys", "value", "after"),
    [
        ("a: 1\n", ("a",), 2, "a: 2\n"),
        ("a: 1", ("a",), "x y", "a: x y"),
        ("a: 1   # why\n", ("a",), 20, "a: 20  # why\n"),
        ("a: 1 # why\n", ("a",), 20, "a: 20  # why\n"),
        ("a:   # why\nb: 1\n", ("a",), 2, "a: 2  # why\nb: 1\n"),
        ("a:\nb: 1\n", ("a",), {}, "a: {}\nb: 1\n"),
        ("a: {b: 1, c: 2}\n", ("a", "b"), None, "a: {b: null, c: 2}\n"),
        ("a: {b: 1}\n", ("a", "c"), "no", 'a: {b: 1, c: "no"}\n'),
        ("a: {}\nz: 1\n", ("a", "c"), {"d": 1}, "a: {c: {d: 1}}\nz: 1\n"),
        ("a:\n  b: 1\n\n# z\nz: 1\n", ("a", "c"), {}, "a:\n  b: 1\n  c: {}\n\n# z\nz: 1\n"),
        ("a:\r\n  b: 1\r\nz: 1\r\n", ("a", "c"), 2, "a:\r\n  b: 1\r\n  c: 2\r\nz: 1\r\n"),
        ("a:\n  b: 1", ("a", "c"), 2, "a:\n  b: 1\n  c: 2\n"),
        ("a:\n  b:\n  - 1\n  - 2\nz: 1\n", ("a", "b"), [3], "a:\n  b: [3]\nz: 1\n"),
        ("a:\n  b: {c: 1}   # why\nz: 1\n", ("a", "d"), 2, "a:\n  b: {c: 1}   # why\n  d: 2\nz: 1\n"),
    ],
)
def test_a_value_is_put_in_its_place(before: str, keys: tuple[str, ...], value: object, after: str) -> None:
    assert with_value(before, keys, value) == after
    assert value_at(read_yaml(after, origin="after"), keys) == value


def test_a_data_set_that_is_planned_can_be_fetched() -> None:
    assert set(LAYOUTS) < set(KNOWN)
