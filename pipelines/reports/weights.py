"""How far every step moved the adapted weights, and what the directions of two tasks have in common."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from pipelines.reports.history import History, needed
from sdlora.change import Pair, inner_products, overlaps


@dataclass(frozen=True, kw_only=True)
class Movement:
    """What all steps did to the weights. The axis of targets is in the model's order."""

    targets: list[str]
    steps: np.ndarray | None
    """(steps, targets): ‖ΔW_t − ΔW_{t−1}‖_F / ‖W₀‖_F, ΔW being what step t adds to the backbone; ΔW_0 = 0.

    None where there are more steps than are shown: every step moves all magnitudes, so it would take the inner products
    of every two directions.
    """
    total: np.ndarray | None
    """(targets,): ‖ΔW_T‖_F / ‖W₀‖_F after the last step. None where `steps` is."""
    base: np.ndarray
    """(targets,): ‖W₀‖_F."""
    tasks: list[str]
    """Tasks that left a direction of their own, of those that are shown."""
    columns: np.ndarray
    """(tasks, tasks): overlap of the column spaces (what a direction writes), mean over the targets."""
    rows: np.ndarray
    """(tasks, tasks): overlap of the row spaces (what a direction reads), mean over the targets."""
    chance_columns: float
    """The overlap of column spaces that directions of these ranks have by chance; NaN for a single one."""
    chance_rows: float

    @property
    def blocks(self) -> list[str]:
        """Names of the blocks, in the model's order."""
        return list(dict.fromkeys(map(block_of, self.targets)))

    @property
    def by_block(self) -> np.ndarray | None:
        """(steps, blocks): the same change of all adapted weights of a block, taken as one: √Σ‖·‖² / √Σ‖W₀‖²."""
        if self.steps is None:
            return None
        mine = np.array([[block_of(target) == block for block in self.blocks] for target in self.targets])
        squared = np.square(self.base)
        return np.sqrt(np.square(self.steps) * squared @ mine / (squared @ mine))


class _Version(NamedTuple):
    """One file of a direction. A frozen one is the same at every later step."""

    task: str
    path: Path


def block_of(target: str) -> str:
    """Return the block that a target is in: `blocks.3.attn.q` → `blocks.3`."""
    found = re.match(r"(?:.*\.)?\d+(?=\.)", target)
    return found[0] if found else target


def read_movement(artifacts: Path, history: History) -> Movement | None:
    """Compare the directions of all steps. None where no step has one, or t00 has no norms to measure against."""
    norms = history.origin.get("norms", {})
    targets = list(
        dict.fromkeys(target for record in history.records for target in record.get("targets", []))
    )
    versions = _find_versions(artifacts / "model", history)
    if not versions or not all(target in norms for target in targets):
        return None
    whole = len(history.shown) == len(history.tasks)
    mine = [
        versions[place][task]
        for place, task in zip(history.shown, history.shown_tasks, strict=True)
        if task in versions[place]
    ]
    files = list(dict.fromkeys(version for step in versions for version in step.values())) if whole else mine
    own = [files.index(version) for version in mine]
    base = np.array([norms[target] for target in targets])
    steps, total, columns, rows, chances = [], [], [], [], []
    for place, target in enumerate(targets):
        pairs = [_read_pair(needed(file.path), target) for file in files]
        if whole:
            gram = inner_products(pairs)
            scales = _coefficients(history, versions, files, target)
            moved = np.diff(scales, axis=0, prepend=0)
            steps.append(_lengths(moved, gram) / base[place])
            total.append(_lengths(scales[-1:], gram)[0] / base[place])
        left = [pairs[index] for index in own]
        columns.append(overlaps([pair.up for pair in left]))
        rows.append(overlaps([pair.down.T for pair in left]))
        chances.append(_chance(left))
    return Movement(
        targets=targets,
        steps=np.stack(steps, axis=1) if whole else None,
        total=np.array(total) if whole else None,
        base=base,
        tasks=[files[index].task for index in own],
        columns=_mean_of_known(columns),
        rows=_mean_of_known(rows),
        chance_columns=float(np.mean([columns for columns, _ in chances])),
        chance_rows=float(np.mean([rows for _, rows in chances])),
    )


def _find_versions(models: Path, history: History) -> list[dict[str, _Version]]:
    """Return for each step task → the file of its direction, under the first step that has it. Empty if no step has
    any.

    A step's own record names the directions that it wrote. One of format 1 names all that it has, by their hashes, so
    what is frozen is recognised, and read once.
    """
    first: dict[tuple[str, str], _Version] = {}
    known: dict[str, _Version] = {}
    steps = []
    for step, record in zip(history.tasks, history.records, strict=True):
        for task in record.get("directions", []):
            name = f"directions/{task}.safetensors"
            if (digest := record["files"].get(name)) is not None:
                known[task] = first.setdefault((task, digest), _Version(task, models / step / name))
        steps.append({task: known[task] for task in record.get("directions", [])})
    return steps if any(steps) else []


def _read_pair(path: Path, target: str) -> Pair:
    """Read the direction at one target, in double precision."""
    from safetensors import safe_open

    with safe_open(path, framework="numpy") as file:
        return Pair(*(file.get_tensor(f"{target}.{side}").astype(np.float64) for side in ("up", "down")))


def _coefficients(
    history: History, versions: Sequence[dict[str, _Version]], files: Sequence[_Version], target: str
) -> np.ndarray:
    """(steps, files): the magnitude of each direction at a target, 0 where a step does not hold it."""
    scales = np.zeros((len(versions), len(files)))
    place = {file: index for index, file in enumerate(files)}
    for step, held in enumerate(versions):
        index = history.records[step]["targets"].index(target) if held else 0
        for task, version in held.items():
            scales[step, place[version]] = history.magnitudes[step][task][index]
    return scales


def _lengths(scales: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """(rows,): ‖Σ cᵢDᵢ‖_F of each row of coefficients, from the inner products of the directions."""
    return np.sqrt(np.maximum(((scales @ gram) * scales).sum(axis=1), 0))


def _chance(pairs: Sequence[Pair]) -> tuple[float, float]:
    """Overlap that random column and row spaces of these ranks have on average: larger rank / dimension."""
    ranks = np.array([pair.down.shape[0] for pair in pairs])
    larger = np.maximum.outer(ranks, ranks)[np.triu_indices(len(ranks), 1)]
    if not larger.size:
        return float("nan"), float("nan")
    return float(larger.mean()) / pairs[0].up.shape[0], float(larger.mean()) / pairs[0].down.shape[1]


def _mean_of_known(matrices: Sequence[np.ndarray]) -> np.ndarray:
    """Mean over matrices, cell by cell, of what is not NaN. NaN where all are."""
    stacked = np.array(matrices)
    known = (~np.isnan(stacked)).sum(axis=0)
    summed = np.nansum(stacked, axis=0)
    return np.divide(summed, known, out=np.full(summed.shape, np.nan), where=known > 0)
