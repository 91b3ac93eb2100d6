"""Stage `freeze`: turn a fit into a step: directions, magnitudes and head frozen, a record added to the ledger."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data.decoding import decode
from pipelines.data.packed import read_images, training_images
from pipelines.data.scratch_files import scratch_tensor
from pipelines.ledger.fit_facts import last_epoch
from pipelines.ledger.receipts import restore_retired_output
from pipelines.ledger.verdicts import MUCH_DRIFT
from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of, whole_folder
from pipelines.project.params import read_params
from pipelines.project.provenance import code_hash, library_versions
from pipelines.project.settings import Adapter
from pipelines.runtime.console import log_line
from pipelines.runtime.earlier_outputs import outputs_beside
from pipelines.runtime.memory import memory_room
from pipelines.runtime.progress import progress
from pipelines.runtime.stage import StageResult, stage

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from sdlora.classifier import ModelState
    from sdlora.freezing import FrozenStep


@stage
def freeze(
    task: str, *, fit: Path, train: Path, images: Path, before: Path, backbone: Path, out: Path
) -> StageResult:
    """Freeze what a task learned, and settle the head: the model folder of this step.

    It holds what this step has made, and its record names the step before, whose files stay where they are. Images and
    backbone are looked at where a head is made from statistics, or where freezing changes the function.

    Args:
        task: Task of params.yaml, such as t01.
        fit: What `fit` left for this task.
        train: What describes the task's training images, train.json.
        images: Folder of the training images: a folder for each task.
        before: Model folder of the step before.
        backbone: Model folder of step t00: the frozen backbone.
        out: Folder to leave; an existing one is replaced as a whole.
    """
    from sdlora.devices import set_deterministic
    from sdlora.fit_folder import read_fit
    from sdlora.freezing import frozen_step, lost_by_drift
    from sdlora.ledger import record_hash
    from sdlora.model_folder import read_model, write_model

    restored = restore_retired_output("freeze", task, out)
    if restored is not None:
        return restored
    adapter, seed = read_params("adapter", Adapter), read_params("seed", int)
    deterministic = read_params("training.deterministic", bool)
    set_deterministic(deterministic)
    described = _described_fit(fit, task, adapter)
    with outputs_beside(before, "step.json") as found:
        learned, record = read_model(found(before.name), beside=found, statistics=True)
    _require_head(adapter, record, before)
    result = read_fit(fit, described, tasks=[*record["tasks"], task])
    features = _TrainingFeatures(task, train=train, images=images, backbone=backbone)
    step = frozen_step(learned, result, adapter, features, seed, record=record)
    with whole_folder(out) as folder:
        written = write_model(
            folder,
            step.learned,
            {
                "step": task,
                "previous": record_hash(before),
                "after": record["step"],
                **_inherited(record, described, task),
                **_made_with(adapter, described, deterministic=deterministic),
                **_learned_in(step, task, fit),
            },
            before=learned,
        )
    _warn(step, task, lost=lost_by_drift(record), classes=len(written["classes"]))
    row = {
        "step": task,
        "directions": len(step.learned.directions),
        "classes": len(record["classes"]) + len(written["classes"]),
        "record": record_hash(out)[:12],
        "previous": written["previous"][:12],
        **step.facts,
    }
    return StageResult([row])


def _warn(step: "FrozenStep", task: str, *, lost: float, classes: int) -> None:
    """Say where drift has cost much of the accuracy of earlier classes, and what to do about it."""
    from sdlora.retention import FEW_CLASSES

    loss = float(step.facts.get("drift_loss", 0.0))
    if loss > MUCH_DRIFT and loss > lost:
        before, after = (100 * float(step.facts[f"old_accuracy_{when}"]) for when in ("before", "after"))
        doubt = ", or much less, as a task of so few classes tells little" if classes < FEW_CLASSES else ""
        log_line(
            f"freeze {task}: warning: drift has cost about {100 * loss:.0f} % of the accuracy of earlier classes"
            f"{doubt} (in this step an estimated {before:.1f} % right became {after:.1f}); lower "
            "training.learning_rate, or set training.feature_distillation, training.head_rate and training.head_start"
        )


def _require_head(adapter: Adapter, record: Mapping[str, Any], before: Path) -> None:
    """Refuse another head than that of the step before."""
    if record.get("head", adapter.head) != adapter.head:
        raise InputError(
            f"{before}: this step was made with head {record['head']!r}, params.yaml: adapter.head is "
            f"{adapter.head!r}; a chain keeps one of them (run `sdlora run` from the first task)"
        )


def _described_fit(fit: Path, task: str, adapter: Adapter) -> dict[str, Any]:
    """Return what a fit says of itself, if it is the fit of `task` that `params.yaml` asks for."""
    from sdlora.fit_folder import read_fit_description

    described = read_fit_description(fit)
    if described["task"] != task:
        raise InputError(f"{fit}: this is the fit of {described['task']}, expected {task}; run `sdlora run`")
    if described["adapter"] != adapter.of_the_fit:
        raise InputError(f"{fit}: made with another adapter block than that of params.yaml; run `sdlora run`")
    return described


def _inherited(record: Mapping[str, Any], described: Mapping[str, Any], task: str) -> dict[str, Any]:
    """Return the part of the new record that goes on from the record of the step before."""
    return {
        "backbone": record["backbone"],
        **{key: described[key] for key in ("classes", "step_classes") if key in described},
        "targets": described["targets"] or record.get("targets", []),
        "images": {task: described["split"]["images"]},
        "split": described["split"],
    }


def _made_with(adapter: Adapter, described: Mapping[str, Any], *, deterministic: bool) -> dict[str, Any]:
    """Return the part of the new record that says by which method, parameters and code the step was made."""
    from sdlora.methods import METHODS

    return {
        "method": adapter.method,
        "needs_old_images": METHODS[adapter.method].joint,
        "formulation": adapter.formulation,
        "head": adapter.head,
        "code": {"fit": described["code"], "freeze": code_hash(freeze.fn)},
        "versions": library_versions(),
        "determinism": "deterministic algorithms" if deterministic else "none required",
        "parameters": {
            "adapter": adapter.recorded,
            **{key: described[key] for key in ("training", "seed")},
        },
    }


def _learned_in(step: "FrozenStep", task: str, fit: Path) -> dict[str, Any]:
    """Return the part of the new record that says what was learned, and what freezing made of it."""
    from sdlora.freezing import remembered

    learned = step.learned
    newest = learned.directions.get(task, {})
    return {
        "directions": list(learned.directions),
        "metrics": last_epoch(fit),
        "rank": max((pair.down.shape[0] for pair in newest.values()), default=0),
        "magnitudes": {name: round(alpha.mean().item(), 6) for name, alpha in learned.magnitudes.items()},
        "remembered": remembered(learned),
        "freezing": dict(step.facts),
        "fit": {path.name: sha256_of(path) for path in sorted(fit.iterdir())},
    }


class _TrainingFeatures:
    """The features of the task's training images under any model of the chain. Images are read at the first use."""

    def __init__(self, task: str, *, train: Path, images: Path, backbone: Path) -> None:
        self._task, self._train, self._images, self._backbone = task, train, images, backbone

    @cached_property
    def _table(self) -> "pa.Table":
        return read_images(training_images(self._train, self._images))

    @cached_property
    def _pixels(self) -> "Tensor":
        import torch

        from sdlora.backbones import read_backbone
        from sdlora.preprocessing import Preprocessing

        preprocessing = Preprocessing.of(read_backbone(self._backbone).description)
        title = f"freeze {self._task}: decode"
        return torch.from_numpy(decode(self._table, preprocessing, room=memory_room(), title=title))

    def labels(self) -> "Tensor":
        """(n,), 0 … classes − 1 within the task."""
        import torch

        labels = torch.from_numpy(self._table["label"].to_numpy().astype("int64"))
        return labels.unique(return_inverse=True)[1]

    def __call__(self, learned: "ModelState") -> "Tensor":
        """(n, d) on the CPU."""
        import torch

        from sdlora.backbones import read_backbone
        from sdlora.classifier import merged_classifier
        from sdlora.devices import best_device
        from sdlora.evaluation import feature_batches
        from sdlora.freezing import FEATURE_BATCH

        device = best_device()
        base = read_backbone(self._backbone)  # a new one, because merging changes it
        config = base.description["pretrained_cfg"]
        batches = feature_batches(
            merged_classifier(base.model, learned).to(device),
            self._pixels,
            mean=config["mean"],
            std=config["std"],
            batch_size=FEATURE_BATCH,
            device=device,
        )
        found = scratch_tensor(
            (len(self._pixels), base.description["features"]), torch.float32, room=memory_room()
        )
        with progress(f"freeze {self._task}: look at images", total=len(found), unit="images") as bar:
            for done, (batch, place) in enumerate(
                zip(batches, found.split(FEATURE_BATCH), strict=True), start=1
            ):
                place.copy_(batch)
                bar.update(min(done * FEATURE_BATCH, len(found)))
        return found
