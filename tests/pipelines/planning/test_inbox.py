"""An event may name a folder of the inbox, and nothing else in the world."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.planning.inbox import add_once, arrived
from pipelines.project.errors import InputError
from pipelines.project.params import Params
from tests.support.parameters import settings
from tests.support.pictures import paint

INBOX = Path("data/inbox")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project with one folder in its inbox, and a folder outside."""
    folder = tmp_path / "project"
    paint(folder / INBOX / "animals/zebra", 1, 2)
    paint(tmp_path / "secret/key", 2, 2)
    (folder / "params.yaml").write_text(settings(), encoding="utf-8")
    monkeypatch.chdir(folder)
    return folder


def refusal(folder: str) -> str:
    with pytest.raises(InputError) as caught:
        arrived(folder, INBOX)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_of_the_inbox_is_taken_also_where_the_inbox_is_a_link(project: Path, tmp_path: Path) -> None:
    assert arrived("animals", INBOX) == INBOX / "animals"
    (project / "data").rename(tmp_path / "share")
    (project / "data").mkdir()
    INBOX.symlink_to(tmp_path / "share/inbox")
    assert arrived("animals", INBOX) == INBOX / "animals"


@pytest.mark.parametrize("folder", ["", ".", "./"])
def test_no_name_is_refused(folder: str) -> None:
    assert "names no folder" in refusal(folder)


@pytest.mark.parametrize(
    "folder", ["/etc", "..", "../..", "animals/../../..", "a\\b", "a\nb", "\x00", "x" * 300 + "/.."]
)
def test_a_name_that_could_lead_elsewhere_is_refused(folder: str) -> None:
    assert "not the name of a folder in data/inbox" in refusal(folder)


def test_a_missing_folder_or_file_is_refused() -> None:
    assert "no such folder" in refusal("lions")
    assert "no such folder" in refusal("animals/zebra/0.png")


def test_links_that_lead_out_are_refused_wherever_they_are(tmp_path: Path) -> None:
    (INBOX / "link").symlink_to(tmp_path / "secret")
    assert "leads out" in refusal("link")
    (INBOX / "animals/key").symlink_to(tmp_path / "secret/key")
    assert "key is a link that leads out" in refusal("animals")
    (INBOX / "animals/key").unlink()
    (INBOX / "animals/zebra/9.png").symlink_to(tmp_path / "secret/key/0.png")
    assert "zebra/9.png is a link that leads out" in refusal("animals")


def test_a_missing_inbox_is_said() -> None:
    with pytest.raises(InputError, match="the inbox is missing on this machine"):
        arrived("animals", Path("data/other"))


def test_the_same_folder_is_one_task_until_a_class_is_added() -> None:
    source = arrived("animals", INBOX)
    add_once(source)
    text = Path("params.yaml").read_bytes()
    assert list(Params.load().tasks) == ["t01", "t02", "t03"]
    assert "already" in add_once(source)[0]
    assert Path("params.yaml").read_bytes() == text
    paint(source / "lion", 3, 2)
    add_once(source)
    assert Params.load().tasks["t04"].classes == ("lion",)


def test_a_folder_with_known_classes_brings_more_images_of_them() -> None:
    paint(INBOX / "animals/a", 3, 2)
    add_once(arrived("animals", INBOX))

    added = Params.load().tasks["t03"]
    assert (added.kind, added.classes) == ("more", ("a", "zebra"))
