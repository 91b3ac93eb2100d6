"""The doctor: what is wrong, or looks wrong, with the images of tasks and with the machine, before any training."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import statistics
import sys
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.data.duplicates import (
    Print,
    leaking_pictures,
    near_across_parts,
    near_pictures,
    perceptual_hash,
    read_pictures,
)
from pipelines.data.duplicates import same_pictures as find_same
from pipelines.data.packed import PACKED, picture_hash, read_images
from pipelines.data.sources import (
    EXTENSIONS,
    WORDS,
    Found,
    class_names,
    divide,
    is_divided,
    read_source,
    visible,
)
from pipelines.planning.tasks import inside_project, known_tasks, next_task
from pipelines.project.errors import InputError
from pipelines.project.files import read_json
from pipelines.project.layout import BACKBONE, DVC, PARAMS, RAW, SPLITS, TRAINED
from pipelines.project.params import Data, Fetch, Params, Task, class_name_fault, read_text
from pipelines.runtime.progress import progress

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from PIL.Image import Image

    from sdlora.backbones import Backbone

FEW = 5
"""Images of a class in a part below which it is named."""
UNEVEN = 10
"""Largest class ÷ smallest, in training images, from which a task is called uneven."""
SMALL = 2
"""Enlargement of the typical image above which its size is called small."""
FAR_MEAN, LOW_SPREAD, HIGH_SPREAD = 1.0, 0.25, 2.0
"""Mean and standard deviation of normalised pixels beyond which they are called unusual (expected: 0 and 1).

scikit-learn's digits and glyphs100 on the packaged backbone have −0.4 and −0.6, 0.7 both; photographs under timm's two
usual normalisations have means about 0 and deviations from 0.5 to 1.
"""
ALIKE = 0.7
"""Distance of two classes' means ÷ typical distance of an image from its class's mean, below which they look alike.

