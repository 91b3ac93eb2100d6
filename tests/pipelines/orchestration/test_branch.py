"""Unattended runs put three files and the ledger on a branch of their own, and touch nothing else of a clone."""

from __future__ import annotations

import contextlib
import os
import subprocess
from pathlib import Path

import pytest

from pipelines.ledger.journal import keep_cost, read_journal
from pipelines.orchestration.branch import commit, edit, take, tip
from pipelines.project.errors import InputError
from pipelines.project.layout import JOURNAL
from pipelines.runtime.stage import StageResult

BRANCH = "sdlora/learned"


def git(*arguments: str, folder: Path | str = ".") -> str:
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone, of a repository beside it, with a change of its user's in a file and one in the index."""
    for variable in ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL"):
        monkeypatch.setenv(variable, "tester")
    origin, folder = tmp_path / "origin.git", tmp_path / "clone"
    git("init", "-q", "--bare", "-b", "main", str(origin))
    git("clone", "-q", str(origin), str(folder))
    git("switch", "-q", "-c", "main", folder=folder)
    for name in ("params.yaml", "code", "staged"):
        (folder / name).write_text("first\n")
    git("add", ".", folder=folder)
    git("commit", "-qm", "first", folder=folder)
    git("push", "-q", "origin", "main", folder=folder)
    (folder / "code").write_text("edited\n")
    (folder / "staged").write_text("staged\n")
    git("add", "staged", folder=folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def another(clone: Path, tmp_path: Path) -> Path:
    """A second clone of the same repository."""
    git("clone", "-q", str(tmp_path / "origin.git"), str(tmp_path / "another"))
    return tmp_path / "another"


def change(text: str) -> None:
    """Change params.yaml as an unattended run does."""

    def write_it(path: Path) -> list[str]:
        path.write_text(text)
        return []

    edit(write_it)


def learn(text: str, remote: str | None = None) -> str | None:
    take(BRANCH, remote)
    change(text)
    Path("dvc.lock").write_text(f"lock of {text}")
    return commit(BRANCH, "Learn", remote)


def test_a_run_reads_the_files_by_which_dvc_keeps_images(clone: Path, another: Path) -> None:
    learn("second\n", "origin")
    git("fetch", "-q", "origin", BRANCH, folder=another)
    git("switch", "-q", BRANCH, folder=another)
    for text in ("pictures\n", "more pictures\n"):
        (another / "birds.dvc").write_text(text)
        git("add", "birds.dvc", folder=another)
        git("commit", "-qm", text, folder=another)
        git("push", "-q", "origin", BRANCH, folder=another)
        take(BRANCH, "origin")
        assert Path("birds.dvc").read_text() == text
    Path("birds.dvc").write_text("my own\n")
    take(BRANCH, "origin")
    assert Path("birds.dvc").read_text() == "my own\n"


def test_a_commit_holds_the_three_files_and_leaves_the_users_changes_alone(clone: Path) -> None:
    head, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    new = learn("second\n")
    assert new == tip(BRANCH)
    assert git("show", "--name-only", "--format=%s", BRANCH).split() == ["Learn", "dvc.lock", "params.yaml"]
    assert git("rev-parse", f"{BRANCH}^") == head == git("rev-parse", "HEAD")
    assert git("show", f"{BRANCH}:code") == git("show", f"{BRANCH}:staged") == "first"
    assert set(git("status", "--porcelain", "-uno").splitlines()) - set(status.splitlines()) == {
        " M params.yaml"
    }
    assert git("ls-remote", "origin", BRANCH) == ""


def test_nothing_new_is_no_commit(clone: Path) -> None:
    first = learn("second\n")
    assert commit(BRANCH, "Learn", None) is None
    assert tip(BRANCH) == first


def test_another_clone_goes_on_from_what_was_pushed(
    clone: Path, another: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn("second\n", "origin")
    monkeypatch.chdir(another)
    take(BRANCH, "origin")
    assert Path("params.yaml").read_text() == "second\n"
    assert Path("dvc.lock").read_text() == "lock of second\n"
    learn("third\n", "origin")
    monkeypatch.chdir(clone)
    take(BRANCH, "origin")
    assert Path("params.yaml").read_text() == "third\n"
    assert git("rev-list", "--count", BRANCH) == "3"


def test_what_an_interrupted_run_left_is_replaced_and_a_persons_edit_is_not(clone: Path) -> None:
    take(BRANCH, None)
    change("half a run\n")
    take(BRANCH, None)
    assert Path("params.yaml").read_text() == "first\n"
    Path("params.yaml").write_text("my idea\n")
    with pytest.raises(InputError, match="changes that are in no commit"):
        take(BRANCH, None)
    assert Path("params.yaml").read_text() == "my idea\n"


def test_two_histories_are_not_mixed(clone: Path, another: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    learn("second\n", "origin")
    monkeypatch.chdir(another)
    git("update-ref", f"refs/heads/{BRANCH}", git("commit-tree", "HEAD^{tree}", "-p", "HEAD", "-m", "mine"))
    learn("other\n")
    with pytest.raises(InputError, match="has gone two ways"):
        take(BRANCH, "origin")


def test_a_branch_that_is_checked_out_is_refused(clone: Path) -> None:
    with pytest.raises(InputError, match="main is checked out in"):
        take("main", None)


def test_a_remote_that_does_not_answer_is_one_line(clone: Path) -> None:
    git("remote", "set-url", "origin", str(clone / "nowhere"))
    with pytest.raises(InputError, match="git ls-remote") as caught:
        take(BRANCH, "origin")
    assert "\n" not in str(caught.value)


def test_the_ledger_goes_along_and_comes_to_a_clone_that_lacks_it(
    clone: Path, another: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("kept/0001.json", "retired/ü 1/receipt.json"):
        (Path("ledger") / name).parent.mkdir(parents=True)
        (Path("ledger") / name).write_text(f"here {name}")
    learn("second\n", "origin")

    monkeypatch.chdir(another)
    Path("ledger/kept").mkdir(parents=True)
    Path("ledger/kept/0001.json").write_text("kept in this clone")
    take(BRANCH, "origin")
    assert Path("ledger/retired/ü 1/receipt.json").read_text() == "here retired/ü 1/receipt.json"
    assert Path("ledger/kept/0001.json").read_text() == "kept in this clone"


SIGNATURE, NOTE = Path("ledger/signatures/t01.sig"), Path("ledger/kept/0001.json")


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def ledger_of_the_branch() -> dict[str, str]:
    names = git("ls-tree", "-r", "--name-only", BRANCH, "--", "ledger").splitlines()
    return {name: git("show", f"{BRANCH}:{name}") for name in names}


@pytest.fixture
def person(clone: Path, another: Path) -> Path:
    """A person's clone, with the branch checked out, to which the worker's clone has pushed a ledger."""
    take(BRANCH, "origin")
    write(SIGNATURE, "signed")
    write(SIGNATURE.with_name("t02.sig"), "signed")
    write(NOTE, "first note")
    commit(BRANCH, "Learn", "origin")
    git("fetch", "-q", folder=another)
    git("switch", "-q", BRANCH, folder=another)
    return another


def publish(person: Path) -> None:
    git("add", ".", folder=person)
    git("commit", "-qm", "by hand", folder=person)
    git("push", "-q", folder=person)


def test_a_commit_leaves_alone_what_a_person_signed_or_removed_on_the_branch(person: Path) -> None:
    write(person / SIGNATURE, "signed anew")
    (person / SIGNATURE.with_name("t02.sig")).unlink()
    write(person / NOTE, "put right by hand")
    publish(person)

    take(BRANCH, "origin")
    assert SIGNATURE.read_text() == "signed anew"
    assert not SIGNATURE.with_name("t02.sig").exists()
    write(Path("ledger/kept/0002.json"), "second note")
    commit(BRANCH, "Learn", "origin")
    assert ledger_of_the_branch() == {
        "ledger/kept/0001.json": "put right by hand",
        "ledger/kept/0002.json": "second note",
        "ledger/signatures/t01.sig": "signed anew",
    }


def test_what_this_clone_computed_anew_survives_a_take_and_is_committed(person: Path) -> None:
    write(person / SIGNATURE, "signed anew")
    write(person / NOTE, "put right by hand")
    publish(person)
    write(NOTE, "note of a run that was cut off")

    take(BRANCH, "origin")
    commit(BRANCH, "Learn", "origin")
    assert ledger_of_the_branch()["ledger/kept/0001.json"] == "note of a run that was cut off"
    assert ledger_of_the_branch()["ledger/signatures/t01.sig"] == "signed anew"


def test_a_take_that_is_killed_anywhere_makes_nothing_this_clones_own(
    person: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for text in ("signed anew", "signed a third time"):
        write(person / SIGNATURE, text)
        write(person / SIGNATURE.with_name("t02.sig"), text)
        publish(person)
        written = 0

        def killed(path: Path, data: bytes) -> None:
            nonlocal written
            if path.parent == SIGNATURE.parent and (written := written + 1) == 2:
                raise KeyboardInterrupt
            path.write_bytes(data)

        with monkeypatch.context() as patched:
            patched.setattr("pipelines.orchestration.branch.write_whole", killed)
            with pytest.raises(KeyboardInterrupt):
                take(BRANCH, "origin")
    take(BRANCH, "origin")
    assert commit(BRANCH, "Learn", "origin") is None
    assert SIGNATURE.read_text() == "signed a third time"


def test_a_ledger_that_the_clone_has_checked_out_does_not_replace_the_branchs(
    person: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    git("push", "-q", "origin", f"{BRANCH}:main", folder=person)
    git("clone", "-q", "-b", "main", str(tmp_path / "origin.git"), str(tmp_path / "fresh"))
    write(person / SIGNATURE, "signed anew")
    (person / SIGNATURE.with_name("t02.sig")).unlink()
    publish(person)
    monkeypatch.chdir(tmp_path / "fresh")
    take(BRANCH, "origin")
    assert commit(BRANCH, "Learn", "origin") is None
    assert SIGNATURE.read_text() == "signed anew"


def test_what_is_pushed_during_a_run_stays_and_the_runs_commit_comes_after_it(person: Path) -> None:
    take(BRANCH, "origin")
    write(person / SIGNATURE, "signed during the run")
    publish(person)
    theirs = git("rev-parse", "HEAD", folder=person)
    change("second\n")

    made = commit(BRANCH, "Learn", "origin")
    assert made == git("rev-parse", BRANCH) == git("ls-remote", "origin", BRANCH).split()[0]
    assert git("rev-parse", f"{BRANCH}^") == theirs
    assert git("show", f"{BRANCH}:params.yaml") == "second"
    assert ledger_of_the_branch()["ledger/signatures/t01.sig"] == "signed during the run"


def test_parameters_that_are_pushed_during_a_run_are_taken_up_by_the_next(person: Path) -> None:
    take(BRANCH, "origin")
    write(person / "params.yaml", "by hand\n")
    publish(person)
    theirs = git("rev-parse", "HEAD", folder=person)
    change("second\n")
    write(NOTE, "note of the run")

    with pytest.raises(InputError, match=r"params\.yaml has changed on .* since this run began") as caught:
        commit(BRANCH, "Learn", "origin")
    assert "\n" not in str(caught.value)
    assert tip(BRANCH) == theirs == git("ls-remote", "origin", BRANCH).split()[0]
    take(BRANCH, "origin")
    assert Path("params.yaml").read_text() == "by hand\n"
    assert commit(BRANCH, "Learn", "origin")
    assert ledger_of_the_branch()["ledger/kept/0001.json"] == "note of the run"


def test_lines_that_two_clones_wrote_into_the_journal_are_all_on_the_branch(
    person: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the other was pushed before this one took the branch, or after."""

    def work(folder: Path, label: str) -> None:
        with monkeypatch.context() as patch:
            patch.chdir(folder)
            keep_cost(label, {"out": Path("out")}, StageResult([]), seconds=1.0)

    for before, (theirs, mine) in ((True, ("fit@t01", "fit@t02")), (False, ("fit@t03", "fit@t04"))):
        git("pull", "-q", folder=person)
        if not before:
            take(BRANCH, "origin")
        work(person, theirs)
        publish(person)
        work(Path(), mine)
        if before:
            take(BRANCH, "origin")
        commit(BRANCH, "Learn", "origin")
    take(BRANCH, "origin")
    git("pull", "-q", folder=person)
    assert JOURNAL.read_bytes() == (person / JOURNAL).read_bytes()
    assert [line.stage for line in read_journal().values()] == ["fit@t01", "fit@t02", "fit@t03", "fit@t04"]
    assert commit(BRANCH, "Learn", "origin") is None


def test_a_remote_that_refuses_the_commit_leaves_the_branch_where_the_remote_has_it(
    person: Path, tmp_path: Path
) -> None:
    hook = tmp_path / "origin.git/hooks/pre-receive"
    write(hook, "#!/bin/sh\nexit 1\n")
    hook.chmod(0o755)
    before = tip(BRANCH)
    with pytest.raises(InputError, match=r"git push: .*nothing was committed"):
        learn("second\n", "origin")
    assert tip(BRANCH) == before
    hook.unlink()
    write(person / SIGNATURE, "signed meanwhile")
    publish(person)
    assert learn("second\n", "origin") == git("ls-remote", "origin", BRANCH).split()[0]


@pytest.mark.parametrize("after", range(12))
def test_a_run_that_is_killed_after_any_write_leaves_what_the_next_one_takes(
    person: Path, monkeypatch: pytest.MonkeyPatch, after: int
) -> None:
    write(person / "params.yaml", "by hand\n")
    publish(person)
    left, replace = after, os.replace

    def killed(source: str, target: str) -> None:
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        replace(source, target)

    with monkeypatch.context() as patched, contextlib.suppress(KeyboardInterrupt):
        patched.setattr("os.replace", killed)
        take(BRANCH, "origin")
        change("second\n")
    write(person / "params.yaml", "by hand again\n")
    publish(person)
    take(BRANCH, "origin")
    assert Path("params.yaml").read_text() == "by hand again\n"


def test_an_edit_names_params_yaml_and_one_that_fails_changes_nothing(clone: Path) -> None:
    def refused(path: Path) -> list[str]:
        path.write_text("half\n")
        raise InputError(f"{path}: no")

    with pytest.raises(InputError, match=r"^params\.yaml: no$"):
        edit(refused)
    assert Path("params.yaml").read_text() == "first\n"
    assert edit(lambda path: [f"{path}: done"]) == ["params.yaml: done"]
    assert not [path for path in clone.iterdir() if "partial" in path.name]


def test_an_edit_of_what_a_person_changed_does_not_make_it_an_unattended_runs(clone: Path) -> None:
    Path("params.yaml").write_text("my idea\n")
    change("my idea and a task\n")
    with pytest.raises(InputError, match="changes that are in no commit"):
        take(BRANCH, None)
