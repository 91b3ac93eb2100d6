"""The choices of a chain: what `params.yaml` holds in its block `adapter`, and what a method reads of it."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Protocol

from sdlora.formulations import FORMULATIONS
from sdlora.methods import Settings


class AdapterChoices(Protocol):
    """What a task adds to the backbone, as `adapter` in `params.yaml` says it."""

    @property
    def method(self) -> str: ...
    @property
    def head(self) -> str: ...
    @property
    def formulation(self) -> str: ...
    @property
    def own_choices(self) -> Mapping[str, Any]: ...
    @property
    def rank(self) -> int: ...
    @property
    def rank_schedule(self) -> Mapping[str, int]: ...
    @property
    def tolerance(self) -> float: ...
    @property
    def compress(self) -> float | None: ...
    @property
    def penalty(self) -> float | None: ...
    @property
    def covariance_rank(self) -> int: ...
    @property
    def temperature(self) -> str | None: ...


def settings_of(adapter: AdapterChoices) -> Settings:
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
