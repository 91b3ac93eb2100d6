"""The published data sets: what is known of each, its classes in the papers' order, and its images.

A data set is a folder of `pipelines/data/embedded`: `source.json` has addresses, sizes and hashes of its files,
`classes.txt` a line for each class in the order of the labels that the papers' code permutes: the folder in the
archive and, after a tab, the readable name where that is another one. A layout is a function of `LAYOUTS`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Container, Generator, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from pipelines.data.archives import archive_members, gunzip, is_archive, names
from pipelines.data.downloads import Installed, Remote, obtain
from pipelines.data.glyphs import scenes
from pipelines.data.png import png
from pipelines.data.source_files import is_litter
from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of
from pipelines.project.layout import DOWNLOADS
from pipelines.runtime.console import log_line
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np

_Image = tuple[PurePosixPath, bytes]
"""`{train,test}/<class>/<file>` and the file's bytes"""

_Lists = dict[PurePosixPath, str]
"""A path in an archive and the part, train or test, that it belongs to."""

_PARTS = ("train", "test")
_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif")

_STRATIFIED_SEED = 1993
"""Chooses the test images of the split `stratified`; fixed, because a split by that name is one split."""

_STRATIFIED_SHARE = 0.2
"""Share of each class that the split `stratified` tests on."""


@dataclass(frozen=True)
class Benchmark:
    """What is known of a data set before any of it is here."""

    name: str
    title: str
    page: str
    """where its authors describe it"""
    remotes: dict[str, Remote]
    of_split: dict[str, str]
    """files that only one split needs, and that split"""
    images: dict[str, dict[str, int]]
    """split → part (train, test, or all for both together) → how many images there must be"""
    notes: dict[str, str]
    """split → what to know of numbers that are measured on it"""
    folders: dict[str, str]
    """class folder in the archive → class, in the order of the labels"""

    @property
    def classes(self) -> list[str]:
        """The classes in the order of the labels that the papers' code permutes."""
        return list(self.folders.values())

    def obtain(self, name: str) -> Path:
        """Return the verified file, downloaded if it is not here."""
        return obtain(self.remotes[name], DOWNLOADS / self.name)

    def obtain_all(self, split: str) -> dict[str, Path]:
        """Return all files that a split needs, by name. The small ones first, so that what is missing shows early."""
        needed = [n for n in self.remotes if self.of_split.get(n, split) == split]
        return {name: self.obtain(name) for name in sorted(needed, key=lambda n: (n.endswith(".zip"), n))}


def load_benchmark(name: str) -> Benchmark:
    """Read what is known of a data set."""
    folder = resources.files("pipelines.data") / "embedded" / name
    try:
        source = json.loads(folder.joinpath("source.json").read_text(encoding="utf-8"))
        lines = folder.joinpath("classes.txt").read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise InputError(f"{folder}: a file is missing; install the package again") from None
    return Benchmark(
        name=name,
        title=source["title"],
        page=source["page"],
        remotes={file["name"]: _remote(file) for file in source["files"]},
        of_split={file["name"]: file["split"] for file in source["files"] if "split" in file},
        images=source["images"],
        notes=source.get("notes", {}),
        folders={line.split("\t")[0]: line.split("\t")[-1] for line in lines},
    )


def _remote(file: dict[str, Any]) -> Remote:
    """Return what `source.json` says of one file."""
    installed = file.get("installed")
    return Remote(
        name=file["name"],
        urls=tuple(file["urls"]),
        size=file["size"],
        digest=file["digest"],
        installed=installed
        and Installed(path=Path(installed["path"]), header=bytes.fromhex(installed["header"])),
    )


