"""What changed in the weights between two steps: magnitudes, directions and their overlaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from pipelines.audits.steps import AuditedStep, Figures, spread
from pipelines.project.errors import InputError

if TYPE_CHECKING:
    from sdlora.change import Pair, Update


def compared_weights(then: AuditedStep, now: AuditedStep, notes: list[str]) -> Figures | None:
    """Magnitudes, sizes of changes, overlaps of directions. None where the weights cannot be compared."""
    from sdlora.change import read_update, relative_changes
    from sdlora.ledger import read_own_record

    if then.record["backbone"] != now.record["backbone"]:
        notes.append("the two began from different backbones, so their weights are not compared")
        return None
    before, after = read_update(then.model, beside=then.beside), read_update(now.model, beside=now.beside)
    base = read_own_record(now.beside("t00"))
    targets = dict.fromkeys([*before.targets, *after.targets])
    if missing := [target for target in targets if target not in base.get("norms", {})]:
        raise InputError(
            f"{now.beside('t00')}/step.json: it has no norm of {missing[0]}; run `sdlora run` to make t00 anew"
        )
    return {
        "magnitudes": _compared_magnitudes(before, after),
        "changes": relative_changes(after, before, base["norms"]),
        "overlaps": _overlaps(before, after),
    }


def _compared_magnitudes(before: Update, after: Update) -> list[Figures]:
    """Return mean and range of each direction's magnitudes over the targets, then and now."""
    rows = []
    for task in dict.fromkeys([*before.magnitudes, *after.magnitudes]):
        sides = {
            side: spread(update.magnitudes[task]) if task in update.magnitudes else None
            for side, update in (("then", before), ("now", after))
        }
        both = sides["then"] is not None and sides["now"] is not None
        change = sides["now"]["mean"] - sides["then"]["mean"] if both else None  # type: ignore[index]
        rows.append({"task": task, **sides, "change": change})
    return rows


def _overlaps(before: Update, after: Update) -> list[Figures]:
    """Return how far the directions that only one of the two has lie in the space of all that the other has.

    A direction that both have under one name, but not the same one (two runs of a step), is compared with its
    namesake. `rows` is the row space (of `down`, in the layer's input), `columns` the column space (of `up`, in its
    output); `overlap` is the mean squared cosine of the principal angles, `angle` the largest of them in degrees,
    `chance` the overlap that random spaces of these sizes have on average.
    """
    found = []
    for task in dict.fromkeys([*before.directions, *after.directions]):
        mine, other = after.directions.get(task), before.directions.get(task)
        left: Mapping[str, Mapping[str, Pair]]
        if mine is not None and other is not None:
            if _same_direction(mine, other):
                continue
            kind, against, left, right = "both", [task], {task: other}, mine
        elif mine is not None:
            kind, against, left, right = "now", list(before.directions), before.directions, mine
        else:
            assert other is not None
            kind, against, left, right = "then", list(after.directions), after.directions, other
        common = [name for name in right if all(name in pairs for pairs in left.values())]
        if not left or not common:
            continue
        targets = {
            name: {
                side: overlap_of([matrix(pairs[name]) for pairs in left.values()], matrix(right[name]))
                for side, matrix in (("rows", _row_space), ("columns", _column_space))
            }
            for name in common
        }
        found.append(
            {
                "task": task,
                "only": kind,
                "against": against,
                "rank": int(right[common[0]].down.shape[0]),
                **{
                    side: _over_targets([at[side] for at in targets.values()]) for side in ("rows", "columns")
                },
                "targets": targets,
            }
        )
    return found


def _same_direction(left: Mapping[str, Pair], right: Mapping[str, Pair]) -> bool:
    """Return whether two directions are the same to the bit."""
    return left.keys() == right.keys() and all(
        np.array_equal(a, b) for name in left for a, b in zip(left[name], right[name], strict=True)
    )


def _row_space(pair: Pair) -> np.ndarray:
    """(columns, r): what a direction reads."""
    return pair.down.T


def _column_space(pair: Pair) -> np.ndarray:
    """(rows, r): what a direction writes."""
    return pair.up


def overlap_of(spaces: Sequence[np.ndarray], space: np.ndarray) -> Figures:
    """Overlap, largest angle in degrees and chance level of a space (d, r) with the sum of some others (d, s)."""
    from sdlora.change import principal_cosines

    whole = np.concatenate(spaces, axis=1)
    cosines = principal_cosines(whole, space)
    size = whole.shape[0]
    known = bool(cosines.size)
    return {
        "overlap": float(np.square(cosines).mean()) if known else math.nan,
        "angle": math.degrees(math.acos(cosines.min())) if known else math.nan,
        "chance": min(1.0, max(whole.shape[1], space.shape[1]) / size),
    }


def _over_targets(at: Sequence[Figures]) -> Figures:
    """Mean and range over the targets, of overlaps and angles. The mean of the chance levels."""
    return {
        "overlap": spread(each["overlap"] for each in at),
        "angle": spread(each["angle"] for each in at),
        "chance": float(np.mean([each["chance"] for each in at])),
    }
