"""Stage `fit`: learn one task on top of the step before, resumable at any optimiser step."""

import contextlib
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipelines.data.decoding import decode
from pipelines.data.packed import PACKED, read_images, training_images
from pipelines.data.scratch_files import scratch_tensor
from pipelines.ledger.receipts import restore_retired_output
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of, whole_folder
from pipelines.project.params import read_params
from pipelines.project.provenance import code_hash, library_versions
from pipelines.project.schemas import ClassMap, TrainingImages
from pipelines.project.settings import Adapter, Training
from pipelines.runtime.checkpoints import CheckpointStore, input_key, read_snapshot, snapshot_bytes
from pipelines.runtime.console import log_line
from pipelines.runtime.earlier_outputs import outputs_beside
from pipelines.runtime.machines import devices_of_fit, launched, other_machines
from pipelines.runtime.memory import device_room, memory_room
from pipelines.runtime.processes import TERMINATED, stop_asked
from pipelines.runtime.progress import Bar, progress
from pipelines.runtime.ranks import Member, local_member, other_ranks
from pipelines.runtime.stage import StageResult, stage

if TYPE_CHECKING:
    import torch

    from sdlora.process_group import ProcessGroup
    from sdlora.training import Fit, Schedule


class _Choices(NamedTuple):
    """What a fit reads of `params.yaml`."""

    adapter: Adapter
    training: Training
    seed: int


def _read_choices() -> _Choices:
    """Read what a fit reads of `params.yaml`."""
    return _Choices(
        read_params("adapter", Adapter), read_params("training", Training), read_params("seed", int)
    )


@stage
def fit(
    task: str, *, train: Path, images: Path, classes: Path, before: Path, backbone: Path, out: Path
) -> StageResult:
    """Learn a task from its images alone: a direction, all magnitudes, head rows.

    What the method trains is left raw, with the training curve. A checkpoint is written every
    `training.checkpoint_seconds` under the hash of everything that decides the result; started again after being
    killed, the stage goes on from the newest one and leaves the same bytes.

    Args:
        task: Task of params.yaml, such as t01.
        train: What describes the task's training images, train.json.
        images: Folder of the training images: a folder for each task.
        classes: All classes so far, classes.json.
        before: Model folder of the step before.
        backbone: Model folder of step t00: the frozen backbone.
        out: Folder to leave; an existing one is replaced as a whole.
    """
    import torch

    from sdlora.fit_folder import write_fit

    restored = restore_retired_output("fit", task, out)
    if restored is not None:
        return restored
    choices = _read_choices()
    training = choices.training
    inputs = {"train": train, "images": images, "classes": classes, "before": before, "backbone": backbone}
    key = _key(task, choices, inputs)
    store = CheckpointStore(training.checkpoint_store, key)
    with _first_member(task, key, inputs) as member:
        group, learner = _join(task, member, inputs)
        for snapshot in store.newest():
            learner.restore(snapshot)
            log_line(f"fit {task}: going on from step {snapshot.step} of {learner.total_steps}")
            break
        if group.size > 1:
            group.spread(snapshot_bytes(learner.snapshot()), device=learner.device)
        started, first = time.monotonic(), learner.step
        seen = _train(learner, store, every=training.checkpoint_seconds)
        seconds = time.monotonic() - started
    with whole_folder(out) as folder:
        write_fit(
            folder,
            learner.result(),
            curve=learner.curve,
            description=_description(learner, choices, train, classes, processes=group.size),
        )
    store.forget_old()
    if learner.lone:
        log_line(f"fit {task}: one class has nothing to be told from, so no direction is trained")
    if learner.step > first:
        where = f"{group.size} × {learner.device.type}" if group.size > 1 else f"{learner.device}"
        log_line(
            f"fit {task}: {seen} images in {seconds:.1f} s on {where} ({torch.get_num_threads()} threads)"
        )
    return StageResult([_row(learner)])


def _row(learner: "Fit") -> dict[str, str | int | float]:
    """Return the line that the table of a fit has."""
    row: dict[str, str | int | float] = {
        "task": learner.task,
        "images": learner.images,
        "trained parameters": learner.trained_parameters,
        "steps": learner.total_steps,
    }
    if learner.curve:
        last = learner.curve[-1]
        row |= {"loss": round(last.loss, 4), "training accuracy": round(last.accuracy, 4)}
    return row


