"""The sections of `params.yaml`: their keys, types and bounds."""

from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    field_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from pipelines.project.layout import RETIRED
from pipelines.project.names import (
    branch_fault,
    class_name_fault,
    line_fault,
    manifest_fault,
    model_fault,
    name_fault,
    path_fault,
    project_fault,
    source_fault,
    text_fault,
)

UNFIT = "unfit"
"""The type of the error that a text is none of its kind. Its `fault` says why, in words that follow the text."""


def _checked(fault_of: Callable[[str], str | None], remedy: str = "") -> AfterValidator:
    """Return a validator of texts of one kind."""

    def check(text: str) -> str:
        if fault := fault_of(text):
            raise PydanticCustomError(UNFIT, "{fault}", {"fault": fault + remedy})
        return text

    return AfterValidator(check)


Share = Annotated[float, Field(gt=0, lt=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Text = Annotated[str, Field(min_length=1)]
_Line = Annotated[str, _checked(line_fault)]
_Lines = Annotated[str, _checked(text_fault)]
_Name = Annotated[str, _checked(name_fault)]
_Path = Annotated[str, _checked(path_fault)]
_Source = Annotated[str, _checked(source_fault)]
_Manifest = Annotated[str, _checked(manifest_fault)]
_ModelName = Annotated[str, _checked(model_fault)]
_ProjectName = Annotated[str, _checked(project_fault)]
_Ref = Annotated[str, _checked(branch_fault)]
_ClassName = Annotated[str, _checked(class_name_fault, "; rename the class and its folder")]
AT_FREEZING = {"head", "tolerance", "compress", "covariance_rank", "temperature", "unknown", "unknown_rate"}
"""Keys of `adapter` that no fit reads."""


class Section(BaseModel):
    """A block of `params.yaml`: unknown, missing and wrong-typed keys are errors. Nothing changes later."""

    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class Digits(Section):
    """How scikit-learn's handwritten digits are divided."""

    test_fraction: Share
    """share of each class that becomes test images"""
    seed: Seed
    """chooses the test images"""


class EmbeddedGlyphs(Section):
    """The packaged characters, and the scenes made of them, come divided already and have no settings."""


class Published(Section):
    """A data set that its authors divided into train and test, and that has no settings."""


class _Divided(Section):
    """A data set that its authors did not divide, and that the user may have divided already."""

    archive: _Path | None = None
    """with split: archive only: a .zip or .tar that has train/<class>/ and test/<class>/ in it"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None = None
    """its hash, so that another file under its name is noticed"""


class ImageNetR(_Divided):
    """How ImageNet-R is divided."""

    split: Literal["coda-prompt", "stratified", "archive"]
    """which images are tested on"""


class ImageNetA(_Divided):
    """How ImageNet-A is divided."""

    split: Literal["stratified", "archive"]
    """which images are tested on"""


class Cub200(_Divided):
    """How CUB-200-2011 is divided."""

    split: Literal["official", "stratified", "archive"]
    """which images are tested on"""


class DomainNet(Section):
    """How DomainNet is divided."""

    split: Literal["coda-prompt", "official"]
    """which images are tested on, and of which domains"""


class Fetch(Section):
    """The data sets that `sdlora fetch` can bring, by name. Own images need none."""

    digits: Digits | None = None
    """scikit-learn's handwritten digits"""
    glyphs100: EmbeddedGlyphs | None = None
    """the embedded benchmark of 100 characters"""
    glyphs100_scene: EmbeddedGlyphs | None = Field(None, alias="glyphs100-scene")
    """the same characters, moved, in front of clutter"""
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
        """Return the data sets that are known, as `params.yaml` calls them."""
        return list(fields_of(cls))

    def entry(self, name: str) -> Section | None:
        """Return the settings of a known data set, if it is to be brought."""
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

    duplicates: Literal["refuse", "allow", "leave_out", "keep_first"]
    """whether the same picture may stand in two tasks or classes (never in train and test), and which ones go"""
    test_fraction: Share
    """share of each class that becomes test images where the source is not divided"""
    seed: Seed
    """chooses the test and the validation images"""
    validation: Share | None
    """share of each class's training images that is kept from training to select on; null is none"""
    max_pixels: Count
    """width × height above which an image is refused"""


class BackboneChoice(Section):
    """The frozen model under all tasks."""

    name: _ModelName
    """glyph_vit, or any timm vision transformer with the tag of its weights"""
    weights: Annotated[_Path, Field(pattern=r"\.safetensors$")] | None
    """a local .safetensors file instead of the name's own weights, or null"""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")] | None
    """the file's hash, so that another file under its name is noticed; null without a file"""
    image_size: Count | None
    """side of its images in pixels; null is the model's own"""
    input_normalisation: Literal["model", "none"]
    """mean and standard deviation of the model's own configuration, or pixels in [0, 1] as they are"""


def _all_or_some(value: object, some: ValidatorFunctionWrapHandler) -> object:
    return value if value == "all" else some(value)


_Targets = Annotated[
    tuple[Literal["q", "k", "v", "proj", "fc1", "fc2"], ...],
    Field(strict=False, min_length=1),
    WrapValidator(_all_or_some),
    PlainSerializer(lambda targets: targets if targets == "all" else list(targets)),
]
"""The word `all` stays a word: DVC writes a list over several lines when it changes another key of the file."""


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
    head: Literal["aligned", "rgda", "lda", "ncm", "linear"]
    """what becomes of the classifier's rows when a step is frozen"""
    formulation: Literal["continuous", "reference", "paper"]
    """how directions are scaled and their magnitudes start"""
    targets: _Targets | None
    """which projections of every block are adapted, all or a list; null is the method's own"""
    rank: Count
    """rank of each task's directions"""
    rank_schedule: Mapping[str, Annotated[int, Field(ge=0)]]
    """of sdlora-rr only: task and the rank from that task on; 0 is no new direction"""
    magnitude_start: Annotated[float, Field(gt=0)] | None
    """first value of a new magnitude; null is the formulation's own"""
    magnitudes: Literal["carried", "restarted", "fixed"] | None
    """whether earlier magnitudes go on from step to step, trained or fixed; null is the formulation's own"""
    initial_up: Literal["zero", "uniform"] | None
    """how B of a new direction starts; null is the formulation's own"""
    tolerance: Annotated[float, Field(ge=0, le=1)]
    """of sdlora-kd only: relative residual below which a direction is absorbed"""
    compress: Annotated[float, Field(gt=0, le=1)] | None
    """share of a direction's energy that is kept when it is frozen; null keeps the rank"""
    penalty: Annotated[float, Field(ge=0)] | None
    """weight of what olora, nlora and clora add to the loss; null is the method's own"""
    covariance_rank: Count
    """principal directions of every class that aligned, rgda and lda remember"""
    temperature: Literal["auto"] | None = None
    """whether one number divides all logits of a step, so that confidences are right more often; null is none"""
    unknown: Literal["relative", "mahalanobis", "energy", "max_logit"] | None = None
    """score by which an image is of none of the known classes; null is none"""
    unknown_rate: Share = 0.05
    """share of the images of known classes that may be called unknown"""

    @property
    def of_the_fit(self) -> dict[str, Any]:
        """What a fit reads. The rest is read when the step is frozen."""
        return self.model_dump(mode="json", exclude=AT_FREEZING)

    @property
    def recorded(self) -> dict[str, Any]:
        """What a step's record says. A key that came later is left out where it is null."""
        later = {"temperature"} if self.temperature is None else set()
        later |= {"unknown", "unknown_rate"} if self.unknown is None else set()
        return self.model_dump(mode="json", exclude=later)


class Training(Section):
    """How each task is fitted."""

    optimizer: Literal["sgd", "adam"]
    """the rule of descent"""
    learning_rate: Annotated[float, Field(gt=0)]
    """size of its steps"""
    head_rate: Annotated[float, Field(gt=0)] | None = None
    """learning rate of the head's new rows; null is learning_rate"""
    magnitude_rate: Annotated[float, Field(ge=0)] | None = None
    """learning rate of the magnitudes, at 0 they stay; null is learning_rate"""
    head_start: Literal["random", "small", "discriminant"] | None = None
    """how the head's new rows start; null is random, as published"""
    feature_distillation: Annotated[float, Field(ge=0)] | None = None
    """weight that keeps the features of a task's images near those before the step; null is none"""
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
    checkpoint_store: _Path | None
    """a folder or fsspec URL for them; null is .sdlora/checkpoints"""

    @property
    def of_the_fit(self) -> dict[str, Any]:
        """What changes a fit's result. A key that is null by default is left out then, as if it were not known."""
        return self.model_dump(exclude={"checkpoint_seconds", "checkpoint_store"}, exclude_defaults=True)


class Evaluation(Section):
    """How a step is tested."""

    batch_size: Count
    """images in one forward pass"""
    precision: Literal["fp32", "tf32", "bf16"]
    """number format of the backbone's forward pass"""


class Gate(Section):
    """What a step must keep before the next one is learned. Null is no limit."""

    on: Literal["test", "validation"] = "test"
    """the images that it is measured on"""
    fall: Annotated[float, Field(ge=0, le=1)] | None
    """most that the accuracy of any old task may fall in the step"""
    negative_flips: Annotated[float, Field(ge=0, le=1)] | None
    """largest share of the old tasks' images that were right before the step and are wrong after it"""
    calibration_error: Annotated[float, Field(ge=0, le=1)] | None
    """largest expected calibration error on all images so far"""
    new_task: Annotated[float, Field(ge=0, le=1)] | None
    """least accuracy on the task just learned"""
    drift: Annotated[float, Field(ge=0, le=1)] | None = None
    """largest share of the earlier classes' accuracy that drift may have cost by then, as the steps estimate it"""
    unknown: Annotated[float, Field(ge=0, le=1)] | None = None
    """least AUROC by which the step before tells images of the new classes from those of its own"""

    @property
    def limits(self) -> dict[str, float | None]:
        """The limits by name."""
        return self.model_dump(exclude={"on"})


class Approval(Section):
    """A person's decision to go on although a limit is broken. `sdlora approve` writes it."""

    by: _Line
    """who decided"""
    why: _Lines
    """the reason"""
    evaluation: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """hash of the results that were looked at: it holds for no others"""
    limits: Annotated[
        tuple[Literal["fall", "negative_flips", "calibration_error", "new_task", "drift", "unknown"], ...],
        Field(strict=False),
    ]
    """the limits that they broke: it holds for no others"""


class Workers(Section):
    """How `sdlora deploy` sets machines to work. No stage reads it."""

    project: _ProjectName | None = None
    """what the project is called on the Prefect server; null is the name of its Git repository"""
    pool: _Name
    """Prefect work pool, of this project alone, whose workers run the chain"""
    schedule: Annotated[str, Field(pattern=r"^\S+( +\S+){4}$")] | None
    """cron line (UTC) by which they do so unasked; null is on request or on new images only"""
    inbox: _Source
    """folder inside the project that images of new tasks arrive in"""
    branch: _Ref | None
    """Git branch that gets params.yaml, dvc.lock and metrics.json after each run; null is none, for one worker only"""
    push: _Ref | None
    """Git remote that the branch is taken from and pushed to; null keeps it in this clone, for workers there only"""
    heartbeat_seconds: Annotated[int, Field(ge=30)]
    """seconds between two signs of life of a run; Prefect takes 30 and more"""
    dead_after_seconds: Annotated[int, Field(ge=30)]
    """seconds without one after which a run is marked crashed and started again"""
    attempts: Count
    """how many times in a row a run may end without any progress before it has failed"""


Kind = Literal["classes", "more"]
"""What a task brings."""


class Task(Section):
    """Images that arrive together."""

    after: _Name
    """the task before it; t00 for the first"""
    kind: Kind = "classes"
    """`classes`: all are new; `more`: images of known classes, with new ones among them or not"""
    source: _Source
    """the folder of its images, inside the project"""
    manifest: _Manifest | None = None
    """a file in that folder which lists or holds the images, or a pattern of such; null for all that is there"""
    classes: Annotated[tuple[_ClassName, ...], Field(strict=False)]
    """its classes; new ones get their labels in this order"""

    @property
    def retired(self) -> bool:
        """Whether its images were deleted: then its source is its receipt."""
        return self.source.startswith(f"{RETIRED}/")


def fields_of(model: type[Section]) -> dict[str, FieldInfo]:
    """Return the fields of a block by the names that `params.yaml` has for them: an attribute has no hyphen."""
    return {field.alias or name: field for name, field in model.model_fields.items()}
