"""A retired task's images are nowhere, and everything goes on without them: no later step ever reads them."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipelines.audits.retire import command, deletion, survey
from pipelines.audits.retire.command import retire
from pipelines.data.packed import read_images
from pipelines.ledger.receipts import read_receipts
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of
from pipelines.project.params import Params
from tests.support.commands import call, call_here, finish, said_here
from tests.support.shards import png, write_parquet

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("preloaded")]
WHY = "the contract ends"


def copy(source: Path, folder: Path) -> Path:
    """A copy of a project and of the storage beside it, which it is told of."""
    shutil.copytree(source, folder, symlinks=True)
    if (source.parent / "storage").is_dir():
        shutil.copytree(source.parent / "storage", folder.parent / "storage")
    return folder


def refused(folder: Path, *command: str) -> str:
    """The one line of a command that is refused with status 2."""
    done = finish(folder, *command)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


@pytest.fixture(scope="module")
def kept(finished: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished project, all of which was pushed to a remote."""
    folder = copy(finished[0], tmp_path_factory.mktemp("kept") / "project")
    call(folder, "dvc", "remote", "add", "-d", "storage", "../storage")
    call(folder, "dvc", "push", "-q", "--run-cache")
    return folder


@pytest.fixture(scope="module")
def images(kept: Path) -> dict[str, bytes]:
    """The training images of t01 by id."""
    table = read_images(kept / "artifacts/train/t01/train.arrow")
    return dict(zip(table["id"].to_pylist(), table["image"].to_pylist(), strict=True))