def images(name: str, split: str, archive: Path | None = None, sha256: str | None = None) -> Iterator[_Image]:
    """Yield the images of a data set, as its split divides them.

    `archive` is the user's own for the split `archive`.
    """
    benchmark = load_benchmark(name)
    if split in benchmark.notes:
        log_line(f"{name}: split {split}: {benchmark.notes[split]}")
    found = (
        _divided_archive(benchmark, archive, sha256)
        if archive is not None
        else LAYOUTS[name](benchmark, split)
    )
    counts = dict.fromkeys(_PARTS, 0)
    for path, data in found:
        counts[path.parts[0]] += 1
        yield path, data
    for part, expected in benchmark.images.get(split, {}).items():
        number = sum(counts.values()) if part == "all" else counts[part]
        if number != expected:
            raise InputError(
                f"{name}: found {number:,} images{'' if part == 'all' else f' to {part} on'}, expected {expected:,}; "
                f"delete {DOWNLOADS / name} and run the same again, or report it with this line"
            )


def _cifar(benchmark: Benchmark, split: str) -> Iterator[_Image]:
    """CIFAR-100's binary version (the other one is a pickle): coarse label, fine label, 3 planes of 32x32."""
    import numpy as np

    archive = benchmark.obtain_all(split)["cifar-100-binary.tar.gz"]
    wanted = {"train.bin", "test.bin", "fine_label_names.txt"}
    files = {path.name: data for path, data in archive_members(archive, lambda path: path.name in wanted)}
    for name in wanted - set(files):
        raise InputError(f"{archive}: {name} is missing; delete the file and run the same again")
    if files["fine_label_names.txt"].decode().split() != benchmark.classes:
        raise InputError(
            f"{archive}: its class names are not the known ones; delete it and run the same again"
        )
    rows = {}
    for part in _PARTS:
        if len(files[f"{part}.bin"]) % 3074:
            raise InputError(f"{archive}: {part}.bin is cut off; delete the file and run the same again")
        rows[part] = np.frombuffer(files[f"{part}.bin"], np.uint8).reshape(-1, 3074)
    planes = {part: table[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1) for part, table in rows.items()}
    yield from _numbered(benchmark, planes, {part: table[:, 1] for part, table in rows.items()})


def _mnist(benchmark: Benchmark, split: str) -> Iterator[_Image]:
    """MNIST's four files, and Fashion-MNIST's in the same format."""
    files = benchmark.obtain_all(split)
    stems = {"train": "train", "test": "t10k"}
    pictures = {p: _idx(files[f"{stem}-images-idx3-ubyte.gz"], dimensions=3) for p, stem in stems.items()}
    labels = {p: _idx(files[f"{stem}-labels-idx1-ubyte.gz"], dimensions=1) for p, stem in stems.items()}
    yield from _numbered(benchmark, pictures, labels)


