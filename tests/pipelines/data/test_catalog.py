"""The readers of the published data sets, on tiny archives in the layout of each; and what is recorded of them."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from pipelines.data import catalog
from pipelines.data.catalog import LAYOUTS, load_benchmark, stratified
from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of
from pipelines.project.names import class_name_fault
from pipelines.project.settings import Fetch
from pipelines.stages.fetch import fetch
from tests.support.repository import REPOSITORY

SHIPPED = REPOSITORY / "params.yaml"
EMBEDDED = REPOSITORY / "pipelines" / "data" / "embedded"


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project without a network: what `publish` puts there is all that there is."""
    (tmp_path / "project").mkdir()
    shutil.copyfile(SHIPPED, tmp_path / "project" / "params.yaml")
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(catalog, "resources", SimpleNamespace(files=lambda _: tmp_path / "package"))
    return tmp_path / "project"


def publish(
    name: str,
    files: dict[str, bytes],
    classes: list[str],
    *,
    splits: dict[str, str] | None = None,
    **facts: object,
) -> None:
    """Record a data set in place of the real one, and put its archives where downloads are kept."""
    known = Path("../package/embedded") / name
    known.mkdir(parents=True, exist_ok=True)
    (known / "classes.txt").write_text("".join(f"{line}\n" for line in classes), encoding="utf-8")
    rows = []
    for file, data in files.items():
        path = Path(".sdlora/downloads") / name / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        row = {"name": file, "urls": [f"http://127.0.0.1:1/{file}"], "size": len(data)}
        row["digest"] = f"sha256:{hashlib.sha256(data).hexdigest()}"
        rows.append(row | ({"split": splits[file]} if splits and file in splits else {}))
    source = {"title": name, "page": "", "files": rows, "images": {}, **facts}
    (known / "source.json").write_text(json.dumps(source), encoding="utf-8")


def choose(entry: str) -> None:
    """Write an entry into the fetch block of params.yaml."""
    text = Path("params.yaml").read_text(encoding="utf-8")
    Path("params.yaml").write_text(re.sub(r"(?m)^fetch:\n", f"fetch:\n  {entry}\n", text), encoding="utf-8")


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return file.getvalue()


# What is recorded.


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch) -> None:
    """The package's own records."""
    monkeypatch.setattr(catalog, "resources", SimpleNamespace(files=lambda _: EMBEDDED.parent))


def test_every_known_data_set_has_a_folder_of_its_own() -> None:
    assert {path.name for path in EMBEDDED.iterdir()} == set(Fetch.names())


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_file_has_an_address_and_a_hash(name: str) -> None:
    for remote in load_benchmark(name).remotes.values():
        assert remote.urls
        assert all(
            url.startswith(("https://", "http://")) and url.endswith(remote.name) for url in remote.urls
        )
        assert remote.digest
        assert re.fullmatch(r"sha256:[0-9a-f]{64}|git-blob:[0-9a-f]{40}", remote.digest)


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize(
    ("name", "number", "first", "last"),
    [
        ("mnist", 10, "0", "9"),
        ("fashion-mnist", 10, "T-shirt_top", "Ankle_boot"),
        ("cifar100", 100, "apple", "worm"),
        ("imagenet-r", 200, "goldfish", "acorn"),
        ("imagenet-a", 200, "stingray", "acorn"),
        ("cub200", 200, "001.Black_footed_Albatross", "200.Common_Yellowthroat"),
        ("domainnet", 345, "aircraft_carrier", "zigzag"),
    ],
)
def test_the_classes_of_every_data_set_are_known(name: str, number: int, first: str, last: str) -> None:
    classes = load_benchmark(name).classes

    assert len(set(classes)) == number
    assert (classes[0], classes[-1]) == (first, last)
    assert not [line for line in classes if class_name_fault(line)]


@pytest.mark.usefixtures("real")
@pytest.mark.parametrize("name", ["imagenet-r", "imagenet-a", "cub200", "cifar100"])
def test_labels_are_in_the_order_in_which_image_folder_sorts(name: str) -> None:
    """torchvision sorts the names of class folders as plain text, and the papers' code numbers them so."""
    folders = list(load_benchmark(name).folders)
    assert folders == sorted(folders)


# The layouts.


