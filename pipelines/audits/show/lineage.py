"""What became of an image: the steps, statistics and directions that it went into, and where it is tested."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.audits.steps import AuditedProject, AuditedStep, Figures, opened_project, samples_of
from pipelines.audits.tables import print_json
from pipelines.data.decoding import picture_hash
from pipelines.data.duplicates import read_pictures
from pipelines.data.source_files import Found
from pipelines.project.errors import InputError
from pipelines.project.files import natural_key, sha256_of

if TYPE_CHECKING:
    from PIL.Image import Image


class Lineage:
    """The images of a chain, by what they show and by their bytes."""

    def __init__(self, project: AuditedProject) -> None:
        self._steps = [project.step(name) for name in project.evaluated()]
        self._by_hash: dict[str, list[Figures]] = defaultdict(list)
        for row in samples_of(self._steps[-1]):
            for key in {row["sha256"], row["pixels"]}:
                self._by_hash[key].append(row)

    def of(self, sha256: str, pixels: str | None) -> Figures:
        """Return the images of the chain that have these bytes or show this picture, and what each went into.

        Args:
            sha256: The hash of a file's bytes.
            pixels: `picture_hash` of what it shows. None where it cannot be decoded.
        """
        rows = {row["id"]: row for key in (sha256, pixels) if key for row in self._by_hash.get(key, [])}
        known = [self._described(row, same_bytes=row["sha256"] == sha256) for row in rows.values()]
        return {"known": known, "in_test": any(image["part"] == "test" for image in known)}

    def _described(self, row: Figures, *, same_bytes: bool) -> Figures:
        """Return where an image of the chain stands and what it went into, step by step."""
        task = row["id"].partition("/")[0]
        since = [step for step in self._steps if task in step.tasks]
        told = {
            "id": row["id"],
            "part": row["split"],
            "class": self._steps[-1].classes[row["label"]]["name"],
            "task": task,
            "same_bytes": same_bytes,
        }
        if row["split"] != "train":
            return {**told, "went_into": [], "tested_in": [step.name for step in since]}
        return {**told, "went_into": list(self._went_into(since)), "tested_in": []}

    def _went_into(self, since: Sequence[AuditedStep]) -> Iterator[Figures]:
        """Yield each step with the files of its model that a training image of the first went into.

        The step that learned its task has made them of it. A later one starts from them: some it holds as they were,
        others, such as statistics that follow the features, it carries on. A method that needs old images learns from
        the image at every step.
        """
        made: dict[str, str] = {}
        for step in since:
            files, learned = step.record["files"], not made or bool(step.record.get("needs_old_images"))
            if learned:
                before = self._files_before(step)
                made |= {name: value for name, value in files.items() if before.get(name) != value}
            held = sorted(made.keys() & files.keys(), key=natural_key)
            yield {
                "step": step.name,
                "trained_on_it": learned,
                "files": held,
                "as_they_were": [name for name in held if not learned and files[name] == made[name]],
            }

    def _files_before(self, step: AuditedStep) -> Figures:
        """Return the files of the model that a step began from, with their hashes."""
        names = [its.name for its in self._steps]
        place = names.index(step.name)
        return dict(self._steps[place - 1].record["files"]) if place else {}


def show_files(folder: Path) -> None:
    """Print, as JSON, what became of every image in a folder and the folders in it."""
    if not folder.is_dir():
        raise InputError(f"--files {folder}: no such folder")
    paths = sorted(
        (path for path in folder.rglob("*") if path.is_file()), key=lambda path: natural_key(path.as_posix())
    )
    with opened_project() as project:
        lineage = Lineage(project)
        seen: dict[int, tuple[str, str]] = {}

        def look(index: int, data: bytes, picture: Image) -> None:
            seen[index] = hashlib.sha256(data).hexdigest(), picture_hash(picture)

        images = [Found(path, None, "", path.name) for path in paths]
        read_pictures("files", images, look, max_pixels=project.params.data.max_pixels)
        found = {
            path.relative_to(folder).as_posix(): lineage.of(*seen.get(index) or (sha256_of(path), None))
            for index, path in enumerate(paths)
        }
    print_json({"folder": str(folder), "files": found})
