"""`sdlora export`: a step's model for other programs, checked against the model that was evaluated."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipelines.project.errors import InputError, UnequalError
from pipelines.project.files import whole_folder
from pipelines.serving.exports import hub_folder, onnx_file, peft_folder, timm_folder
from pipelines.serving.exports.subject import Subject, reference_logits, reference_scores

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sdlora.loading import Step

_LIMIT, _ROUNDING = 1e-4, 4e-6
"""The largest difference of a logit that passes; where logits exceed 25, this share of the largest one. Those of
the heads `ncm` and `lda` do: on the packaged backbone (logits up to 267) float32 itself is up to 2e-4 away from
float64 there, with the other heads 1e-5. `lda` of few images has larger terms that cancel: 1.5e-3 of 1,430."""
_CARRIED = {"classes.json", "preprocessing.json", "ledger.json"}
_WRITTEN = _CARRIED | {
    "README.md",
    "adapter_config.json",
    "adapter_model.safetensors",
    "config.json",
    "model.onnx",
    "model.onnx.data",
    "model.safetensors",
}
"""All that any format writes: a folder with anything else in it, such as a clone of a hub's, is not replaced."""


@dataclass(frozen=True, kw_only=True)
class _Format:
    """A format: what it writes into a folder, its logits as other programs compute them, and how to load it."""

    write: Callable[[Path, Subject], None]
    logits: Callable[[Path, Subject, Sequence[Image]], Tensor]
    usage: Callable[[Path, Subject], str]
    needs: tuple[str, ...] = ()
    """Packages beyond those that every installation has."""
    linear: bool = True
    """Whether it can hold linear rows only."""
    scores: Callable[[Path, Subject, Sequence[Image]], Tensor] | None = None
    """Its scores for unknown images. None where it cannot hold them."""


FORMATS = {
    "timm": _Format(write=timm_folder.write, logits=timm_folder.logits, usage=timm_folder.usage),
    "hub": _Format(write=hub_folder.write, logits=hub_folder.logits, usage=hub_folder.usage),
    "peft": _Format(
        write=peft_folder.write, logits=peft_folder.logits, usage=peft_folder.usage, needs=("peft",)
    ),
    "onnx": _Format(
        write=onnx_file.write,
        logits=onnx_file.logits,
        usage=onnx_file.usage,
        needs=("onnx", "onnxruntime", "onnxscript"),
        linear=False,
        scores=onnx_file.scores,
    ),
}
"""The formats by name."""


class Difference(NamedTuple):
    """How far the logits of an export are from those of the model that was evaluated."""

    largest: float
    scale: float
    """The largest logit, in size."""
    images: int

    @property
    def limit(self) -> float:
        """What passes as rounding."""
        return max(_LIMIT, _ROUNDING * self.scale)

    @property
    def passes(self) -> bool:
        """Whether it is rounding. A logit that is no number never is."""
        return self.largest <= self.limit

    def __str__(self) -> str:
        return (
            f"max |Δlogit| {self.largest:.1e} on {self.images} images (logits up to {self.scale:.3g}, "
            f"limit {self.limit:.1e})"
        )