def _description(
    learner: "Fit", choices: _Choices, train: Path, classes: Path, *, processes: int
) -> dict[str, object]:
    """Return what a fit says of itself: all that decided its result, and how much it trained.

    How many processes shared it is said where it does not follow from its settings.
    """
    shared = {} if processes == choices.training.devices else {"processes": processes}
    return {
        **shared,
        "task": learner.task,
        **_classes_of(learner.task, classes),
        "adapter": choices.adapter.of_the_fit,
        "split": read_json(train, TrainingImages),
        "code": code_hash(fit.fn),
        "versions": library_versions(),
        "training": choices.training.of_the_fit,
        "seed": choices.seed,
        "steps": learner.total_steps,
        "images": learner.images,
        "trained_parameters": learner.trained_parameters,
    }


def run_rank(
    task: str,
    number: int,
    meeting: Path,
    *,
    train: Path,
    images: Path,
    classes: Path,
    before: Path,
    backbone: Path,
) -> None:
    """Share the batches of a fit that another process has begun.

    This process goes through all of its steps, and leaves nothing.

    Args:
        task: Task of params.yaml, such as t01.
        number: Which of the devices.
        meeting: Folder that the processes share.
        train: What describes the task's training images, train.json.
        images: Folder of the training images: a folder for each task.
        classes: All classes so far, classes.json.
        before: Model folder of the step before.
        backbone: Model folder of step t00: the frozen backbone.
    """
    inputs = {"train": train, "images": images, "classes": classes, "before": before, "backbone": backbone}
    devices = read_params("training", Training).devices
    _share(task, inputs, local_member(number, devices, meeting))


def accept_order(order: Mapping[str, Any]) -> Callable[[Member], None]:
    """Return what shares a fit that was begun on another machine.

    Raises:
        InputError: the inputs, the settings or the program are others here.
        OSError: an input is not here.
    """
    task, inputs = order["task"], {name: Path(path) for name, path in order["inputs"].items()}
    devices_of_fit(read_params("training", Training).devices)
    if _key(task, _read_choices(), inputs) != order["key"]:
        raise InputError(
            f"fit {task}: its inputs, its settings or this program are others on {socket.gethostname()} than on the "
            "machine that begins the fit; share the project's folder, or pull the same commit and `dvc pull`"
        )
    return partial(_share_to_the_end, task, inputs)


def _share_to_the_end(task: str, inputs: Mapping[str, Path], member: Member) -> None:
    """Share a fit, also where all are told to stop: the first then keeps what it has, and leaves."""
    from torch.distributed import DistError

    with stop_asked() as stop:
        try:
            _share(task, inputs, member)
        except DistError:
            if stop():
                raise SystemExit(TERMINATED) from None
            raise


def _share(task: str, inputs: Mapping[str, Path], member: Member) -> None:
    """Go through all steps of a fit that another process has begun."""
    group, learner = _join(task, member, inputs)
    learner.restore(read_snapshot(group.spread(b"", device=learner.device)))
    with contextlib.suppress(FloatingPointError):  # the first says so
        for _ in learner.run():
            pass
    group.leave()


def _first_member(
    task: str, key: str, inputs: Mapping[str, Path]
) -> contextlib.AbstractContextManager[Member]:
    """Have the other processes take part, those of other machines or one for each further device here.

    A fit by itself needs none.
    """
    devices = devices_of_fit(read_params("training", Training).devices)
    place = launched()
    _own_device(0 if place is None else place.local_rank, devices)  # before any other process takes one
    if place is not None:
        paths = {name: str(path) for name, path in inputs.items()}
        return other_machines(place, {"task": task, "key": key, "inputs": paths})
    if devices == 1:
        return contextlib.nullcontext(Member())
    options = [word for name, path in inputs.items() for word in (f"--{name}", str(path))]
    return other_ranks(devices, [run_rank.__name__.replace("_", "-"), task, *options])