On the packaged backbone, 30 images of a class: of the 4,950 pairs of glyphs100, 13 are below; their images are nearer
to the other mean in 12 % of cases (0.7 to 1: 8 %, above: 1 %). No pair of digits is (the nearest: 1.0); one class under
two names always was (0.34 and less).
"""
ENOUGH = 10
"""Images of a class below which its mean says too little for that: of 3, every second glyph would look like another."""
SAMPLE, PER_CLASS = 3000, 30
"""Images that go through the backbone: at most so many of a class, and about so many of a task."""
SHOWN = 10
"""Places of one finding that the table names; --json has all of them."""


class Finding(NamedTuple):
    """One thing that the doctor found."""

    level: str
    """error (training would be refused, or its numbers wrong), warning or ok"""
    check: str
    """what was looked at"""
    task: str
    """the task; empty for the machine"""
    what: str
    where: list[str]
    """files or classes"""
    remedy: str


@dataclass
class Seen:
    """What was found in the files of one task."""

    images: list[Found] = field(default_factory=list)
    """those that can be read"""
    prints: list[Print] = field(default_factory=list)
    sides: list[int] = field(default_factory=list)
    """the shorter side of each, in pixels"""


def doctor(source: Path | None, *, as_json: bool, quick: bool) -> int:
    """Examine a source as the next task, or all tasks and the machine; print it; return 2 if there is an error."""
    findings = examine(source, quick=quick)
    if as_json:
        levels = Counter(finding.level for finding in findings)
        shown = {
            "errors": levels["error"],
            "warnings": levels["warning"],
            "findings": [finding._asdict() for finding in findings],
        }
        sys.stdout.write(json.dumps(shown, indent=2, ensure_ascii=False) + "\n")
    else:
        show(findings)
    return 2 if any(finding.level == "error" for finding in findings) else 0


def examine(source: Path | None, *, quick: bool = False) -> list[Finding]:
    """All findings: of the machine if no source is given, then of each task; `quick` leaves the backbone out."""
    findings: list[Finding] = []
    if source is None:
        params = Params.load()
        checked = set(params.tasks)
        findings += machine_findings(params)
    else:
        found = as_next_task(source, findings)
        if found is None:
            return findings
        params, checked = found
    base = None if quick else load_backbone(params, findings)
    fetched = frozenset(name for name in Fetch.names() if params.fetch.entry(name) is not None)
    seen: dict[str, Seen] = {}
    earlier: list[Print] = []
    for key, task in params.tasks.items():
        if key in checked and task.retired:
            what = f"its images were deleted; others are compared with their hashes ({task.source})"
            findings.append(Finding("ok", "images", key, what, [], ""))
        if key in checked and not task.retired:
            seen[key] = look_at(key, task, params.data, findings, fetched=fetched)
            findings += duplicate_findings(key, seen[key].prints, earlier, params.data)
            earlier += seen[key].prints
        else:
            earlier += known_prints(key, task, params.data, findings)
    findings += name_findings(params.tasks, checked)
    if base is not None:
        findings += backbone_findings(params.tasks, seen, base, params.data)
    for key in seen:
        if not any(finding.task == key and finding.level != "ok" for finding in findings):
            what = f"{count(seen[key].images, 'image')} of {count(params.tasks[key].classes, 'class')}, nothing amiss"
            findings.append(Finding("ok", "images", key, what, [], ""))
    order = {key: position for position, key in enumerate(["", *params.tasks])}
    return sorted(findings, key=lambda finding: order[finding.task])


def as_next_task(source: Path, findings: list[Finding]) -> tuple[Params, set[str]] | None:
    """The parameters with the source as next task, and the tasks to examine; None if it can be none.

    Where all its classes are tasks already, those tasks are examined.
    """
    text = read_text(PARAMS)
    known = known_tasks(text, PARAMS)
    owner = {name: key for key, task in known.items() for name in task.classes}
    try:
        folder, manifest = inside_project(source, PARAMS)
        names = class_names(Path(folder), manifest=manifest, shown=folder)
    except InputError as error:
        findings.append(Finding("error", "source", "", str(error), [], ""))
        return None
    bad = {name: fault for name in names if (fault := class_name_fault(name))}
    new = [name for name in names if name not in owner and name not in bad]
    old = [name for name in names if name in owner]
    if bad:
        where = [
            f"{json.dumps(name, ensure_ascii=not name.isprintable())} {fault}" for name, fault in bad.items()
        ]
        findings.append(
            Finding(
                "error", "class names", "", f"{count(bad, 'class')} cannot have its name", where, "rename"
            )
        )
    if not new:
        if old and not bad:
            return Params.parse(text, origin=str(PARAMS)), {owner[name] for name in old}
        return None
    key, _, _, with_it = next_task(source, classes=new)
    if old:
        what = f"{count(old, 'class')} of it learned already, left out here and by `sdlora add-task`"
        findings.append(Finding("warning", "classes", key, what, [f"{n} ({owner[n]})" for n in old], ""))
    return Params.parse(with_it, origin=str(PARAMS)), {key}


# ---- the machine


def machine_findings(params: Params) -> Iterator[Finding]:
    """What a run needs of the machine: packages, a device, git, a DVC project."""
    import torch

    from sdlora.devices import best_device

    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "timm", "dvc", "prefect", "pillow"))
    yield Finding("ok", "packages", "", f"Python {platform.python_version()}, {packages}", [], "")
    device = best_device()
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    yield Finding("ok", "device", "", f"{device.type} ({name})", [], "")
    if shutil.which("git") is None:
        yield Finding("error", "git", "", "there is no git on the PATH", [], "install it: DVC needs it")
    elif not any((folder / ".git").exists() for folder in (Path.cwd(), *Path.cwd().parents)):
        yield Finding("error", "git", "", "the project is no git repository", [], "run `git init`")
    if not DVC.is_dir():
        yield Finding("error", "dvc", "", "the project is no DVC project", [], "run `dvc init`")


def load_backbone(params: Params, findings: list[Finding]) -> Backbone | None:
    """The frozen base of the chain if there is one, else the one that params.yaml names; None if neither is here."""
    from sdlora.backbones import create_backbone, read_backbone

    choice = params.backbone
    try:
        base = read_backbone(BACKBONE) if BACKBONE.is_dir() else None
        if base is None or base.description["name"] != choice.name:
            base = create_backbone(
                choice.name,
                weights=Path(choice.weights) if choice.weights else None,
                image_size=choice.image_size,
                input_normalisation=choice.input_normalisation,
            )
    except (OSError, ValueError, InputError) as error:
        what = f"{choice.name} cannot be loaded: {' '.join(str(error).split())}"
        findings.append(Finding("error", "backbone", "", what, [], "correct backbone in params.yaml"))
        return None
    channels, height, width = base.input_size
    what = f"{choice.name}, images of {channels}×{height}×{width}"
    findings.append(Finding("ok", "backbone", "", what, [], ""))
    return base


# ---- the files of a task


def look_at(
    key: str, task: Task, data: Data, findings: list[Finding], *, fetched: frozenset[str] = frozenset()
) -> Seen:
    """Read every image of a task; what is wrong with the files joins the findings.

    A source that `sdlora run` would fetch, by its name among `fetched`, may be missing.
    """
    folder = Path(task.source)
    if not folder.is_dir() and folder.parent == RAW and folder.name in fetched:
        remedy = f"run `sdlora fetch {folder.name}`"
        findings.append(Finding("warning", "source", key, f"{folder} is not fetched yet", [], remedy))
        return Seen()
    try:
        source = read_source(folder, task.classes, manifest=task.manifest)
        divided = divide(source.images, data)
    except InputError as error:
        findings.append(Finding("error", "source", key, str(error), [], ""))
        return Seen()
    faults = [*source.faults, *divided.faults]
    if faults:
        what = f"{len(faults)} {'fault' if len(faults) == 1 else 'faults'} of the source"
        findings.append(Finding("error", "source", key, what, [str(fault) for fault in faults], "mend each"))
    unread = list(left_out(folder)) if task.manifest is None and folder.is_dir() else []
    if unread:
        what = f"{len(unread)} things are not read"
        findings.append(Finding("warning", "source", key, what, unread, "move them into a class, or away"))

    looks: dict[int, tuple[Print, int]] = {}

    def look(index: int, data: bytes, picture: Image) -> None:
        found = divided.images[index]
        looks[index] = (print_of(found, picture), min(picture.size))

    unreadable = read_pictures(f"read {key}", divided.images, look, max_pixels=data.max_pixels)
    if unreadable:
        where = [f"{divided.images[index].path} ({fault})" for index, fault in unreadable.items()]
        what = f"{count(where, 'image')} cannot be read"
        findings.append(Finding("error", "unreadable", key, what, where, "replace or remove each"))
    whole = sorted(looks)
    seen = Seen(
        [divided.images[index] for index in whole],
        [looks[index][0] for index in whole],
        [looks[index][1] for index in whole],
    )
    findings += balance_findings(key, seen.images)
    return seen


def print_of(found: Found, picture: Image) -> Print:
    """What a picture is compared by; its class's name is its label, since every class has one task."""
    assert found.part is not None
    return Print(str(found.path), found.part, found.name, picture_hash(picture), perceptual_hash(picture))


