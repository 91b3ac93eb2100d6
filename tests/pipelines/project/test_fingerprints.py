"""A fingerprint changes with every edit that can change a result, and with no other."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.project import fingerprints
from pipelines.project.fingerprints import (
    Definition,
    Fingerprint,
    fingerprint,
    fingerprint_of,
    stage_fingerprint,
)
from pipelines.project.layout import CODE_MEMORY, STAGES
from pipelines.stages.fit import fit
from tests.support.repository import REPOSITORY


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small program in place of this one; its modules may be written at any time."""
    monkeypatch.setattr(fingerprints, "_root", lambda package: tmp_path / package)
    for package in fingerprints.PACKAGES:
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("")
    yield tmp_path
    forget()


def forget() -> None:
    for function in (fingerprints._module, fingerprints._content):
        function.cache_clear()
    fingerprints._FOUND.clear()


def of(program: Path, **modules: str) -> str:
    """The fingerprint of `pipelines.work.work` once these modules say so; a double underscore is a dot."""
    for name, text in modules.items():
        path = program.joinpath(*name.split("__")).with_suffix(".py")
        path.parent.mkdir(exist_ok=True)
        (path.parent / "__init__.py").touch()
        path.write_text(text)
    forget()
    return fingerprint("pipelines.work", "work").text


WORK = """
from sdlora.rule import LIMIT, better
def work(n):
    return better(n) if n > LIMIT else n
"""
RULE = """
LIMIT = 3
def better(n):
    return n + 1
def other(n):
    return n
"""


def test_it_changes_with_all_that_is_referred_to_and_with_nothing_else(program: Path) -> None:
    first = of(program, pipelines__work=WORK, sdlora__rule=RULE)
    assert of(program, sdlora__rule=RULE.replace("LIMIT = 3", "LIMIT = 4")) != first
    assert of(program, sdlora__rule=RULE.replace("n + 1", "n + 2")) != first
    assert of(program, sdlora__rule=RULE.replace("return n\n", "return -n\n")) == first


@pytest.mark.parametrize(
    ("work", "rule"),
    [
        pytest.param(WORK.replace("else n", "else n  # often"), RULE, id="comment"),
        pytest.param(WORK.replace("def work(n):", 'def work(n):\n    """Do it."""'), RULE, id="docstring"),
        pytest.param(WORK.replace("def work(n):", "def work(n: int) -> int:"), RULE, id="type-hints"),
        pytest.param(
            WORK, RULE.replace("LIMIT = 3", 'LIMIT = 3\n"""From here on."""'), id="text-below-a-constant"
        ),
        pytest.param(
            WORK.replace("better", "improved"), RULE.replace("better", "improved"), id="renamed-function"
        ),
        pytest.param(
            "def work(n):\n    from sdlora import rule\n    return rule.better(n) if n > rule.LIMIT else n\n",
            RULE,
            id="imported-where-it-is-used",
        ),
        pytest.param(WORK, "import os\nLIMIT = 3\n\n\n\ndef better(n): return (n + 1)\n", id="formatting"),
    ],
)
def test_what_changes_no_result_changes_no_fingerprint(program: Path, work: str, rule: str) -> None:
    first = of(program, pipelines__work=WORK, sdlora__rule=RULE)
    assert of(program, pipelines__work=work, sdlora__rule=rule) == first


def test_a_moved_or_divided_module_changes_nothing(program: Path) -> None:
    first = of(program, pipelines__work=WORK, sdlora__rule=RULE)
    moved = of(
        program,
        pipelines__work="from sdlora.parts.limits import LIMIT\nfrom sdlora.rule import better\n"
        + WORK.partition("better\n")[2],
        sdlora__rule="def better(n):\n    return n + 1\n",
        sdlora__parts__limits="LIMIT = 3\n",
    )
    assert moved == first