def _join(task: str, member: Member, inputs: Mapping[str, Path]) -> tuple["ProcessGroup", "Fit"]:
    """Take a device, find the others, and prepare the fit."""
    from sdlora.devices import set_deterministic
    from sdlora.process_group import join_group

    training = read_params("training", Training)
    set_deterministic(training.deterministic, tf32=training.precision == "tf32")
    device = _own_device(member.device, member.devices)
    group = join_group(member.rank, member.size, store=member.store, device=device)
    room = memory_room() // member.devices
    return group, _prepare(task, **inputs, room=room, device=device, group=group)


def _own_device(number: int, count: int) -> "torch.device":
    from sdlora.devices import device_of

    try:
        return device_of(number, count)
    except ValueError as error:
        raise InputError(
            f"params.yaml: training.devices: {error}; write how many there are, or correct CUDA_VISIBLE_DEVICES"
        ) from error


def _prepare(
    task: str,
    *,
    train: Path,
    images: Path,
    classes: Path,
    before: Path,
    backbone: Path,
    room: int,
    device: "torch.device",
    group: "ProcessGroup",
) -> "Fit":
    """Return a fit of `task` that has not begun. Its decoded images take at most `room` bytes of main memory."""
    import torch

    from sdlora.backbones import read_backbone
    from sdlora.choices import adapted_targets, settings_of
    from sdlora.methods import METHODS
    from sdlora.model_folder import read_model
    from sdlora.preprocessing import Preprocessing
    from sdlora.training import Fit, TaskImages

    choices = _read_choices()
    adapter, settings = choices.adapter, choices.training
    method = METHODS[adapter.method]
    base = read_backbone(backbone)
    with outputs_beside(before, "step.json") as found:
        learned, record = read_model(found(before.name), beside=found)
    targets = adapted_targets(adapter.targets, method)
    _check_continues(record, adapter, before, targets)
    preprocessing = Preprocessing.of(base.description)
    tasks = {}
    for name in [*record["tasks"], task] if method.joint else [task]:
        path = training_images(train, images) if name == task else _earlier_images(name, task, images, record)
        table = read_images(path)
        labels = torch.from_numpy(table["label"].to_numpy().astype("int64"))
        title = f"fit {task}: decode the images of {name}" if group.rank == 0 else ""
        pixels = torch.from_numpy(decode(table, preprocessing, room=room, title=title))
        room -= pixels.nbytes if pixels.nbytes <= room else 0
        tasks[name] = TaskImages(pixels, labels.unique(return_inverse=True)[1])
    with _passes(task, sum(len(its.images) for its in tasks.values()), group) as looked:
        return Fit(
            base.model,
            learned,
            tasks=tasks,
            mean=preprocessing.mean,
            std=preprocessing.std,
            method=method,
            settings=settings_of(adapter),
            targets=targets,
            schedule=_schedule_of(settings),
            seed=choices.seed,
            device=device,
            group=group,
            image_room=device_room(),
            empty=partial(scratch_tensor, room=room),
            looked=looked,
        )


@contextlib.contextmanager
def _passes(task: str, total: int, group: "ProcessGroup") -> Iterator[Callable[[int], None]]:
    """Give what shows how far a pass over all images is. Not all methods make one, and then nothing is shown."""
    with contextlib.ExitStack() as stack:

        @cache
        def bar() -> Bar:
            return stack.enter_context(progress(f"fit {task}: look at images", total=total, unit="images"))

        yield lambda images: bar().update(images) if group.rank == 0 else None


def _schedule_of(training: Training) -> "Schedule":
    """Return the schedule of a fit: its training settings but for where it runs and where it is kept."""
    from sdlora.training import Schedule

    settings = {key: value for key, value in training.of_the_fit.items() if key not in _NOT_SCHEDULED}
    return Schedule(decay=settings.pop("schedule"), **settings)


_NOT_SCHEDULED = {"devices", "deterministic"}
"""Training keys that say where and how a fit runs, and nothing of its steps."""


def _earlier_images(name: str, task: str, images: Path, record: dict[str, Any]) -> Path:
    """Return the training images of an earlier task, for a joint method.

    They are no declared input of the stage, but the step before is, and its ledger holds their hash: images that are
    not those are refused, so what DVC stores under the declared inputs was made of these images alone.
    """
    path = images / name / PACKED
    if not path.is_file():
        raise InputError(
            f"{path}: the images of {name} are missing, and a joint method learns all of them with {task}; restore "
            f"them (`dvc checkout {path.parent}`, `dvc pull {path.parent}`), or choose another adapter.method"
        )
    if sha256_of(path) != record.get("images", {}).get(name):
        raise InputError(f"{path}: changed since {name} was learned; run `sdlora run` from the first task")
    return path