def left_out(folder: Path) -> Iterator[str]:
    """Images and folders that stand where no class folder is, and classes that are in test/ and not in train/."""
    divided = is_divided(folder)
    learned = {path.name for path in visible(folder / "train")}
    for place in [folder, *(folder / word for word in WORDS)] if divided else [folder]:
        for path in sorted(visible(place)):
            if path.suffix.lower() in EXTENSIONS and path.is_file():
                yield printable(str(path))
            elif divided and path.is_dir() and path.name not in (WORDS if place == folder else learned):
                yield printable(f"{path}/")


def printable(text: str) -> str:
    """The text, or its escape sequences where a terminal could not show it."""
    return text if text.isprintable() else ascii(text)


def balance_findings(key: str, images: Iterable[Found]) -> Iterator[Finding]:
    """Classes with few images, and tasks in which one class has many times what another has."""
    counts: dict[str, Counter[str]] = {part: Counter() for part in ("train", "validation", "test")}
    for found in images:
        assert found.part is not None
        counts[found.part][found.name] += 1
    for part, reason in (("train", "to learn from"), ("test", "for an accuracy that means something")):
        few = {name: number for name, number in counts[part].items() if number < FEW}
        if few:
            what = f"{count(few, 'class')} with fewer than {FEW} {part} images {reason}"
            where = [f"{name}: {number}" for name, number in sorted(few.items(), key=lambda item: item[1])]
            yield Finding("warning", "few images", key, what, where, "add images")
    train = counts["train"]
    if train and max(train.values()) >= UNEVEN * min(train.values()):
        (most, high), (least, low) = train.most_common()[0], train.most_common()[-1]
        what = f"uneven classes: {most} has {high} training images, {least} {low}"
        what += f" (median {statistics.median(train.values()):g})"
        remedy = "add images of small classes; accuracy over all images says little about them"
        yield Finding("warning", "imbalance", key, what, [], remedy)


