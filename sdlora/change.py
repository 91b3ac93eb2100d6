"""How far steps moved the weights and the features: norms, overlaps and angles, all from factors.

Only where their ranks together are larger than d, as in a long chain, is d×d formed. A low-rank matrix B·A is a `Pair`
of arrays: `up` is B (rows, r), `down` is A (r, columns). Everything here is plain numpy in double precision, so that
what reads a model folder to show it loads neither torch nor a model.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdlora.ledger import Beside, read_record, require_files
from sdlora.tensor_checks import check_tensors, direction_shapes, read_arrays

_Array = NDArray[np.float64]


class Pair(NamedTuple):
    """A low-rank matrix B·A: `up` is B (rows, r), `down` is A (r, columns)."""

    up: _Array
    down: _Array


@dataclass(frozen=True, kw_only=True)
class Update:
    """What the steps so far add to the weights of the backbone, as a model folder holds it."""

    targets: tuple[str, ...]
    """Names of the adapted projections (`blocks.0.attn.q`), in the model's order; none where nothing is adapted."""
    directions: Mapping[str, Mapping[str, Pair]]
    """Task id → target → the frozen direction."""
    magnitudes: Mapping[str, _Array]
    """Task id → (targets,)."""

    def scale(self, task: str, target: str) -> float:
        """Return the magnitude of a task's direction at a target."""
        return float(self.magnitudes[task][self.targets.index(target)])

    def at(self, target: str) -> Pair:
        """Σ αₖ BₖAₖ at one target, as one pair of the summed rank. Of rank 0 where there is no direction."""
        scales = {task: self.scale(task, target) for task in self.directions}
        return weighted_sum([(scales[task], pairs[target]) for task, pairs in self.directions.items()])


def read_update(folder: Path, *, beside: Beside | None = None) -> Update:
    """Read what the steps up to that of a model folder add to the backbone.

    Args:
        beside: where the folders of earlier steps are; None where they lie beside `folder`.

    Raises:
        FileNotFoundError: the folder, its record or a file that the record names is missing.
        ValueError: one of them does not hold what it must.
    """
    record: Mapping[str, Any] = read_record(folder, beside=beside)
    targets = tuple(record.get("targets", []))
    sizes: dict[str, int] = {}

    def read(name: str, shapes: Mapping[str, tuple[int | str, ...]]) -> dict[str, NDArray[Any]]:
        path = require_files(folder, record, [name], beside=beside)[name]
        tensors = read_arrays(path)
        check_tensors(path, tensors, shapes, sizes)
        return tensors

    directions = {}
    for task in record["directions"]:
        tensors = read(f"directions/{task}.safetensors", direction_shapes(task, targets))
        directions[task] = {
            target: Pair(_double(tensors[f"{target}.up"]), _double(tensors[f"{target}.down"]))
            for target in targets
        }
    return Update(targets=targets, directions=directions, magnitudes=read_magnitudes(folder, record))


def read_magnitudes(folder: Path, record: Mapping[str, Any]) -> dict[str, _Array]:
    """Return the magnitudes of all directions at a step, task id → (targets,), with its record as `read_record` has it.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: it is another than the record names, or does not hold what it must.
    """
    if not record["directions"]:
        return {}
    path = require_files(folder, record, ["magnitudes.safetensors"])["magnitudes.safetensors"]
    tensors = read_arrays(path)
    check_tensors(path, tensors, dict.fromkeys(record["directions"], (len(record["targets"]),)), {})
    return {task: _double(tensors[task]) for task in record["directions"]}


def weighted_sum(terms: Sequence[tuple[float, Pair]]) -> Pair:
    """Σ sₖ BₖAₖ as one pair (rows, Σr), (Σr, columns). An empty one for no terms."""
    if not terms:
        return Pair(np.zeros((0, 0)), np.zeros((0, 0)))
    return Pair(
        np.concatenate([scale * pair.up for scale, pair in terms], axis=1),
        np.concatenate([pair.down for _, pair in terms], axis=0),
    )


def norm(pair: Pair) -> float:
    """‖BA‖_F = √tr((BᵀB)(AAᵀ)), from two r×r Gram matrices. From BA itself where that is the smaller matrix."""
    if pair.up.shape[1] > max(len(pair.up), pair.down.shape[1]):
        return float(np.linalg.norm(pair.up @ pair.down))
    squared = float(((pair.up.T @ pair.up) * (pair.down @ pair.down.T)).sum())
    return max(squared, 0.0) ** 0.5


