"""What the JSON files that stages leave hold, as far as it is read: types for `read_json`."""

from __future__ import annotations

import re
from typing import Annotated, NotRequired, TypedDict

from sdlora.ledger import ClassEntry, Labels
from sdlora.records import FileName, Name, Number, Rule, Sha256, TaskId, WholeNumber

_SplitFile = Annotated[
    str,
    Rule(
        re.compile(r"(samples|test|validation)/t[0-9]{2,9}\.arrow|(classes|train)\.json").fullmatch,
        "the name of a file of a split",
    ),
]
_Images = Annotated[int, Rule(range(1, 2**53).__contains__, "a number of images, at least 1")]


class ClassMap(TypedDict):
    """classes.json: all classes so far, in the order of their labels, and all tasks."""

    classes: list[ClassEntry]
    tasks: list[TaskId]
    step_classes: NotRequired[dict[TaskId, Labels]]
    """the labels that each task of the kind `more` has images of"""


class SplitRecord(TypedDict):
    """split.json: which split this is, which one is before, and its own files with their hashes."""

    task: TaskId
    after: NotRequired[TaskId]
    previous: NotRequired[Sha256]
    files: NotRequired[dict[_SplitFile, Sha256]]


class _PinnedFile(TypedDict):
    name: Name
    url: str
    sha256: Sha256
    size: WholeNumber


class PinnedSource(TypedDict):
    """remote.json: the files of a source that are elsewhere, with their hashes."""

    files: list[_PinnedFile]


class TrainingImages(TypedDict):
    """train.json: what describes a task's training images."""

    task: TaskId
    images: Sha256


class SampleDigest(TypedDict):
    """split.json: one hash for all samples of a task."""

    digest: Sha256


class SampleCounts(TypedDict):
    """split.json: class → part → how many images."""

    counts: dict[Name, dict[Name, WholeNumber]]


class Split(SampleDigest, SampleCounts):
    """split.json: both."""


class Metrics(TypedDict):
    """metrics.json of a step: images of each task's test, how many are right, and their share."""

    tasks: list[TaskId]
    accuracy: list[Number]
    samples: list[_Images]
    correct: list[WholeNumber]
    validation_samples: NotRequired[list[WholeNumber]]
    validation_correct: NotRequired[list[WholeNumber]]


class _SplitDescription(TypedDict):
    """What a record has of train.json."""

    digest: Sha256


class _Approved(TypedDict):
    """Who let a step through that breaks a limit, and why."""

    by: Name
    why: Name


class RecordedFiles(TypedDict):
    """The record of a step or of a split: the files of its folder. Splits of before have none."""

    files: NotRequired[dict[FileName | _SplitFile, Sha256]]


class _Freezing(TypedDict):
    """What happened when a step was frozen, as far as it is read."""

    drift_loss: NotRequired[Number]
    unknown_threshold: NotRequired[Number]


class FreezingFacts(TypedDict):
    """step.json: what happened when the step was frozen. Steps without earlier classes have no estimate of drift."""

    freezing: NotRequired[_Freezing]


class AuditedRecord(TypedDict):
    """step.json of a step that learned a task, as far as an audit reads it beside what the library does."""

    classes: list[ClassEntry]
    images: dict[TaskId, Sha256]
    split: _SplitDescription
    fit: dict[Name, Sha256]
    code: dict[Name, Sha256]
    metrics: object
    learned_magnitudes: NotRequired[object]
    """of format 1"""
    parameters: dict[Name, object]


class Verdict(TypedDict):
    """verdict.json of a step that learned a task."""

    step: TaskId
    previous: Sha256
    record: Sha256
    samples: Sha256
    evaluation: dict[Name, Sha256]
    measured: dict[Name, Number | None]
    limits: dict[Name, object]
    broken: dict[Name, str]
    approved: _Approved | None


class Headline(TypedDict):
    """metrics.json of a chain."""

    last_accuracy: Number | None
    average_accuracy: Number | None
    forgetting: Number | None