def packed_names(key: str) -> dict[int, str]:
    """Label → class of what was packed for a task: its classes in params.yaml may have changed since."""
    return {entry["label"]: entry["name"] for entry in read_json(SPLITS / key / "classes.json")["classes"]}


def known_prints(key: str, task: Task, data: Data, findings: list[Finding]) -> list[Print]:
    """What the pictures of a task that is not examined are compared by: as it was packed, else from its source."""
    packed = SPLITS / key / "samples" / f"{key}.arrow"
    if packed.is_file():
        rows = read_images(packed).to_pylist()
        names = packed_names(key)
        return [
            Print(
                f"{row['id']} of {key}",
                row["split"],
                names[row["label"]],
                row["pixels"],
                row["perceptual"],
            )
            for row in rows
        ]
    passed: list[Finding] = []
    seen = look_at(key, task, data, passed)
    if any(finding.level == "error" for finding in passed):
        what = f"{key} has errors of its own, so not all of its pictures were compared with"
        findings.append(Finding("warning", "source", key, what, [], "run `sdlora doctor` without a folder"))
    return seen.prints


# ---- the same, and nearly the same


def duplicate_findings(
    key: str, prints: Sequence[Print], earlier: Sequence[Print], data: Data
) -> Iterator[Finding]:
    """Pictures that stand where they must not, copies, and pictures that nearly are others."""
    strict = list(find_same(prints, earlier, tolerated=False))
    refused = strict
    if data.duplicates == "leave_out":
        left_out = dict.fromkeys(leaking_pictures(prints, earlier))
        if left_out:
            what = f"{count(left_out, 'picture')} left out, because others in another part are the same"
            yield Finding(
                "warning", "same picture", key, what, [prints[i].shown for i in left_out], "nothing"
            )
        prints = [one for index, one in enumerate(prints) if index not in left_out]
        strict = list(find_same(prints, earlier, tolerated=False))
    if data.duplicates != "refuse":
        refused = list(find_same(prints, earlier, tolerated=True))
        kept = set(refused)
        allowed = [fault for fault in strict if fault not in kept]
        if allowed:
            what = f"{count(allowed, 'picture')} under two classes, as data.duplicates allows"
            where = [f"{fault.where}: {fault.what}" for fault in allowed]
            yield Finding("warning", "same picture", key, what, where, "no model can tell such classes apart")
    if refused:
        what = f"{count(refused, 'picture')} in two parts or under two classes"
        where = [f"{fault.where}: {fault.what}" for fault in refused]
        yield Finding("error", "same picture", key, what, where, refused[0].remedy)
    first: dict[tuple[str, int | str, str], Print] = {}
    copies = []
    for one in prints:
        other = first.setdefault((one.part, one.label, one.pixels), one)
        if other is not one:
            copies.append(f"{one.shown} = {other.shown}")
    if copies:
        what = f"{count(copies, 'copy')} of pictures of the same class and part"
        yield Finding("warning", "copies", key, what, copies, "they weigh more than others; remove them")
    near = near_across_parts(prints, earlier)
    if near:
        what = f"{count(near, 'picture')} nearly the same in train and in test or validation: a test too easy"
        yield Finding("warning", "near duplicates", key, what, pairs(near), "keep each group in one part")
    same_part = [
        pair
        for part in ("train", "validation", "test")
        for pair in near_pictures(
            [one for one in prints if one.part == part], [one for one in earlier if one.part == part]
        )
    ]
    if same_part:
        what = f"{count(same_part, 'picture')} nearly the same as one of an earlier task, under another class"
        yield Finding("warning", "near duplicates", key, what, pairs(same_part), "check their labels")


def pairs(found: Iterable[tuple[Print, Print]]) -> list[str]:
    """Pairs as text."""
    return [f"{one.shown} ~ {other.shown}" for one, other in found]


