"""What is read of a chain's folders is right, or refused in one line: searched with mutations of right ones."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdlora.change import read_update
from sdlora.drift import DriftMap
from sdlora.fit_folder import EpochRecord, read_curve, read_fit, read_fit_description, write_fit
from sdlora.head import HeadBlock
from sdlora.ledger import RECORD, file_sha256, read_own_record, record_hash
from sdlora.loading import read_step, timm_classifier
from sdlora.methods import FitResult
from sdlora.model_folder import read_model, write_model
from sdlora.records import read_bounded_json
from sdlora.statistics import class_statistics
from sdlora.tensors import read_tensors, write_tensors
from tests.support.chains import make_chain
from tests.support.fuzzing import SEARCH, assert_answered

pytestmark = pytest.mark.fuzz

VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 3),
    st.sampled_from([-(2**80), 2**80, 1.5, -0.0, 1e300]),
    st.sampled_from(["", "t00", "t01", "t09", "../../etc/passwd", "/etc/passwd", "a\nb", "\u2028", "\ud800"]),
    st.sampled_from(["vit_base_patch16_224", "local-dir:/etc", "hf-hub:a/b", "x" * 5000, "0" * 64]),
    st.recursive(
        st.integers(0, 3), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner)
    ),
)
WHOLE = [
    b"",
    b"null",
    b"5",
    b'"text"',
    b"[]",
    b"{}",
    b"\xff\xfe\x00",
    b"NaN",
    b"9" * 5000,
    b"[" * 100_000,
    b'{"a":' * 100_000,
    b"[" * 70 + b"]" * 70,
    b" " * 10_000_000,
]


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders t00, t02 and fit of a chain with all that a folder may hold."""
    root = tmp_path_factory.mktemp("right")
    models = make_chain(root, "tiny_vit")
    learned, _ = read_model(models / "t02")
    before, _ = read_model(models / "t01")
    own = read_own_record(models / "t02")
    rows = {task: HeadBlock(block.weight + 1, block.bias) for task, block in learned.head.items()}
    known = class_statistics(torch.randn(12, 24), torch.arange(12) % 2, rank=2)
    shutil.rmtree(models / "t02")
    (models / "t02").mkdir()
    write_model(
        models / "t02",
        replace(
            learned,
            settled=rows,
            statistics={"t02": known},
            drift={"t02": DriftMap(torch.eye(24), torch.zeros(24))},
            memory={"blocks.0.attn": torch.eye(24)[:, :3].contiguous()},
        ),
        own,
        before=before,
    )
    (models / "fit").mkdir()
    write_fit(
        models / "fit",
        FitResult(
            task="t02",
            factors=learned.directions["t02"],
            magnitudes=learned.magnitudes,
            head={"t02": learned.head["t02"]},
        ),
        curve=[EpochRecord(4, 1, 0.5, 0.5, 0.1)],
        description={
            "task": "t02",
            "classes": own["classes"],
            "split": {"images": "0" * 64},
            "adapter": {},
            "code": "0" * 64,
            "training": {},
            "seed": 1,
        },
    )
    return models


@pytest.fixture
def copied(right: Path, tmp_path: Path) -> Callable[[], Path]:
    """Makes a new copy of the right folders, in place of the last."""

    def make() -> Path:
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        for name in ("t00", "t01", "t02", "fit"):
            shutil.copytree(right / name, tmp_path / "m" / name)
        return tmp_path / "m"

    return make


def use_model(models: Path) -> None:
    """Read a step as everybody does, and hold that what is read can be used."""
    read_update(models / "t02")
    read_model(models / "t02", statistics=True)
    step = read_step(models / "t02")
    with torch.no_grad():
        logits = timm_classifier(step)(torch.full((1, 3, 16, 16), 0.3))
    assert logits.shape == (1, len(step.classes))
    assert logits.isfinite().all()


def use_fit(models: Path) -> None:
    described = read_fit_description(models / "fit")
    read_curve(models / "fit")
    fit = read_fit(models / "fit", described, tasks=["t01", "t02"])
    assert all(part.isfinite().all() for pair in fit.factors.values() for part in pair)
    assert list(fit.head) == ["t02"]


def hold_answered(work: Callable[[Path], None], models: Path) -> None:
    try:
        work(models)
    except (OSError, ValueError) as error:
        assert_answered(error)


