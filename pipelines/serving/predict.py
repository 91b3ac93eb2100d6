"""`sdlora predict`: classes of images by the model of a step, as they are read, one line each."""

from __future__ import annotations

import codecs
import itertools
import os
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.data.source_files import image_bytes, is_litter
from pipelines.project.errors import InputError
from pipelines.project.files import natural_key
from pipelines.runtime.console import printable
from pipelines.runtime.devices import choose_bf16, choose_device
from pipelines.serving.prediction_output import WRITERS, Row, opened

if TYPE_CHECKING:
    import numpy as np
    import torch

    from sdlora.classifier import IncrementalClassifier
    from sdlora.loading import Step
    from sdlora.preprocessing import Preprocessing

AHEAD = 2
"""Batches that are decoded while another one is predicted."""


@dataclass(frozen=True, kw_only=True)
class PredictionSettings:
    """How predictions are computed and written."""

    top: int
    batch_size: int | None
    device: str
    """`auto`, or a device of torch."""
    precision: str
    """`auto`, `fp32` or `bf16`."""
    format: str
    """`table`, `jsonl` or `csv`."""
    out: Path | None
    """None for standard output."""
    unknown: bool
    """Whether it is said which images look like none of the classes."""


def predict(model: Path, backbone: Path | None, images: Sequence[str], settings: PredictionSettings) -> int:
    """Predict and write one line for each image. Returns 0, or 1 where an image could not be read.

    Memory does not grow with the number of images: names are read, pictures decoded and lines written on the way.
    """
    from pipelines.data.decoding import strict_pictures
    from pipelines.runtime.progress import progress
    from sdlora.devices import set_deterministic
    from sdlora.loading import read_step
    from sdlora.prediction import judged_guesses
    from sdlora.preprocessing import Preprocessing

    names = _some_files(images)
    device = choose_device(settings.device)
    bf16 = choose_bf16(settings.precision, device)
    set_deterministic(True)
    step = read_step(model, backbone=backbone)
    if settings.unknown:
        _require_threshold(step, model)
    preprocessing = Preprocessing.of(step.backbone.description)
    classifier = _classifier_on(device, step, bf16=bf16)
    size = settings.batch_size or (256 if device.type == "cuda" else 64)
    top = min(settings.top, len(step.classes))
    done = failed = 0
    with ExitStack() as stack:
        sink = stack.enter_context(opened(settings.out))
        write = WRITERS[settings.format](sink, top, step.classes, settings.unknown)
        bar = None
        if sys.stderr.isatty() and "-" not in images:
            bar = stack.enter_context(progress("predict", total=sum(1 for _ in files(images)), unit="images"))
        stack.enter_context(strict_pictures())
        for some, decoded in _decoded_batches(names, preprocessing, size):
            good = [item for item in decoded if not isinstance(item, str)]
            found = iter(
                judged_guesses(
                    classifier,
                    good,
                    preprocessing,
                    step.classes,
                    top=top,
                    bf16=bf16,
                    unknown=settings.unknown,
                )
            )
            for name, item in zip(some, decoded, strict=True):
                if isinstance(item, str):
                    failed += 1
                    sys.stderr.write(f"{printable(name)}: {item}\n")
                    write(Row(name, [], error=item))
                else:
                    write(Row(name, *next(found)))
            sink.flush()
            done += len(some)
            if bar is not None:
                bar.update(done)
    if failed:
        sys.stderr.write(f"{failed} of {done} images could not be read\n")
    return 1 if failed else 0


def _classifier_on(device: torch.device, step: Step, *, bf16: bool) -> IncrementalClassifier:
    """Return the merged model of a step on a device."""
    from sdlora.backbones import spell_out_attention
    from sdlora.classifier import merged_classifier

    classifier = merged_classifier(step.backbone.model, step.learned).to(device)
    if bf16 and device.type == "cpu":
        spell_out_attention(step.backbone.model)
    return classifier


def _some_files(images: Sequence[str]) -> Iterator[str]:
    """Return the names of all images, of which there is at least one."""
    for name in images:
        if name != "-" and not os.path.lexists(name):
            raise InputError(f"{printable(name)}: no such file or folder")
    names = files(images)
    first = next(names, None)
    if first is None:
        raise InputError(f"{' '.join(map(printable, images))}: no image there")
    return itertools.chain([first], names)


def _require_threshold(step: Step, model: Path) -> None:
    """Refuse a step that knows nothing of unknown images."""
    if step.learned.rejection is None:
        raise InputError(
            f"{model}: step {step.record['step']} has no threshold for unknown images: adapter.unknown was null, or no "
            "image could be left out; set it and call `sdlora run`, or leave --unknown out"
        )


def files(images: Iterable[str]) -> Iterator[str]:
    """Yield the names of all images: a folder stands for those in it, `-` for a list on standard input, one a line."""
    for name in images:
        if name == "-":
            lines = (
                line if number else line.removeprefix(codecs.BOM_UTF8)
                for number, line in enumerate(sys.stdin.buffer)
            )
            yield from (os.fsdecode(line.rstrip(b"\r\n")) for line in lines if line.strip())
        elif os.path.isdir(name):
            yield from map(str, files_of(Path(name)))
        else:
            yield name


def files_of(folder: Path) -> Iterator[Path]:
    """Yield the images of a folder and of the folders in it, by name, `img2` before `img10`.

    Hidden ones are left out, and what other programs leave beside images.
    """
    from PIL import Image

    known = {suffix for suffix, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    for home, folders, names in os.walk(folder):
        folders[:] = sorted((name for name in folders if not is_litter(name)), key=natural_key)
        for name in sorted(names, key=natural_key):
            if not is_litter(name) and os.path.splitext(name)[1].lower() in known:
                yield Path(home, name)


def _decoded_batches(
    names: Iterator[str], preprocessing: Preprocessing, size: int
) -> Iterator[tuple[list[str], list[np.ndarray | str]]]:
    """Names with their pixels, or with why there are none, `size` at a time, some batches ahead, in threads."""
    waiting: deque[tuple[list[str], list[Future[np.ndarray | str]]]] = deque()
    from pipelines.data.decoding import decoding_threads

    with ThreadPoolExecutor(decoding_threads()) as pool:
        try:
            while True:
                while len(waiting) <= AHEAD and (some := list(itertools.islice(names, size))):
                    waiting.append((some, [pool.submit(_pixels, name, preprocessing) for name in some]))
                if not waiting:
                    return
                some, futures = waiting.popleft()
                yield some, [future.result() for future in futures]
        finally:
            pool.shutdown(cancel_futures=True)


def _pixels(name: str, preprocessing: Preprocessing) -> np.ndarray | str:
    from pipelines.data.decoding import picture_pixels

    try:
        return picture_pixels(image_bytes(Path(name)), preprocessing)
    except OSError as error:
        return error.strerror or type(error).__name__
    except ValueError as error:
        return str(error)
