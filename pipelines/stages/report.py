"""Stage `report`: from all steps to numbers for DVC (`metrics.json`, `plots/*.csv`) and a page for people."""

from __future__ import annotations

from pathlib import Path

from pipelines.project.files import whole_folder, write_json
from pipelines.project.leftovers import remove_leftovers
from pipelines.project.params import read_params
from pipelines.project.settings import Task
from pipelines.reports.history import read_history
from pipelines.reports.pages import Pictures, render_page
from pipelines.reports.plots import write_plots, write_tables
from pipelines.reports.prefect_artifacts import make_exhibits
from pipelines.reports.samples import Album, flipped_images, sample_images
from pipelines.reports.statistics import headline, table_value
from pipelines.reports.weights import read_movement
from pipelines.runtime.progress import progress
from pipelines.runtime.stage import StageResult, stage


@stage
def report(*, artifacts: Path, out: Path, metrics: Path) -> StageResult:
    """Put all evaluations and models into a report: a page, the data of its plots, the headline numbers.

    Args:
        artifacts: Folder of all that the other stages left.
        out: Folder to leave; an existing one is replaced as a whole.
        metrics: Summary to write, metrics.json.
    """
    tasks = list(read_params("tasks", dict[str, Task]))
    remove_leftovers(tasks, artifacts)  # what DVC records that this stage read is the same in every clone
    history = read_history(artifacts, tasks)
    movement = read_movement(artifacts, history)
    album = Album(artifacts, history)
    numbers = headline(history)
    with whole_folder(out) as folder, progress("report", total=3, unit="parts") as bar:
        write_plots(folder / "plots", history, movement)
        if len(history.shown) < len(tasks):
            write_tables(folder / "tables", history)
        bar.update(1)
        pictures = Pictures(sample_images(album, history), flipped_images(album, history))
        bar.update(2)
        page = render_page(history, movement, pictures)
        (folder / "report.html").write_text(page, encoding="utf-8", newline="\n")
        bar.update(3)
    write_json(metrics, numbers)
    return StageResult(
        [
            {
                "metric": name.replace("_", " "),
                "per sample": table_value(numbers[name]),
                "per task": table_value(numbers[f"{name}_per_task"]),
            }
            for name in ("last_accuracy", "average_accuracy", "forgetting", "backward_transfer")
        ],
        documents=lambda: make_exhibits(history, movement),
    )