def name_findings(tasks: Mapping[str, Task], checked: set[str]) -> Iterator[Finding]:
    """Classes whose names differ only in case or in the Unicode form of an accent: one folder on other machines."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for key, task in tasks.items():
        for name in task.classes:
            groups[unicodedata.normalize("NFKC", name).casefold()].append((name, key))
    for members in groups.values():
        last = members[-1][1]
        if len(members) > 1 and last in checked:
            where = [f"{name!r} ({key})" for name, key in members]
            what = "class names that differ in case or in the form of a character only"
            yield Finding(
                "warning", "class names", last, what, where, "rename, if they are one class join them"
            )


# ---- what the backbone sees


class Features(NamedTuple):
    """What the frozen backbone makes of some training images of a class."""

    task: str
    mean: np.ndarray
    """(features,)"""
    variance: float
    """mean squared distance of an image from the mean of all that there are, estimated without bias; NaN of one"""
    images: int
    pixels: tuple[float, float]
    """mean and mean square of its normalised pixels"""


def backbone_findings(
    tasks: Mapping[str, Task], seen: Mapping[str, Seen], base: Backbone, data: Data
) -> Iterator[Finding]:
    """Sizes, brightness and contrast against what the backbone expects; classes that look alike to it."""
    _, height, width = base.input_size
    for key, its in seen.items():
        if its.sides and min(height, width) > SMALL * statistics.median(its.sides):
            side = statistics.median(its.sides)
            what = f"the typical image is {side:g} pixels on its shorter side, the backbone sees {height}×{width}"
            yield Finding(
                "warning", "sizes", key, what, [], "take larger originals, or a backbone for small images"
            )
    last = max((position for position, key in enumerate(tasks) if key in seen), default=-1)
    chosen = {key: sample_of(key, task, seen.get(key), data) for key, task in list(tasks.items())[: last + 1]}
    features = features_of(chosen, base)
    config = base.description["pretrained_cfg"]
    normalised = any(config["mean"])  # with backbone.input_normalisation: none, nothing is expected of pixels
    for key in seen:
        own = [its.pixels for its in features.values() if its.task == key]
        if own and normalised:
            yield from pixel_findings(key, own)
    yield from alike_findings(features, set(seen))


def pixel_findings(key: str, pixels: Sequence[tuple[float, float]]) -> Iterator[Finding]:
    """Whether normalised pixels are about where the backbone's normalisation is meant to put them."""
    mean = statistics.fmean(its[0] for its in pixels)
    spread = max(statistics.fmean(its[1] for its in pixels) - mean**2, 0.0) ** 0.5
    if abs(mean) > FAR_MEAN or not LOW_SPREAD <= spread <= HIGH_SPREAD:
        what = f"normalised pixels have mean {mean:.2f} and standard deviation {spread:.2f}, expected 0 and 1"
        remedy = "look at some: too dark, too light, inverted, or of another kind than the backbone's"
        yield Finding("warning", "brightness", key, what, [], remedy)


def alike_findings(features: Mapping[str, Features], checked: set[str]) -> Iterator[Finding]:
    """Classes whose means are much closer to that of a class before them than images are to their own mean."""
    import numpy as np

    features = {name: its for name, its in features.items() if its.images >= ENOUGH}
    if len(features) < 2:
        return
    names = list(features)
    means = np.stack([its.mean for its in features.values()])
    spread = np.array([its.variance for its in features.values()])
    noise = spread / np.array([its.images for its in features.values()])
    found: dict[str, list[tuple[float, str]]] = defaultdict(list)
    for index in range(1, len(names)):
        name = names[index]
        if features[name].task not in checked:
            continue
        # Means are apart by chance alone, the fewer the images the more; what is left is the distance of the classes.
        apart = ((means[:index] - means[index]) ** 2).sum(axis=1) - noise[:index] - noise[index]
        least = np.maximum(np.minimum(spread[:index], spread[index]), np.finfo(float).tiny)
        ratio = np.sqrt(np.maximum(apart, 0) / least)
        nearest = int(ratio.argmin())
        if ratio[nearest] < ALIKE:
            other = names[nearest]
            text = f"{name} ~ {other} of {features[other].task} ({ratio[nearest]:.2f})"
            found[features[name].task].append((float(ratio[nearest]), text))
    for key, texts in found.items():
        what = f"{count(texts, 'class')} that look like one before (distance ÷ spread below {ALIKE})"
        remedy = "one class under two names? else expect confusions, or a backbone that tells them apart"
        yield Finding("warning", "similar classes", key, what, [text for _, text in sorted(texts)], remedy)


Loader = Callable[[], bytes]


