"""What is read is what ruamel, and so DVC, reads: values and their types. All else is refused in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import YAMLFileCorruptedError, parse_yaml
from dvc.utils.serialize import load_yaml as dvc_load
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipelines.project.error_text import user_message
from pipelines.project.errors import InputError
from pipelines.project.yaml_text import quoted
from pipelines.project.yaml_values import load_yaml
from tests.support.repository import REPOSITORY

# One each, between blanks.
SCALARS = r"""
no off n y yes on Yes NO true True TRUE tRUE false False ~ null Null NULL nULL nil
012 0012 08 0o14 0O14 0b101 0x1F 0X1f 12:30 12:30:45 1_000 _1 1_ 1__0 + - -0 +7 -012 0_ 0x 0b2 0o8
1. .5 -.5 +.5 1.5 1e3 1E3 1e-3 1.e3 .5e3 .5e+3 1_0.5 1e 1e+ . .. ... -1.5e-7 0.1.2 1,5 1.0e 12e03 0.e
.inf -.inf +.inf .Inf .INF .iNF inf .nan .NaN -.nan nan
2001-12-14 2001-1-1 2001-12-14t21:59:43.10-05:00 2001-13-45 0000-00-00 2001-12 2024-01-01x
<< = ! a:b a=b a#b #c c'd "0123" '1e3' "\/" "\x41\u00e9" '' "" 'it''s'
!!null !!binary !own !!python/name:os.system &a *nowhere @a `b %c
"""
PHRASES = [
    "2001-12-14 21:59:43.10 -5",
    "!!str 12",
    '!!int "12"',
    "!!float 3",
    "!!bool no",
    "!!int x",
    "x y # z",
]

TEXTS = [
    "",
    "a",
    "# nothing\n",
    "---\na: 1\n",
    "--- {a: 1}\n...\n",
    "a: 1\n--- \nb: 2\n",
    "%YAML 1.1\n---\na: no\nb: 012\n",
    "%YAML 1.2\n---\na: no\n",
    "\ufeffa: 1\n",
    "a: b\x85c: d\n",
    "a: 'b\u2028c'\n",
    "a: 1\na: 2\n",
    "a: 1\n'a': 2\n",
    "1: a\n1.0: b\n",
    "1: a\ntrue: b\n",
    "a: {b: 1, b: 2}\n",
    "a: [1, 2\n",
    "a: b: c\n",
    "a:\n\tb: 1\n",
    "a:\tb\n",
    "a: 'b\n",
    "a: &x [1]\nb: *x\n",
    "a: &x {b: 1}\nc:\n  <<: *x\n  d: 2\n",
    "a: &x {b: 1}\nc: {<<: [*x], b: 2}\n",
    "&x a: *x\n",
    "a: &x [*x]\n",
    "? a\n: b\n",
    "? [1, 2]\n: b\n",
    "? {a: 1}\n: b\n",
    "{a: 1, b}\n",
    "{a:1, b:c}\n",
    '{"a":1}\n',
    "[a:b, c: d]\n",
    "[a, b,]\n",
    "- a\n- - b\n  - c\n-\n  d: e\n",
    "a:\n- b\n-\n",
    "a:\nb:\n",
    "a: |\n  b\n   c\n\nd: >-\n  e\n  f\n\n  g\n",
    "a: |+\n  b\n\n\nc: |2\n    d\n",
    "a: b\n  c\n  d\ne: 'f\n\n  g'\n",
    "ü: ñ\n日本: \U0001f600\n",
    "a: 12\n\nb: !!map {c: d}\n",
    "a: @b\n",
    "a: `b\n",
    "a: %b\n",
    "a: *b\n",
    "a: b\x00\n",
    "a: 'b\x07'\n",
    "a: b\r\nc: d\re: f\n",
    "a: b #c\nd: e#f\n",
    "null: 1\n~: 2\n",
    "no: 1\n2001-01-01: 2\n",
    "a: !!set {b, c}\n",
    "a: !!omap [b: 1]\n",
]