def test_cifar100_is_read_from_its_binary_version(project: Path) -> None:
    def rows(*labels: int) -> bytes:
        return b"".join(
            bytes([7, label]) + bytes([label]) * 1024 + bytes(1024) + bytes([255]) * 1024 for label in labels
        )

    archive = {
        "cifar-100-binary/train.bin": rows(2, 0),
        "cifar-100-binary/coarse_label_names.txt": b"fish\n",
        "cifar-100-binary/fine_label_names.txt": b"apple\nbaby\nbear\n\n",
        "cifar-100-binary/test.bin": rows(1),
    }
    publish("cifar100", {"cifar-100-binary.tar.gz": tar(archive, "w:gz")}, ["apple", "baby", "bear"])
    choose("cifar100: {}")

    summary = fetch("cifar100", out=project / "out").rows

    assert set(tree(project / "out")) == {
        "train/bear/00000.png",
        "train/apple/00001.png",
        "test/baby/00000.png",
    }
    pixels = np.asarray(Image.open(project / "out/train/bear/00000.png"))
    assert pixels.shape == (32, 32, 3)
    assert pixels[5, 6].tolist() == [2, 0, 255]
    assert summary[0] == {"split": "train", "classes": 2, "images": 2}


@pytest.mark.parametrize(
    ("archive", "fault"),
    [
        pytest.param({"train.bin": b"", "test.bin": b""}, "fine_label_names.txt is missing", id="a-file"),
        pytest.param(
            {"train.bin": b"", "test.bin": b"", "fine_label_names.txt": b"pear"}, "not the known", id="names"
        ),
        pytest.param(
            {"train.bin": bytes(3073), "test.bin": b"", "fine_label_names.txt": b"apple"}, "cut off", id="cut"
        ),
        pytest.param(
            {"train.bin": b"\1\1" + bytes(3072), "test.bin": b"", "fine_label_names.txt": b"apple"},
            "images and labels of train do not fit",
            id="label",
        ),
    ],
)
def test_another_archive_of_cifar100_is_refused(project: Path, archive: dict[str, bytes], fault: str) -> None:
    publish("cifar100", {"cifar-100-binary.tar.gz": tar(archive, "w:gz")}, ["apple"])
    choose("cifar100: {}")

    with pytest.raises(InputError, match=fault):
        fetch("cifar100", out=project / "out")
    assert not (project / "out").exists()


def idx(array: np.ndarray) -> bytes:
    head = [0x800 + array.ndim, *array.shape]
    return gzip.compress(np.array(head, ">u4").tobytes() + array.astype(np.uint8).tobytes(), mtime=0)


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist"])
def test_mnist_is_read_from_its_four_files(project: Path, name: str) -> None:
    images = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    files = {
        "train-images-idx3-ubyte.gz": idx(images),
        "train-labels-idx1-ubyte.gz": idx(np.array([1, 0])),
        "t10k-images-idx3-ubyte.gz": idx(images[1:]),
        "t10k-labels-idx1-ubyte.gz": idx(np.array([1])),
    }
    publish(name, files, ["zero", "one"], images={"official": {"train": 2, "test": 1}})
    choose(f"{name}: {{}}")

    fetch(name, out=project / "out")

    assert set(tree(project / "out")) == {
        "train/one/00000.png", "train/zero/00001.png", "test/one/00000.png",
    }  # fmt: skip
    np.testing.assert_array_equal(np.asarray(Image.open(project / "out/train/zero/00001.png")), images[1])


def as_debian_packs(data: bytes) -> bytes:
    """A gzip file without name and time in its header, as in Debian's packages."""
    name_ends = data.index(b"\0", 10) + 1
    return data[:3] + bytes(5) + data[8:10] + data[name_ends:]


def published_and_installed() -> dict[str, bytes]:
    """Publish Fashion-MNIST, put it into a folder in the layout of Debian's package, and forget the downloads."""
    images = np.arange(2 * 4 * 3).reshape(2, 4, 3)
    parts = {"train-images-idx3": images, "t10k-images-idx3": images[1:]}
    parts |= {"train-labels-idx1": np.array([1, 0]), "t10k-labels-idx1": np.array([1])}
    files = {}
    for name, array in parts.items():
        packed = io.BytesIO()
        with gzip.GzipFile(f"{name}-ubyte", "wb", fileobj=packed, mtime=1504176627) as file:
            file.write(gzip.decompress(idx(array)))
        files[f"{name}-ubyte.gz"] = packed.getvalue()
    folder = Path("../datasets").resolve()
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(as_debian_packs(data))
    publish("fashion-mnist", files, ["zero", "one"])
    record = Path("../package/embedded/fashion-mnist/source.json")
    source = json.loads(record.read_text(encoding="utf-8"))
    for row in source["files"]:
        data = files[row["name"]]
        header = data[: data.index(b"\0", 10) + 1].hex()
        row["installed"] = {"path": str(folder / row["name"]), "header": header}
    record.write_text(json.dumps(source), encoding="utf-8")
    shutil.rmtree(".sdlora/downloads")
    choose("fashion-mnist: {}")
    return files