def sample_of(key: str, task: Task, seen: Seen | None, data: Data) -> dict[str, list[Loader]]:
    """Some training images of each class, chosen by their names: readers of their bytes."""
    each = max(ENOUGH, min(PER_CLASS, SAMPLE // max(len(task.classes), 1)))
    readers: dict[str, list[tuple[str, Loader]]] = defaultdict(list)
    packed = TRAINED / key / PACKED
    if seen is None and packed.is_file():
        table = read_images(packed)
        labels, ids = table["label"].to_pylist(), table["id"].to_pylist()
        names = packed_names(key)
        for row, (label, name) in enumerate(zip(labels, ids, strict=True)):
            readers[names[label]].append((name, partial(packed_image, table, row)))
    else:
        images = seen.images if seen else known_images(task, data)
        for found in images:
            if found.part == "train":
                readers[found.name].append((found.file, found.path.read_bytes))
    return {
        name: [reader for _, reader in sorted(its, key=lambda pair: _lot(pair[0]))[:each]]
        for name, its in readers.items()
    }


def packed_image(table: pa.Table, row: int) -> bytes:
    """The bytes of a packed image."""
    return table["image"][row].as_py()


def known_images(task: Task, data: Data) -> list[Found]:
    """The images of a task that is not examined, as far as its source has them."""
    try:
        return divide(
            read_source(Path(task.source), task.classes, manifest=task.manifest).images, data
        ).images
    except InputError:
        return []


def _lot(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()


def features_of(chosen: Mapping[str, Mapping[str, Sequence[Loader]]], base: Backbone) -> dict[str, Features]:
    """Features of the chosen images of every class, tasks in order."""
    import numpy as np
    import pyarrow as pa
    import torch

    from pipelines.data.packed import decode
    from sdlora.devices import best_device
    from sdlora.preprocessing import Preprocessing, normalise

    device = best_device()
    model = base.model.to(device)
    preprocessing = Preprocessing.of(base.description)
    total = sum(len(readers) for classes in chosen.values() for readers in classes.values())
    found: dict[str, Features] = {}
    done = 0
    with progress("look at images", total=total, unit="images") as bar, torch.inference_mode():
        for key, classes in chosen.items():
            for name, readers in classes.items():
                images = pa.array([reader() for reader in readers], pa.large_binary())
                table = pa.table({"id": [name] * len(images), "image": images})
                pixels = torch.from_numpy(decode(table, preprocessing)).to(device)
                normal = normalise(pixels, mean=preprocessing.mean, std=preprocessing.std)
                values = model(normal).double().cpu().numpy()
                variance = values.var(axis=0, ddof=1).sum() if len(values) > 1 else np.nan
                facts = (normal.mean().item(), normal.square().mean().item())
                found[name] = Features(key, values.mean(axis=0), float(variance), len(values), facts)
                done += len(values)
                bar.update(done)
    return found


# ---- showing


def count(things: Sequence[Any] | Mapping[Any, Any], word: str) -> str:
    """A number of things in words."""
    plural = {"class": "classes", "copy": "copies"}.get(word, f"{word}s")
    return f"{len(things)} {word if len(things) == 1 else plural}"


def show(findings: Sequence[Finding]) -> None:
    """Print findings as a table, then the places of each; all of them where files cannot be read."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    colours = {"error": "red", "warning": "yellow", "ok": "green"}
    table = Table(show_lines=False)
    for column in ("", "task", "check", "found", "what to do"):
        table.add_column(column, overflow="fold")
    alike: dict[tuple[str, ...], list[str]] = {}
    for finding in findings:
        row = (finding.level, finding.check, finding.what, finding.remedy, *finding.where)
        alike.setdefault(row, []).append(finding.task)
    for (level, check, what, remedy, *_), tasks in alike.items():
        keys = tasks[0] if len(tasks) == 1 else f"{tasks[0]} … {tasks[-1]}"
        cells = [Text(cell) for cell in (keys, check, what, remedy)]
        table.add_row(Text(level, style=colours[level]), *cells)
    console.print(table)
    for finding in findings:
        if finding.where:
            console.print(Text(f"{finding.task} {finding.check}: {finding.what}".strip(), style="bold"))
            limit = len(finding.where) if finding.check in ("unreadable", "source") else SHOWN
            for place in finding.where[:limit]:
                console.print(Text(f"  {place}"), soft_wrap=True)
            if len(finding.where) > limit:
                console.print(Text(f"  … and {len(finding.where) - limit} more (--json has all)"))
    levels = Counter(finding.level for finding in findings)
    verdict = ", ".join(
        f"{levels[level]} {level if levels[level] == 1 else f'{level}s'}" for level in ("error", "warning")
    )
    console.print(Text(verdict, style="red" if levels["error"] else "green"))
