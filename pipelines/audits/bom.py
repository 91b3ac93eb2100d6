"""`sdlora audit bom`: what a step is made of, as a bill of materials for machine learning in CycloneDX's format."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from uuid import NAMESPACE_OID, uuid5

from pipelines.audits.verify import verify
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of, write_json
from pipelines.project.layout import BACKBONE, EVALUATIONS, GATES, MODELS
from pipelines.project.params import Params
from pipelines.versioning.artifacts import ArtifactStore, read_lock
from sdlora.ledger import RECORD

if TYPE_CHECKING:
    from cyclonedx.model.bom import Bom
    from cyclonedx.model.component import Component, ComponentType

_EXPORTED = "ledger.json"
"""The file of an export that says of which step it is."""


def bill(file: Path, *, step: str | None, export: Path | None) -> list[str]:
    """Verify the chain up to a step, and write what the step is made of. Return lines to print.

    Args:
        file: the JSON file to write.
        step: such as t03; that of the export, or else the last one, if not given.
        export: a folder that `sdlora export` left, whose files are listed too.
    """
    if importlib.util.find_spec("cyclonedx") is None:
        raise InputError(
            "audit bom: needs cyclonedx-python-lib, which is not installed: pip install 'sdlora[bom]'"
        )
    params = Params.load()
    exported = _exported(export) if export else None
    step = step or (exported["step"] if exported else list(params.tasks)[-1])
    if step not in params.tasks:
        raise InputError(f"audit bom: there is no step {step!r}; known are {', '.join(params.tasks)}")
    _require_verified(step)
    with TemporaryDirectory(prefix="sdlora-bom-") as scratch:
        place = ArtifactStore(read_lock(params), Path(scratch))
        tasks = list(params.tasks)
        parts = _Parts(place, tasks[: tasks.index(step) + 1])
        if exported and exported["sha256"] != parts.hash_of(step):
            raise InputError(f"{export}: it was not made of {step} as it stands here; export {step} again")
        write_json(file, parts.document(export))
    return [f"{file}: CycloneDX, {step} with record {parts.hash_of(step)[:12]}"]


def _exported(folder: Path) -> Any:  # noqa: ANN401 - what an export says of itself
    """Return which step an export is of."""
    if not (folder / _EXPORTED).is_file():
        raise InputError(f"{folder}: no export there (no {_EXPORTED} in it); make one with `sdlora export`")
    found = read_json(folder / _EXPORTED)
    if not isinstance(found, dict) or not {"step", "sha256"} <= found.keys():
        raise InputError(
            f"{folder / _EXPORTED}: it does not say of which step the export is; export it again"
        )
    return found


def _require_verified(step: str) -> None:
    """Refuse a step whose chain does not hold."""
    for finding in verify():
        if finding.fault:
            raise InputError(
                f"{finding.step}: {finding.fault}; no bill is written of a chain that does not hold"
            )
        if finding.step == step:
            return


@dataclass(frozen=True)
class _Parts:
    """What a step is made of: the backbone, the steps before, their images, and the libraries."""

    place: ArtifactStore
    tasks: list[str]
    """those of the chain up to the step"""

    def hash_of(self, step: str) -> str:
        """Return the hash of a step's record."""
        return sha256_of(self.place.find(MODELS / step) / RECORD)

    def document(self, export: Path | None) -> dict[str, Any]:
        """Return the bill as JSON has it."""
        from cyclonedx.output.json import JsonV1Dot6

        written: dict[str, Any] = json.loads(JsonV1Dot6(self._bom(export)).output_as_string())
        # The library has no model cards.
        written["metadata"]["component"]["modelCard"] = self._card()
        del written["metadata"]["timestamp"]  # equal steps have equal bills
        return written

    def _bom(self, export: Path | None) -> Bom:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType

        tool = Component(name="sdlora", version=version("sdlora"), type=ComponentType.APPLICATION)
        base = self._backbone()
        libraries = list(self._libraries())
        models, images = {BACKBONE.name: base}, {task: self._images(task) for task in self.tasks}
        for task in self.tasks:
            models[task] = self._step(task)
        last = models[self.tasks[-1]]
        if export:
            last.components = self._files(export)
        bom = Bom(
            serial_number=uuid5(NAMESPACE_OID, self.hash_of(self.tasks[-1])),
            metadata=BomMetaData(component=last),
            components=[
                *(models[name] for name in (BACKBONE.name, *self.tasks[:-1])),
                *images.values(),
                *libraries,
            ],
        )
        bom.metadata.tools.components.add(tool)
        for before, task in zip((BACKBONE.name, *self.tasks), self.tasks, strict=False):
            bom.register_dependency(models[task], [models[before], images[task], *libraries])
        return bom

    def _step(self, task: str) -> Component:
        """Return the model that a task left."""
        from cyclonedx.model.component import ComponentType

        record = self._record(task)
        told = {
            "method": record["method"],
            "head": record["head"],
            "classes": len(record["classes"]),
            "verdict": sha256_of(self.place.find(GATES / task) / "verdict.json"),
            "parameters": json.dumps(record["parameters"], sort_keys=True, ensure_ascii=False),
            **{f"code:{stage}": digest for stage, digest in record["code"].items()},
        }
        kind = ComponentType.MACHINE_LEARNING_MODEL
        return self._component(
            kind, task, self.hash_of(task), told, "Its hash is that of its record, step.json."
        )

    def _images(self, task: str) -> Component:
        """Return the training images of a task."""
        from cyclonedx.model.component import ComponentType

        split = read_json(self.place.find(MODELS / task) / RECORD)["split"]
        told = {
            "samples": split["digest"],
            **{f"images:{name}": count for name, count in split["counts"].items()},
        }
        return self._component(
            ComponentType.DATA, f"{task}-images", split["images"], told, "Packed training images."
        )

    def _backbone(self) -> Component:
        """Return the pre-trained model, with its licence where timm knows one."""
        from cyclonedx.contrib.license.factories import LicenseFactory
        from cyclonedx.model.component import ComponentType
        from timm.models import get_pretrained_cfg

        import sdlora.backbones  # noqa: F401 - timm knows the packaged one then

        name = read_json(self.place.find(BACKBONE) / "backbone.json")["name"]
        kind, digest = ComponentType.MACHINE_LEARNING_MODEL, self._record(BACKBONE.name)["backbone"]
        found = self._component(
            kind, name, digest, {}, "The frozen backbone. Its hash is that of its weights."
        )
        own = get_pretrained_cfg(name, allow_unregistered=False)
        if own and own.license:
            found.licenses.add(LicenseFactory().make_from_string(own.license))
        return found

    def _libraries(self) -> Iterator[Component]:
        """Yield the libraries that the step was made with."""
        from cyclonedx.model.component import Component, ComponentType
        from packageurl import PackageURL

        for name, number in self._record(self.tasks[-1])["versions"].items():
            if name == "python":
                yield Component(name=name, version=number, type=ComponentType.PLATFORM, bom_ref=name)
            else:
                purl = PackageURL("pypi", name=name, version=number)
                yield Component(
                    name=name, version=number, type=ComponentType.LIBRARY, bom_ref=name, purl=purl
                )

    def _files(self, export: Path) -> list[Component]:
        """Return the files of an export."""
        from cyclonedx.model.component import ComponentType

        paths = sorted(path for path in export.rglob("*") if path.is_file())
        names = {path.relative_to(export).as_posix(): path for path in paths}
        return [
            self._component(ComponentType.FILE, name, sha256_of(path), {}, None)
            for name, path in names.items()
        ]

    def _component(
        self, kind: ComponentType, name: str, digest: str, told: Mapping[str, object], description: str | None
    ) -> Component:
        """Return a component with a hash, and what else is to be told of it."""
        from cyclonedx.model import HashAlgorithm, HashType, Property
        from cyclonedx.model.component import Component

        return Component(
            name=name,
            type=kind,
            bom_ref=name,
            version=digest[:12],
            description=description,
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
            properties=[Property(name=f"sdlora:{key}", value=str(value)) for key, value in told.items()],
        )

    def _card(self) -> dict[str, Any]:
        """Return the model card: on what the model was trained, and how well it does."""
        metrics = read_json(self.place.find(EVALUATIONS / self.tasks[-1]) / "metrics.json")
        shares = zip(metrics["tasks"], metrics["accuracy"], strict=True)
        return {
            "modelParameters": {
                "approach": {"type": "supervised"},
                "task": "image-classification",
                "modelArchitecture": read_json(self.place.find(BACKBONE) / "backbone.json")["name"],
                "datasets": [{"ref": f"{task}-images"} for task in self.tasks],
            },
            "quantitativeAnalysis": {
                "performanceMetrics": [
                    {"type": "accuracy", "value": str(share), "slice": f"test images of {task}"}
                    for task, share in shares
                ]
            },
        }

    def _record(self, step: str) -> dict[str, Any]:
        found: dict[str, Any] = read_json(self.place.find(MODELS / step) / RECORD)
        return found
