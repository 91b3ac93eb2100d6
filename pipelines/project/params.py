"""The choices of a run: the whole of `params.yaml`, validated before any work begins."""

import difflib
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from pipelines.project.errors import InputError
from pipelines.project.layout import PARAMS, RAW, RETIRED
from pipelines.project.yaml_values import load_yaml

T = TypeVar("T")
Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(min_length=1)]
AT_FREEZING = {"head", "tolerance", "compress", "covariance_rank"}
"""Keys of `adapter` that no fit reads."""
SDLORA = ("sdlora", "sdlora-rr", "sdlora-kd")
READ_BY = {
    "magnitude_start": SDLORA,
    "magnitudes": SDLORA,
    "initial_up": SDLORA,
    "compress": SDLORA,
    "penalty": ("olora", "nlora", "clora"),
}
"""Keys of `adapter` that are null by default, and the methods that read them."""
HEADS_OF = {"ncm": ("ncm", "lda"), "joint": ("linear",)}
"""Methods that go with some heads only: one trains no rows that could be kept, one trains all rows together."""
MANIFEST = r"[^./\\][^/\\]*\.(csv|jsonl|parquet)"
TASK_KEY = r"t(0[1-9]|[1-9][0-9]{1,2})"


class Section(BaseModel):
    """A block of `params.yaml`: unknown, missing and wrong-typed keys are errors; nothing changes later."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Digits(Section):
    """How scikit-learn's handwritten digits are divided."""

    test_fraction: Share
    """share of each class that becomes test images"""
    seed: Seed
    """chooses the test images"""


class Glyphs100(Section):
    """The embedded benchmark comes divided already and has no settings."""


class Published(Section):
    """A data set that its authors divided into train and test, and that has no settings."""


class Divided(Section):
    """A data set that its authors did not divide, and that the user may have divided already."""

    archive: Text | None = None
    """with split: archive only: a .zip or .tar that has train/<class>/ and test/<class>/ in it"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """its hash, so that another file under its name is noticed"""


class ImageNetR(Divided):
    """How ImageNet-R is divided."""

    split: Literal["coda-prompt", "stratified", "archive"]
    """which images are tested on"""


class ImageNetA(Divided):
    """How ImageNet-A is divided."""

    split: Literal["stratified", "archive"]
    """which images are tested on"""


class Cub200(Divided):
    """How CUB-200-2011 is divided."""

    split: Literal["official", "stratified", "archive"]
    """which images are tested on"""


class DomainNet(Section):
    """How DomainNet is divided."""

    split: Literal["coda-prompt", "official"]
    """which images are tested on, and of which domains"""


class Fetch(Section):
    """The data sets that `sdlora fetch` can bring, by name; own images need none."""

    digits: Digits | None = None
    """scikit-learn's handwritten digits"""
    glyphs100: Glyphs100 | None = None
    """the embedded benchmark of 100 characters"""
    mnist: Published | None = None
    """handwritten digits, 28x28"""
    fashion_mnist: Published | None = Field(None, alias="fashion-mnist")
    """pictures of clothes, 28x28"""
    cifar100: Published | None = None
    """CIFAR-100, 32x32"""
    imagenet_r: ImageNetR | None = Field(None, alias="imagenet-r")
    """ImageNet-R(enditions)"""
    imagenet_a: ImageNetA | None = Field(None, alias="imagenet-a")
    """ImageNet-A(dversarial)"""
    cub200: Cub200 | None = None
    """CUB-200-2011, birds"""
    domainnet: DomainNet | None = None
    """DomainNet, 345 classes in several domains"""

    @classmethod
    def names(cls) -> list[str]:
        """The data sets that are known, as `params.yaml` calls them."""
        return list(_fields(cls))

    def entry(self, name: str) -> Section | None:
        """The settings of a known data set, if it is to be brought."""
        entry: Section | None = getattr(self, name.replace("-", "_"))
        return entry

    @field_validator("*", mode="before")
    @classmethod
    def _is_a_block(cls, value: object) -> object:
        if value is None:
            raise PydanticCustomError("model_type", "null")
        return value