def export(
    name: str, out: Path, *, model: Path, backbone: Path | None, images: Path | None, count: int
) -> list[str]:
    """Export the model folder to `out` in the format `name`. Returns lines that say what was done.

    Args:
        backbone: the folder of step t00; None for the one beside `model`.
        images: a folder of images for the check; None for the step's packed test images.
        count: how many of them.

    Raises:
        InputError: something that the user can mend.
        UnequalError: the logits differ by more than rounding; nothing is left.
    """
    chosen = FORMATS[name]
    missing = [package for package in chosen.needs if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(
            f"export {name}: needs {', '.join(missing)}, which is not installed: pip install 'sdlora[export]'"
        )
    _check_out(out)
    subject = Subject(model=model, backbone=backbone or model.resolve().parent / "t00")
    step = subject.linear_step() if chosen.linear else subject.step()
    pictures = check_pictures(subject, images, count)
    expected = reference_logits(subject, pictures, linear=chosen.linear)
    with whole_folder(out) as folder:
        chosen.write(folder, subject)
        found = chosen.logits(folder, subject, pictures)
        difference = Difference(
            largest=(found - expected).abs().max().item(),
            scale=expected.abs().max().item(),
            images=len(pictures),
        )
        if not difference.passes:
            raise UnequalError(
                f"export {name}: {difference}: not the model of {model}; {out} was not written"
            )
        unknown = _check_scores(name, folder, subject, pictures, scale=difference.scale)
    return [
        f"step {step.record['step']}: {len(step.classes)} classes of {len(step.record['tasks'])} tasks, "
        f"record {subject.chain()[0].sha256[:12]}",
        *(_stand_in(name, step, expected, reference_logits(subject, pictures)) if step.fallback else []),
        f"check: {difference}",
        *unknown,
        f"{out}: {chosen.usage(out, subject)}",
    ]


def _check_scores(
    name: str, folder: Path, subject: Subject, pictures: Sequence[Image], *, scale: float
) -> list[str]:
    """Return the line that says what an export holds of the step's score for unknown images, checked. None without one.

    Args:
        scale: the largest logit, in size. A score is twice a logit and a term of its size, which cancel.

    Raises:
        UnequalError: the scores differ by more than rounding.
    """
    if not subject.has_threshold():
        return []
    scores = FORMATS[name].scores
    if scores is None:
        return [f"unknown images: {name} holds no score for them; onnx and sdlora predict --unknown have it"]
    expected = reference_scores(subject, pictures)
    largest = (scores(folder, subject, pictures) - expected).abs().max().item()
    limit = max(_LIMIT, _ROUNDING * (4 * scale + expected.abs().max().item()))
    if not largest <= limit:
        raise UnequalError(
            f"export {name}: max |Δscore| {largest:.1e} (limit {limit:.1e}): not the score of {subject.model}"
        )
    return [f"unknown images: second output, max |Δscore| {largest:.1e}; the threshold is in its metadata"]


def _stand_in(name: str, step: Step, expected: Tensor, evaluated: Tensor) -> list[str]:
    """Return the line that says which head takes the place of the step's own, and what that changes."""
    others = int((expected.argmax(dim=1) != evaluated.argmax(dim=1)).sum())
    return [
        f"head: {name} can hold a linear one only, so {step.fallback} in place of {step.record['head']}: another class "
        f"for {others} of {len(expected)} images; onnx holds {step.record['head']}"
    ]


def check_pictures(subject: Subject, images: Path | None, count: int) -> list[Image]:
    """Pictures for the check, as they are opened and in the backbone's colours, spread over all there are."""
    from pipelines.data.decoding import open_picture, strict_pictures

    mode = "L" if subject.preprocessing.input_size[0] == 1 else "RGB"
    pictures = []
    with strict_pictures():
        for name, data in _folder_images(images, count) if images else _packed_images(subject, count):
            try:
                pictures.append(open_picture(data).convert(mode))
            except ValueError as error:
                raise InputError(f"{name}: {error}; replace the image") from None
    return pictures


def _packed_images(subject: Subject, count: int) -> list[tuple[str, bytes]]:
    from pipelines.data.packed import read_images
    from pipelines.data.split_chain import TEST, part_file

    home = subject.model.resolve().parent.parent / "split"
    places = (home / task / part_file(TEST, task) for task in subject.tasks())
    paths = [path for path in places if path.is_file()]
    tables = [read_images(path) for path in paths]
    rows = [(table, index) for table in tables for index in range(len(table))]
    if not rows:
        raise InputError(
            f"{home}: no test images to check the export on; name a folder of images with --images"
        )
    chosen = [rows[index] for index in _spread(len(rows), count)]
    return [(table["id"][index].as_py(), table["image"][index].as_py()) for table, index in chosen]


def _folder_images(folder: Path, count: int) -> list[tuple[str, bytes]]:
    from pipelines.data.source_files import image_bytes
    from pipelines.serving.predict import files_of

    paths = list(files_of(folder))
    if not paths:
        raise InputError(f"{folder}: no image there to check the export on")
    chosen = [paths[index] for index in _spread(len(paths), count)]
    try:
        return [(str(path), image_bytes(path)) for path in chosen]
    except ValueError as error:
        raise InputError(f"{folder}: an image that cannot be read: {error}; replace it") from None


def _spread(total: int, count: int) -> list[int]:
    """At most `count` indices, evenly from first to last."""
    count = min(total, count)
    return [index * (total - 1) // max(count - 1, 1) for index in range(count)]


def _check_out(out: Path) -> None:
    """Refuse to replace anything but an earlier export."""
    if out.is_dir() and not out.is_symlink():
        names = {path.name for path in out.iterdir()}
        if not names or _CARRIED <= names <= _WRITTEN:
            return
    elif not out.exists():
        return
    raise InputError(f"{out}: exists and is no export; choose another folder, or remove it")


def run(name: str, out: Path, *, model: Path, backbone: Path | None, images: Path | None, count: int) -> int:
    """Export and say so. The exit status is 1 where the check failed."""
    try:
        lines = export(name, out, model=model, backbone=backbone, images=images, count=count)
    except UnequalError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
