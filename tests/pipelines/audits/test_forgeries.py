"""Which check finds which forgery: the table of docs/explanation/auditing.md is what these say."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from pipelines.audits.rederivation import derived_stages, run_again
from pipelines.audits.sign import check_signatures, sign
from pipelines.audits.verify import StepVerification, verify
from pipelines.ledger.journal import read_journal
from pipelines.project.errors import FaultError, InputError
from pipelines.project.files import sha256_of
from pipelines.project.layout import GATES, StageName
from pipelines.project.params import Params
from tests.support.forgeries import FORGERIES
from tests.support.repository import REPOSITORY

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("preloaded"),
    pytest.mark.skipif(shutil.which("ssh-keygen") is None, reason="OpenSSH is not installed"),
]
PAGE = REPOSITORY / "docs/explanation/auditing.md"
BEGIN, END = "<!-- forgeries: written by tests/pipelines/audits/test_forgeries.py -->\n", "<!-- end -->\n"
FINDERS = ("`verify`", "`--recompute`", "`--retrain`", "`--expect`", "signature")


@pytest.fixture(scope="module")
def signed(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished chain that somebody has signed, without what no check here reads."""
    root = tmp_path_factory.mktemp("signed")
    shutil.copytree(
        finished[0], root / "project", ignore=shutil.ignore_patterns("pipelines", "sdlora", "cache")
    )
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", root / "key"], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root / "project")
        sign(root / "key")
        for file in Path("artifacts").rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
    return root / "project"


@pytest.fixture(scope="module")
def same(signed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Notes on all stages of that chain: run again they give the same."""
    notes = tmp_path_factory.mktemp("notes")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(signed)
        params = Params.load()
        fits = [StageName("fit", step) for step in params.tasks]
        run_again(params, [*derived_stages(params), *fits], notes=notes)
    return notes


def found_by(notes: Path, head: str) -> list[str]:
    """What each of `FINDERS` says of the chain in the working directory, as cells of a table.

    Nothing is run again of a chain that `verify` has found already: the command stops there.
    """
    verified = finds(lambda: [*map(holding, verify()), read_journal()])
    run = {False: "–", True: "found"}
    cells = [run[verified], "", ""]
    if not verified:
        params = Params.load()
        derived = derived_stages(params)
        frozen, others = (
            [stage for stage in derived if (stage.kind == "freeze") is which] for which in (True, False)
        )
        fits = [StageName("fit", step) for step in params.tasks]
        again = finds(lambda: run_again(params, frozen, notes=notes))
        for column, stages in ((1, others), (2, fits)):
            cells[column] = run[again or finds(partial(run_again, params, stages, notes=notes))]
    signed = finds(lambda: list(check_signatures(heads(), None)))
    return [*cells, run[head not in heads().values()], run[signed]]


def holding(finding: StepVerification) -> None:
    if finding.fault:
        raise FaultError(finding.fault)


def heads() -> dict[str, str]:
    return {step: sha256_of(GATES / step / "verdict.json") for step in ("t00", *Params.load().tasks)}


def finds(check: Callable[[], object]) -> bool:
    try:
        check()
    except (FaultError, InputError):
        return True
    return False


def test_the_page_says_which_check_finds_which_forgery(
    signed: Path, same: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(signed)
    head = heads()["t02"]
    assert set(found_by(same, head)) == {"–"}
    rows = []
    for index, (what, forge) in enumerate(FORGERIES.items()):
        folder = shutil.copytree(signed, tmp_path / str(index))
        monkeypatch.chdir(folder)
        forge()
        found = found_by(same, head)
        assert "found" in found, f"nothing finds {what}"
        rows.append(f"| {what} | {' | '.join(found)} |")
        monkeypatch.chdir(tmp_path)
        shutil.rmtree(folder)
    lines = [
        f"| changed | {' | '.join(FINDERS)} |",
        "| --- | " + " | ".join("---" for _ in FINDERS) + " |",
        *rows,
    ]
    table = "\n".join(lines) + "\n"
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    written = f"{before}{BEGIN}\n{table}\n{END}{rest.partition(END)[2]}"
    if "SDLORA_WRITE_TABLES" in os.environ:
        PAGE.write_text(written, encoding="utf-8")
    assert written == text, table
