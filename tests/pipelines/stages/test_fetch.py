import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipelines.data import glyphs
from pipelines.data.png import png
from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of
from pipelines.project.settings import Digits, Fetch
from pipelines.stages.fetch import KNOWN, digits, distinct_images, fetch
from tests.support.repository import REPOSITORY

SHIPPED = REPOSITORY / "params.yaml"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copyfile(SHIPPED, tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def with_glyphs() -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text.replace("fetch:\n", "fetch:\n  glyphs100: {}\n"))


def pack_glyphs(folder: Path, monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, object]]) -> None:
    """Put another benchmark in the place of the packaged one."""
    (folder / "embedded" / "glyphs100").mkdir(parents=True)
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_file(folder / "embedded" / "glyphs100" / "glyphs100.arrow", table.schema) as file:
        file.write_table(table)
    monkeypatch.setattr(glyphs, "resources", SimpleNamespace(files=lambda _: folder))


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in folder.rglob("*") if p.is_file()}


def test_every_known_data_set_has_its_settings() -> None:
    assert set(KNOWN) == set(Fetch.names())


def test_digits_become_png_files_in_class_folders(project: Path) -> None:
    from sklearn.datasets import load_digits

    summary = fetch("digits", out=project / "data/raw/digits").rows

    files = tree(project / "data/raw/digits")
    assert {tuple(name.split("/")[:2]) for name in files} == {
        (part, str(digit)) for part in ("train", "test") for digit in range(10)
    }
    assert sorted(int(Path(name).stem) for name in files) == list(range(1797))
    assert summary == [
        {"split": "train", "classes": 10, "images": 1438},
        {"split": "test", "classes": 10, "images": 359},
    ]
    (first,) = (name for name in files if name.endswith("/0000.png"))
    pixels = np.asarray(Image.open(project / "data/raw/digits" / first))
    np.testing.assert_array_equal(pixels, np.rint(load_digits().images[0] * 255 / 16))


def test_the_same_settings_give_the_same_bytes() -> None:
    settings = Digits(test_fraction=0.2, seed=0)

    assert digits(settings) == digits(settings)


def test_each_class_is_divided_by_the_fraction_and_another_seed_divides_otherwise() -> None:
    one, two = (digits(Digits(test_fraction=0.5, seed=seed)) for seed in (0, 1))

    def tests(files: list) -> list[str]:
        return [path.name for path, _ in files if path.parts[:2] == ("test", "0")]

    assert len(tests(one.files)) == len(tests(two.files)) == 89
    assert tests(one.files) != tests(two.files)


def test_a_tiny_fraction_still_leaves_a_test_image_in_every_class() -> None:
    files = digits(Digits(test_fraction=0.0001, seed=0)).files

    assert sorted(path.parts[1] for path, _ in files if path.parts[0] == "test") == [
        str(i) for i in range(10)
    ]


def test_copies_are_kept_once_and_not_at_all_where_their_labels_disagree() -> None:
    images = np.array([[1], [2], [1], [3], [3]], np.uint8)

    assert distinct_images(images, np.array([0, 1, 0, 0, 1])).tolist() == [0, 1]


def test_png_bytes_do_not_depend_on_a_compressor() -> None:
    assert len(png(np.zeros((8, 8), np.uint8))) == len(png(np.arange(64, dtype=np.uint8).reshape(8, 8)))


def test_glyphs_are_named_by_row_and_font(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_glyphs()
    rows = [
        {"image": b"x", "split": "train", "label": "Ж", "font": "DejaVu Sans, Bold"},
        {"image": b"y", "split": "test", "label": "Ж", "font": "Gentium"},
    ]
    pack_glyphs(project, monkeypatch, rows)

    summary = fetch("glyphs100", out=project / "out").rows

    assert set(tree(project / "out")) == {"train/Ж/0000-dejavu-sans-bold.png", "test/Ж/0001-gentium.png"}
    assert summary == [
        {"split": "train", "classes": 1, "images": 1},
        {"split": "test", "classes": 1, "images": 1},
    ]


def test_a_benchmark_that_points_outside_its_folder_is_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with_glyphs()
    pack_glyphs(project, monkeypatch, [{"image": b"x", "split": "train", "label": "../../x", "font": "a"}])

    with pytest.raises(InputError, match=r"glyphs100\.arrow: row 0 has no class folder"):
        fetch("glyphs100", out=project / "out")
    assert not (project / "out").exists()


def test_a_missing_benchmark_file_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_glyphs()
    monkeypatch.setattr(glyphs, "resources", SimpleNamespace(files=lambda _: project))

    with pytest.raises(InputError, match=r"embedded/glyphs100/glyphs100\.arrow: the file is missing"):
        fetch("glyphs100", out=project / "out")


def test_an_unknown_data_set_is_refused_with_the_known_ones(project: Path) -> None:
    with pytest.raises(
        InputError, match=r"'cifar10' is not a data set .* known are digits, glyphs100, cifar100"
    ):
        fetch("cifar10", out=project / "out")


def test_a_data_set_without_an_entry_is_refused(project: Path) -> None:
    with pytest.raises(InputError, match=r"params\.yaml: fetch: there is no entry 'glyphs100'; add"):
        fetch("glyphs100", out=project / "out")