def _numbered(
    benchmark: Benchmark, pictures: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Iterator[_Image]:
    """Images that come as arrays, one for each part. A file is named by its place in the data set."""
    with progress(f"unpack {benchmark.name}", total=sum(map(len, pictures.values())), unit="images") as bar:
        done = 0
        for part in _PARTS:
            if len(pictures[part]) != len(labels[part]) or (labels[part] >= len(benchmark.classes)).any():
                raise InputError(
                    f"{DOWNLOADS / benchmark.name}: images and labels of {part} do not fit; delete the folder"
                    " and run the same again"
                )
            for index, (picture, label) in enumerate(zip(pictures[part], labels[part], strict=True)):
                yield PurePosixPath(part, benchmark.classes[label], f"{index:05d}.png"), png(picture)
                done += 1
                bar.update(done)


def _scenes(benchmark: Benchmark, split: str) -> Iterator[_Image]:
    """Yield the packaged characters in front of clutter, which need no file."""
    return scenes()


def _imagenet_variant(benchmark: Benchmark, split: str) -> Iterator[_Image]:
    """ImageNet-R and ImageNet-A: `<name>/<wnid>/<file>`, undivided."""
    files = benchmark.obtain_all(split)
    archive = files[f"{benchmark.name}.tar"]
    if split == "stratified":
        parts = stratified([path for path in names(archive) if _is_image(path, benchmark.folders)])
    else:
        parts = {
            PurePosixPath(*PurePosixPath(line).parts[1:]): part  # they begin with data/
            for part in _PARTS
            for line in _listed(files[f"{benchmark.name}_{part}.yaml"])
        }
    _require_all(benchmark, parts, (yield from _by_lists(benchmark, [archive], parts)))


def _cub(benchmark: Benchmark, split: str) -> Iterator[_Image]:
    """CUB-200-2011, divided by its authors: two text files beside the images name each by a number."""
    archive = benchmark.obtain_all(split)["CUB_200_2011.tgz"]
    root = PurePosixPath("CUB_200_2011")
    if split == "stratified":
        parts = stratified([path for path in names(archive) if _is_image(path, benchmark.folders)])
    else:
        wanted = (root / "images.txt", root / "train_test_split.txt")
        tables = {
            path.name: dict(line.split() for line in data.decode().splitlines())
            for path, data in archive_members(archive, wanted.__contains__)
        }
        for path in wanted:
            if path.name not in tables:
                raise InputError(f"{archive}: {path} is missing; delete the file and run the same again")
        parts = {
            root / "images" / path: "train" if tables["train_test_split.txt"].get(number) == "1" else "test"
            for number, path in tables["images.txt"].items()
        }
    _require_all(benchmark, parts, (yield from _by_lists(benchmark, [archive], parts)))


def _domainnet(benchmark: Benchmark, split: str) -> Iterator[_Image]:
    """DomainNet: an archive `<domain>/<class>/<file>` for each domain. Names begin with the domain's.

    `official` divides by the lists beside the archives (six domains); `coda-prompt` by those of
    CODA-Prompt's repository (five: there is no quickdraw among them). Those may have been written for the
    archives before their authors removed copies, so an image that is gone is said and left out.
    """
    files = benchmark.obtain_all(split)
    if split == "official":
        texts = {name: path for name, path in files.items() if name.endswith(".txt")}
        parts = {
            PurePosixPath(line.rsplit(maxsplit=1)[0]): Path(name).stem.rpartition("_")[2]
            for name, path in texts.items()
            for line in path.read_text(encoding="utf-8").splitlines()
            if line.strip()
        }
    else:
        parts = {
            PurePosixPath(*PurePosixPath(line).parts[-3:]): part  # they begin with data/DomainNet/
            for part in _PARTS
            for line in _listed(files[f"domainnet_{part}.yaml"])
        }
    archives = [path for name, path in files.items() if name.endswith(".zip")]
    missing = yield from _by_lists(benchmark, archives, parts)
    if split == "official":
        _require_all(benchmark, parts, missing)
    elif missing:
        log_line(
            f"{benchmark.name}: {len(missing):,} of {len(parts):,} listed images are in no archive; left out"
        )


def _divided_archive(benchmark: Benchmark, archive: Path, sha256: str | None) -> Iterator[_Image]:
    """Yield the images of an archive that has folders train and test already, as they are."""
    if not archive.is_file() or not is_archive(archive):
        raise InputError(
            f"fetch.{benchmark.name}.archive: {archive} is not the path of a .zip or .tar file; correct it"
        )
    if (found := sha256_of(archive)) != sha256:
        raise InputError(
            f"fetch.{benchmark.name}.sha256: found {found} for {archive}, expected {sha256}; "
            "it is another file: correct the path or the hash"
        )
    known = {**benchmark.folders, **{name: name for name in benchmark.classes}}
    inside = [path for path in names(archive) if len(path.parts) >= 3 and path.parts[-3] in _PARTS]
    for path in inside:
        if _is_image(path) and path.parent.name not in known:
            raise InputError(
                f"{archive}: {path.parent} is not a class folder of {benchmark.title}; rename it"
            )
    parts = {path: path.parts[-3] for path in inside if _is_image(path, known)}
    if set(parts.values()) != set(_PARTS):
        raise InputError(
            f"{archive}: there is no train/<class>/<image> or no test/<class>/<image> in it; pack it so"
        )
    yield from _by_lists(benchmark, [archive], parts)


def _is_image(path: PurePosixPath, folders: Container[str] | None = None) -> bool:
    """Return whether a member of an archive is an image, in one of the folders if some are given. Litter is none."""
    if is_litter(path.parts[0]) or is_litter(path.name) or path.suffix.lower() not in _IMAGES:
        return False
    return folders is None or path.parent.name in folders


def _by_lists(
    benchmark: Benchmark, archives: list[Path], parts: _Lists
) -> Generator[_Image, None, set[PurePosixPath]]:
    """Yield those files of some archives that `parts` names. Return those that are in none."""
    known = {**benchmark.folders, **{name: name for name in benchmark.classes}}
    missing = set(parts)
    with progress(f"unpack {benchmark.name}", total=len(parts), unit="images") as bar:
        for archive in archives:
            for path, data in archive_members(archive, parts.__contains__):
                if path.parent.name not in known:
                    raise InputError(
                        f"{archive}: {path.parent} is not a class of {benchmark.title}; delete the file"
                    )
                missing.discard(path)
                yield PurePosixPath(parts[path], known[path.parent.name], path.name), data
                bar.update(len(parts) - len(missing))
    return missing


def _require_all(benchmark: Benchmark, parts: _Lists, missing: set[PurePosixPath]) -> None:
    """Refuse archives that lack an image that a list names."""
    if missing:
        raise InputError(
            f"{benchmark.name}: {len(missing):,} of {len(parts):,} listed images are in no archive, "
            f"{min(missing)} among them; delete {DOWNLOADS / benchmark.name} and run the same again"
        )


def stratified(paths: list[PurePosixPath]) -> _Lists:
    """Our own division where none is published as a list: of each class a fifth to test on, at least one image."""
    import numpy as np

    parts: _Lists = {}
    classes: dict[str, list[PurePosixPath]] = {}
    for path in sorted(paths):
        classes.setdefault(path.parent.name, []).append(path)
    for position, folder in enumerate(sorted(classes)):
        group = classes[folder]
        tests = max(1, min(len(group) - 1, round(len(group) * _STRATIFIED_SHARE)))
        order = np.random.default_rng([_STRATIFIED_SEED, position]).permutation(len(group))
        chosen = set(order[:tests].tolist())
        parts |= {path: "test" if index in chosen else "train" for index, path in enumerate(group)}
    return parts


def _listed(path: Path) -> list[str]:
    """Return the entries of the list `data` of a YAML file, one a line. A parser needs minutes for these."""
    found: list[str] = []
    inside = False
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("- "):
            inside = line.strip() == "data:"
        elif inside:
            found.append(line[2:].strip())
    if not found:
        raise InputError(f"{path}: there is no list `data` in it; delete the file and run the same again")
    return found


def _idx(path: Path, *, dimensions: int) -> np.ndarray:
    """Return an array of bytes in MNIST's own format."""
    import numpy as np

    data = gunzip(path)
    head = 4 * (1 + dimensions)
    numbers = np.frombuffer(data[:head], ">u4").tolist() if len(data) >= head else []
    if not numbers or numbers[0] != 0x800 + dimensions or len(data) - head != np.prod(numbers[1:]):
        raise InputError(
            f"{path}: not an IDX file of {dimensions} dimensions; delete it and run the same again"
        )
    return np.frombuffer(data, np.uint8, offset=head).reshape(numbers[1:])


LAYOUTS: dict[str, Callable[[Benchmark, str], Iterator[_Image]]] = {
    "cifar100": _cifar,
    "cub200": _cub,
    "domainnet": _domainnet,
    "fashion-mnist": _mnist,
    "glyphs100-scene": _scenes,
    "imagenet-a": _imagenet_variant,
    "imagenet-r": _imagenet_variant,
    "mnist": _mnist,
}
"""The data sets by name; each has its settings in `params.Fetch` and its folder in `pipelines/data/embedded`."""
