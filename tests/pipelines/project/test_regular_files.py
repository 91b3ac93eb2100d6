"""Nothing is read that may never end."""

import os
from pathlib import Path

import pytest

from pipelines.project.errors import InputError
from pipelines.project.regular_files import require_regular_files


def test_a_folder_of_files_links_and_folders_passes(tmp_path: Path) -> None:
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "a/b/1.png").touch()
    (tmp_path / "a/2.png").symlink_to("b/1.png")
    (tmp_path / "a/3.png").symlink_to("nowhere")
    (tmp_path / "a/c").symlink_to(tmp_path)

    require_regular_files(tmp_path)


@pytest.mark.parametrize(
    ("target", "what"),
    [
        pytest.param(None, "a pipe", id="pipe"),
        pytest.param("/dev/zero", "a device", id="device"),
        pytest.param("/proc/self/mounts", "a link to a file of the kernel", id="kernel"),
    ],
)
def test_what_would_be_read_without_end_is_refused_at_once(
    tmp_path: Path, target: str | None, what: str
) -> None:
    path = tmp_path / "a/1.png"
    path.parent.mkdir()
    os.mkfifo(path) if target is None else path.symlink_to(target)

    with pytest.raises(InputError) as caught:
        require_regular_files(tmp_path)
    assert str(caught.value) == f"{path}: {what} among the files, which is not read; remove it"
