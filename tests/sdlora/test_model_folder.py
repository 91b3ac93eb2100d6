"""A model folder holds what its step made, exactly, stands on the folders before, and notices every change."""

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdlora.classifier import ModelState
from sdlora.drift import DriftMap
from sdlora.head import HeadBlock, QuadraticBlock
from sdlora.ledger import (
    RECORD,
    ChainReader,
    JoinedRecords,
    file_sha256,
    read_own_record,
    read_record,
    record_bytes,
)
from sdlora.model_folder import read_model, write_model
from sdlora.statistics import class_statistics
from sdlora.tensors import read_tensors, write_tensors
from sdlora.verification import faults_of_step
from tests.support.chains import make_chain
from tests.support.model_chains import first_folder, write_chain, write_old_folder, write_step
from tests.support.tiny_model import learn

Steps = Mapping[str, ModelState]


@pytest.fixture(scope="module")
def steps() -> list[ModelState]:
    """What a chain has learned after each of three steps, with statistics, maps and rows made of them."""
    found: list[ModelState] = []
    random = torch.Generator().manual_seed(0)
    for place in (1, 2, 3):
        learned, task = learn(place), f"t{place:02}"
        before = found[-1] if found else ModelState()
        known = class_statistics(torch.randn(12, 16, generator=random), torch.arange(12) % 2, rank=2)
        moved = DriftMap(torch.randn(16, 16, generator=random), torch.randn(16, generator=random))
        found.append(
            replace(
                learned,
                settled={t: HeadBlock(b.weight + place, b.bias) for t, b in learned.head.items()},
                statistics={**before.statistics, task: known},
                drift={**before.drift, **({task: moved} if place > 1 else {})},
            )
        )
    return found


@pytest.fixture
def chain(tmp_path: Path, steps: list[ModelState]) -> Path:
    return write_chain(tmp_path, steps)


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def require_equal(found: ModelState, learned: ModelState) -> None:
    assert list(found.directions) == list(learned.directions)
    for task, direction in learned.directions.items():
        assert torch.equal(found.magnitudes[task], learned.magnitudes[task])
        for target, factors in direction.items():
            assert all(
                torch.equal(*pair) for pair in zip(found.directions[task][target], factors, strict=True)
            )
    for kind in ("head", "settled", "statistics", "drift"):
        one, other = getattr(found, kind), getattr(learned, kind)
        assert list(one) == list(other), kind
        for task in other:
            assert all(torch.equal(*pair) for pair in zip(one[task], other[task], strict=True)), kind
    assert found.memory.keys() == learned.memory.keys()
    assert all(torch.equal(found.memory[name], learned.memory[name]) for name in learned.memory)


def faults(chain: Path, names: Mapping[str, Path | None]) -> Iterator[str]:
    joined = JoinedRecords()
    for step, before in names.items():
        yield from (
            f"{step}/{file}: {what}"
            for file, what in faults_of_step(chain / step, step, joined, before=before)
        )


def test_what_is_written_is_read_back_to_the_bit(chain: Path, steps: list[ModelState]) -> None:
    for learned, step in zip(steps, ("t01", "t02", "t03"), strict=True):
        require_equal(read_model(chain / step, statistics=True)[0], learned)


def test_statistics_and_maps_are_read_only_for_who_asks(chain: Path) -> None:
    for path in chain.rglob("statistics/*"):
        path.unlink()
    assert not read_model(chain / "t03")[0].statistics
    with pytest.raises(FileNotFoundError, match=r"statistics/t01\.safetensors: it is missing"):
        read_model(chain / "t03", statistics=True)


def test_a_folder_holds_the_files_of_its_own_step_alone(chain: Path) -> None:
    for step in ("t02", "t03"):
        assert contents(chain / step).keys() == {
            f"directions/{step}.safetensors",
            f"drift/{step}.safetensors",
            f"head/{step}.safetensors",
            f"statistics/{step}.safetensors",
            "classifier.safetensors",
            "magnitudes.safetensors",
            "step.json",
        }


def test_a_record_is_joined_with_those_before(chain: Path) -> None:
    record = read_record(chain / "t03")

    assert record["tasks"] == ["t01", "t02", "t03"]
    assert [entry["label"] for entry in record["classes"]] == list(range(6))
    assert record["owners"]["directions/t01.safetensors"] == "t01"
    assert record["owners"]["magnitudes.safetensors"] == "t03"


