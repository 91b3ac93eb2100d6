"""What no person writes into params.yaml is refused in one line, within two seconds."""

from __future__ import annotations

import itertools
import math
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipelines.project.errors import InputError
from pipelines.project.params import Params
from pipelines.project.yaml_text import quoted
from pipelines.project.yaml_values import load_yaml
from pipelines.sweeps.grid import read_axes
from tests.support.fuzzing import SEARCH, assert_answered
from tests.support.repository import REPOSITORY

SHIPPED = (REPOSITORY / "params.yaml").read_text(encoding="utf-8")
LAUGHS = ["l0: &l0 [a, a, a, a, a, a, a, a, a]"]
LAUGHS += [f"l{i}: &l{i} [" + ", ".join([f"*l{i - 1}"] * 9) + "]" for i in range(1, 10)]


WRITTEN_BY_NOBODY = {
    "itself": ("data: &a {b: *a}\n", 'line 1: an anchor or alias ("a")'),
    "laughs": ("\n".join(LAUGHS), 'line 1: an anchor or alias ("l0")'),
    "deep": ("data: " + "[" * 500 + "]" * 500, "line 1: more than 64 levels"),
    "deeper": ("data: " + "{a: " * 100_000 + "1" + "}" * 100_000, "more than 64 levels"),
    "deep-blocks": ("".join("  " * i + "a:\n" for i in range(200)), "line 65: more than 64 levels"),
    "deep-lists": ("- " * 100_000 + "a", "more than 64 levels"),
    "keys": ("".join(f"k{i}: 1\n" for i in range(100_000)), "more than 100,000 keys"),
    "unknown-keys": ("".join(f"k{i}: 1\n" for i in range(49_000)), "k0: unknown key"),
    "numbers-as-keys": ("".join(f"{i}: 1\n" for i in range(49_000)), "the key 0 is not text"),
    "comment": ("# " + "x" * 10_000_000 + "\nseed: 1\n", "larger than 4 MiB"),
    "value": ("seed: " + "x" * 4_000_000, "line 1: a text of 4,000,000 characters"),
    "key": ("? " + "x" * 1_000_000 + "\n: 1\n", "line 1: a text of 1,000,000 characters"),
    "long-key": ("? " + "x" * 60_000 + "\n: 1\n", "unknown key"),
    "long-number": ("seed: " + "9" * 60_000, "is not a number that can be read"),
    "long-hex-number": ("seed: 0x" + "f" * 60_000, "is not a number that can be read"),
    "number": ("seed: 1" + "0" * 98 + "\n", "seed: expected less than 4294967296, found 1000"),
    "date": ("seed: 2026-01-01\n", 'line 1: "2026-01-01" is a date'),
    "tag": ("seed: !!set {a, b}\n", "line 1: a tag"),
    "documents": ("seed: 1\n---\nseed: 1\n", "line 2: not valid YAML (a second document"),
    "block-as-key": ("? {a: 1}\n: 1\n", "line 1: not valid YAML (a block of keys as a key)"),
    "control-character": ("a: 'b\x07'\n", "line 1: the character U+0007"),
    "list-without-end": ("a: 1\nb: [\n" + "# c\n" * 900_000, "not valid YAML"),
    "quotes-without-end": ('seed: "' + "a\\\n" * 900_000, "not valid YAML"),
}


@pytest.mark.parametrize("case", WRITTEN_BY_NOBODY)
def test_what_nobody_writes_is_refused_in_one_line_within_two_seconds(case: str, tmp_path: Path) -> None:
    text, fault = WRITTEN_BY_NOBODY[case]
    path = tmp_path / "p.yaml"
    path.write_text(text, encoding="utf-8")
    started = time.process_time()
    with pytest.raises(InputError) as refused:
        Params.load(path)
    assert time.process_time() - started < 2
    assert fault in str(refused.value)
    assert_answered(refused.value)