class Data(Section):
    """How a task's images are divided, checked and packed."""

    duplicates: Literal["refuse", "allow", "leave_out"]
    """whether the same picture may stand in two tasks or classes (never in train and test)"""
    test_fraction: Share
    """share of each class that becomes test images where the source is not divided"""
    seed: Seed
    """chooses the test and the validation images"""
    validation: Share | None
    """share of each class's training images that is kept from training to select on; null is none"""
    max_pixels: Count
    """width × height above which an image is refused"""


class Backbone(Section):
    """The frozen model under all tasks."""

    name: Text
    """glyph_vit, or any timm vision transformer with the tag of its weights"""
    weights: Annotated[str, Field(pattern=r"\.safetensors$")] | None
    """a local .safetensors file instead of the name's own weights, or null"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """the file's hash, so that another file under its name is noticed; null without a file"""
    image_size: Count | None
    """side of its images in pixels; null is the model's own"""
    input_normalisation: Literal["model", "none"]
    """mean and standard deviation of the model's own configuration, or pixels in [0, 1] as they are"""


class Adapter(Section):
    """What a task adds to the backbone."""

    method: Literal[
        "sdlora",
        "sdlora-rr",
        "sdlora-kd",
        "finetune",
        "frozen",
        "ncm",
        "joint",
        "olora",
        "nlora",
        "inflora",
        "clora",
    ]
    """how tasks are learned"""
    head: Literal["aligned", "lda", "ncm", "linear"]
    """what becomes of the classifier's rows when a step is frozen"""
    formulation: Literal["continuous", "reference", "paper"]
    """how directions are scaled and their magnitudes start"""
    targets: (
        Annotated[tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...], Field(strict=False, min_length=1)]
        | None
    )
    """which projections of every block are adapted; null is the method's own"""
    rank: Count
    """rank of each task's directions"""
    rank_schedule: Mapping[str, Count]
    """of sdlora-rr only: task and the rank from that task on"""
    magnitude_start: Annotated[float, Field(gt=0)] | None
    """first value of a new magnitude; null is the formulation's own"""
    magnitudes: Literal["carried", "restarted"] | None
    """whether earlier magnitudes go on from step to step; null is the formulation's own"""
    initial_up: Literal["zero", "uniform"] | None
    """how B of a new direction starts; null is the formulation's own"""
    tolerance: Annotated[float, Field(ge=0, le=1)]
    """of sdlora-kd only: relative residual below which a direction is absorbed"""
    compress: Annotated[float, Field(gt=0, le=1)] | None
    """share of a direction's energy that is kept when it is frozen; null keeps the rank"""
    penalty: Annotated[float, Field(ge=0)] | None
    """weight of what olora, nlora and clora add to the loss; null is the method's own"""
    covariance_rank: Count
    """principal directions of every class that aligned and lda remember"""

    @property
    def of_the_fit(self) -> dict[str, Any]:
        """What a fit reads; the rest is read when the step is frozen."""
        return self.model_dump(mode="json", exclude=AT_FREEZING)

    @property
    def own_choices(self) -> dict[str, Any]:
        """What is chosen in place of the formulation's own fields."""
        chosen = {
            "magnitude_start": self.magnitude_start,
            "carried": None if self.magnitudes is None else self.magnitudes == "carried",
            "initial_up": self.initial_up,
        }
        return {key: value for key, value in chosen.items() if value is not None}