def test_who_reads_steps_in_order_reads_each_record_once(chain: Path) -> None:
    reader = ChainReader(chain.joinpath)
    alone = {step: read_record(chain / step) for step in ("t00", "t01", "t02", "t03")}
    found = {step: reader.read(chain / step) for step in ("t03", "t01", "t02")}
    shutil.rmtree(chain / "t01")
    assert found | {step: reader.read(chain / step) for step in ("t03",)} | {"t00": alone["t00"]} == alone
    with pytest.raises(FileNotFoundError, match=r"t01/step\.json: it is missing"):
        reader.read(chain / "t02")


def test_quadratic_rows_are_read_as_they_were_written(tmp_path: Path) -> None:
    folder = make_chain(tmp_path, "tiny_vit", head="rgda") / "t02"
    found, record = read_model(folder, statistics=True)
    again = tmp_path / "again"
    again.mkdir()
    write_model(again, found, record, before=ModelState())

    assert all(isinstance(rows, QuadraticBlock) for rows in found.settled.values())
    for name in ("classifier.safetensors", "statistics/t02.safetensors"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_quadratic_rows_that_lack_a_part_are_refused(tmp_path: Path) -> None:
    folder = make_chain(tmp_path, "tiny_vit", head="rgda") / "t02"
    tensors = read_tensors(folder / "classifier.safetensors")
    del tensors["t01.offsets"]
    write_tensors(folder / "classifier.safetensors", tensors)
    record = read_own_record(folder)
    record["files"]["classifier.safetensors"] = file_sha256(folder / "classifier.safetensors")
    (folder / RECORD).write_bytes(record_bytes(record))

    with pytest.raises(ValueError, match=r"it lacks the tensor t01\.offsets; restore the file"):
        read_model(folder)


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, steps: list[ModelState]) -> None:
    first, second = (write_chain(tmp_path / name, steps) for name in ("a", "b"))

    assert contents(first) == contents(second)


@pytest.mark.parametrize(
    "name",
    [
        "t02/directions/t02.safetensors",
        "t01/head/t01.safetensors",
        "t03/magnitudes.safetensors",
        "t03/classifier.safetensors",
        "t02/drift/t02.safetensors",
        "t01/statistics/t01.safetensors",
    ],
)
def test_one_flipped_bit_is_noticed_and_named(name: str, chain: Path) -> None:
    data = bytearray((chain / name).read_bytes())
    data[-3] ^= 1
    (chain / name).write_bytes(data)

    with pytest.raises(ValueError, match=f"{name}: changed since the step was frozen"):
        read_model(chain / "t03", statistics=True)
    assert any(name in fault for fault in faults(chain, _verified(chain)))


def test_another_record_before_is_noticed_and_named(chain: Path) -> None:
    path = chain / "t01/step.json"
    path.write_bytes(path.read_bytes().replace(b'"class 0"', b'"klass 0"'))

    with pytest.raises(ValueError, match=r"t01/step\.json: not the record that step t02 was made from"):
        read_model(chain / "t03")
    assert any(
        fault.startswith("t02/step.json: its step before is") for fault in faults(chain, _verified(chain))
    )


@pytest.mark.parametrize("missing", ["t02/head/t02.safetensors", "t01/step.json"])
def test_a_missing_file_is_an_error_that_names_it(missing: str, chain: Path) -> None:
    (chain / missing).unlink()

    with pytest.raises(FileNotFoundError, match=missing):
        read_model(chain / "t03")


