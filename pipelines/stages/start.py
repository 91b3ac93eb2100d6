"""The stage `start`: the state of the data before any task, so that the first task is no special case."""

from pathlib import Path

from pipelines.project.files import whole_folder, write_json
from pipelines.runtime.stage import StageResult, stage


@stage
def start(*, out: Path, evaluation: Path, gate: Path) -> StageResult:
    """Leave the empty class map of step t00, no results, and the first verdict.

    Args:
        out: Folder to leave; an existing one is replaced as a whole.
        evaluation: Folder for the results before any task: none.
        gate: Folder for the first verdict.
    """
    with whole_folder(out) as folder:
        write_json(folder / "classes.json", {"classes": [], "tasks": []})
        write_json(folder / "split.json", {"task": "t00"})
    with whole_folder(evaluation) as folder:
        nothing: dict[str, list[float]] = {name: [] for name in ("accuracy", "correct", "samples", "tasks")}
        write_json(folder / "metrics.json", {"step": "t00", **nothing})
    with whole_folder(gate) as folder:
        write_json(folder / "verdict.json", {"step": "t00", "previous": None})
        write_json(folder / "open.json", {"open": True})
    return StageResult([{"task": "t00", "classes": 0}])
