"""Stage `gate`: let the next task be learned if this step keeps the limits of `params.yaml`. Sign off the step."""

from collections.abc import Iterable
from pathlib import Path

from pipelines.ledger.verdicts import broken, in_a_verdict, measured_in, results_of
from pipelines.project.errors import GateClosedError
from pipelines.project.files import read_json, sha256_of, whole_folder, write_json
from pipelines.project.params import read_params
from pipelines.project.schemas import SampleDigest
from pipelines.project.settings import Approval, Gate, Task
from pipelines.runtime.stage import StageResult, stage


@stage
def gate(
    task: str,
    *,
    model: Path,
    split: Path,
    evaluation: Path,
    evaluation_before: Path,
    before: Path,
    out: Path,
) -> StageResult:
    """Let the next task be learned if this step keeps every limit of `gate` in params.yaml.

    The verdict is the second half of the ledger: it holds the hash of the verdict before, of the step's record, of all
    its samples and of its results, so the hash of the last one stands for the whole chain. A step that breaks a limit
    leaves nothing, and the chain stops, unless a person has approved of just these results (`sdlora approve`).

    Args:
        task: Task of params.yaml, such as t01.
        model: Model folder of this step.
        split: What `split` says of the task, split.json.
        evaluation: What `evaluate` left for this step.
        evaluation_before: The same folder of the step before.
        before: Verdict folder of the step before.
        out: Folder to leave, with the verdict, and open.json, without which the next task is not learned.
    """
    limits = read_params("gate", Gate)
    measured = measured_in(evaluation, evaluation_before, limits.on, model=model)
    faults = broken(limits, measured)
    approval = read_params("approvals", dict[str, Approval]).get(task)
    if faults and not (approval and _covers(approval, faults, evaluation)):
        late = "; what was approved were other results, or other limits" if approval else ""
        raise GateClosedError(
            f"gate: {task} {' and '.join(faults.values())}{late}; look at it (`sdlora audit diff "
            f"{read_params('tasks', dict[str, Task])[task].after} {task}`), then mend the step, or let it through with "
            f"`sdlora approve {task} --by NAME --why REASON`"
        )
    with whole_folder(out) as folder:
        write_json(
            folder / "verdict.json",
            {
                "step": task,
                "previous": sha256_of(before / "verdict.json"),
                "record": sha256_of(model / "step.json"),
                "samples": read_json(split, SampleDigest)["digest"],
                "evaluation": {path.name: sha256_of(path) for path in sorted(evaluation.iterdir())},
                "measured": measured,
                "limits": in_a_verdict(limits),
                "broken": faults,
                "approved": {"by": approval.by, "why": approval.why} if faults and approval else None,
            },
        )
        # The same bytes every time: the next fit depends on this file alone, and never on a limit or a test image.
        write_json(folder / "open.json", {"open": True})
    shown = {name: "-" if value is None else value for name, value in measured.items()}
    return StageResult([{"step": task, **shown, "verdict": "approved" if faults else "holds"}])


def _covers(approval: Approval, faults: Iterable[str], evaluation: Path) -> bool:
    """Return whether a person has approved of just these results, and of every limit that they break."""
    return approval.evaluation == results_of(evaluation) and set(faults) <= set(approval.limits)
