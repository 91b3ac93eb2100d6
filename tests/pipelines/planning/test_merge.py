"""`sdlora merge`: two people's branches become one in which nothing of the first changes, or nothing is touched."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from pipelines.orchestration.run import run_pipeline
from pipelines.planning.merge import merge
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from tests.support.folders import replace
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import DVC_YAML, EVALUATE, FIT, REPORT, preload_nothing, ran

HEAD = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0]
FIRST = '  t01: {after: t00, source: images/a, classes: ["a"]}\n'
OURS = '  t02: {after: t01, source: images/b, classes: ["b"]}\n'
THEIRS = '  t02: {after: t01, source: images/c, classes: ["c"]}\n'
THEIRS += '  t03: {after: t02, source: images/d, classes: ["d"]}\n'


def git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


def lock(**entries: str) -> str:
    """A dvc.lock in which each stage has a command that tells the entries apart."""
    lines = [f"  {name.replace('_', '@')}:\n    cmd: {command}\n" for name, command in entries.items()]
    return "schema: '2.0'\nstages:\n" + "".join(lines)


def learn(*, params: str, message: str, **files: str) -> None:
    """Commit what a person has done: params.yaml, dvc.lock, a number, a line of the journal."""
    Path("params.yaml").write_text(params, encoding="utf-8")
    for name, text in files.items():
        path = Path({"lock": "dvc.lock", "metrics": "metrics.json", "journal": "ledger/journal.jsonl"}[name])
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    git("add", "-A")
    git("commit", "-qm", message)


@pytest.fixture
def begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one task, on the branch `ours`; `theirs` stands there too."""
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "tester")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "tester@example.org")
    monkeypatch.chdir(tmp_path)
    git("init", "-q", "-b", "ours")
    Path(".gitattributes").write_text((REPOSITORY / ".gitattributes").read_text())
    Path(".gitignore").write_text("/.sdlora/\n")
    Path("notes").write_text("first\n")
    learn(
        params=f"{HEAD}tasks:\n{FIRST}",
        message="first",
        lock=lock(fit_t01="first", report="first"),
        metrics="1\n",
        journal="first\n",
    )
    git("branch", "theirs")
    return tmp_path


def both_learn() -> None:
    """Both people add a `t02`; the second adds a `t03` too."""
    learn(
        params=f"{HEAD}tasks:\n{FIRST}{OURS}",
        message="ours",
        lock=lock(fit_t01="first", report="ours", fit_t02="ours"),
        metrics="2\n",
        journal="first\nours\n",
    )
    git("switch", "-q", "theirs")
    learn(
        params=f"{HEAD}tasks:\n{FIRST}{THEIRS}",
        message="theirs",
        lock=lock(fit_t01="first", report="theirs", fit_t02="theirs", fit_t03="theirs"),
        metrics="3\n",
        journal="first\ntheirs\n",
    )
    git("switch", "-q", "ours")


def test_the_seconds_tasks_come_after_those_of_the_first_and_are_to_be_learned(begun: Path) -> None:
    both_learn()
    lines = merge("theirs")
    tasks = Params.load().tasks
    assert {key: (task.after, task.source) for key, task in tasks.items()} == {
        "t01": ("t00", "images/a"),
        "t02": ("t01", "images/b"),
        "t03": ("t02", "images/c"),
        "t04": ("t03", "images/d"),
    }
    assert lines[:3] == ["theirs: merged", "t02 of theirs is t03 here", "t03 of theirs is t04 here"]
    assert Path("dvc.lock").read_text() == lock(fit_t01="first", report="ours", fit_t02="ours")
    assert Path("metrics.json").read_text() == "2\n"
    assert Path("ledger/journal.jsonl").read_text() == "first\nours\ntheirs\n"
    assert git("status", "--porcelain") == ""
    assert git("log", "-1", "--format=%P").split() == [git("rev-parse", "ours^"), git("rev-parse", "theirs")]


