"""Where everything is in a project, and what its stages are called."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Self

from pipelines.project.errors import InputError

PARAMS = Path("params.yaml")
DVC_YAML = Path("dvc.yaml")
RAW = Path("data/raw")
"""Images as they were brought: a folder for each data set."""
ARTIFACTS = Path("artifacts")
CODE = ARTIFACTS / "code"
"""For each stage a file with the fingerprint of its code."""

CODE_STAGE = "code"
STEP_STAGES = ("split", "fit", "freeze", "evaluate", "gate")
"""The stages that a task goes through, in their order."""
STAGES = ("fetch", "start", "backbone", *STEP_STAGES, "report")
"""The stages whose code has a fingerprint, in the order in which a chain runs them."""


class StageName(NamedTuple):
    """The name of a stage in dvc.yaml, such as `fit@t03` or `report`."""

    kind: str
    item: str | None = None
    """The task, or the data set that `fetch` brings; None for a stage that there is once."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read a name as DVC writes it."""
        kind, _, item = text.partition("@")
        return cls(kind, item or None)

    def __str__(self) -> str:
        return self.kind if self.item is None else f"{self.kind}@{self.item}"


def require_project() -> None:
    """Refuse to work anywhere but in a project's folder."""
    for path in (PARAMS, DVC_YAML):
        if not path.is_file():
            raise InputError(
                f"no {path} in {Path.cwd()}: run sdlora in the folder of the project, or start one with sdlora init"
            )
