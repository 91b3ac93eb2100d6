"""The stage `start`: the state of the data before any task, so that the first task is no special case."""

from pathlib import Path

from pipelines.files import whole_folder, write_json
from pipelines.stage import stage


@stage
def start(*, out: Path) -> list[dict[str, str | int | float]]:
    """Leave an empty class map in `out`."""
    with whole_folder(out) as folder:
        write_json(folder / "classes.json", {"classes": [], "tasks": []})
        write_json(folder / "split.json", {"task": "t00"})
    return [{"task": "t00", "classes": 0}]