def inner_products(pairs: Sequence[Pair]) -> _Array:
    """⟨BᵢAᵢ, BⱼAⱼ⟩_F of every two of n pairs of one shape, (n, n). ‖Σ cᵢBᵢAᵢ‖² is cᵀGc for any coefficients c.

    Two products of all stacked factors, so that a chain of hundreds of steps is compared in one go.
    """
    if not pairs:
        return np.zeros((0, 0))
    up = np.concatenate([pair.up for pair in pairs], axis=1)
    down = np.concatenate([pair.down for pair in pairs], axis=0)
    of = _membership([pair.up.shape[1] for pair in pairs])
    return of.T @ ((up.T @ up) * (down @ down.T)) @ of


def relative_changes(now: Update, then: Update, base_norms: Mapping[str, float]) -> dict[str, float]:
    """‖ΔW_now − ΔW_then‖_F / ‖W₀‖_F of every target that either has, ΔW = Σ αₖDₖ. Both may be of any two steps.

    Where both hold the same frozen direction only the difference of its magnitudes enters, so that a direction that
    did not move gives exactly 0 and not the rounding of two large sums.

    Args:
        base_norms: target → ‖W₀‖_F (`norms` in the record of step t00).
    """
    changes = {}
    for target in dict.fromkeys([*then.targets, *now.targets]):
        terms: list[tuple[float, Pair]] = []
        for task in dict.fromkeys([*then.directions, *now.directions]):
            sides = [
                (sign * side.scale(task, target), side.directions[task][target])
                for sign, side in ((1.0, now), (-1.0, then))
                if target in side.directions.get(task, {})
            ]
            if len(sides) == 2 and all(
                np.array_equal(a, b) for a, b in zip(sides[0][1], sides[1][1], strict=True)
            ):
                sides = [(sides[0][0] + sides[1][0], sides[0][1])]
            terms += [(scale, pair) for scale, pair in sides if scale]
        changes[target] = norm(weighted_sum(terms)) / base_norms[target]
    return changes


def principal_cosines(left: _Array, right: _Array) -> _Array:
    """Cosines of the principal angles between two column spaces, largest first: (min(r, s),) for (d, r) and (d, s).

    From the QR decompositions and the SVD of an r×s matrix (Björck & Golub, 1973). A space that is a part of the
    other has ones only; spaces that are perpendicular have zeros. Columns that depend on others are left out.
    """
    left, right = _orthonormal(left), _orthonormal(right)
    if not left.shape[1] or not right.shape[1]:
        return np.zeros(0)
    return np.clip(np.linalg.svd(left.T @ right, compute_uv=False), 0.0, 1.0)


def overlap(left: _Array, right: _Array) -> float:
    """Mean squared cosine of the principal angles: 0 perpendicular, 1 one space within the other. NaN of nothing."""
    cosines = principal_cosines(left, right)
    return float(np.square(cosines).mean()) if cosines.size else float("nan")


def overlaps(spaces: Sequence[_Array]) -> _Array:
    """`overlap` of every two of n column spaces of one height, (n, n).

    In one product: the sum of squared cosines is ‖QᵢᵀQⱼ‖²_F of orthonormal bases Q.
    """
    if not spaces:
        return np.zeros((0, 0))
    bases = [_orthonormal(space) for space in spaces]
    ranks = [basis.shape[1] for basis in bases]
    stacked, of = np.concatenate(bases, axis=1), _membership(ranks)
    shared = of.T @ np.square(stacked.T @ stacked) @ of
    least = np.minimum.outer(ranks, ranks)
    found = np.divide(shared, least, out=np.full_like(shared, np.nan), where=least > 0)
    return np.clip(found, 0.0, 1.0)


def linear_cka(left: ArrayLike, right: ArrayLike) -> float:
    """Linear centred kernel alignment of two sets of features of the same images, (n, d) and (n, e).

    ‖YᵀX‖²_F / (‖XᵀX‖_F ‖YᵀY‖_F) of centred features (Kornblith et al., ICML 2019): 1 where they are equal up to
    rotation, scale and offset. NaN where either does not vary.
    """
    x, y = (np.asarray(features, dtype=np.float64) for features in (left, right))
    x, y = x - x.mean(axis=0), y - y.mean(axis=0)
    scale = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return float(np.square(np.linalg.norm(y.T @ x)) / scale) if scale > 0 else float("nan")


def _orthonormal(columns: _Array) -> _Array:
    """Return an orthonormal basis of a column space."""
    if not columns.size:
        return columns[:, :0]
    u, values, _ = np.linalg.svd(columns, full_matrices=False)
    kept = values > max(columns.shape) * np.finfo(np.float32).eps * values[0] if values[0] > 0 else values > 0
    return u[:, kept]


def _membership(ranks: Sequence[int]) -> _Array:
    """(Σr, n): which of n matrices each stacked column is of."""
    return np.repeat(np.eye(len(ranks)), ranks, axis=0)


def _double(array: NDArray[Any]) -> _Array:
    return array.astype(np.float64)
