"""`sdlora audit verify` holds for what a run left, and finds one flipped bit in any file of it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from pathlib import Path

import pytest

from pipelines.project.errors import FaultError
from pipelines.project.params import Params
from sdlora.ledger import file_sha256, read_record, record_bytes
from sdlora.tensors import read_tensors, write_tensors
from tests.support.commands import call, call_here, finish, said_here

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("preloaded")]


@pytest.fixture
def project(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project, as the working directory."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder)
    monkeypatch.chdir(folder)
    return folder


def verify(folder: Path) -> tuple[int, list[str]]:
    """The exit status and the lines of `sdlora audit verify`."""
    done = finish(folder, "sdlora", "audit", "verify")
    assert not done.stderr
    return done.returncode, done.stdout.splitlines()


def first_fault() -> str | None:
    """The first thing that does not hold in the working directory, found in this process: faster."""
    from pipelines.audits.verify import verify

    return next((f"{finding.step} {finding.fault}" for finding in verify() if finding.fault), None)


def flip(path: Path, at: int = -1) -> None:
    """Change one bit of a file, and hide it from whoever looks at times and sizes only."""
    times = path.stat()
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.chmod(0o644)
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


def test_a_finished_chain_holds_and_says_its_head(project: Path) -> None:
    status, lines = verify(project)
    head = file_sha256(project / "artifacts/gate/t02/verdict.json")

    assert status == 0
    assert [line.split()[:2] for line in lines[:-1]] == [
        [s, "holds"] for s in ("t00", "t01", "t02", "report", "journal")
    ]
    assert lines[-1] == f"the chain holds; its head is {head}"
    report = json.loads(call_here(project, "audit", "verify", "--json", "--expect", head))
    assert (report["holds"], report["head"]) == (True, head)
    last = report["steps"][2]
    assert (last["record"], last["head"]) == (file_sha256(project / "artifacts/model/t02/step.json"), head)
    journal = report["journal"]
    assert (journal["results"], journal["told"], journal["beyond"]) == (10, 10, [])
    lines = (project / "ledger/journal.jsonl").read_bytes().splitlines()
    assert journal["heads"] == [hashlib.sha256(lines[-1]).hexdigest()]


def test_one_flipped_bit_of_any_file_is_found_and_the_file_named(project: Path) -> None:
    files = sorted(path for path in (project / "artifacts").rglob("*") if path.is_file())
    assert len({path.suffix for path in files}) >= 5
    missed = []
    for index, path in enumerate([*files, project / "metrics.json"]):
        name = path.relative_to(project).as_posix()
        at = (0, path.stat().st_size // 2, -1)[index % 3]
        flip(path, at)
        fault = first_fault()
        if fault is None or f" {name}" not in fault:
            missed.append((name, at, fault))
        flip(path, at)
    assert not missed
    assert first_fault() is None


def test_what_a_removed_task_has_left_changes_no_verdict(project: Path) -> None:
    (project / "artifacts/fit/t09").mkdir()
    (project / "artifacts/fit/t09/fit.json").write_text("{}")
    assert first_fault() is None


def test_a_moved_direction_is_named_with_step_and_file(project: Path) -> None:
    path = project / "artifacts/model/t01/directions/t01.safetensors"
    tensors = read_tensors(path)
    tensors["blocks.1.attn.v.up"][0, 0] += 1e-6
    path.chmod(0o644)
    write_tensors(path, tensors)
    status, lines = verify(project)

    assert status == 1
    assert "t01     artifacts/model/t01/directions/t01.safetensors: the file was changed" in lines[1]
    assert lines[2] == "the chain does not hold at t01"


def test_a_direction_that_moved_with_its_record_rewritten_is_found_all_the_same(project: Path) -> None:
    folder = project / "artifacts/model/t01"
    path = folder / "directions/t01.safetensors"
    tensors = {name: tensor * 1.01 for name, tensor in read_tensors(path).items()}
    for file in (path, folder / "step.json"):
        file.chmod(0o644)
    write_tensors(path, tensors)
    record = json.loads((folder / "step.json").read_text())
    record["files"]["directions/t01.safetensors"] = file_sha256(path)
    (folder / "step.json").write_bytes(record_bytes(record))

    assert "t01 artifacts/model/t01/" in (fault := str(first_fault()))
    assert "its bytes are not those of dvc.lock" in fault


def test_a_frozen_direction_that_a_later_step_brings_again_is_found(project: Path) -> None:
    folder = project / "artifacts/model/t02"
    path = folder / "directions/t01.safetensors"
    tensors = read_tensors(project / "artifacts/model/t01/directions/t01.safetensors")
    write_tensors(path, {name: tensor * 1.01 for name, tensor in tensors.items()})
    record = json.loads((folder / "step.json").read_text())
    record["files"]["directions/t01.safetensors"] = file_sha256(path)
    (folder / "step.json").chmod(0o644)
    (folder / "step.json").write_bytes(record_bytes(record))

    assert "t02 artifacts/model/t02/directions/t01.safetensors: it was frozen at an earlier step" in str(
        first_fault()
    )


def test_an_earlier_record_that_was_rewritten_breaks_the_chain_after_it(project: Path) -> None:
    path = project / "artifacts/model/t01/step.json"
    record = json.loads(path.read_text())
    record["parameters"]["seed"] += 1
    path.chmod(0o644)
    path.write_bytes(record_bytes(record))
    lock = project / "dvc.lock"

    assert "t01 artifacts/model/t01/step.json: its bytes are not those of dvc.lock" in str(first_fault())
    # Whoever rewrites dvc.lock too is betrayed by the verdict.
    from pipelines.versioning.artifacts import folder_md5, read_lock
    from pipelines.versioning.file_hashes import md5_of

    names = [file for file in (path.parent).rglob("*") if file.is_file()]
    forged = folder_md5({file.relative_to(path.parent).as_posix(): md5_of(file) for file in names})
    known = read_lock(Params.load())
    text = lock.read_text().replace(known.outs["artifacts/model/t01"], forged)
    lock.write_text(text)
    assert "t01 dvc.lock: evaluate@t01 read another artifacts/model/t01/step.json" in str(first_fault())
    lock.write_text(text.replace(known.deps["gate@t01"]["artifacts/model/t01/step.json"], md5_of(path)))
    assert "t01 artifacts/gate/t01/verdict.json: its record is not what follows" in str(first_fault())


@pytest.mark.parametrize("column", ["image", "pixels", "label"])
def test_a_test_picture_that_was_swapped_is_found_whatever_stands_beside_it(
    project: Path, column: str
) -> None:
    """The digest of the samples is in the ledger; a file that agrees with itself is not enough."""
    import hashlib

    from pipelines.audits.verify import SeenPictures, check_bytes, check_split
    from pipelines.data.packed import ImageRow, read_images, write_images
    from pipelines.versioning.artifacts import ArtifactStore, read_lock

    path = project / "artifacts/split/t02/test/t02.arrow"
    rows = [ImageRow(**row) for row in read_images(path).to_pylist()]
    other = read_images(project / "artifacts/train/t02/train.arrow").to_pylist()[0]
    swapped = {
        "image": rows[0]._replace(image=other["image"], sha256=hashlib.sha256(other["image"]).hexdigest()),
        "pixels": rows[0]._replace(pixels="0" * 64),
        "label": rows[0]._replace(label=3 - rows[0].label % 2),
    }
    record = read_record(project / "artifacts/model/t02")
    (project / "scratch").mkdir()
    place = ArtifactStore(read_lock(Params.load()), project / "scratch")
    check_bytes(place, "artifacts/split/t01")
    check_split(place, "t02", record, SeenPictures())
    path.chmod(0o644)
    write_images(path, [swapped[column], *rows[1:]])
    with pytest.raises(FaultError, match=r"test/t02\.arrow: its pictures are not the samples of the ledger"):
        check_split(place, "t02", record, SeenPictures())


def test_the_class_map_of_a_split_is_that_of_the_ledger_however_it_is_written(project: Path) -> None:
    from pipelines.audits.verify import SeenPictures, check_bytes, check_split
    from pipelines.data.split_chain import own_files
    from pipelines.versioning.artifacts import ArtifactStore, read_lock

    (project / "scratch").mkdir()
    place = ArtifactStore(read_lock(Params.load()), project / "scratch")
    split = project / "artifacts/split/t02"
    record = read_record(project / "artifacts/model/t02")
    check_bytes(place, "artifacts/split/t01")
    named = json.loads((split / "classes.json").read_text())
    for file in (split / "classes.json", split / "split.json"):
        file.chmod(0o644)

    def check_map(written: str) -> None:
        (split / "classes.json").write_text(written)
        described = json.loads((split / "split.json").read_text())
        (split / "split.json").write_text(json.dumps({**described, "files": own_files(split)}))
        seen = SeenPictures()
        check_split(place, "t01", read_record(project / "artifacts/model/t01"), seen)
        check_split(place, "t02", record, seen)

    check_map(json.dumps(named))
    named["classes"][0]["name"] = "renamed"
    with pytest.raises(FaultError, match=r"t02/classes\.json: not the classes of the ledger"):
        check_map(json.dumps(named, sort_keys=True, indent=2) + "\n")


def test_the_hash_of_a_class_map_follows_from_the_records_in_order(project: Path) -> None:
    from pipelines.audits.verify import _ClassMaps

    maps = _ClassMaps()
    for step in ("t01", "t02"):
        record = read_record(project / "artifacts/model" / step)
        assert maps.sha256(record) == file_sha256(project / "artifacts/split" / step / "classes.json")


def test_a_picture_that_an_earlier_task_was_trained_on_is_found_in_a_later_test(project: Path) -> None:
    from pipelines.audits.verify import SeenPictures, check_bytes, check_split
    from pipelines.data.packed import SampleRow, read_images, samples_digest, write_samples
    from pipelines.data.split_chain import own_files
    from pipelines.versioning.artifacts import ArtifactStore, read_lock

    (project / "scratch").mkdir()
    place = ArtifactStore(read_lock(Params.load()), project / "scratch")
    check_bytes(place, "artifacts/split/t01")
    split, seen = project / "artifacts/split/t02", SeenPictures()
    check_split(place, "t01", read_record(project / "artifacts/model/t01"), seen)
    record = read_record(project / "artifacts/model/t02")
    mine = [SampleRow(**row) for row in read_images(split / "samples/t02.arrow").to_pylist()]
    trained = next(
        row
        for row in read_images(project / "artifacts/split/t01/samples/t01.arrow").to_pylist()
        if row["split"] == "train"
    )
    at = next(index for index, row in enumerate(mine) if row.split == "test")
    forged = [*mine[:at], mine[at]._replace(pixels=trained["pixels"]), *mine[at + 1 :]]
    for file in (split / "samples/t02.arrow", split / "split.json", split / "test/t02.arrow"):
        file.chmod(0o644)
    write_samples(split / "samples/t02.arrow", forged)
    described = json.loads((split / "split.json").read_text())
    table = read_images(split / "test/t02.arrow").to_pylist()
    from pipelines.data.packed import ImageRow, write_images

    write_images(
        split / "test/t02.arrow",
        [
            ImageRow(**{**row, "pixels": trained["pixels"] if row["id"] == mine[at].id else row["pixels"]})
            for row in table
        ],
    )
    named = {**described, "digest": samples_digest(forged), "files": own_files(split)}
    (split / "split.json").write_text(json.dumps(named))
    with pytest.raises(FaultError, match="is both trained on and tested, by all tasks so far"):
        check_split(place, "t02", record, seen)


def test_metrics_that_do_not_follow_from_the_evaluations_are_found(project: Path) -> None:
    from pipelines.versioning.artifacts import read_lock
    from pipelines.versioning.file_hashes import md5_of

    lock, path = project / "dvc.lock", project / "metrics.json"
    was = read_lock(Params.load()).outs["metrics.json"]
    path.write_text(path.read_text().replace('"steps": 2', '"steps": 3'))
    lock.write_text(lock.read_text().replace(was, md5_of(path)))
    assert first_fault() == "report metrics.json: it does not follow from the evaluations"


def test_a_verdict_that_was_rewritten_with_the_lock_is_found(project: Path) -> None:
    """A step that broke a limit cannot be let through afterwards by whoever can write every file."""
    from pipelines.versioning.artifacts import folder_md5, read_lock
    from pipelines.versioning.file_hashes import md5_of

    path, lock = project / "artifacts/gate/t01/verdict.json", project / "dvc.lock"
    verdict = json.loads(path.read_text())
    assert verdict["record"] == file_sha256(project / "artifacts/model/t01/step.json")
    for change, fault in (
        ({"record": "0" * 64}, "its record is not what follows"),
        ({"samples": "0" * 64}, "its samples is not what follows"),
        ({"measured": {**verdict["measured"], "new_task": 1.01}}, "its measured is not what follows"),
        (
            {"limits": {**verdict["limits"], "calibration_error": 0.0}},
            "it let a step through that breaks a limit",
        ),
        ({"measured": {**verdict["measured"]}}, None),
    ):
        path.chmod(0o644)
        path.write_text(json.dumps({**verdict, **change}))
        forged = folder_md5({file.name: md5_of(file) for file in path.parent.iterdir()})
        before = lock.read_text()
        lock.write_text(before.replace(read_lock(Params.load()).outs["artifacts/gate/t01"], forged))
        found = str(first_fault())
        lock.write_text(before)
        if fault:
            assert f"t01 artifacts/gate/t01/verdict.json: {fault}" in found
        else:  # the same content in other bytes: the next verdict holds the hash of these
            assert (
                "t02 artifacts/gate/t02/verdict.json: its previous is not what follows" in found
                or "dvc.lock" in found
            )


def test_a_file_too_many_and_one_too_few_are_found(project: Path) -> None:
    extra = project / "artifacts/model/t01/head/t09.safetensors"
    extra.write_bytes(b"")
    assert "head/t09.safetensors: the record does not name this file" in str(first_fault())
    extra.unlink()
    (project / "artifacts/model/t02/magnitudes.safetensors").unlink()
    assert "t02 artifacts/model/t02/magnitudes.safetensors: the file is missing" in str(first_fault())


def test_what_is_not_in_the_workspace_is_verified_from_the_cache(project: Path) -> None:
    shutil.rmtree(project / "artifacts")
    assert first_fault() is None
    cached = [path for path in (project / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    flip(max(cached, key=lambda path: path.stat().st_size), 100_000)
    assert "t00 artifacts/model/t00/backbone.safetensors" in str(first_fault())


def test_what_is_nowhere_is_named(project: Path) -> None:
    shutil.rmtree(project / "artifacts/fit")
    shutil.rmtree(project / ".dvc/cache")
    assert "t01 artifacts/fit/t01: it is neither here nor in DVC's cache or remote; run `sdlora run`" in str(
        first_fault()
    )


def test_what_only_the_remote_has_is_verified_from_there_and_nothing_is_left_behind(
    project: Path, tmp_path: Path
) -> None:
    remote = tmp_path / "remote"
    call(project, "dvc", "remote", "add", "-q", "-d", "store", str(remote))
    call(project, "dvc", "push", "-q")
    shutil.rmtree(project / "artifacts")
    shutil.rmtree(project / ".dvc/cache")
    assert first_fault() is None
    assert not (project / "artifacts").exists()
    assert not list((project / ".dvc/cache").rglob("*.*"))
    stored = [path for path in remote.rglob("*") if path.is_file()]
    flip(max(stored, key=lambda path: path.stat().st_size), 100_000)
    assert "t00 artifacts/model/t00/backbone.safetensors" in str(first_fault())


def test_a_report_of_other_results_than_there_are_is_found(project: Path) -> None:
    from pipelines.versioning.artifacts import read_lock

    lock = project / "dvc.lock"
    was = read_lock(Params.load()).deps["report"]["artifacts/evaluation"]
    lock.write_text(lock.read_text().replace(was, "0" * 32 + ".dir"))
    assert first_fault() == (
        "report dvc.lock: report read another artifacts/evaluation than the one that was made"
    )


def test_a_step_learned_again_gives_the_same_bytes_and_one_that_cannot_is_named(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path / "scratch"  # its own, as other tests learn steps again at the same time
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    store = tmp_path / "store"
    params = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(
        params.replace("checkpoint_store:  ", f"checkpoint_store: {store}").replace(
            "checkpoint_seconds: 30 ", "checkpoint_seconds: 0.0001 "
        )
    )
    assert (project / "params.yaml").read_text() != params
    call_here(project, "--version")  # which remembers the fingerprints of the code, in .sdlora
    before = sorted(path for path in project.rglob("*") if path.is_file())
    lines = call_here(project, "audit", "verify", "--retrain", "t02").splitlines()

    assert lines[-2].startswith("t02     learned again in ")
    assert [list(folder.iterdir()) for folder in scratch.iterdir()] == [
        []
    ]  # its notes are gone, their folder stays
    assert not store.exists()  # a checkpoint would have learned nothing again
    assert sorted(path for path in project.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize(
    "command",
    [
        "rm -r fit t01 --out x",
        "sdlora freeze t01 --out x",
        "sdlora fit t01 --out ../x",
        "sdlora fit t01 --out /x",
        "",
    ],
)
def test_nothing_but_the_stage_itself_on_the_projects_own_files_is_run_again(command: str) -> None:
    from pipelines.audits.rederivation import _arguments
    from pipelines.project.errors import FaultError
    from pipelines.project.layout import StageName
    from pipelines.versioning.artifacts import Lock

    with pytest.raises(FaultError, match=r"dvc\.lock: the command of fit@t01 is none of this program's"):
        _arguments(Lock({}, {}, {}, {"fit@t01": command}, {}), StageName("fit", "t01"))


def test_a_step_is_learned_again_by_the_commands_of_dvc_yaml(project: Path) -> None:
    from dvc.repo import Repo

    from pipelines.versioning.artifacts import read_lock

    commands = read_lock(Params.load()).commands
    with Repo() as repo:
        said = {stage.addressing: stage.cmd for stage in repo.stage.load_all("dvc.yaml")}
    assert commands == said


def test_a_step_that_does_not_exist_is_not_learned_again(project: Path) -> None:
    _, said = said_here(project, "audit", "verify", "--retrain", "t09", status=2)
    assert said == "error: --retrain t09: there is no such task; known are t01, t02\n"


def test_a_head_that_the_chain_has_not_is_a_fault_and_an_earlier_one_none(project: Path) -> None:
    earlier = file_sha256(project / "artifacts/gate/t01/verdict.json")
    assert "t01     has the head that was expected" in call_here(
        project, "audit", "verify", "--expect", earlier
    )
    said = call_here(project, "audit", "verify", "--expect", "0" * 64, status=1)
    assert "and none of its steps has 000000000000: it was cut short, or made anew" in said
    _, said = said_here(project, "audit", "verify", "--expect", "0" * 12, status=2)
    assert said.startswith("error: --expect: not a head, which is 64 hexadecimal digits")


def test_a_line_of_the_journal_that_was_changed_is_found(project: Path) -> None:
    path = project / "ledger/journal.jsonl"
    path.write_text(path.read_text().replace('"images": 12', '"images": 13', 1))
    assert "the chain does not hold at the journal" in call_here(project, "audit", "verify", status=1)


def test_a_cached_object_that_was_changed_is_found_with_cache_and_a_remote_says_what_it_has(
    project: Path, tmp_path: Path
) -> None:
    call(project, "dvc", "remote", "add", "-q", "-d", "store", str(tmp_path / "remote"))
    call(project, "dvc", "push", "-q", "evaluate@t01")
    report = json.loads(call_here(project, "audit", "verify", "--cache", "--json"))
    cache, remote = (report["stored"][name] for name in ("the cache", "remote store"))
    assert cache["objects"] == cache["needed"] == remote["needed"]
    assert remote["objects"] == 3
    cached = [path for path in (project / ".dvc/cache/files/md5").rglob("*") if path.is_file()]
    flip(max(cached, key=lambda path: path.stat().st_size), 100_000)
    assert first_fault() is None
    said = call_here(project, "audit", "verify", "--cache", status=1)
    assert "its bytes are not those of its name" in said
    assert said.endswith("the chain does not hold at what is stored\n")


def test_without_a_lock_there_is_nothing_to_verify(project: Path) -> None:
    (project / "dvc.lock").unlink()
    _, said = said_here(project, "audit", "verify", status=2)
    assert said.startswith("error: dvc.lock: the file is missing; run `sdlora run`")


def test_what_the_lock_does_not_know_and_records_that_are_none_are_one_line(project: Path) -> None:
    lock = project / "dvc.lock"
    text = lock.read_text()
    lock.write_text(text.replace("artifacts/fit/t02", "artifacts/fit/t09"))
    assert "t02 artifacts/fit/t02: dvc.lock does not know it" in str(first_fault())
    lock.write_text(text)
    record = project / "artifacts/model/t01/step.json"
    record.chmod(0o644)
    for data in (b"[]", b'{"step": "t01", "files": []}', b"{"):
        record.write_bytes(data)
        assert "t01 artifacts/model/t01/step.json: " in str(first_fault())


def test_an_evaluation_of_other_pictures_than_were_packed_is_found(project: Path) -> None:
    """Whoever runs `split` again and stops there leaves an evaluation of what is gone."""
    from pipelines.versioning.artifacts import read_lock

    lock, key = project / "dvc.lock", "artifacts/split/t02/split.json"
    out = read_lock(Params.load()).deps["evaluate@t02"][key]
    assert out in lock.read_text()
    lock.write_text(lock.read_text().replace(out, "a" * 32))
    assert f"dvc.lock: evaluate@t02 read another {key} than" in str(first_fault())


def test_a_listing_of_the_cache_that_leads_elsewhere_is_not_followed(project: Path) -> None:
    from pipelines.versioning.artifacts import read_lock

    md5 = read_lock(Params.load()).outs["artifacts/fit/t01"]
    listing = project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    listing.chmod(0o644)
    listing.write_text(listing.read_text().replace("fit.json", "../../../evil"))
    shutil.rmtree(project / "artifacts/fit/t01")
    assert "t01 artifacts/fit/t01: DVC's cache has another listing of its files" in str(first_fault())
