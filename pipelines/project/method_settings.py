"""From the `adapter` block of `params.yaml` to what the library takes."""

from dataclasses import replace

from pipelines.project.settings import Adapter
from sdlora.formulations import FORMULATIONS
from sdlora.methods import Settings


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