def test_what_only_one_side_changed_is_taken_with_its_comments(begun: Path) -> None:
    learn(
        params=f"{HEAD}tasks:\n{FIRST}{OURS}",
        message="ours",
        lock=lock(fit_t01="first", report="first", fit_t02="ours"),
    )
    git("switch", "-q", "theirs")
    changed = HEAD.replace("  rank: 10 ", "  rank: 4 ").replace("seed: 1993", "seed: 1993  # the papers' own")
    learn(params=f"{changed}tasks:\n{FIRST}", message="theirs", lock=lock(fit_t01="theirs", report="theirs"))
    git("switch", "-q", "ours")
    merge("theirs")
    assert Path("params.yaml").read_text() == f"{changed}tasks:\n{FIRST}{OURS}"
    assert Path("dvc.lock").read_text() == lock(fit_t01="theirs", report="theirs", fit_t02="ours")


def test_the_same_task_added_by_both_is_one(begun: Path) -> None:
    learn(params=f"{HEAD}tasks:\n{FIRST}{OURS}", message="ours")
    git("switch", "-q", "theirs")
    more = '  t03: {after: t02, source: images/d, classes: ["d"]}\n'
    learn(
        params=f"{HEAD}tasks:\n{FIRST}{OURS}{more}",
        message="theirs",
        lock=lock(fit_t01="first", report="theirs", fit_t02="theirs", fit_t03="theirs"),
    )
    git("switch", "-q", "ours")
    merge("theirs")
    assert Path("params.yaml").read_text() == f"{HEAD}tasks:\n{FIRST}{OURS}{more}".replace('"d"', "d")
    assert "fit@t03" in Path("dvc.lock").read_text()


def test_two_first_tasks_are_two_tasks(begun: Path) -> None:
    learn(params=f"{HEAD}tasks: {{}}\n", message="none")
    git("branch", "-f", "theirs")
    learn(params=f"{HEAD}tasks:\n{FIRST}", message="ours")
    git("switch", "-q", "theirs")
    another = FIRST.replace("images/a", "images/z").replace('"a"', '"z"')
    learn(params=f"{HEAD}tasks:\n{another}", message="theirs")
    git("switch", "-q", "ours")
    assert "t01 of theirs is t02 here" in merge("theirs")
    assert {key: task.classes for key, task in Params.load().tasks.items()} == {"t01": ("a",), "t02": ("z",)}


def test_a_branch_that_only_went_on_is_taken_as_it_is(begun: Path) -> None:
    git("switch", "-q", "theirs")
    learn(params=f"{HEAD}tasks:\n{FIRST}{THEIRS}", message="theirs")
    git("switch", "-q", "ours")
    merge("theirs")
    assert git("rev-parse", "ours") == git("rev-parse", "theirs")
    assert merge("theirs") == ["theirs: nothing to merge, all of it is here"]


def test_an_approval_of_a_step_that_is_learned_anew_is_not_taken(begun: Path) -> None:
    both_learn()
    git("switch", "-q", "theirs")
    entry = f'{{by: Ana, why: fine, evaluation: "{64 * "0"}", limits: [fall]}}'
    replace(Path("params.yaml"), "approvals: {}", f"approvals:\n  t02: {entry}")
    git("commit", "-qam", "approved")
    git("switch", "-q", "ours")
    assert "approvals: not taken of t02: it is learned anew, with other results" in merge("theirs")
    assert not Params.load().approvals