class Training(Section):
    """How each task is fitted."""

    optimizer: Literal["sgd", "adam"]
    """the rule of descent"""
    learning_rate: Annotated[float, Field(gt=0)]
    """size of its steps"""
    momentum: Annotated[float, Field(ge=0, lt=1)]
    """of sgd only"""
    schedule: Literal["constant", "cosine"]
    """course of the learning rate within a task"""
    epochs: Count
    """passes over each task's images"""
    batch_size: Count
    """images in one optimiser step"""
    crop_scale: Annotated[float, Field(gt=0, le=1)]
    """smallest share of the area that a random crop keeps; 1.0 is no crop"""
    flip: bool
    """random horizontal flips"""
    precision: Literal["fp32", "tf32", "bf16"]
    """number format of the forward pass"""
    compile: bool
    """kernels made for this model before the first step; needs a C++ compiler"""
    devices: Count
    """accelerators of one machine that share every batch"""
    deterministic: bool
    """the same bytes from the same machine every time"""
    checkpoint_seconds: Annotated[float, Field(gt=0)]
    """seconds between two saved states of an unfinished fit"""
    checkpoint_store: Text | None
    """a folder or fsspec URL for them; null is .sdlora/checkpoints"""


class Evaluation(Section):
    """How a step is tested."""

    batch_size: Count
    """images in one forward pass"""
    precision: Literal["fp32", "tf32", "bf16"]
    """number format of the backbone's forward pass"""


class Gate(Section):
    """What a step must keep before the next one is learned; null is no limit."""

    fall: Annotated[float, Field(ge=0, le=1)] | None
    """most that the accuracy of any old task may fall in the step"""
    negative_flips: Annotated[float, Field(ge=0, le=1)] | None
    """largest share of the old tasks' test images that were right before the step and are wrong after it"""
    calibration_error: Annotated[float, Field(ge=0, le=1)] | None
    """largest expected calibration error on all test images so far"""
    new_task: Annotated[float, Field(ge=0, le=1)] | None
    """least accuracy on the task just learned"""


class Approval(Section):
    """A person's decision to go on although a limit is broken; `sdlora approve` writes it."""

    by: Text
    """who decided"""
    why: Text
    """the reason"""
    evaluation: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """hash of the results that were looked at: it holds for no others"""
    limits: Annotated[
        tuple[Literal["fall", "negative_flips", "calibration_error", "new_task"], ...], Field(strict=False)
    ]
    """the limits that they broke: it holds for no others"""


class Workers(Section):
    """How `sdlora deploy` sets machines to work; no stage reads it."""

    pool: Text
    """Prefect work pool whose workers run the chain"""
    schedule: Annotated[str, Field(pattern=r"^\S+( +\S+){4}$")] | None
    """cron line (UTC) by which they do so unasked; null is on request or on new images only"""
    inbox: Text
    """folder inside the project that images of new tasks arrive in"""
    branch: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w./+-]*$")] | None
    """Git branch that gets params.yaml, dvc.lock and metrics.json after each run; null is none"""
    push: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][\w.-]*$")] | None
    """Git remote that the branch is taken from and pushed to; null keeps it here"""
    heartbeat_seconds: Annotated[int, Field(ge=30)]
    """seconds between two signs of life of a run; Prefect takes 30 and more"""
    dead_after_seconds: Annotated[int, Field(ge=30)]
    """seconds without one after which a run is marked crashed and started again"""
    attempts: Count
    """how many times in a row a run may end without any progress before it has failed"""


class Task(Section):
    """A set of classes that arrives together."""

    after: str
    """the task before it; t00 for the first"""
    source: Text
    """the folder of its images, inside the project"""
    manifest: str | None = None
    """a file in that folder which lists the images; null for class folders or a metadata file"""
    classes: Annotated[tuple[str, ...], Field(strict=False)]
    """its classes, in the order of their labels"""

    @property
    def retired(self) -> bool:
        """Whether its images were deleted: then its source is its receipt."""
        return self.source.startswith(f"{RETIRED}/")