def test_folders_of_earlier_steps_may_lie_elsewhere(
    chain: Path, tmp_path: Path, steps: list[ModelState]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (chain / "t01").rename(tmp_path / "elsewhere/t01")

    def beside(step: str) -> Path:
        return (tmp_path / "elsewhere" if step == "t01" else chain) / step

    require_equal(read_model(chain / "t03", beside=beside, statistics=True)[0], steps[-1])


def test_a_whole_chain_holds(chain: Path) -> None:
    assert list(faults(chain, _verified(chain))) == []


def test_a_frozen_file_that_is_written_again_is_a_fault(tmp_path: Path, steps: list[ModelState]) -> None:
    chain = write_chain(tmp_path, steps[:1])
    first = steps[1].head["t01"]
    again = replace(steps[1], head={**steps[1].head, "t01": HeadBlock(first.weight + 1, first.bias)})
    write_step(chain, "t02", again, before=steps[0])
    found = list(faults(chain, {"t00": None, "t01": chain / "t00", "t02": chain / "t01"}))

    assert found == ["t02/head/t01.safetensors: it was frozen at an earlier step, and is here again"]


def test_a_folder_of_format_1_holds_all_so_far_and_new_steps_go_on_from_it(
    tmp_path: Path, steps: list[ModelState]
) -> None:
    first_folder(tmp_path)
    write_old_folder(tmp_path, "t02", steps[1])
    require_equal(read_model(tmp_path / "t02", statistics=True)[0], replace(steps[1], drift={}))

    # As they were carried to t02: no map of it moves them again.
    before = replace(steps[1], drift={})
    after = replace(steps[2], drift={"t03": steps[2].drift["t03"]})
    write_step(tmp_path, "t03", after, before=before)
    require_equal(read_model(tmp_path / "t03", statistics=True)[0], after)
    record = read_record(tmp_path / "t03")
    assert record["tasks"] == ["t01", "t02", "t03"]
    assert record["owners"]["directions/t01.safetensors"] == "t02"


def test_memory_is_that_of_the_last_step(tmp_path: Path) -> None:
    one, two = learn(1, method="inflora"), learn(2, method="inflora")
    chain = write_chain(tmp_path, [one, two])

    require_equal(read_model(chain / "t02")[0], two)
    assert read_record(chain / "t02")["owners"]["memory.safetensors"] == "t02"


def test_a_method_that_replaces_its_direction_holds_the_last_one_alone(tmp_path: Path) -> None:
    learned = [learn(place, method="finetune") for place in (1, 2)]
    chain = write_chain(tmp_path, learned, method="finetune")

    require_equal(read_model(chain / "t02")[0], learned[1])
    assert "directions/t01.safetensors" not in read_record(chain / "t02")["files"]
    assert list(faults(chain, _verified(chain))) == []


def _verified(chain: Path) -> dict[str, Path | None]:
    names = sorted(path.name for path in chain.iterdir() if path.name.startswith("t"))
    return {
        name: chain / before if before else None for name, before in zip(names, [None, *names], strict=False)
    }


@pytest.fixture
def more(tmp_path: Path, steps: list[ModelState]) -> Path:
    """A chain whose second step saw both known classes, and brought none."""
    seen = {"t02": (0, 1)}
    settled = {task: HeadBlock(block.weight[:kept], block.bias[:kept])
               for (task, block), kept in zip(steps[1].settled.items(), (2, 0), strict=True)}  # fmt: skip
    last = {**settled, "t03": steps[2].settled["t03"]}
    return write_chain(
        tmp_path,
        [
            steps[0],
            replace(steps[1], step_classes=seen, settled=settled),
            replace(steps[2], step_classes=seen, settled=last),
        ],
    )


def test_a_step_that_brings_no_class_is_read_back_and_goes_on(more: Path) -> None:
    learned, record = read_model(more / "t03", statistics=True)

    assert [(entry["label"], entry["task"]) for entry in record["classes"]] == [
        *((0, "t01"), (1, "t01"), (2, "t03"), (3, "t03"))
    ]
    assert record["step_classes"] == {"t02": [0, 1]}
    assert learned.step_classes == {"t02": (0, 1)}
    assert [len(rows.bias) for rows in learned.rows.values()] == [2, 0, 2]
    assert "step_classes" not in read_own_record(more / "t03")
    assert not list(
        faults(more, {"t00": None, "t01": more / "t00", "t02": more / "t01", "t03": more / "t02"})
    )


@pytest.mark.parametrize(
    ("saw", "what"),
    [
        ({"t02": [0, 2]}, "the classes that it saw are not its own and known ones"),
        ({"t01": [0, 1]}, "the classes that it saw are not its own and known ones"),
        ({"t02": [1, 0]}, "step_classes.t02 is a list, expected labels that rise, at least one"),
        ({"t02": []}, "step_classes.t02 is a list, expected labels that rise, at least one"),
        ({}, "the tasks of its classes are not its tasks"),
    ],
)
def test_classes_that_a_step_cannot_have_seen_are_refused_in_one_line(
    saw: dict[str, list[int]], what: str, more: Path
) -> None:
    record = {**read_own_record(more / "t02"), "step_classes": saw}
    (more / "t02" / RECORD).write_bytes(record_bytes(record))

    with pytest.raises(ValueError, match=what) as refusal:
        read_record(more / "t02")
    assert "\n" not in str(refusal.value)
