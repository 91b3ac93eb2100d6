"""The notebook of the documentation runs, and shows what it says it shows."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import pytest

from tests.support.repository import REPOSITORY

NOTEBOOK = REPOSITORY / "docs/tutorial/notebook.ipynb"


def run(source: str, names: dict[str, Any]) -> tuple[str, str, int]:
    """What a cell prints, its value, and how many pictures it draws, as Jupyter has them."""
    *body, last = ast.parse(source).body
    found, printed = None, io.StringIO()
    with contextlib.redirect_stdout(printed):
        shown = isinstance(last, ast.Expr)
        exec(compile(ast.Module(body if shown else [*body, last], []), "cell", "exec"), names)
        if isinstance(last, ast.Expr):
            found = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    drawn = len(plt.get_fignums())
    plt.close("all")
    return printed.getvalue(), "" if found is None else repr(found), drawn


def words(text: str) -> list[str]:
    """A text without its numbers, which another machine rounds otherwise, and without its layout."""
    return re.sub(r"[\d.]+", "#", text).split()


@pytest.fixture
def agg() -> Iterator[None]:
    """Figures are drawn without a screen."""
    before = plt.get_backend()
    plt.switch_backend("agg")
    yield
    plt.switch_backend(before)


@pytest.mark.usefixtures("agg")
def test_the_notebook_shows_what_its_cells_make() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] != "code":
            continue
        printed, value, drawn = run("".join(cell["source"]), names)
        outputs = cell["outputs"]
        streams = ["".join(o["text"]) for o in outputs if o.get("name") == "stdout"]
        values = ["".join(o["data"]["text/plain"]) for o in outputs if o["output_type"] == "execute_result"]
        assert (words(printed), words(value)) == (words("".join(streams)), words("".join(values)))
        assert drawn == sum("image/png" in o.get("data", {}) for o in outputs)
    assert names["accuracy"][-1] > 0.9