REFUSED: dict[str, tuple[Callable[[], None], Callable[[], None], str]] = {
    "a parameter that both changed": (
        lambda: replace(Path("params.yaml"), "  rank: 10 ", "  rank: 4 "),
        lambda: replace(Path("params.yaml"), "  rank: 10 ", "  rank: 8 "),
        r"both branches changed adapter\.rank; give it one value",
    ),
    "a task that was there before": (
        lambda: replace(Path("params.yaml"), '["a"]', '["a", "x"]'),
        lambda: replace(Path("params.yaml"), FIRST, FIRST + OURS),
        r"one of them t01, which was there before",
    ),
    "a class that both add from other folders": (
        lambda: replace(Path("params.yaml"), FIRST, FIRST + OURS),
        lambda: replace(Path("params.yaml"), FIRST, FIRST + OURS.replace("images/b", "images/other")),
        r"params\.yaml with theirs \(nothing is merged\).*'?b'?",
    ),
    "another file": (
        lambda: replace(Path("notes"), "first", "ours"),
        lambda: replace(Path("notes"), "first", "theirs"),
        r"both branches changed notes; make them the same",
    ),
    "a file that is no text": (
        lambda: replace(Path("params.yaml"), FIRST, FIRST + OURS),
        lambda: Path("params.yaml").write_bytes(b"\xff"),
        r"params\.yaml, theirs: the file is not UTF-8",
    ),
    "a lock that DVC did not write": (
        lambda: replace(Path("params.yaml"), FIRST, FIRST + OURS),
        lambda: Path("dvc.lock").write_text("stages: {}\n"),
        r"dvc\.lock on theirs is not as DVC writes it",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_both_changed_is_said_in_one_line_and_nothing_is_merged(begun: Path, what: str) -> None:
    ours, theirs, said = REFUSED[what]
    ours()
    git("commit", "-qam", "ours")
    git("switch", "-q", "theirs")
    theirs()
    git("commit", "-qam", "theirs")
    git("switch", "-q", "ours")
    head = git("rev-parse", "HEAD")
    with pytest.raises(InputError, match=said) as caught:
        merge("theirs")
    assert len(str(caught.value)) <= 300
    assert (git("rev-parse", "HEAD"), git("status", "--porcelain")) == (head, "")
    assert not Path(".git/MERGE_HEAD").exists()


def test_nothing_is_merged_over_what_is_in_no_commit(begun: Path) -> None:
    both_learn()
    replace(Path("params.yaml"), "  rank: 10 ", "  rank: 4 ")
    with pytest.raises(InputError, match=r"params\.yaml has changes that are in no commit"):
        merge("theirs")
    with pytest.raises(InputError, match="no branch 'nowhere'"):
        merge("nowhere")


@pytest.mark.slow
def test_a_merged_chain_learns_one_step(
    make_project: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two people learn a `t02` of their own; after the merge the first one's is as it was."""
    scripts = {"fit": FIT, "evaluate": EVALUATE, "report": REPORT}
    files = {"dvc.yaml": DVC_YAML, "params.yaml": f"{HEAD}tasks:\n{FIRST}", "code": "#", **scripts}
    files |= {f"images/{name}/picture": name for name in "abc"}
    folder = make_project({**files, ".gitignore": "/ran\n/artifacts/\n/.sdlora/\n"})
    for name in scripts:
        (folder / name).chmod(0o755)
    for who in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{who}_NAME", "tester")
        monkeypatch.setenv(f"GIT_{who}_EMAIL", "tester@example.org")
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    preload_nothing(monkeypatch)
    git("add", "-A")
    git("commit", "-qm", "first")
    for branch, task in (("theirs", THEIRS.splitlines(keepends=True)[0]), ("ours", OURS)):
        git("switch", "-q", "-c", branch, "master" if branch == "theirs" else "theirs^")
        with (folder / "params.yaml").open("a") as file:
            file.write(task)
        run_pipeline()
        git("add", "-A")
        git("commit", "-qm", branch)
    before = (folder / "artifacts/model/t02").read_bytes()
    ran(folder)
    merge("theirs")
    assert run_pipeline() == 0
    assert ran(folder) == ["fit t03", "evaluate t03", "report"]
    assert (folder / "artifacts/model/t02").read_bytes() == before
    git("diff", "--quiet", "HEAD", "--", "params.yaml")
