"""What is exported: a step of a chain, with what every export carries beside its weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of, write_json

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from sdlora.loading import Step
    from sdlora.preprocessing import Preprocessing

_BATCH = 32
"""Pictures in one forward pass of the check."""


class _Link(NamedTuple):
    """A step's record in the chain."""

    step: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model folder, and the backbone of its chain."""

    model: Path
    backbone: Path

    def step(self) -> Step:
        """Return the step anew, because building a model of it changes its backbone."""
        return self._read(linear=False)

    def linear_step(self) -> Step:
        """Return the step anew with linear rows: its own, or those of the head that stands in for them."""
        return self._read(linear=True)

    def _read(self, *, linear: bool) -> Step:
        from sdlora.loading import read_step

        return read_step(self.model, backbone=self.backbone, linear=linear)

    @property
    def preprocessing(self) -> Preprocessing:
        """How the chain's backbone wants its pictures."""
        from sdlora.backbones import read_description
        from sdlora.preprocessing import Preprocessing

        return Preprocessing.of(read_description(self.backbone))

    def chain(self) -> list[_Link]:
        """Return the records from this step back to t00, as far as their folders lie beside it.

        Each is checked to be the one that its successor names.
        """
        from sdlora.ledger import read_own_record, read_record, record_hash

        record = read_record(self.model, beside=self._beside)
        links = [_Link(record["step"], record_hash(self.model))]
        for step in ["t00", *record["tasks"]][-2::-1]:
            folder = self._beside(step)
            links.append(_Link(step, record["previous"]))
            if not (folder / "step.json").is_file():
                break
            if record_hash(folder) != record["previous"]:
                raise InputError(
                    f"{folder}: its record is not the one that {links[-2].step} was made from "
                    f"({record['previous'][:12]}); restore the chain with `dvc checkout`"
                )
            record = read_own_record(folder)
        return links

    def has_threshold(self) -> bool:
        """Return whether the step says which images are of none of its classes."""
        from sdlora.ledger import read_own_record

        return "unknown" in read_own_record(self.model).get("freezing", {})

    def tasks(self) -> list[str]:
        """Return the tasks that the step knows."""
        from sdlora.ledger import read_record

        return list(read_record(self.model, beside=self._beside)["tasks"])

    def _beside(self, step: str) -> Path:
        return self.backbone if step == "t00" else self.model.resolve().parent / step

    def carry(self, folder: Path, step: Step) -> None:
        """Write what every export carries: classes.json, preprocessing.json and ledger.json."""
        write_json(folder / "classes.json", {"classes": step.record["classes"]})
        write_json(folder / "preprocessing.json", self.described_preprocessing())
        write_json(folder / "ledger.json", self.described_ledger(step))

    def described_preprocessing(self) -> dict[str, Any]:
        """Return all that a server must know of the pictures."""
        own = self.preprocessing
        return {
            **asdict(own),
            "colours": "grey" if own.input_size[0] == 1 else "RGB",
            "layout": "NCHW, float32, (value / 255 - mean) / std",
            "transparency": "on white",
        }

    def described_ledger(self, step: Step) -> dict[str, Any]:
        """Return which step this is, and what it came from.

        Where another head stands in for the step's own, `classifier` says so.
        `sha256` is the hash of its record, `head` that of its verdict, which signatures name: null where no folder of
        verdicts lies beside that of the models.
        """
        last, *earlier = self.chain()
        verdict = self.model.resolve().parent.parent / "gate" / last.step / "verdict.json"
        return {
            "step": last.step,
            "sha256": last.sha256,
            "head": sha256_of(verdict) if verdict.is_file() else None,
            "earlier": [link._asdict() for link in earlier],
            "record": step.record,
            **(
                {"classifier": {"head": step.fallback, "in_place_of": step.record["head"]}}
                if step.fallback
                else {}
            ),
        }


def head_note(step: Step) -> str:
    """Return what a README says where the head is not the step's own; else nothing."""
    if not step.fallback:
        return ""
    return (
        f"\nThe head in this folder is `{step.fallback}`, made of the same statistics of the classes. The step's own, "
        f"`{step.record['head']}`, is\nnot linear, and this folder cannot hold it. Figures of the step are of its own "
        f"head: the accuracy of\n`{step.fallback}` was not measured.\n"
    )


def batches(pictures: Sequence[Image]) -> Iterator[Sequence[Image]]:
    """Some pictures at a time."""
    for start in range(0, len(pictures), _BATCH):
        yield pictures[start : start + _BATCH]


def reference_scores(subject: Subject, pictures: Sequence[Image]) -> Tensor:
    """Scores (n,) for unknown images of the model as it is evaluated, on the CPU."""
    import torch

    from sdlora.loading import scored_model

    transform, model = subject.preprocessing, scored_model(subject.step())
    with torch.inference_mode():
        return torch.cat(
            [model(torch.stack([transform(picture) for picture in some]))[1] for some in batches(pictures)]
        )


def reference_logits(subject: Subject, pictures: Sequence[Image], *, linear: bool = False) -> Tensor:
    """Logits (n, classes) of the model as it is evaluated, on the CPU.

    Args:
        linear: whether it is evaluated with the rows that a linear format holds.
    """
    import torch

    from sdlora.classifier import merged_classifier

    step, transform = subject.linear_step() if linear else subject.step(), subject.preprocessing
    model = merged_classifier(step.backbone.model, step.learned)
    with torch.inference_mode():
        return torch.cat(
            [model(torch.stack([transform(picture) for picture in some])) for some in batches(pictures)]
        )