def test_a_set_of_classes_is_refused() -> None:
    text = SHIPPED[: SHIPPED.index("tasks:\n")]
    with pytest.raises(InputError, match=r"tasks.t01.classes: expected a list, found a block of keys"):
        Params.parse(text + "tasks:\n  t01: {after: t00, source: data/one, classes: {a, b}}\n", origin="p")


def test_1000_tasks_are_read_within_two_seconds() -> None:
    keys = [f"t{number:02d}" for number in range(1001)]
    lines = [
        f"  {key}: {{after: {before}, source: data/raw/own, classes: [{', '.join(f'c{key}-{i}' for i in range(20))}]}}"
        for before, key in itertools.pairwise(keys)
    ]
    text = SHIPPED[: SHIPPED.index("tasks:\n")] + "\n".join(["tasks:", *lines]) + "\n"
    started = time.process_time()
    params = Params.parse(text, origin="params.yaml")
    assert time.process_time() - started < 2
    assert len(params.tasks) == 1000


def test_a_params_file_is_a_regular_one(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"params\.yaml: not a regular file"):
        Params.load(tmp_path / "params.yaml")


PIECES = [*"{}[]()&*!|>%@`'\"#:,-?~\t\n\r =<", "\x00", "\x85", "\u2028", "\ufeff", "\ud800", "\u200d", "é"]
PIECES += [
    ": ",
    "- ",
    "? ",
    "&a ",
    "*a",
    "!!set ",
    "<<: ",
    "---\n",
    "...\n",
    "null",
    "1e999",
    ".nan",
    "${seed}",
]
PIECES += ["0x", "t999", "\U0001f600", "  ", "\n\n", "2026-01-01", "../", "/", "x" * 300, "9" * 200]
PIECES += ["[" * 80, "{a: " * 80, "- " * 80]
_VALUES = st.recursive(
    st.sampled_from([None, True, 0, -1, 10**30, 0.5, float("nan"), float("inf"), "", "t01", "../x", "a" * 300, "${a}"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip


def _answer(text: str) -> Params | None:
    """What a text says, None where it is refused in one line."""
    try:
        return Params.parse(text, origin="params.yaml")
    except InputError as refused:
        assert_answered(refused)
        return None


@pytest.mark.fuzz
@SEARCH
@given(data=st.data())
def test_a_text_of_which_pieces_are_others_is_read_or_refused_in_one_line(data: st.DataObject) -> None:
    text = SHIPPED
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(text)))
        end = start + data.draw(st.sampled_from([0, 0, 1, 2, 5, 40, 400]))
        text = text[:start] + data.draw(st.sampled_from(PIECES)) + text[end:]
    _answer(text)


@pytest.mark.fuzz
@SEARCH
@given(data=st.data())
def test_a_tree_of_which_values_are_others_is_read_as_it_is_or_refused(data: st.DataObject) -> None:
    tree = load_yaml(SHIPPED, origin="")
    for _ in range(data.draw(st.integers(1, 3))):
        block, key = tree, data.draw(st.sampled_from(list(tree)))
        while isinstance(block[key], dict) and block[key] and data.draw(st.booleans()):
            block = block[key]
            key = data.draw(st.sampled_from(list(block)))
        block[key] = data.draw(_VALUES)
    _answer(_written(tree))


@pytest.mark.fuzz
@SEARCH
@given(st.lists(st.sampled_from([*PIECES, "seed", "=", ",", "1", "a"]), max_size=6).map("".join))
def test_the_values_of_a_sweep_are_read_or_refused_in_one_line(text: str) -> None:
    try:
        read_axes([f"training.epochs={text}"])
    except InputError as refused:
        assert_answered(refused)


def _written(value: object) -> str:
    """A value in YAML, all in lines' brackets."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_written(str(key))}: {_written(its)}" for key, its in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_written, value)) + "]"
    if isinstance(value, str):
        return quoted(value)
    if isinstance(value, float) and not math.isfinite(value):
        return f".{value}"
    return "null" if value is None else str(value).lower()
