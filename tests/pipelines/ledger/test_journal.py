"""The journal says what each stage cost, and never costs the stage. No line of it can be changed unnoticed."""

from __future__ import annotations

import hashlib
import json
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from pipelines.ledger import journal
from pipelines.ledger.journal import heads_of, joined, keep_cost, read_journal
from pipelines.orchestration.stage_runs import launch
from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of
from pipelines.project.layout import JOURNAL
from pipelines.runtime.stage import Stage, StageResult


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, as the working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(label: str = "fit@t01") -> None:
    keep_cost(label, {"out": Path("out")}, StageResult([]), seconds=1.0)


def write_many(count: int) -> None:
    for _ in range(count):
        write()


@pytest.fixture
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Git not be asked who works here, which takes longer than all else."""
    monkeypatch.setattr(journal, "current_commit", lambda: None)
    monkeypatch.setattr(journal, "_person", lambda: None)


def test_a_stage_that_ended_leaves_what_it_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)

    def work(task: str, *, out: Path) -> StageResult:
        out.mkdir(parents=True)
        (out / "step.json").write_text("{}")
        return StageResult([{"task": task, "images": 3}, {"task": task, "images": 4}])

    launch(Stage("freeze", work), task="t01", out=Path("out"))
    (found,) = read_journal().values()

    assert found.stage == "freeze@t01"
    assert found.images == 7
    assert found.output == {"step.json": sha256_of(Path("out/step.json"))}
    assert found.peak_memory > 10_000_000
    assert 0 <= found.seconds < 60
    assert found.commit is None
    assert found.previous == ()


def test_a_commit_is_named_with_whether_files_differ_from_it_and_who_works_there() -> None:
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    Path("a").write_text("1")
    for command in (["init", "-q"], ["add", "a"], ["commit", "-qm", "one"], ["tag", "v1"]):
        subprocess.run([*git, *command], check=True)
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    for key, value in (("name", "Zoë Ana"), ("email", "zoe@example.org")):
        subprocess.run(["git", "config", f"user.{key}", value], check=True)
    for content in ("1", "2"):
        Path("a").write_text(content)
        write()
    assert [line.commit for line in read_journal().values()] == [head, f"{head}+"]
    assert {line.by for line in read_journal().values()} == {"Zoë Ana <zoe@example.org>"}


def test_without_git_the_login_name_stands_there_and_without_that_nobody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CONFIG_SYSTEM", "/dev/null")
    monkeypatch.setenv("LOGNAME", "zoe")
    write()
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 4_000_000)
    write()
    assert [line.by for line in read_journal().values()] == ["zoe", None]


def test_a_journal_that_cannot_be_written_costs_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ledger").write_text("a file, where a folder should be")
    write()
    assert capsys.readouterr().err == (
        "warning: fit@t01 is done, but its cost could not be written to ledger/journal.jsonl (File exists)\n"
    )


@pytest.mark.usefixtures("unasked")
def test_each_line_names_the_one_before_by_the_hash_of_its_bytes() -> None:
    write_many(3)
    lines = JOURNAL.read_bytes().splitlines()
    hashes = [hashlib.sha256(line).hexdigest() for line in lines]
    assert [json.loads(line)["previous"] for line in lines] == [[], [hashes[0]], [hashes[1]]]
    assert heads_of(read_journal()) == [hashes[2]]


@pytest.mark.usefixtures("unasked")
def test_a_line_that_was_changed_dropped_or_damaged_is_found_once_a_later_one_is_known() -> None:
    write_many(4)
    lines = JOURNAL.read_bytes().splitlines(keepends=True)
    head = heads_of(read_journal())
    for forged in (
        [lines[0].replace(b"fit@t01", b"fit@t02"), *lines[1:]],
        [lines[0], *lines[2:]],
        lines[1:],
    ):
        JOURNAL.write_bytes(b"".join(forged))
        with pytest.raises(InputError, match=r"names a line before it that was changed or is missing"):
            read_journal()
    for damaged in (b"{}\n", b"no line\n", b"[" * 100_000 + b"\n"):
        JOURNAL.write_bytes(b"".join([lines[0], damaged, *lines[1:]]))
        with pytest.raises(InputError, match=r"ledger/journal.jsonl: line 2 is none of a journal"):
            read_journal()
    extra = lines[0].replace(b"fit@t01", b"fit@t09")
    JOURNAL.write_bytes(b"".join([extra, *lines]))
    assert heads_of(read_journal()) != head  # put in, it is a head that no signature names
    JOURNAL.write_bytes(b"".join(reversed(lines)))
    assert heads_of(read_journal()) == head


@pytest.mark.usefixtures("unasked")
def test_two_journals_that_git_put_together_go_on_as_one() -> None:
    write()
    common = JOURNAL.read_bytes()
    write("fit@t02")
    mine = JOURNAL.read_bytes()
    JOURNAL.write_bytes(common)
    write("fit@t03")
    theirs = JOURNAL.read_bytes()
    assert joined(theirs, mine) == theirs + mine.removeprefix(common)
    assert joined(mine, mine) == joined(mine, common) == mine
    JOURNAL.write_bytes(joined(theirs, mine))
    both = heads_of(read_journal())
    write("fit@t04")
    assert len(both) == 2
    assert list(read_journal().values())[-1].previous == tuple(both)


@pytest.mark.usefixtures("unasked")
@pytest.mark.parametrize("tail", [b'{"stage": "fit', b"\x00\xff", b'"text"'])
def test_what_a_kill_has_cut_off_is_ignored_and_then_removed(tail: bytes) -> None:
    write()
    whole = JOURNAL.read_bytes()
    JOURNAL.write_bytes(whole + tail)
    assert len(read_journal()) == 1
    write()
    assert JOURNAL.read_bytes().startswith(whole)
    assert len(read_journal()) == 2


@pytest.mark.usefixtures("unasked")
def test_a_line_that_lost_its_end_only_stays() -> None:
    write()
    JOURNAL.write_bytes(JOURNAL.read_bytes().rstrip(b"\n"))
    write()
    assert [len(line.previous) for line in read_journal().values()] == [0, 1]


@pytest.mark.usefixtures("unasked")
def test_those_who_write_at_the_same_time_lose_no_line_and_give_one_head() -> None:
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(write_many, [8, 8, 8]))
    assert len(read_journal()) == 24
    assert len(heads_of(read_journal())) == 1