def places(value: Any, here: tuple[str | int, ...] = ()) -> Iterator[tuple[str | int, ...]]:  # noqa: ANN401
    """Every place of a JSON value but for its root."""
    if here:
        yield here
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, child in items:
        yield from places(child, (*here, key))


def mutated(data: st.DataObject, original: bytes) -> bytes:
    """A JSON file with one thing changed."""
    value = json.loads(original)
    kind = data.draw(st.sampled_from(["replace", "replace", "drop", "rename", "twice", "whole", "cut"]))
    if kind == "whole":
        return data.draw(st.sampled_from(WHOLE))
    if kind == "cut":
        return original[: data.draw(st.integers(0, len(original) - 1))]
    if kind == "twice":
        return b'{"step": "t02", "name": "x", ' + original.lstrip()[1:]
    *way, last = data.draw(st.sampled_from(list(places(value))))
    home = value
    for key in way:
        home = home[key]
    held = copy.deepcopy(home[last])
    if kind == "replace":
        home[last] = data.draw(VALUES)
    else:
        del home[last]
        if kind == "rename" and isinstance(home, dict):
            home[data.draw(st.sampled_from(["", "../x", "x" * 2000, "a\nb", "head/t09.safetensors"]))] = held
    return json.dumps(value).encode()


def changed_tensor(data: st.DataObject, tensors: dict[str, Tensor]) -> None:
    """Change one tensor of a file in place."""
    name = data.draw(st.sampled_from(sorted(tensors)))
    held = tensors.pop(name)
    changes: dict[str, Callable[[], Tensor]] = {
        "flat": held.flatten,
        "shorter": lambda: held[:-1].clone(),
        "longer": lambda: torch.cat([held, held[:1]]),
        "turned": lambda: held.T.contiguous() if held.ndim == 2 else held[None].clone(),
        "empty": lambda: held[:0].clone(),
        "scalar": lambda: torch.tensor(1.0),
        "half": held.half,
        "whole": held.int,
        "double": held.double,
        "nan": lambda: torch.where(torch.arange(held.numel()).view(held.shape) == 0, torch.nan, held),
        "infinite": lambda: torch.where(torch.arange(held.numel()).view(held.shape) == 0, torch.inf, held),
    }
    kind = data.draw(st.sampled_from([*changes, "gone", "renamed", "added"]))
    if kind in changes:
        tensors[name] = changes[kind]()
    elif kind != "gone":
        tensors |= {"another": held.clone()} if kind == "renamed" else {name: held, "another": held.clone()}


def rehash(models: Path) -> None:
    """Let the records name the files as they are, so that nothing but their content can be wrong."""
    previous = None
    for step in ("t00", "t01", "t02"):
        record = json.loads((models / step / RECORD).read_bytes())
        record["files"] = {name: file_sha256(models / step / name) for name in record["files"]}
        record |= {"previous": previous, "backbone": file_sha256(models / "t00/backbone.safetensors")}
        (models / step / RECORD).write_text(json.dumps(record))
        previous = record_hash(models / step)


def test_the_folders_that_are_mutated_are_right(copied: Callable[[], Path]) -> None:
    use_model(copied())
    use_fit(copied())


@SEARCH
@given(data=st.data())
def test_a_mutated_record_is_read_or_refused_in_one_line(
    copied: Callable[[], Path], data: st.DataObject
) -> None:
    models = copied()
    path = models / data.draw(st.sampled_from(["t02", "t02", "t00"])) / RECORD
    path.write_bytes(mutated(data, path.read_bytes()))

    hold_answered(use_model, models)


@SEARCH
@given(data=st.data())
def test_a_mutated_description_of_a_backbone_is_read_or_refused_in_one_line(
    copied: Callable[[], Path], data: st.DataObject
) -> None:
    models = copied()
    path = models / "t00/backbone.json"
    path.write_bytes(mutated(data, path.read_bytes()))
    rehash(models)

    hold_answered(use_model, models)