REFUSED_HERE = (
    "anchor or alias",
    "a tag",
    "a date, or of a meaning",
    "directive",
    "as a key",
    "in brackets, which DVC does not take",
    "which YAML does not take",
)
"""What ruamel reads and this program does not, as its lines say it."""


def by_ruamel(text: str) -> object:
    return YAML(typ="safe", pure=True).load(text)


def assert_read_alike(text: str) -> None:
    """Hold that a text is what ruamel finds, or is refused in one line: as ruamel refuses it, or as more than plain.

    Compared in a form in which nothing equals what it is not: 1, 1.0 and true; nan is itself.
    """
    try:
        found = repr(load_yaml(text, origin="params.yaml"))
    except InputError as refused:
        line = user_message(refused)
        assert line
        assert line.startswith("params.yaml: line ")
        if not any(words in line for words in REFUSED_HERE):
            with pytest.raises((YAMLError, ValueError)):
                by_ruamel(text)
    else:
        assert found == repr(by_ruamel(text))


@pytest.mark.parametrize("scalar", [*SCALARS.split(), *PHRASES])
@pytest.mark.parametrize("form", ["{}\n", "a: {}\n", "- {}\n", "{{a: {}, b: [{}]}}\n", "? {}\n: b\n"])
def test_a_scalar_is_what_ruamel_finds(scalar: str, form: str) -> None:
    assert_read_alike(form.replace("{}", scalar).replace("{{", "{").replace("}}", "}"))


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_what_ruamel_finds(text: str) -> None:
    assert_read_alike(text)


@pytest.mark.parametrize(
    "text", ["# it's\there!\na: 1 #\t&b\n", "a: 'b\tc'\n", "a: |\n  b\tc\nd: 1\n", "\ufeffa: 1\n"]
)
def test_tabs_and_signs_in_comments_and_quotes_are_text(text: str) -> None:
    assert load_yaml(text, origin="") == by_ruamel(text)


@pytest.mark.parametrize("text", ["a: b\tc\n", "a: b\t\n", "a: b\t# c\n", "a: {b: c,\td: e}\n", "a:\tb\n"])
def test_a_tab_between_values_is_refused_with_its_line(text: str) -> None:
    with pytest.raises(InputError, match="x: line 2: a tab between values"):
        load_yaml(f"# \t\n{text}", origin="x")


def test_a_colon_in_a_word_in_brackets_is_refused_as_dvc_does(tmp_path: Path) -> None:
    """ruamel alone reads it, and DVC, which reads with ruamel's parser in C where that is installed, does not."""
    (tmp_path / "params.yaml").write_text("a: [b:c, d]\n")
    with pytest.raises(YAMLFileCorruptedError):
        dvc_load(tmp_path / "params.yaml")
    with pytest.raises(
        InputError, match=r'line 1: "b:c" in brackets, which DVC does not take; write it in quotes'
    ):
        load_yaml("a: [b:c, d]\n", origin="x")
    assert load_yaml("a:\n- b:c\n", origin="x") == {"a": ["b:c"]}


@pytest.mark.parametrize(
    "name", ["12:30", "a:b", "? q", "- z", "no", "1e3", "007", "#a", "[x]", "a, b", "می\u200cخواهم"]
)
def test_a_class_that_stands_on_a_line_of_its_own_outlives_an_experiment(name: str, tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(f"seed: 1\nclasses:\n- {quoted(name)}\n", encoding="utf-8")
    apply_overrides(path, ["seed=2"])
    assert dvc_load(path) == {"seed": 2, "classes": [name]}
    assert load_yaml(path.read_text(encoding="utf-8"), origin="") == {"seed": 2, "classes": [name]}


def test_the_files_of_the_project_are_read_as_dvc_reads_them() -> None:
    paths = [
        REPOSITORY / "params.yaml",
        REPOSITORY / "dvc.yaml",
        *(REPOSITORY / "experiments").rglob("*.yaml"),
    ]
    assert len(paths) > 2
    for path in paths:
        text = path.read_text(encoding="utf-8")
        assert repr(load_yaml(text, origin=str(path))) == repr(parse_yaml(text, path))