@pytest.mark.parametrize(
    ("text", "edited"),
    [
        pytest.param(
            "import math\ndef work(n): return math.floor(n)\n", "math.ceil(n)", id="a-library's-function"
        ),
        pytest.param("from math import floor as f\ndef work(n): return f(n)\n", None, id="a-library's-name"),
        pytest.param(
            "import os\nos.environ['A'] = '1'\ndef work(n): return n\n", None, id="statement-of-the-module"
        ),
        pytest.param("A = {}\nA['b'] = 1\ndef work(n): return A\n", None, id="entry-of-a-table"),
        pytest.param(
            "A = {}\nfor n in 'bc':\n    A.update({n: '1'})\ndef work(n): return A\n",
            None,
            id="loop-over-a-table",
        ),
    ],
)
def test_what_decides_from_outside_the_function_counts(program: Path, text: str, edited: str | None) -> None:
    changed = {
        "math.floor(n)": "math.ceil(n)",
        "import floor": "import ceil",
        "'1'": "'2'",
        "= 1": "= 2",
    }
    before, after = next(pair for pair in changed.items() if pair[0] in text)
    first = of(program, pipelines__work=text)
    assert of(program, pipelines__work=text.replace(before, after)) != first


def test_a_module_used_as_a_value_stands_for_all_that_it_defines(program: Path) -> None:
    work = "from sdlora import rule\ndef work(n): return getattr(rule, n)\n"
    first = of(program, pipelines__work=work, sdlora__rule=RULE)
    assert of(program, sdlora__rule=RULE.replace("return n\n", "return -n\n")) != first


def test_functions_that_call_each_other_have_a_fingerprint(program: Path) -> None:
    text = "def work(n): return other(n - 1) if n else 0\ndef other(n): return work(n - 1) if n else 1\n"
    first = of(program, pipelines__work=text)
    assert of(program, pipelines__work=text.replace("else 1", "else 2")) != first


def test_packaged_files_count_by_their_content(program: Path) -> None:
    text = (
        'from importlib import resources\ndef work(): return (resources.files("sdlora") / "data").iterdir()\n'
    )
    (program / "sdlora" / "data").mkdir()
    (program / "sdlora" / "data" / "words").write_text("one")
    first = of(program, pipelines__work=text)
    (program / "sdlora" / "data" / "words").write_text("two")
    assert of(program) != first
    keyed = of(program, pipelines__work=text.replace('"data")', '"data" / KEY)') + "KEY = 1\n")
    (program / "sdlora" / "data" / "words").write_text("three")
    assert of(program) == keyed


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("from pathlib import Path\ndef work(): return Path(__file__).parent\n", id="file"),
        pytest.param(
            'from importlib import resources\ndef work(): return resources.files("sdlora")\n',
            id="bare-package",
        ),
        pytest.param(
            'from importlib import resources\ndef work(): return resources.files("sdlora") / "no"\n',
            id="no-such-file",
        ),
        pytest.param("from sdlora import gone\ndef work(): return gone\n", id="no-such-definition"),
    ],
)
def test_what_cannot_be_followed_is_refused(program: Path, text: str) -> None:
    with pytest.raises(ValueError, match=r"packaged|__file__|definition"):
        of(program, pipelines__work=text)


@pytest.mark.parametrize("kind", STAGES)
def test_every_decision_that_a_stage_depends_on_changes_its_fingerprint(kind: str) -> None:
    """Each comparison is turned around and each constant is replaced, in the syntax tree, one at a time."""
    found = stage_fingerprint(kind)
    silent = []
    for definition in found.definitions:
        module = fingerprints._module(definition.module)
        assert module is not None
        was = fingerprints._content.__wrapped__(definition).sha256
        for statement in module.statements[definition.name]:
            for where in mutations(statement):
                with contextlib.suppress(ValueError, ImportError):  # no such file or package
                    if fingerprints._content.__wrapped__(definition).sha256 == was:
                        silent.append(f"{definition}: {where}")
    assert not silent


def mutations(statement: ast.stmt) -> Iterator[str]:
    """Change one decision after the other, for as long as the caller looks at it."""
    skipped = {id(node) for node in without_meaning(statement)}
    for node in ast.walk(statement):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Compare):
            operator = node.ops[0]
            node.ops[0] = ast.NotEq() if isinstance(operator, ast.Eq) else ast.Eq()
            yield f"line {node.lineno}: {ast.unparse(node)}"
            node.ops[0] = operator
        elif isinstance(node, ast.Constant):
            value = node.value
            node.value = f"not {value!r}"
            yield f"line {node.lineno}: {value!r}"
            node.value = value