class Params(Section):
    """Every choice of a run."""

    seed: Seed
    """start of every random choice in training"""
    fetch: Fetch
    """the data sets to bring; {} for own images only"""
    data: Data
    """how images are divided, checked and packed"""
    backbone: Backbone
    """the frozen model under all tasks"""
    adapter: Adapter
    """what a task adds to it"""
    training: Training
    """how each task is fitted"""
    evaluation: Evaluation
    """how each step is tested"""
    gate: Gate
    """what a step must keep before the next one is learned"""
    approvals: Mapping[str, Approval]
    """steps that a person let through all the same; {} for none"""
    workers: Workers
    """machines that run the chain unattended"""
    tasks: Mapping[str, Task]
    """the tasks in order of arrival"""

    @classmethod
    def load(cls, path: Path = PARAMS) -> Self:
        """Read and validate the file; an `InputError` names the first fault and counts the others."""
        return cls.parse(read_text(path), origin=str(path))

    @classmethod
    def parse(cls, text: str, *, origin: str) -> Self:
        """Validate the text of a params file that is called `origin` in errors."""
        raw = read_yaml(text, origin=origin)
        faults = list(_wrong_keys(raw))
        if not faults:
            try:
                params = cls.model_validate(raw)
            except ValidationError as error:
                faults = _type_faults(error)
            else:
                faults = [
                    *_fetch_faults(params.fetch),
                    *_backbone_faults(params.backbone),
                    *_adapter_faults(params.adapter),
                    *_task_faults(params.tasks),
                    *_approval_faults(params.approvals, params.tasks),
                    *_worker_faults(params.workers),
                ]
                if not faults:
                    return params
        more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
        raise InputError(f"{origin}: {faults[0]}{more}")


def read_params(key: str, kind: type[T]) -> T:
    """Return what `params.yaml` has under a dotted key, as a stage reads it.

    A stage names each key that it reads, so that its fingerprint has the settings of that key and of no other. The
    whole file was validated by `Params.load` when the stage began.

    Raises:
        InputError: there is no such key, or another value than the key takes.
    """
    value: Any = read_yaml(read_text(PARAMS), origin=str(PARAMS))
    try:
        for part in key.split("."):
            value = value[part]
        return TypeAdapter(kind).validate_python(value)
    except (KeyError, TypeError):
        raise InputError(
            f"{PARAMS}: {key}: the key is missing; restore the file from version control"
        ) from None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join([key, *map(str, first["loc"])])
        raise InputError(f"{PARAMS}: {where}: {first['msg']}; correct it") from None


def read_text(path: Path) -> str:
    """The text of a params file, line ends and all; an `InputError` where there is none."""
    try:
        return path.read_bytes().decode()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: the file is missing; run the command in the project's folder") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from None


def read_yaml(text: str, *, origin: str) -> dict[Any, Any]:
    """The mapping in a YAML text, read as DVC reads it; an `InputError` names the line of a syntax error."""
    from ruamel.yaml.constructor import DuplicateKeyError
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        raw = load_yaml(text)
    except DuplicateKeyError as error:
        key = re.search(r'key "(.*?)"', str(error.problem))
        raise InputError(
            f"{origin}: line {error.problem_mark.line + 1}: the key {key[1] if key else ''!r} stands there"
            " a second time; remove one of the two"
        ) from None
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}: " if mark else ""
        fault = " ".join(str(error.problem or error.context).split())
        raise InputError(f"{origin}: {line}not valid YAML ({fault}); mend that line") from None
    except (YAMLError, ValueError) as error:
        fault = " ".join(str(error).split())
        raise InputError(f"{origin}: not valid YAML ({fault})") from None
    if raw is None:
        raise InputError(f"{origin}: the file is empty; restore it from version control")
    if not isinstance(raw, dict):
        raise InputError(f"{origin}: expected a block of keys, found {_show(raw)}; restore the file")
    return raw


def class_name_fault(name: str) -> str | None:
    """Why a class cannot have this name, which is also its folder's, or None."""
    if not name.strip() or name != name.strip():
        return "is empty or has blanks at an end"
    if "/" in name or "\\" in name:
        return "has a path separator"
    if name.startswith("."):
        return "starts with a dot, as hidden folders do"
    if not name.isprintable():
        return "has characters that cannot be printed"
    return None