def _classes_of(task: str, classes: Path) -> dict[str, Any]:
    """Return the entries of the class map that arrive with `task`, in label order, and the labels of all that it saw
    where some may be known.
    """
    seen: ClassMap = read_json(classes, ClassMap)
    saw = seen.get("step_classes", {})
    return {
        "classes": [entry for entry in seen["classes"] if entry["task"] == task],
        **({"step_classes": {task: saw[task]}} if task in saw else {}),
    }


def _check_continues(record: dict[str, Any], adapter: Adapter, before: Path, targets: Sequence[str]) -> None:
    """Refuse to go on with choices that cannot read what the step before has left."""
    from sdlora.adapters import target_of

    held = sorted({target_of(name) for name in record.get("targets", [])})
    for key, chosen, found in (
        ("method", adapter.method, record.get("method")),
        ("formulation", adapter.formulation, record.get("formulation")),
        ("targets", ", ".join(sorted(targets)), ", ".join(held)),
    ):
        found = found or chosen
        if found != chosen:
            raise InputError(
                f"{before}: this step was made with {key} {found!r}, params.yaml: adapter.{key} is {chosen!r}; "
                "a chain keeps one of them (run `sdlora run` from the first task)"
            )


def _train(learner: "Fit", store: CheckpointStore, *, every: float) -> int:
    """Train to the end, saving a checkpoint every so many seconds, and on SIGTERM. Returns the images seen."""
    import torch

    schedule, images, before = learner.schedule, learner.images, learner.images_seen
    seen, saved = 0, time.monotonic()
    total = learner.total_steps and schedule.epochs * images
    pause, micro_batch = every, learner.micro_batch
    with stop_asked() as stop, progress(f"fit {learner.task}", total=total, unit="images") as bar:
        try:
            for seen in learner.run():
                facts = learner.curve[-1]._asdict() if learner.curve else {}
                shown = {key: facts[key] for key in ("loss", "accuracy") if key in facts}
                done = before + seen
                epoch = min(done // images + 1, schedule.epochs)
                bar.update(
                    done,
                    step=f"{learner.step}/{learner.total_steps}",
                    epoch=f"{epoch}/{schedule.epochs}",
                    **shown,
                )
                if learner.micro_batch < micro_batch:
                    micro_batch = learner.micro_batch
                    log_line(
                        f"fit {learner.task}: out of memory; going on with {micro_batch} images at a time"
                    )
                if stop():
                    store.save(learner.snapshot())
                    log_line(
                        f"fit {learner.task}: stopped by SIGTERM at step {learner.step}; the same goes on from here"
                    )
                    raise SystemExit(TERMINATED)
                if time.monotonic() - saved >= pause and learner.step < learner.total_steps:
                    begun = time.monotonic()
                    stored = store.save(learner.snapshot())
                    saved = time.monotonic()
                    # A store that is away may take a tenth of the time, and no more.
                    pause = every if stored else max(every, 9 * (saved - begun))
        except FloatingPointError as error:
            raise InputError(f"params.yaml: training.learning_rate: {error}") from error
        except torch.OutOfMemoryError as error:
            raise InputError(
                f"fit {learner.task}: not even one image at a time fits the memory that is free; free some (is another "
                "program on the device?), or choose a smaller backbone.image_size or backbone"
            ) from error
    return seen


def _key(task: str, choices: _Choices, inputs: Mapping[str, Path]) -> str:
    """Return the hash of all that decides the fit's result. A checkpoint of anything else is never picked up."""
    settings = {
        "code": code_hash(fit.fn),
        "task": task,
        "adapter": choices.adapter.of_the_fit,
        "training": choices.training.of_the_fit,
        "seed": choices.seed,
        **_classes_of(task, inputs["classes"]),
    }
    steps = [inputs[name] / "step.json" for name in ("before", "backbone")]
    return input_key(settings, [inputs["train"], *steps])