def without_meaning(statement: ast.stmt) -> Iterator[ast.AST]:
    """The docstrings, and the type hints of functions."""
    for node in ast.walk(statement):
        hints: list[ast.AST | None] = []
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            hints = [node.returns]
        elif isinstance(node, ast.arg):
            hints = [node.annotation]
        elif (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            hints = [node]
        for hint in hints:
            if hint is not None:
                yield from ast.walk(hint)


def test_what_turns_params_into_settings_is_part_of_the_key() -> None:
    for kind, section in (
        ("fit", "Adapter"),
        ("freeze", "Adapter"),
        ("evaluate", "Evaluation"),
        ("gate", "Gate"),
    ):
        names = {definition.name for definition in stage_fingerprint(kind).definitions}
        assert {section, "read_params", "read_yaml"} <= names


@pytest.mark.parametrize("kind", STAGES)
def test_a_stage_does_not_depend_on_who_runs_it(kind: str) -> None:
    """Who launches a stage, keeps its cost, shows its progress or reports its end decides no byte of its result."""
    above = (
        "pipelines.cli.",
        "pipelines.orchestration.",
        "pipelines.ledger.journal.",
        "pipelines.runtime.progress_bar.",
        "pipelines.runtime.stage_outcome.",
        "pipelines.project.error_text.user_message",
    )
    found = [str(definition) for definition in stage_fingerprint(kind).definitions]
    assert not [name for name in found if name.startswith(above)]


def test_a_stage_does_not_depend_on_the_settings_of_others_nor_on_who_shows_its_progress() -> None:
    names = {definition.name for definition in stage_fingerprint("fit").definitions}
    assert not names & {"Workers", "Gate", "Evaluation", "Data", "ProgressBar", "ProgressArtifact", "Params"}


def test_no_stage_calls_code_of_this_program_by_a_name_in_a_text() -> None:
    """Such a call could not be followed."""
    found = []
    definitions = {definition for kind in STAGES for definition in stage_fingerprint(kind).definitions}
    for definition in definitions - {Definition(fingerprints.__name__, "PACKAGES")}:
        module = fingerprints._module(definition.module)
        assert module is not None
        found += [
            f"{definition}: {node.value}"
            for statement in module.statements[definition.name]
            for call in ast.walk(statement)
            if not (isinstance(call, ast.Call) and ast.unparse(call.func) == "resources.files")
            for node in ast.iter_child_nodes(call)
            if isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and node.value.startswith(("pipelines.", "sdlora."))
        ]
    assert not found


def test_what_is_remembered_of_the_sources_is_found_again_without_reading_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    CODE_MEMORY.parent.mkdir()
    found = []
    for _ in range(2):
        forget()
        fingerprints._stage_fingerprints.cache_clear()
        found.append(stage_fingerprint("fit"))
    assert found[0] == found[1]
    assert fingerprint_of(fit.fn) is found[1]
    assert fingerprints._module.cache_info().currsize == 0


def test_a_text_has_a_line_for_each_definition_and_names_none() -> None:
    found: Fingerprint = stage_fingerprint("gate")
    assert len(found.text.splitlines()) == len(found.definitions) == len(set(found.definitions))
    assert "gate" not in found.text


def test_no_module_changes_another_when_it_is_loaded() -> None:
    """Only the statements of modules that a reference reaches are followed; so none may do more than define names."""
    doing = {}
    for package in fingerprints.PACKAGES:
        for file in (REPOSITORY / package).rglob("*.py"):
            name = (
                file.relative_to(REPOSITORY)
                .with_suffix("")
                .as_posix()
                .replace("/", ".")
                .removesuffix(".__init__")
            )
            module = fingerprints._module(name)
            assert module is not None
            doing[name] = [ast.unparse(statement) for statement in module.statements.get("", [])]
    allowed = (
        "if __name__ == '__main__'",
        "app.add_typer(",
    )  # what runs as a program, and the command line's groups
    assert not {
        name: others
        for name, statements in doing.items()
        if (others := [text for text in statements if not text.startswith(allowed)])
    }