@pytest.fixture(scope="module")
def gone(kept: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """That project with t01 retired, and what the command printed."""
    folder = copy(kept, tmp_path_factory.mktemp("gone") / "project")
    return folder, call(folder, "sdlora", "retire", "t01", "--by", "Zoë", "--why", WHY, "--yes")


@pytest.fixture
def project(kept: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project with all images, as the working directory."""
    monkeypatch.chdir(copy(kept, tmp_path / "project"))
    return tmp_path / "project"


@pytest.fixture
def retired(gone: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the project without them, as the working directory."""
    monkeypatch.chdir(copy(gone[0], tmp_path / "project"))
    return tmp_path / "project"


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def holding(root: Path, images: dict[str, bytes], packed: str) -> Iterator[str]:
    """Files below a folder, whatever they are, that hold one of the images or are the packed ones."""
    for path in root.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            if hashlib.sha256(data).hexdigest() == packed or any(image in data for image in images.values()):
                yield path.relative_to(root).as_posix()


def test_no_byte_of_the_images_is_left_in_project_cache_or_remote(
    kept: Path, gone: tuple[Path, str], images: dict[str, bytes]
) -> None:
    packed = sha256_of(kept / "artifacts/train/t01/train.arrow")
    before = list(holding(kept.parent, images, packed))
    assert len({name.split("/")[0] for name in before}) == 2  # the search does find them
    assert [name for name in before if "/cache/" in name]

    assert not list(holding(gone[0].parent, images, packed))


def test_what_a_step_left_stays_byte_for_byte_but_for_the_images(kept: Path, gone: tuple[Path, str]) -> None:
    for folder in ("split", "fit", "model", "evaluation", "gate"):
        assert contents(kept / "artifacts" / folder) == contents(gone[0] / "artifacts" / folder)
    was, now = (contents(root / "artifacts/train") for root in (kept, gone[0]))
    assert sorted(now) == ["t01/retired.json", "t02/train.arrow"]
    assert now["t02/train.arrow"] == was["t02/train.arrow"]
    assert json.loads(now["t01/retired.json"]) == {
        "task": "t01",
        "images": hashlib.sha256(was["t01/train.arrow"]).hexdigest(),
    }
    assert not (gone[0] / "pictures/train/a").exists()
    assert not (gone[0] / "pictures/test/b").exists()
    assert contents(gone[0] / "pictures/train/c") == contents(kept / "pictures/train/c")


def test_a_retired_project_is_up_to_date_and_holds(gone: tuple[Path, str]) -> None:
    assert "all up to date" in call_here(gone[0], "run")
    lines = call_here(gone[0], "audit", "verify").splitlines()
    receipt = sha256_of(gone[0] / "ledger/retired/t01/receipt.json")
    assert re.fullmatch(rf"t01     holds .* retired \(receipt {receipt[:12]}\)", lines[1])
    assert "retired" not in lines[2]
    assert "Data and pipelines are up to date" in call(gone[0], "dvc", "repro")


def test_the_receipt_says_what_was_deleted_when_and_by_whom(
    kept: Path, gone: tuple[Path, str], images: dict[str, bytes]
) -> None:
    receipt = read_json(gone[0] / "ledger/retired/t01/receipt.json")
    assert (receipt["by"], receipt["why"], receipt["previous"]) == ("Zoë", "the contract ends", None)
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", receipt["at"])
    assert {its["id"]: its["sha256"] for its in receipt["images"]} == {
        name: hashlib.sha256(image).hexdigest() for name, image in images.items()
    }
    files = [path for name in "ab" for path in (kept / "pictures").glob(f"*/{name}/*.png")]
    assert {its["path"]: its["sha256"] for its in receipt["raw"]} == {
        path.relative_to(kept).as_posix(): sha256_of(path) for path in files
    }
    assert receipt["record"] == sha256_of(kept / "artifacts/model/t01/step.json")
    assert receipt["head"] == sha256_of(kept / "artifacts/gate/t02/verdict.json")
    entry = Params.load(gone[0] / "params.yaml").tasks["t01"]
    assert (entry.source, entry.classes) == ("ledger/retired/t01", ("a", "b"))
    assert f"{kept.name}" not in json.dumps(receipt)


@pytest.fixture(scope="module")
def without(gone: tuple[Path, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project without t01's images, with a task more."""
    folder = copy(gone[0], tmp_path_factory.mktemp("without") / "project")
    call_here(folder, "add-task", "more")
    call_here(folder, "run")
    return folder


def test_a_later_task_is_learned_to_the_same_bytes_without_them(
    grown: tuple[Path, str], without: Path, images: dict[str, bytes]
) -> None:
    whole, _ = grown
    for folder in ("fit", "model", "evaluation", "gate"):
        assert contents(whole / "artifacts" / folder) == contents(without / "artifacts" / folder)
    packed = sha256_of(whole / "artifacts/train/t01/train.arrow")
    assert not list(holding(without.parent, images, packed))
    assert "the chain holds" in call_here(without, "audit", "verify")
    assert call_here(without, "predict", "t03", "pictures/test/c/0.png")


def test_a_clone_pulls_and_has_nothing_to_do(retired: Path, tmp_path: Path) -> None:
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    call(retired, "dvc", "push", "-q", "--run-cache")
    call(retired, *git, "add", "-A")
    call(retired, *git, "commit", "-q", "-m", "retired")
    call(tmp_path, "git", "clone", "-q", "project", "clone")
    clone = tmp_path / "clone"
    call(clone, "dvc", "pull", "-q")
    call(clone, "dvc", "checkout", "-q")
    assert "all up to date" in call_here(clone, "run")
    assert "the chain holds" in call_here(clone, "audit", "verify")
    assert not (clone / "artifacts/train/t01/train.arrow").exists()


class Killed(BaseException):
    """Stands for SIGKILL: nothing catches it."""


def test_ended_before_any_of_its_operations_the_same_command_finishes(
    project: Path, gone: tuple[Path, str], monkeypatch: pytest.MonkeyPatch, images: dict[str, bytes]
) -> None:
    """Each attempt may do three things to the disk, or to DVC, and dies before the fourth."""
    from dvc_objects.fs.base import FileSystem

    done: list[str] = []

    def limited(owner: object, name: str) -> None:
        real = getattr(owner, name)

        def work(*args: object, **kwargs: object) -> object:
            if len(done) >= 3:
                raise Killed
            done.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, work)

    packed = sha256_of(project / "artifacts/train/t01/train.arrow")
    for owner, name in ((FileSystem, "remove"), (Path, "unlink"), (Path, "rmdir")):
        limited(owner, name)
    limited(command, "write_json")
    limited(deletion, "replace_file")
    limited(deletion, "reproduce_stage")
    total: list[str] = []
    for attempt in range(40):
        done.clear()
        try:
            assert retire("t01", by="Zoë", why=WHY, dry=False, yes=True) == 0
            break
        except Killed:
            total += done
            assert attempt < 39
    monkeypatch.undo()

    assert {"write_json", "replace_file", "unlink", "rmdir", "remove", "reproduce_stage"} <= {*total, *done}
    assert not list(holding(project.parent, images, packed))
    assert "all up to date" in call_here(project, "run")
    assert "the chain holds" in call_here(project, "audit", "verify")
    assert contents(project / "artifacts/model") == contents(gone[0] / "artifacts/model")


def test_a_second_time_is_refused_and_so_is_what_cannot_be(
    retired: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(retired)
    for task, by, why, fault in (
        (
            "t01",
            "me",
            "x",
            r"t01 is retired already, \d{4}-\d\d-\d\d by Zoë \(ledger/retired/t01/receipt.json\)",
        ),
        ("t09", "me", "x", "there is no task 't09'; known are t01, t02"),
        ("t02", None, "x", "--by None: write a line"),
        ("t02", "me", "a\nb", "--why 'a.nb': write a line"),
        ("t02", "me", "x", "nothing was deleted; add --yes"),
    ):
        with pytest.raises(InputError, match=f"retire: {fault}"):
            retire(task, by=by, why=why, dry=False, yes=False)
    assert retire("t02", by="me", why="x", dry=True, yes=False) == 0
    said = capsys.readouterr().out
    assert "  pictures: 16 files of train, validation and test" in said
    assert "  DVC's remote storage: 2 objects" in said
    now = contents(retired)
    assert {name for name in before.keys() | now.keys() if before.get(name) != now.get(name)} <= {
        name for name in now if name.startswith((".dvc/tmp", ".sdlora/run.lock", ".sdlora/plan.json"))
    }


def test_a_step_that_is_not_done_keeps_its_images(project: Path) -> None:
    """They are still needed: something would have to be made of them."""
    (project / "pictures/train/a/9.png").write_bytes((project / "pictures/train/a/0.png").read_bytes())
    with pytest.raises(
        InputError, match=r"t01 is not up to date \(split@t01: pictures changed\); run `sdlora run`"
    ):
        retire("t01", by="me", why="x", dry=False, yes=True)
    (project / "pictures/train/a/9.png").unlink()
    call_here(project, "add-task", "more")
    with pytest.raises(InputError, match=r"t03 is not up to date \(split@t03: it has never run\)"):
        retire("t03", by="me", why="x", dry=False, yes=True)
    text = Path("params.yaml").read_text(encoding="utf-8")
    joint = text.replace("method: sdlora ", "method: joint ").replace("head: rgda", "head: linear")
    joint = joint.replace("temperature: auto", "temperature: null")
    joint = joint.replace("unknown: relative", "unknown: null")
    Path("params.yaml").write_text(joint, encoding="utf-8")
    with pytest.raises(InputError, match="the method joint learns the images of all tasks"):
        retire("t01", by="me", why="x", dry=False, yes=True)
    assert (project / "artifacts/train/t01/train.arrow").exists()


def test_nothing_is_deleted_through_a_link(project: Path) -> None:
    outside = project.parent / "outside"
    (project / "pictures").rename(outside)
    (project / "pictures").symlink_to(outside)
    before = contents(outside)
    with pytest.raises(
        InputError, match=r"pictures leads through a link to .*outside, where nothing is deleted"
    ):
        retire("t01", by="me", why="x", dry=False, yes=True)
    assert contents(outside) == before
    assert not Path("ledger/retired").exists()


def test_a_file_that_is_a_link_goes_and_what_it_leads_to_stays(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, outside = project / "pictures/train/a/0.png", project.parent / "0.png"
    path.rename(outside)
    path.symlink_to(outside)
    data = outside.read_bytes()
    call(project, "git", "add", "pictures")
    assert retire("t01", by="me", why="x", dry=False, yes=True) == 0
    said = capsys.readouterr().out
    assert "warning: links among the files: 1; what they lead to stays" in said
    assert "warning: files in git, whose history keeps them: 16" in said
    assert not path.is_symlink()
    assert outside.read_bytes() == data


def test_data_that_dvc_keeps_and_what_was_packed_earlier_go_too(
    project: Path, images: dict[str, bytes]
) -> None:
    """Data of `dvc add`, in cache and remote, and files that a split of earlier days left there."""
    from pipelines.data.packed import ImageRow, write_images

    name, image = next(iter(images.items()))
    older = ImageRow(name, 0, image, hashlib.sha256(image).hexdigest(), "p")
    write_images(project / "older.arrow", [older])
    call(project, "dvc", "add", "-q", "pictures", "older.arrow")
    call(project, "dvc", "push", "-q")
    for path in (project / "older.arrow", project / "older.arrow.dvc"):
        path.unlink()
    packed = sha256_of(project / "artifacts/train/t01/train.arrow")
    noted = (project / "pictures.dvc").read_text()
    assert retire("t01", by="me", why="x", dry=False, yes=True) == 0

    left = list(holding(project, images, packed))
    assert not left
    assert (project / "pictures.dvc").read_text() != noted
    assert "all up to date" in call_here(project, "run")
    call(project, "dvc", "push", "-q")
    shutil.rmtree(project / "pictures")
    call(project, "dvc", "pull", "-q")
    assert sorted(path.name for path in (project / "pictures/train").iterdir()) == ["c", "d"]


def test_a_picture_that_another_task_learned_too_stays_there_and_is_named(
    project: Path, images: dict[str, bytes], capsys: pytest.CaptureFixture[str]
) -> None:
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(
        text.replace("duplicates: refuse ", "duplicates: allow "), encoding="utf-8"
    )
    shutil.copy("pictures/train/a/0.png", "pictures/train/c/x.png")
    call_here(project, "run")
    assert retire("t01", by="me", why="x", dry=False, yes=True) == 0

    assert (
        "warning: the same picture is in other tasks, and stays there: t02/train/c/x.png"
        in capsys.readouterr().out
    )
    assert read_json(project / "ledger/retired/t01/receipt.json")["elsewhere"] == ["t02/train/c/x.png"]
    others = {name: image for name, image in images.items() if name != "t01/train/a/0.png"}
    assert len(others) == len(images) - 1
    assert not list(holding(project.parent, others, "packed"))
    assert first_fault() == "holds"
    assert "all up to date" in call_here(project, "run")


def test_a_file_that_two_tasks_list_is_not_taken_from_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.parameters import settings

    monkeypatch.chdir(tmp_path)
    Path("both").mkdir()
    Path("both/0.png").write_bytes(b"")
    for task, label in (("t01", "a"), ("t02", "c")):
        Path(f"both/{task}.csv").write_text(f"path,label\n0.png,{label}\n")
    text = settings().split("tasks:\n")[0] + "tasks:\n"
    text += '  t01: {after: t00, source: both, manifest: "t01.csv", classes: [a]}\n'
    text += '  t02: {after: t01, source: both, manifest: "t02.csv", classes: [c]}\n'
    with pytest.raises(InputError, match=r"both/0\.png is an image of t02 too; give t01 files of its own"):
        list(survey.raw_files("t01", Params.parse(text, origin="params.yaml")))


def test_shards_go_as_a_whole_and_not_where_another_class_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.support.parameters import settings

    monkeypatch.chdir(tmp_path)
    text = settings().split("tasks:\n")[0] + "tasks:\n  t01: {after: t00, source: birds, classes: [a]}\n"
    params = Params.parse(text, origin="params.yaml")
    write_parquet(Path("birds/0.parquet"), [(png(1), "a"), (png(2), "a")])
    write_parquet(Path("birds/1.parquet"), [(png(3), "a")])
    assert [file.path for file in survey.raw_files("t01", params)] == ["birds/0.parquet", "birds/1.parquet"]
    write_parquet(Path("birds/1.parquet"), [(png(3), "b")])
    with pytest.raises(
        InputError, match=r"birds: the shards with the images of t01 hold another class too \(b\)"
    ):
        list(survey.raw_files("t01", params))


def test_a_remote_that_cannot_delete_is_no_reason_to_begin(project: Path) -> None:
    call(project, "dvc", "remote", "add", "web", "http://127.0.0.1:1/store")
    with pytest.raises(InputError, match="DVC's remote web is reached over HTTP, which deletes nothing"):
        retire("t01", by="me", why="x", dry=False, yes=True)
    assert Path("pictures/train/a").is_dir()
    assert not Path("ledger/retired").exists()


def test_a_remote_that_is_not_mounted_is_no_empty_one(project: Path, tmp_path: Path) -> None:
    (tmp_path / "storage").rename(tmp_path / "elsewhere")
    with pytest.raises(InputError, match=r"remote storage: there is no folder .*/storage; mount it"):
        retire("t01", by="me", why="x", dry=False, yes=True)
    assert Path("pictures/train/a").is_dir()
    assert not Path("ledger/retired").exists()


def test_one_that_was_begun_is_ended_before_another_begins(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receipts hold each other's hashes, and an unfinished one is written anew when it is gone on with."""

    def killed(*_: object, **__: object) -> None:
        raise Killed

    monkeypatch.setattr(command, "delete_everywhere", killed)
    with pytest.raises(Killed):
        retire("t01", by="me", why="x", dry=False, yes=True)
    monkeypatch.undo()
    monkeypatch.chdir(project)
    with pytest.raises(
        InputError, match=r"t01/receipt\.json was begun and not ended; run `sdlora retire t01` again"
    ):
        retire("t02", by="me", why="x", dry=False, yes=True)
    for task in ("t01", "t02"):
        assert retire(task, by="me", why="x", dry=False, yes=True) == 0
    assert list(read_receipts()) == ["t01", "t02"]
    assert first_fault() == "holds"


def test_a_retired_task_names_the_split_before_as_it_was_made_since(project: Path) -> None:
    assert retire("t02", by="me", why="x", dry=False, yes=True) == 0
    was = read_json(Path("artifacts/split/t02/split.json"))
    shutil.copy("pictures/test/b/0.png", "pictures/test/a/new.png")
    Path("pictures/test/b/0.png").unlink()  # a test picture that was filed under the wrong class
    call_here(project, "run")
    now = read_json(Path("artifacts/split/t02/split.json"))
    assert now["previous"] == sha256_of(Path("artifacts/split/t01/split.json")) != was["previous"]
    assert {**now, "previous": was["previous"]} == was
    assert first_fault() == "holds"


def test_a_source_that_is_gone_already_leaves_the_rest_to_delete(
    project: Path, images: dict[str, bytes]
) -> None:
    text = Path("params.yaml").read_text(encoding="utf-8")
    shutil.copytree("pictures", "first")
    Path("params.yaml").write_text(text.replace("after: t00, source: pictures", "after: t00, source: first"))
    call_here(project, "run")
    shutil.rmtree("first")
    shutil.rmtree("pictures/train/a")
    shutil.rmtree("pictures/train/b")
    packed = sha256_of(project / "artifacts/train/t01/train.arrow")
    assert retire("t01", by="me", why="x", dry=False, yes=True) == 0
    assert not list(holding(project.parent, images, packed))
    assert read_json(project / "ledger/retired/t01/receipt.json")["raw"] == []


def test_other_code_gives_back_what_was_and_says_so(retired: Path) -> None:
    """The step cannot be made again, so it stays; steps after it go on from there."""
    was, journal = contents(retired / "artifacts"), (retired / "ledger/journal.jsonl").read_bytes()
    source = retired / "pipelines/ledger/receipts.py"
    source.write_text(
        source.read_text().replace("is neither in DVC's cache nor", "is not in DVC's cache nor")
    )
    for stage in ("code", "split@t01", "fit@t01", "freeze@t01"):
        done = finish(retired, "dvc", "repro", "-s", stage, PYTHONPATH=str(retired))
        assert done.returncode == 0, done.stderr
        assert stage == "code" or f"{stage.replace('@', ' ')}: its images were deleted" in done.stderr
    shutil.rmtree(retired / "artifacts/code")
    assert contents(retired / "artifacts") == {
        path: held for path, held in was.items() if not str(path).startswith("code/")
    }
    assert (
        retired / "ledger/journal.jsonl"
    ).read_bytes() == journal  # what the step cost when it was learned


def run_fit(out: str = "elsewhere") -> None:
    from pipelines.stages.fit import fit

    split = Path("artifacts/split/t01")
    model = Path("artifacts/model/t00")
    fit(
        "t01",
        train=split / "train.json",
        images=Path("artifacts/train"),
        classes=split / "classes.json",
        before=model,
        backbone=model,
        out=Path(out),
    )


def test_what_would_be_another_step_is_refused_in_one_line(retired: Path) -> None:
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("  epochs: 12", "  epochs: 13"), encoding="utf-8")
    with pytest.raises(InputError) as caught:
        run_fit()
    assert str(caught.value) == (
        "fit t01: its images were deleted (ledger/retired/t01/receipt.json), so it cannot be made again, but "
        "params.yaml: training.epochs is 13, and was 12; put it back"
    )
    assert "classes: [a, b]" in text
    Path("params.yaml").write_text(text.replace("classes: [a, b]", "classes: [b, a]"), encoding="utf-8")
    with pytest.raises(InputError, match=r"tasks\.t01\.classes changed; put them back"):
        run_fit()
    Path("params.yaml").write_text(text, encoding="utf-8")
    with (retired / "artifacts/model/t00/step.json").open("ab") as file:
        file.write(b" ")
    with pytest.raises(
        InputError, match=r"artifacts/model/t00/step\.json is not what it was made with; restore"
    ):
        run_fit()
    assert not Path("elsewhere").exists()


def test_what_is_given_back_is_the_very_file_or_nothing(retired: Path) -> None:
    md5 = read_receipts()["t01"].stages["fit"].files["fit.json"]
    cached = retired / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    data = cached.read_bytes()
    cached.unlink()
    run_fit()  # from the remote
    assert contents(retired / "elsewhere") == contents(retired / "artifacts/fit/t01")
    shutil.rmtree(retired.parent / "storage")
    with pytest.raises(
        InputError, match=r"artifacts/fit/t01/fit\.json: .* neither in DVC's cache nor in its remote"
    ):
        run_fit("other")
    cached.write_bytes(data + b" ")
    with pytest.raises(InputError, match=r"artifacts/fit/t01/fit\.json: .* is another in "):
        run_fit("other")
    assert not Path("other").exists()


def first_fault() -> str:
    from pipelines.audits.verify import verify

    return next((f"{finding.step} {finding.fault}" for finding in verify() if finding.fault), "holds")


def test_verify_finds_a_receipt_that_was_altered_and_images_without_one(retired: Path, kept: Path) -> None:
    path = Path("ledger/retired/t01/receipt.json")
    data, receipt = path.read_bytes(), read_json(path)
    other = "0" * 64
    for change, fault in (
        ({"by": "nobody"}, "its bytes are not those of dvc.lock"),
        ({"record": other}, "its record is not what follows"),
        ({"train": {**receipt["train"], "sha256": other}}, "its train is not what follows"),
        ({"images": receipt["images"][1:]}, "its images is not what follows"),
        ({"classes": ["a"]}, "its classes is not what follows"),
        ({"previous": other}, "the receipt before it is not the one that it names"),
        ({"task": "t02"}, "it is the receipt of t02"),
        ({"raw": [{**receipt["raw"][0], "path": "../x"}]}, "not a receipt (raw.0.path: "),
    ):
        path.write_text(json.dumps({**receipt, **change}))
        assert f"t01 {path}: {fault}" in first_fault()
    path.unlink()
    assert f"t01 {path}: the receipt is missing" in first_fault()
    path.write_bytes(data)
    assert first_fault() == "holds"

    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(text.replace("source: ledger/retired/t01", "source: pictures"))
    assert f"t01 {path}: t01 is not retired to the end" in first_fault()
    path.unlink()
    assert "t01 artifacts/train/t01/train.arrow: it is missing, and no receipt says" in first_fault()


def test_receipts_are_a_chain_in_the_order_of_retiring(retired: Path, images: dict[str, bytes]) -> None:
    assert retire("t02", by="me", why="too", dry=False, yes=True) == 0
    first, second = (Path(f"ledger/retired/{task}/receipt.json") for task in ("t01", "t02"))
    assert list(read_receipts()) == ["t01", "t02"]
    assert read_json(second)["previous"] == sha256_of(first)
    assert first_fault() == "holds"
    assert not list((retired / "pictures").rglob("*.png"))
    assert "all up to date" in call_here(retired, "run")
    first.write_bytes(first.read_bytes() + b" ")
    with pytest.raises(
        InputError, match=r"t02/receipt\.json: the receipt before it is not the one that it names"
    ):
        read_receipts()


def test_who_asks_for_what_is_gone_is_told_in_one_line(retired: Path) -> None:
    _, said = said_here(retired, "audit", "verify", "--retrain", "t01", status=2)
    assert "t01: its images were deleted (ledger/retired/t01" in said
    table = call_here(retired, "doctor", "--json", "--quick")
    found = [its for its in json.loads(table)["findings"] if its["task"] == "t01"]
    assert [its["level"] for its in found] == ["ok"]
    shutil.rmtree("ledger/retired")
    assert "the receipt of deleted images; restore it from version control" in refused(
        retired, "sdlora", "run"
    )
