"""A model folder holds a step exactly, keeps the bytes of earlier ones, and notices every change."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sdlora.classifier import ModelState
from sdlora.head import HeadBlock
from sdlora.ledger import record_hash
from sdlora.model_folder import read_model, write_model
from sdlora.statistics import class_statistics
from tests.support.tiny_model import learn


def record(learned: ModelState, step: str) -> dict[str, object]:
    targets = list(next(iter(learned.directions.values()))) if learned.directions else []
    owners = [task for task, block in learned.head.items() for _ in block.bias]
    return {
        "step": step,
        "previous": "0" * 64,
        "backbone": "1" * 64,
        "targets": targets,
        "directions": list(learned.directions),
        "tasks": list(learned.head),
        "classes": [
            {"label": label, "name": f"class {label}", "task": task} for label, task in enumerate(owners)
        ],
    }


def write(folder: Path, learned: ModelState, step: str, before: Path | None = None) -> Path:
    folder.mkdir()
    write_model(folder, learned, record(learned, step), before=before)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_what_is_written_is_read_back_to_the_bit(tmp_path: Path, three_steps: dict[str, ModelState]) -> None:
    learned = three_steps["continuous"]
    found, _ = read_model(write(tmp_path / "t03", learned, "t03"))

    assert list(found.directions) == list(learned.directions)
    for task, direction in learned.directions.items():
        assert torch.equal(found.magnitudes[task], learned.magnitudes[task])
        assert torch.equal(found.head[task].weight, learned.head[task].weight)
        assert torch.equal(found.head[task].bias, learned.head[task].bias)
        for target, factors in direction.items():
            assert torch.equal(found.directions[task][target].up, factors.up)
            assert torch.equal(found.directions[task][target].down, factors.down)


def test_the_folder_holds_one_direction_and_one_head_block_per_task(
    tmp_path: Path, three_steps: dict[str, ModelState]
) -> None:
    folder = write(tmp_path / "t03", three_steps["continuous"], "t03")

    assert contents(folder).keys() == {
        "directions/t01.safetensors",
        "directions/t02.safetensors",
        "directions/t03.safetensors",
        "head/t01.safetensors",
        "head/t02.safetensors",
        "head/t03.safetensors",
        "magnitudes.safetensors",
        "step.json",
    }


def test_writing_twice_gives_the_same_bytes(tmp_path: Path, three_steps: dict[str, ModelState]) -> None:
    first = write(tmp_path / "a", three_steps["reference"], "t03")
    second = write(tmp_path / "b", three_steps["reference"], "t03")

    assert contents(first) == contents(second)
    assert record_hash(first) == record_hash(second)


def test_files_of_earlier_tasks_keep_their_bytes(tmp_path: Path) -> None:
    two, three = learn(2), learn(3)
    before = write(tmp_path / "t02", two, "t02")
    after = write(tmp_path / "t03", three, "t03", before=before)

    for name, data in contents(before).items():
        if name.startswith(("directions/", "head/")):
            assert contents(after)[name] == data, name


@pytest.mark.parametrize(
    "name", ["directions/t02.safetensors", "head/t01.safetensors", "magnitudes.safetensors"]
)
def test_one_flipped_bit_is_noticed_and_named(
    name: str, tmp_path: Path, three_steps: dict[str, ModelState]
) -> None:
    folder = write(tmp_path / "t03", three_steps["continuous"], "t03")
    data = bytearray((folder / name).read_bytes())
    data[-3] ^= 1
    (folder / name).write_bytes(data)

    with pytest.raises(ValueError, match=f"{name}: changed since the step was frozen"):
        read_model(folder)


def test_a_missing_file_is_an_error_that_names_it(tmp_path: Path, three_steps: dict[str, ModelState]) -> None:
    folder = write(tmp_path / "t03", three_steps["continuous"], "t03")
    (folder / "head/t02.safetensors").unlink()

    with pytest.raises(FileNotFoundError, match=r"head/t02\.safetensors"):
        read_model(folder)


def test_statistics_settled_rows_and_memory_are_read_back_to_the_bit(tmp_path: Path) -> None:
    learned = learn(2, method="inflora")
    rows = {task: HeadBlock(block.weight + 1, block.bias + 1) for task, block in learned.head.items()}
    known = class_statistics(torch.randn(12, 16), torch.arange(12) % 2, rank=2)
    held = replace(learned, settled=rows, statistics=dict.fromkeys(learned.head, known))
    found, _ = read_model(write(tmp_path / "t02", held, "t02"))

    assert {"memory.safetensors", "settled/t01.safetensors", "statistics/t02.safetensors"} <= contents(
        tmp_path / "t02"
    ).keys()
    assert all(torch.equal(found.memory[name], held.memory[name]) for name in held.memory)
    assert all(torch.equal(found.rows[task].weight, rows[task].weight) for task in rows)
    for task in rows:
        assert all(torch.equal(*pair) for pair in zip(found.statistics[task], known, strict=True))
    assert torch.equal(found.head["t01"].weight, learned.head["t01"].weight)