@SEARCH
@given(data=st.data())
def test_a_mutated_description_of_a_fit_is_read_or_refused_in_one_line(
    copied: Callable[[], Path], data: st.DataObject
) -> None:
    models = copied()
    path = models / "fit" / data.draw(st.sampled_from(["fit.json", "curve.csv"]))
    if path.suffix == ".json":
        path.write_bytes(mutated(data, path.read_bytes()))
    else:
        cells = ["nan", "1e999", "", "x", "9" * 5000, "step,epoch", "\0", '"', "1,1,1,1,1\n1,1"]
        path.write_text(path.read_text().replace("0.5", data.draw(st.sampled_from(cells)), 1))

    hold_answered(use_fit, models)


@SEARCH
@given(data=st.data())
def test_mutated_tensors_are_refused_in_one_line(copied: Callable[[], Path], data: st.DataObject) -> None:
    models = copied()
    files = sorted(path.relative_to(models) for path in models.rglob("*.safetensors"))
    path = models / data.draw(st.sampled_from([file for file in files if read_tensors(models / file)]))
    whole = path.read_bytes()
    if data.draw(st.integers(0, 4)) == 0:
        cut = data.draw(st.integers(0, len(whole) - 1))
        path.write_bytes(data.draw(st.sampled_from([whole[:cut], whole[:cut] + b"{" + whole[cut:]])))
    else:
        tensors = read_tensors(path)
        changed_tensor(data, tensors)
        write_tensors(path, tensors)
    rehash(models)

    if path.parent.name == "fit":
        hold_answered(use_fit, models)
    else:
        hold_answered(use_model, models)


@pytest.mark.parametrize("content", WHOLE, ids=lambda content: repr(content[:9]))
def test_a_json_file_of_any_content_is_read_or_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "it.json"
    path.write_bytes(content)
    try:
        assert read_bounded_json(path) == json.loads(content)
    except ValueError as error:
        assert_answered(error)


@pytest.mark.parametrize("name", [RECORD, "head/t02.safetensors", "directions/t02.safetensors"])
def test_a_pipe_in_a_model_folder_is_refused_at_once(name: str, copied: Callable[[], Path]) -> None:
    models = copied()
    (models / "t02" / name).unlink()
    os.mkfifo(models / "t02" / name)

    with pytest.raises(ValueError, match="not a regular file"):
        read_model(models / "t02")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["head/t02", "classifier", "statistics/t02", "drift/t02", "directions/t02", "magnitudes", "memory"],
)
def test_a_row_that_is_no_number_is_refused_with_its_file_and_tensor(
    name: str, value: float, copied: Callable[[], Path]
) -> None:
    models = copied()
    path = models / f"t02/{name}.safetensors"
    tensors = read_tensors(path)
    key = next(key for key, tensor in tensors.items() if tensor.is_floating_point())
    tensors[key][-1] = value
    write_tensors(path, tensors)
    rehash(models)

    with pytest.raises(ValueError, match=rf"{name}\.safetensors: {key} holds NaN or infinity"):
        read_model(models / "t02", statistics=True)


def test_a_format_of_a_later_version_is_refused_and_none_is_the_first(copied: Callable[[], Path]) -> None:
    models = copied()
    path = models / "t02" / RECORD
    record = json.loads(path.read_bytes())
    assert record.pop("format") == 2
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=r"step\.json: it lacks tasks"):
        read_model(models / "t02")
    path.write_text(json.dumps({**record, "format": 3}))

    with pytest.raises(ValueError, match=r"format is 3, expected 1 or 2; a newer version .* wrote it"):
        read_model(models / "t02")


def test_a_description_of_another_model_is_refused_in_one_line(copied: Callable[[], Path]) -> None:
    """Found by a search: the line had 357 characters."""
    models = copied()
    path = models / "t00/backbone.json"
    path.write_text(json.dumps({**json.loads(path.read_bytes()), "name": "vit_base_patch16_224"}))
    rehash(models)

    with pytest.raises(ValueError, match="not the weights of vit_base_patch16_224: it lacks") as refused:
        use_model(models)
    assert_answered(refused.value)


def test_directions_of_another_order_of_targets_are_refused(copied: Callable[[], Path]) -> None:
    """A magnitude would scale the direction of another target."""
    models = copied()
    path = models / "t02" / RECORD
    record = json.loads(path.read_bytes())
    record["targets"] = record["targets"][::-1]
    path.write_text(json.dumps(record))

    with pytest.raises(ValueError, match="made on another one"):
        use_model(models)