def missing_source(source: str | Path, fetch: Fetch | None = None) -> str:
    """What to do about a source folder that is not there; `fetch` is what params.yaml brings, where that is known."""
    if str(source).startswith(f"{RETIRED}/"):
        return "it holds the receipt of deleted images; restore it from version control"
    folder, name = posixpath.split(posixpath.normpath(str(source)))
    if folder == str(RAW) and name in Fetch.names():
        if fetch is not None and fetch.entry(name) is None:
            return (
                f"{name} is not in fetch (retiring a task takes it out); copy the folder from a clone that has it, "
                "or add the entry"
            )
        return f"run `sdlora fetch {name} --out data/raw/{name}`, or `sdlora run`, which does"
    return "put images there, one folder for each class, or correct the path"


def _wrong_keys(block: dict[Any, Any], where: tuple[str, ...] = ()) -> Iterator[str]:
    """Keys that are not text: DVC drops them without a word, and their stages with them."""
    for key, value in block.items():
        if not isinstance(key, str):
            of_tasks = where in (("tasks",), ("adapter", "rank_schedule"))
            name = f"t{key:02d}" if of_tasks and type(key) is int else json.dumps(str(key))
            place = ".".join(where) or "top level"
            yield f"{place}: the key {_show(key)} is not text, and DVC would drop it silently; write {name}"
        elif isinstance(value, dict):
            yield from _wrong_keys(value, (*where, key))


def _type_faults(error: ValidationError) -> list[str]:
    """One line per fault; unknown keys first, because a misspelt key is also a missing one."""
    details = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
    return [f"{_place(e['loc'])}: {_type_fault(e)}" for e in details]


