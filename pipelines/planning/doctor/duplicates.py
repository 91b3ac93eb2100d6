"""Findings about pictures, and names of classes, that are the same or nearly the same."""

from __future__ import annotations

import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from pipelines.data.duplicates import LEAVE_OUT, Print, Prints, near_across_parts, near_pictures, repeated
from pipelines.data.duplicates import same_pictures as find_same
from pipelines.data.source_files import PARTS
from pipelines.planning.doctor.findings import Finding, counted
from pipelines.project.settings import Data, Task


def duplicate_findings(
    key: str, task: Task, prints: Prints, earlier: Prints, data: Data
) -> Iterator[Finding]:
    """Pictures that stand where they must not, copies, and pictures that nearly are others."""
    strict = list(find_same(prints, earlier, tolerated=False))
    refused = strict
    if data.duplicates in LEAVE_OUT:
        place, find = LEAVE_OUT[data.duplicates]
        left_out = find(prints, earlier, task.classes)
        if left_out:
            what = f"{counted(left_out, 'picture')} left out, because others {place} are the same"
            where = [prints.shown(index) for index in left_out]
            yield Finding("warning", "same picture", key, what, where, "nothing")
        prints = prints.take(np.delete(np.arange(len(prints)), left_out))
        strict = list(find_same(prints, earlier, tolerated=False))
    if data.duplicates != "refuse":
        refused = list(find_same(prints, earlier, tolerated=True))
        kept = set(refused)
        allowed = [fault for fault in strict if fault not in kept]
        if allowed:
            what = f"{counted(allowed, 'picture')} under two classes, as data.duplicates allows"
            where = [f"{fault.where}: {fault.what}" for fault in allowed]
            yield Finding("warning", "same picture", key, what, where, "no model can tell such classes apart")
    if refused:
        what = f"{counted(refused, 'picture')} in two parts, two tasks or two classes"
        where = [f"{fault.where}: {fault.what}" for fault in refused]
        yield Finding("error", "same picture", key, what, where, refused[0].remedy)
    first: dict[tuple[str, int | str, str], Print] = {}
    copies = []
    for one in prints.at(repeated(prints, Prints.joined([]))[0]):
        other = first.setdefault((one.part, one.label, one.pixels), one)
        if other is not one:
            copies.append(f"{one.shown} = {other.shown}")
    if copies:
        what = f"{counted(copies, 'copy')} of pictures of the same class and part"
        yield Finding("warning", "copies", key, what, copies, "they weigh more than others; remove them")
    near = near_across_parts(prints, earlier)
    if near:
        what = (
            f"{counted(near, 'picture')} nearly the same in train and in test or validation: a test too easy"
        )
        yield Finding("warning", "near duplicates", key, what, _pairs(near), "keep each group in one part")
    same_part = [
        pair
        for part in range(len(PARTS))
        for pair in near_pictures(*(its.take(np.flatnonzero(its.parts == part)) for its in (prints, earlier)))
        if pair[0].label != pair[1].label
    ]
    if same_part:
        what = (
            f"{counted(same_part, 'picture')} nearly the same as one of an earlier task, under another class"
        )
        yield Finding("warning", "near duplicates", key, what, _pairs(same_part), "check their labels")


def _pairs(found: Iterable[tuple[Print, Print]]) -> list[str]:
    """Pairs as text."""
    return [f"{one.shown} ~ {other.shown}" for one, other in found]


def name_findings(tasks: Mapping[str, Task], checked: set[str]) -> Iterator[Finding]:
    """Classes whose names differ only in case or in the Unicode form of an accent: one folder on other machines."""
    groups: dict[str, list[tuple[str, str]]] = defaultdict(list)
    owner: dict[str, str] = {}
    for key, task in tasks.items():
        for name in task.classes:
            owner.setdefault(name, key)
    for name, key in owner.items():
        groups[unicodedata.normalize("NFKC", name).casefold()].append((name, key))
    for members in groups.values():
        last = members[-1][1]
        if len(members) > 1 and last in checked:
            where = [f"{name!r} ({key})" for name, key in members]
            what = "class names that differ in case or in the form of a character only"
            yield Finding(
                "warning", "class names", last, what, where, "rename, if they are one class join them"
            )