def test_files_of_debians_package_become_those_of_the_download(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = published_and_installed()

    fetch("fashion-mnist", out=project / "out")

    assert tree(project / ".sdlora/downloads/fashion-mnist") == files
    assert set(tree(project / "out")) == {
        "train/one/00000.png", "train/zero/00001.png", "test/one/00000.png",
    }  # fmt: skip
    assert "t10k-labels-idx1-ubyte.gz: taken from " in capsys.readouterr().err


def test_an_installed_file_that_is_another_one_is_downloaded_instead(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from pipelines.data import downloads

    monkeypatch.setattr(downloads, "TRIES", 1)
    published_and_installed()
    installed = project.parent / "datasets/t10k-images-idx3-ubyte.gz"
    installed.write_bytes(installed.read_bytes()[:-1] + b"?")

    with pytest.raises(InputError, match=r"t10k-images-idx3-ubyte\.gz: not downloaded \(http://127"):
        fetch("fashion-mnist", out=project / "out")
    assert f"{installed}: not the published file, so that is downloaded\n" in capsys.readouterr().err


def test_what_is_not_an_idx_file_is_refused(project: Path) -> None:
    labels = idx(np.array([1]))
    files = dict.fromkeys(("train-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"), labels)
    files |= dict.fromkeys(("train-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"), labels)
    publish("mnist", files, ["0", "1"])
    choose("mnist: {}")

    with pytest.raises(InputError, match=r"train-images-idx3-ubyte\.gz: not an IDX file of 3 dimensions"):
        fetch("mnist", out=project / "out")


RENDITIONS = {
    "imagenet-r/README.txt": b"about",
    "imagenet-r/n02/a_1.jpg": b"shark 1",
    "imagenet-r/n01/a_1.jpg": b"fish 1",
    "imagenet-r/n01/a_2.jpg": b"fish 2",
    "imagenet-r/n02/a_2.jpg": b"shark 2",
}
WNIDS = ["n01\tgoldfish", "n02\tgreat_white_shark"]
YAML_TRAIN = b"data:\n- data/imagenet-r/n01/a_1.jpg\n- data/imagenet-r/n02/a_2.jpg\ntargets:\n- 7\n- 5\n"
YAML_TEST = b"data:\n- data/imagenet-r/n01/a_2.jpg\n- data/imagenet-r/n02/a_1.jpg\ntargets:\n- 7\n- 5\n"


def publish_renditions(**lists: bytes) -> None:
    files = {"imagenet-r.tar": tar(RENDITIONS)}
    files |= {f"imagenet-r_{part}.yaml": text for part, text in lists.items()}
    of_lists = dict.fromkeys(("imagenet-r_train.yaml", "imagenet-r_test.yaml"), "coda-prompt")
    publish("imagenet-r", files, WNIDS, splits=of_lists, notes={"stratified": "our own"})


def test_imagenet_r_is_divided_by_the_published_lists(project: Path) -> None:
    publish_renditions(train=YAML_TRAIN, test=YAML_TEST)
    choose("imagenet-r: {split: coda-prompt}")

    fetch("imagenet-r", out=project / "out")

    assert tree(project / "out") == {
        "train/goldfish/a_1.jpg": b"fish 1",
        "train/great_white_shark/a_2.jpg": b"shark 2",
        "test/goldfish/a_2.jpg": b"fish 2",
        "test/great_white_shark/a_1.jpg": b"shark 1",
    }


def test_a_listed_image_that_is_nowhere_is_an_error(project: Path) -> None:
    publish_renditions(train=YAML_TRAIN.replace(b"a_2", b"a_9"), test=YAML_TEST)
    choose("imagenet-r: {split: coda-prompt}")

    with pytest.raises(
        InputError, match=r"1 of 4 listed images are in no archive, imagenet-r/n02/a_9\.jpg among"
    ):
        fetch("imagenet-r", out=project / "out")
    assert not (project / "out").exists()


def test_a_list_without_entries_is_refused(project: Path) -> None:
    publish_renditions(train=b"targets:\n- 1\n", test=YAML_TEST)
    choose("imagenet-r: {split: coda-prompt}")

    with pytest.raises(InputError, match=r"imagenet-r_train\.yaml: there is no list `data` in it"):
        fetch("imagenet-r", out=project / "out")


def test_the_stratified_division_needs_no_list_and_says_that_it_is_ours(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    publish_renditions()
    choose("imagenet-r: {split: stratified}")

    fetch("imagenet-r", out=project / "out")

    found = tree(project / "out")
    assert sorted(found.values()) == sorted(data for name, data in RENDITIONS.items() if name.endswith("jpg"))
    assert {tuple(name.split("/")[:2]) for name in found} == {
        (part, wnid.split("\t")[1]) for part in ("train", "test") for wnid in WNIDS
    }
    assert "imagenet-r: split stratified: our own\n" in capsys.readouterr().err


def test_a_fifth_of_each_class_is_tested_on_whatever_the_order_of_the_archive() -> None:
    paths = [PurePosixPath("set", folder, f"{i}.jpg") for folder in ("a", "b") for i in range(20)]
    paths += [PurePosixPath("set/c/1.jpg"), PurePosixPath("set/c/2.jpg")]

    parts = stratified(paths)

    assert parts == stratified(paths[::-1])
    tests = [path.parent.name for path, part in parts.items() if part == "test"]
    assert {name: tests.count(name) for name in "abc"} == {"a": 4, "b": 4, "c": 1}
    assert {p.name for p in paths if parts[p] == "test" and p.parent.name == "a"} != {
        p.name for p in paths if parts[p] == "test" and p.parent.name == "b"
    }


def test_an_image_too_few_is_an_error(project: Path) -> None:
    publish("imagenet-a", {"imagenet-a.tar": tar({"imagenet-a/n01/x.jpg": b"1", "imagenet-a/n01/y.jpg": b"2"})},
            WNIDS, images={"stratified": {"all": 3}})  # fmt: skip
    choose("imagenet-a: {split: stratified}")

    with pytest.raises(
        InputError, match=r"imagenet-a: found 2 images, expected 3; delete \.sdlora/downloads"
    ):
        fetch("imagenet-a", out=project / "out")
    assert not (project / "out").exists()


def test_cub200_is_divided_by_the_files_beside_its_images(project: Path) -> None:
    archive = {
        "attributes.txt": b"",
        "CUB_200_2011/images/001.Auk/Auk_0001_7.jpg": b"auk 1",
        "CUB_200_2011/images/001.Auk/Auk_0002_9.jpg": b"auk 2",
        "CUB_200_2011/images/002.Wren/Wren_1.jpg": b"wren",
        "CUB_200_2011/images.txt": b"1 001.Auk/Auk_0001_7.jpg\n2 001.Auk/Auk_0002_9.jpg\n3 002.Wren/Wren_1.jpg\n",
        "CUB_200_2011/train_test_split.txt": b"1 0\n2 1\n3 1\n",
    }
    publish("cub200", {"CUB_200_2011.tgz": tar(archive, "w:gz")}, ["001.Auk", "002.Wren"])
    choose("cub200: {split: official}")

    fetch("cub200", out=project / "out")

    assert tree(project / "out") == {
        "test/001.Auk/Auk_0001_7.jpg": b"auk 1",
        "train/001.Auk/Auk_0002_9.jpg": b"auk 2",
        "train/002.Wren/Wren_1.jpg": b"wren",
    }


def test_cub200_without_its_lists_is_refused(project: Path) -> None:
    archive = {"CUB_200_2011/images/001.Auk/1.jpg": b"auk"}
    publish("cub200", {"CUB_200_2011.tgz": tar(archive, "w:gz")}, ["001.Auk"])
    choose("cub200: {split: official}")

    with pytest.raises(InputError, match=r"CUB_200_2011/images\.txt is missing"):
        fetch("cub200", out=project / "out")


DOMAINS = {
    "real.zip": zipped({"real/tree/real_2_1.jpg": b"real tree", "real/ant/real_1_1.jpg": b"real ant"}),
    "quickdraw.zip": zipped({"quickdraw/ant/quickdraw_1_1.png": b"drawn ant"}),
    "real_train.txt": b"real/tree/real_2_1.jpg 1\n",
    "real_test.txt": b"real/ant/real_1_1.jpg 0\n",
    "quickdraw_train.txt": b"quickdraw/ant/quickdraw_1_1.png 0\n",
    "domainnet_train.yaml": b"data:\n- data/DomainNet/real/ant/real_1_1.jpg\ndomains:\n- real\ntargets:\n- 0\n",
    "domainnet_test.yaml": b"data:\n- data/DomainNet/real/tree/real_2_1.jpg\ntargets:\n- 1\n",
}
OF_SPLIT = {
    name: "coda-prompt" if name.endswith("yaml") else "official" for name in DOMAINS if name != "real.zip"
}


def test_domainnet_is_divided_by_the_lists_of_coda_prompt(project: Path) -> None:
    publish("domainnet", DOMAINS, ["ant", "tree"], splits=OF_SPLIT)
    choose("domainnet: {split: coda-prompt}")

    fetch("domainnet", out=project / "out")

    assert tree(project / "out") == {
        "train/ant/real_1_1.jpg": b"real ant",
        "test/tree/real_2_1.jpg": b"real tree",
    }


def test_domainnet_is_divided_by_the_lists_of_its_authors(project: Path) -> None:
    publish("domainnet", DOMAINS, ["ant", "tree"], splits=OF_SPLIT)
    choose("domainnet: {split: official}")

    fetch("domainnet", out=project / "out")

    assert tree(project / "out") == {
        "train/ant/quickdraw_1_1.png": b"drawn ant",
        "train/tree/real_2_1.jpg": b"real tree",
        "test/ant/real_1_1.jpg": b"real ant",
    }


def test_an_image_of_domainnet_that_its_authors_removed_is_said_and_left_out(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {**DOMAINS, "domainnet_train.yaml": DOMAINS["domainnet_train.yaml"].replace(b"1_1", b"1_9")}
    publish("domainnet", files, ["ant", "tree"], splits=OF_SPLIT)
    choose("domainnet: {split: coda-prompt}")

    fetch("domainnet", out=project / "out")

    assert set(tree(project / "out")) == {"test/tree/real_2_1.jpg"}
    assert "domainnet: 1 of 2 listed images are in no archive; left out\n" in capsys.readouterr().err


# A divided archive of one's own.

OWN = {
    "imagenet-a/train/n01/x.jpg": b"fish",
    "imagenet-a/train/n02/x.jpg": b"shark",
    "imagenet-a/test/n01/y.JPEG": b"fish too",
    "imagenet-a/test/n01/.hidden.jpg": b"",
    "imagenet-a/notes.txt": b"",
    "__MACOSX/imagenet-a/train/n01/x.jpg": b"",
}


@pytest.mark.parametrize("make", [tar, zipped], ids=["tar", "zip"])
def test_a_divided_archive_is_taken_as_it_is(
    project: Path, make: Callable[[dict[str, bytes]], bytes]
) -> None:
    publish("imagenet-a", {}, WNIDS)
    path = project.parent / ("own.zip" if make is zipped else "own.tar")
    path.write_bytes(make(OWN))
    choose(f"imagenet-a: {{split: archive, archive: {path}, sha256: {sha256_of(path)}}}")

    fetch("imagenet-a", out=project / "out")

    assert tree(project / "out") == {
        "train/goldfish/x.jpg": b"fish",
        "train/great_white_shark/x.jpg": b"shark",
        "test/goldfish/y.JPEG": b"fish too",
    }


@pytest.mark.parametrize(
    ("files", "hashed", "fault"),
    [
        pytest.param(None, "", "is not the path of a .zip or .tar file; correct it", id="missing"),
        pytest.param(OWN, "f" * 64, "it is another file: correct the path or the hash", id="hash"),
        pytest.param({"train/n01/x.jpg": b""}, "", "there is no train/<class>/<image> or no test", id="part"),
        pytest.param(
            {"train/n01/x.jpg": b"", "test/cat/x.jpg": b""}, "", "test/cat is not a class folder", id="class"
        ),
        pytest.param({**OWN, "more/train/n01/x.jpg": b"?"}, "", "has this file twice", id="twice"),
    ],
)
def test_an_archive_that_is_not_divided_so_is_refused(
    project: Path, files: dict[str, bytes] | None, hashed: str, fault: str
) -> None:
    publish("imagenet-a", {}, WNIDS)
    if files is not None:
        Path("own.zip").write_bytes(zipped(files))
        hashed = hashed or sha256_of(Path("own.zip"))
    choose(f"imagenet-a: {{split: archive, archive: own.zip, sha256: {hashed or 'f' * 64}}}")

    with pytest.raises(InputError, match=fault):
        fetch("imagenet-a", out=project / "out")
    assert not (project / "out").exists()


def test_a_download_that_fails_leaves_nothing_half_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.data import downloads

    monkeypatch.setattr(downloads, "TRIES", 1)
    publish("imagenet-a", {"imagenet-a.tar": tar({"imagenet-a/n01/x.jpg": b"1"})}, WNIDS)
    (project / ".sdlora/downloads/imagenet-a/imagenet-a.tar").unlink()
    choose("imagenet-a: {split: stratified}")

    with pytest.raises(
        InputError, match=r"imagenet-a\.tar: not downloaded .* or put the file into \.sdlora/down"
    ):
        fetch("imagenet-a", out=project / "out")
    assert not list(project.glob("*out*"))
