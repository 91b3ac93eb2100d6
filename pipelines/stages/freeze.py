"""Stage `freeze`: turn a fit into a step: directions, magnitudes and head frozen, a record added to the ledger."""

from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.data.decoding import decode
from pipelines.data.packed import read_images, training_images
from pipelines.ledger.fit_facts import last_epoch, learned_magnitudes
from pipelines.ledger.receipts import restore_retired_output
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of, whole_folder
from pipelines.project.params import read_params
from pipelines.project.provenance import code_hash, library_versions
from pipelines.project.settings import Adapter
from pipelines.runtime.memory import memory_room
from pipelines.runtime.stage import StageResult, stage

if TYPE_CHECKING:
    import pyarrow as pa
    from torch import Tensor

    from sdlora.classifier import Learned


@stage
def freeze(
    task: str, *, fit: Path, train: Path, images: Path, before: Path, backbone: Path, out: Path
) -> StageResult:
    """Freeze what a task learned, and settle the head: the model folder of this step.

    It holds what the step before holds, byte for byte, and what was learned. A head that is settled from statistics,
    and a freezing that changes the function, need the features of the task's training images; otherwise neither the
    images nor the backbone are looked at.

    Args:
        task: Task of params.yaml, such as t01.
        fit: What `fit` left for this task.
        train: What describes the task's training images, train.json.
        images: Folder of the training images: a folder for each task.
        before: Model folder of the step before.
        backbone: Model folder of step t00: the frozen backbone.
        out: Folder to leave; an existing one is replaced as a whole.
    """
    from pipelines.project.method_settings import settings_of
    from sdlora import freezing
    from sdlora.devices import set_deterministic
    from sdlora.fit_folder import read_fit
    from sdlora.heads import HEADS
    from sdlora.ledger import record_hash
    from sdlora.methods import METHODS
    from sdlora.model_folder import read_model, write_model
    from sdlora.seeding import generator_for

    restored = restore_retired_output("freeze", task, out)
    if restored is not None:
        return restored
    adapter, seed = read_params("adapter", Adapter), read_params("seed", int)
    deterministic = read_params("training.deterministic", bool)
    set_deterministic(deterministic)
    described = read_json(fit / "fit.json")
    if described["task"] != task:
        raise InputError(f"{fit}: this is the fit of {described['task']}, expected {task}; run `sdlora run`")
    if described["adapter"] != adapter.of_the_fit:
        raise InputError(f"{fit}: made with another adapter block than that of params.yaml; run `sdlora run`")
    learned, record = read_model(before)
    if record.get("head", adapter.head) != adapter.head:
        raise InputError(
            f"{before}: this step was made with head {record['head']!r}, params.yaml: adapter.head is "
            f"{adapter.head!r}; a chain keeps one of them (run `sdlora run` from the first task)"
        )
    tasks = [*record["tasks"], task]
    result = read_fit(fit, task=task, targets=described["targets"], tasks=tasks)
    step = freezing.freeze(learned, result, method=METHODS[adapter.method], settings=settings_of(adapter))
    head = HEADS[adapter.head]
    features = TrainingFeatures(train, images, backbone)
    if step.changed:
        step = freezing.measured(step, features=features)
    frozen = step.learned
    if head.settle is not None:
        frozen = freezing.settle_head(
            learned,
            frozen,
            task=task,
            labels=features.labels(),
            features=features,
            head=head,
            covariance_rank=adapter.covariance_rank,
            generator=generator_for(seed, "settle", task),
        )
    seen = [*record["classes"], *described["classes"]]
    with whole_folder(out) as folder:
        written = write_model(
            folder,
            frozen,
            {
                "step": task,
                "previous": record_hash(before),
                "backbone": record["backbone"],
                "tasks": tasks,
                "classes": seen,
                "directions": list(frozen.directions),
                "targets": described["targets"] or record.get("targets", []),
                "method": adapter.method,
                "needs_old_images": METHODS[adapter.method].joint,
                "formulation": adapter.formulation,
                "head": adapter.head,
                "images": {**record.get("images", {}), task: described["split"]["images"]},
                "split": described["split"],
                "code": {"fit": described["code"], "freeze": code_hash(freeze.fn)},
                "versions": library_versions(),
                "determinism": "deterministic algorithms" if deterministic else "none required",
                "metrics": last_epoch(fit),
                "rank": max(
                    (pair.down.shape[0] for pair in frozen.directions.get(task, {}).values()), default=0
                ),
                "parameters": {
                    "adapter": adapter.model_dump(mode="json"),
                    **{key: described[key] for key in ("training", "seed")},
                },
                "learned_magnitudes": learned_magnitudes(fit),
                "magnitudes": {
                    name: round(alpha.mean().item(), 6) for name, alpha in frozen.magnitudes.items()
                },
                "remembered": remembered(frozen),
                "freezing": dict(step.facts),
                "fit": {path.name: sha256_of(path) for path in sorted(fit.iterdir())},
            },
            before=before,
        )
    return StageResult(
        [
            {
                "step": task,
                "directions": len(frozen.directions),
                "classes": len(seen),
                "record": record_hash(out)[:12],
                "previous": written["previous"][:12],
                **step.facts,
            }
        ]
    )


def remembered(learned: "Learned") -> dict[str, Any]:
    """What the step keeps of images, in numbers: statistics of classes and of layers' inputs, and no image."""
    numbers = {"memory": sum(tensor.numel() for tensor in learned.memory.values())}
    if learned.statistics:
        kept = next(iter(learned.statistics.values()))
        _, size, rank = kept.factors.shape
        numbers |= {"means": size, "principal_directions": rank, "per_class": 2 + size + size * rank}
    return numbers


class TrainingFeatures:
    """The features of the task's training images under any model of the chain; images are read at the first use."""

    def __init__(self, train: Path, images: Path, backbone: Path) -> None:
        self._train, self._images, self._backbone = train, images, backbone

    @cached_property
    def _table(self) -> "pa.Table":
        return read_images(training_images(self._train, self._images))

    @cached_property
    def _pixels(self) -> "Tensor":
        import torch

        from sdlora.backbones import read_backbone
        from sdlora.preprocessing import Preprocessing

        preprocessing = Preprocessing.of(read_backbone(self._backbone).description)
        return torch.from_numpy(decode(self._table, preprocessing, room=memory_room()))

    def labels(self) -> "Tensor":
        """(n,), 0 … classes − 1 within the task."""
        import torch

        labels = torch.tensor(self._table["label"].to_pylist())
        return labels - labels.min()

    def __call__(self, learned: "Learned") -> "Tensor":
        """(n, d) on the CPU."""
        import torch

        from sdlora.backbones import read_backbone
        from sdlora.classifier import merged_classifier
        from sdlora.devices import best_device
        from sdlora.evaluation import feature_batches

        device = best_device()
        base = read_backbone(self._backbone)  # a new one, because merging changes it
        config = base.description["pretrained_cfg"]
        batches = feature_batches(
            merged_classifier(base.model, learned).to(device),
            self._pixels,
            mean=config["mean"],
            std=config["std"],
            batch_size=BATCH,
            device=device,
        )
        return torch.cat(list(batches))


BATCH = 256
"""Images in one forward pass; no choice of the user, because it may change the last bits."""
