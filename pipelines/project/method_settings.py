"""From the `adapter` block of `params.yaml` to what the library takes."""

from dataclasses import replace

from pipelines.project.params import Params
from pipelines.project.settings import Adapter
from sdlora.formulations import FORMULATIONS
from sdlora.methods import METHODS, Settings


def settings_of(adapter: Adapter) -> Settings:
    """Return the settings of a method, the formulation with the user's own choices in it."""
    formulation = replace(FORMULATIONS[adapter.formulation], **adapter.own_choices)
    return Settings(
        formulation=formulation,
        rank=adapter.rank,
        rank_schedule=adapter.rank_schedule,
        tolerance=adapter.tolerance,
        compress=adapter.compress,
        penalty=adapter.penalty,
    )


def tasks_read(params: Params, task: str) -> list[str]:
    """Whose images the fit of a task reads: its own, and those of all before it where the method learns them all."""
    tasks = list(params.tasks)
    return tasks[: tasks.index(task) + 1] if METHODS[params.adapter.method].joint else [task]