def _type_fault(error: Any) -> str:  # noqa: ANN401 - pydantic's ErrorDetails, whose keys vary
    found = _show(error["input"])
    bounds = {
        "greater_than": ("gt", "more than"),
        "greater_than_equal": ("ge", "at least"),
        "less_than": ("lt", "less than"),
        "less_than_equal": ("le", "at most"),
    }
    match error["type"]:
        case "extra_forbidden":
            known = list(_fields(_section(error["loc"][:-1])))
            close = difflib.get_close_matches(str(error["loc"][-1]), known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"known are {', '.join(known) or 'none'}"
            return f"unknown key; {hint}"
        case "missing":
            return f"the key is missing; add it ({_field(error['loc']).description})"
        case "literal_error":
            known = re.findall(r"'(.*?)'", error["ctx"]["expected"])
            close = difflib.get_close_matches(str(error["input"]), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            return f"expected one of {', '.join(known)}, found {found}{hint}"
        case kind if kind in bounds:
            bound, words = bounds[kind]
            return f"expected {words} {error['ctx'][bound]:.12g}, found {found}; correct it"
        case "string_type" if isinstance(error["input"], bool | int | float):
            return f"expected text, found {found}; write it in quotes: {json.dumps(str(error['input']))}"
        case "int_type" | "float_type" | "bool_type" if isinstance(error["input"], str):
            return (
                f"expected {_KINDS[error['type']]}, found the text {found}; remove the quotes or correct it"
            )
        case "string_pattern_mismatch" if error["loc"][-1] == "sha256":
            return f"expected 64 hexadecimal digits, found {found}; write what `sha256sum` prints of the file"
        case "string_pattern_mismatch" if error["loc"][-1] == "schedule":
            return (
                f"expected a cron line, found {found}; write minute, hour, day, month and weekday,"
                ' such as "0 3 * * *"'
            )
        case "string_pattern_mismatch" if error["loc"][0] == "workers":
            return f"expected a name as Git has them, found {found}; use letters, digits and . _ - + /"
        case "string_pattern_mismatch":
            return f"expected the path of a .safetensors file, found {found}; other formats are not loaded"
        case "too_short":
            return "the list is empty; name at least one, or write null"
        case "string_too_short":
            return "expected text, found an empty one; fill it in"
        case kind:
            return f"expected {_KINDS.get(kind, 'another value')}, found {found}; correct it"


_KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "tuple_type": "a list",
    "model_type": "a block of keys",
    "dict_type": "a block of keys",
}


def _fetch_faults(fetch: Fetch) -> Iterator[str]:
    """A divided archive of one's own, and its hash, go with the split `archive` and with no other."""
    for name in Fetch.names():
        entry = fetch.entry(name)
        if not isinstance(entry, ImageNetR | ImageNetA | Cub200):
            continue
        for key in ("archive", "sha256"):
            value = getattr(entry, key)
            if entry.split == "archive" and value is None:
                what = (
                    "its path" if key == "archive" else f"what `sha256sum` prints of {entry.archive or 'it'}"
                )
                yield f"fetch.{name}.{key}: the split is your own archive, found nothing; write {what}"
            if entry.split != "archive" and value is not None:
                yield (
                    f"fetch.{name}.{key}: found {_show(value)}, but the split {entry.split} does not read it;"
                    " remove it, or write split: archive"
                )


def _backbone_faults(backbone: Backbone) -> Iterator[str]:
    """A local file and its hash come together: DVC cannot watch a file that only some choices name."""
    if backbone.weights and not backbone.sha256:
        yield (
            f"backbone.sha256: found null, expected the hash of {backbone.weights};"
            " write what `sha256sum` prints of it"
        )
    if backbone.sha256 and not backbone.weights:
        yield "backbone.sha256: found a hash without backbone.weights; name the file, or set it to null"


def _adapter_faults(adapter: Adapter) -> Iterator[str]:
    """Choices that exclude each other."""
    heads = HEADS_OF.get(adapter.method, (adapter.head,))
    if adapter.head not in heads:
        expected = " or ".join(heads)
        yield f"adapter.head: found {_show(adapter.head)}, expected {expected} with the method {adapter.method}"
    for key, methods in READ_BY.items():
        value = getattr(adapter, key)
        if value is not None and adapter.method not in methods:
            yield f"adapter.{key}: found {_show(value)}, but {adapter.method} does not read it; write null"
    carried = adapter.magnitudes or ("carried" if adapter.formulation == "continuous" else "restarted")
    if adapter.method == "sdlora-kd" and carried == "restarted":
        yield (
            "adapter.magnitudes: sdlora-kd keeps what it absorbs in the earlier magnitudes, which restarted would "
            "throw away; write carried"
        )
    for start in adapter.rank_schedule:
        if not re.fullmatch(TASK_KEY, start):
            yield f"adapter.rank_schedule: found {_show(start)}, expected a task's key; write t01, t02, ..."
    if (adapter.rank_schedule or adapter.method == "sdlora-rr") and "t01" not in adapter.rank_schedule:
        yield "adapter.rank_schedule: the first tasks have no rank; add t01"
    if adapter.targets and len(set(adapter.targets)) < len(adapter.targets):
        yield f"adapter.targets: found {', '.join(adapter.targets)}; name each projection once"
    if adapter.formulation == "paper" and adapter.initial_up == "zero":
        yield (
            "adapter.initial_up: zero gives a direction without a norm, which the formulation paper divides by; "
            "write uniform or null"
        )


def _task_faults(tasks: Mapping[str, Task]) -> Iterator[str]:
    """What is wrong between the tasks: their keys, the chain of `after`, their sources and classes."""
    if not tasks:
        yield "tasks: no task is listed; write some with `sdlora plan FOLDER` or `sdlora add-task FOLDER`"
    before, number = "t00", 0
    owner: dict[str, str] = {}
    for position, (key, task) in enumerate(tasks.items(), start=1):
        where = f"tasks.{_show_key(key)}"
        if not re.fullmatch(TASK_KEY, key):
            yield f"{where}: a task's key is t01, t02, ...; rename it, to t{position:02d} for example"
        elif int(key[1:]) <= number:
            yield f"{where}: stands after {before}; keep the tasks in ascending order"
        else:
            number = int(key[1:])
        if task.after != before:
            rule = (
                "the first task comes after t00" if before == "t00" else "each comes after the one above it"
            )
            yield f"{where}.after: found {_show(task.after)}, expected {before}; {rule}"
        if fault := _source_fault(task.source):
            yield f"{where}.source: {_show(task.source)} {fault}"
        if task.retired and (task.source, task.manifest) != (f"{RETIRED}/{key}", None):
            yield (
                f"{where}.source: {_show(task.source)} is where receipts of deleted images are, expected "
                f"{RETIRED}/{key} and no manifest; put back what `sdlora retire` wrote"
            )
        if task.manifest is not None and not re.fullmatch(MANIFEST, task.manifest):
            yield (
                f"{where}.manifest: found {_show(task.manifest)}, expected the name of a .csv, .jsonl or .parquet file"
                " in the source folder; name that file, its folder being the source"
            )
        if not task.classes:
            yield f"{where}.classes: the list is empty; name at least one class folder"
        for name in task.classes:
            if fault := class_name_fault(name):
                yield f"{where}.classes: {_show(name)} {fault}; rename the class and its folder"
            elif owner.get(name) == key:
                yield f"{where}.classes: {_show(name)} stands there twice; remove one"
            elif name in owner:
                yield f"{where}.classes: {_show(name)} is already a class of {owner[name]}; remove one"
            owner.setdefault(name, key)
        before = key


def _approval_faults(approvals: Mapping[str, Approval], tasks: Mapping[str, Task]) -> Iterator[str]:
    for key in approvals:
        if key not in tasks:
            yield f"approvals.{_show_key(key)}: there is no such task; known are {', '.join(tasks)}"


def _worker_faults(workers: Workers) -> Iterator[str]:
    """An inbox inside the project, and times and places that go together."""
    if fault := _source_fault(workers.inbox):
        yield f"workers.inbox: {_show(workers.inbox)} {fault}"
    if workers.push and not workers.branch:
        yield "workers.branch: found nothing (null), but workers.push names where to push it; name a branch"
    if workers.dead_after_seconds < 2 * workers.heartbeat_seconds:
        yield (
            f"workers.dead_after_seconds: found {workers.dead_after_seconds}, expected at least"
            f" {2 * workers.heartbeat_seconds}, two heartbeats: one may be late"
        )


def _source_fault(source: str) -> str | None:
    if posixpath.isabs(source):
        return "is absolute, which no other machine shares; give a path inside the project (a link will do)"
    if posixpath.normpath(source).split("/")[0] in ("..", "."):
        return "is not a folder inside the project; copy or link the images into data/raw"
    if not re.fullmatch(r"[\w./+@%=-]+", source) or source.startswith("-"):
        return (
            "has characters that a command line would not leave alone; use letters, digits and . _ - + @ % ="
        )
    return None


def _section(where: tuple[str | int, ...]) -> type[Section]:
    """The model of the block at `where`."""
    model: Any = Params
    for part in where:
        if isinstance(part, int):  # an entry of a list, whose kind the field of the list says
            continue
        if get_origin(model) is Mapping:
            model = get_args(model)[1]
        else:
            annotation = _fields(model)[part].annotation
            options = [option for option in get_args(annotation) if option is not NoneType]
            model = options[0] if NoneType in get_args(annotation) else annotation
    return model


def _field(where: tuple[str | int, ...]) -> FieldInfo:
    while isinstance(where[-1], int):
        where = where[:-1]
    return _fields(_section(where[:-1]))[str(where[-1])]


def _fields(model: type[Section]) -> dict[str, FieldInfo]:
    """The fields of a block by the names that `params.yaml` has for them: an attribute has no hyphen."""
    return {field.alias or name: field for name, field in model.model_fields.items()}


def _place(where: tuple[str | int, ...]) -> str:
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{_show_key(part)}" for part in where)
    return text.removeprefix(".") or "top level"


def _show_key(key: str) -> str:
    return key if key.isprintable() else json.dumps(key)


def _show(value: object) -> str:
    """A value as one reads it in YAML, on one line."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool | int | float | str):
        text = json.dumps(value, ensure_ascii=not str(value).isprintable())
        return text if len(text) <= 60 else text[:57] + "..."
    return {"dict": "a block of keys", "list": "a list"}.get(type(value).__name__, str(value))
