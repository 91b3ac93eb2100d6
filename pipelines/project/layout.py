"""Where everything is in a project, and what its stages are called."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Self

from pipelines.project.errors import InputError

PARAMS = Path("params.yaml")
DVC_YAML = Path("dvc.yaml")
LOCK = Path("dvc.lock")
METRICS = Path("metrics.json")
"""The headline numbers of the chain, which DVC shows."""
RAW = Path("data/raw")
"""Images as they were brought: a folder for each data set."""

ARTIFACTS = Path("artifacts")
"""What the stages leave: a folder for each kind, and in it one for each task."""
CODE = ARTIFACTS / "code"
"""For each stage a file with the fingerprint of its code."""
SPLITS = Path("artifacts/split")
TRAINED = Path("artifacts/train")
"""The training images of each task, packed."""
FITS = Path("artifacts/fit")
MODELS = Path("artifacts/model")
BACKBONE = Path("artifacts/model/t00")
EVALUATIONS = Path("artifacts/evaluation")
GATES = Path("artifacts/gate")
REPORT = Path("artifacts/report/report.html")
TASK_FOLDERS = (SPLITS, TRAINED, FITS, MODELS, EVALUATIONS, GATES)
"""The folders in which each task has its own."""

LEDGER = Path("ledger")
"""What stages and people leave beside DVC's outputs, for version control: costs, signatures, receipts."""
JOURNAL = Path("ledger/journal.jsonl")
"""A line for each stage that was computed here: who, when, where and at what cost."""
KEPT = Path("ledger/kept")
"""Notes on results that were kept although their code has changed."""
RETIRED = "ledger/retired"
"""Where the receipts of tasks are whose images were deleted: in it, the folder of a task is its source from then on.

A text, as sources are in params.yaml.
"""
SIGNATURES = Path("ledger/signatures")

SCRATCH = Path(".sdlora")
"""What this clone alone needs."""
CHECKPOINTS = ".sdlora/checkpoints"
"""The store of checkpoints where params.yaml names none, as a text: a store may be a URL."""
DOWNLOADS = Path(".sdlora/downloads")
"""Archives, a folder for each data set; files that are put there by hand are used."""
PINNED = Path(".sdlora/pinned")
"""Shards of pinned sources, each under the hash of its bytes; may be deleted."""
DECODED = Path(".sdlora/decoded")
"""Decoded images, which are kept for the next evaluation."""
UNREADABLE = Path(".sdlora/unreadable")
"""For each task the list of its files that cannot be decoded."""
RUN_LOCK = Path(".sdlora/run.lock")
RUN_LOG = Path(".sdlora/run.log")
"""In the workspace of a chain of a sweep: what its run has printed."""
UNPUSHED = Path(".sdlora/unpushed")
"""The stages whose outputs the remote has not taken, one a line."""
TURNS = Path(".sdlora/turns.json")
"""In the workspace of a chain: a folder of locks, and for each stage the name of the one that equal stages share."""
SWEEPS = Path(".sdlora/sweeps")
"""A folder for each sweep; names that begin with a dot are what all share."""
LOCK_MEMORY = Path(".sdlora/dvc.lock.json")
"""What the entries of dvc.lock say, name and content by the hash of the text; may be deleted."""
CODE_MEMORY = Path(".sdlora/code.json")
"""The fingerprints of the stages' code, by the hash of all sources; may be deleted."""
PLAN_MEMORY = Path(".sdlora/plan.json")
"""The stages that were up to date at the last look, and how their files were; may be deleted."""
LOCKED_BEFORE = Path(".sdlora/dvc.lock.before")
"""The stages that dvc.lock had when the run began that has not ended yet, one a line."""
BRANCH_STATE = Path(".sdlora/branch.json")
"""The commits whose ledger was taken (the last is what the run began from), and the one that was made since."""
WRITTEN_PARAMS = Path(".sdlora/params.sha256")
"""The hashes of what an unattended run may have left as params.yaml: that may be replaced by the branch's."""
UNRECORDED = Path(".sdlora/unrecorded")
"""The project's files as they were before a run that records nothing, while there is one."""
UNRECORDED_PARAMS = UNRECORDED / "params.sha256"
"""The hashes of what that run may have left as params.yaml."""

PREFECT = Path(".prefect")
"""What Prefect knows of this clone's own runs: the database of the server of `sdlora history`, and the notes for it."""
HISTORY = Path(".prefect/runs.jsonl")
"""Notes of the runs for which no Prefect server was named: a line when one begins, a line when it ends."""
DVC = Path(".dvc")
RWLOCK = Path(".dvc/tmp/rwlock")
"""DVC's file of the paths that are being read and written."""

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


def read_beside_deps(stage: StageName, tasks: Sequence[str]) -> list[Path]:
    """Return the outputs of earlier steps that a stage reads, and that no dep but a record which names them stands for.

    Args:
        stage: The stage of a task.
        tasks: All tasks, in order of arrival.
    """
    kinds = {"split": [SPLITS], "fit": [MODELS], "freeze": [MODELS], "evaluate": [MODELS, SPLITS]}
    steps = ["t00", *tasks]
    before = steps[: steps.index(stage.item)] if stage.item in steps else []
    return [kind / step for kind in kinds.get(stage.kind, []) for step in before]


def project_root(folder: Path) -> Path | None:
    """Return the project that a folder is in: the nearest above that is one, in the same repository of DVC or Git."""
    for place in (folder, *folder.parents):
        if (place / PARAMS).is_file() and (place / DVC_YAML).is_file():
            return place
        if (place / DVC).is_dir() or (place / ".git").exists():
            return None
    return None


def refuse_braces(folder: Path) -> None:
    """Refuse a project's folder whose path has braces: DVC takes them for names of values."""
    if {"{", "}"} & set(str(folder)):
        raise InputError(
            f"{folder}: DVC takes no braces in the path of a project; move it, or rename the folder"
        )


def require_project() -> None:
    """Refuse to work anywhere but in a project's folder."""
    for path in (PARAMS, DVC_YAML):
        if not path.is_file():
            raise InputError(
                f"no {path} in {Path.cwd()}: run sdlora in the folder of the project, or start one with sdlora init"
            )
