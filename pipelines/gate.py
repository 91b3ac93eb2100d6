"""Stage `gate`: let the next task be learned if this step keeps the limits of `params.yaml`; sign off the step."""

from pathlib import Path

from pipelines.errors import InputError
from pipelines.files import read_json, sha256_of, whole_folder, write_json
from pipelines.images import read_images
from pipelines.params import Params
from pipelines.stage import Summary, stage
from pipelines.verdicts import broken, measure


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
) -> Summary:
    """Leave in `out` the verdict on a step, and `open.json`, without which the next task is not learned.

    The verdict is the second half of the ledger: it holds the hash of the verdict before, of the step's record, of all
    its samples and of its results, so the hash of the last one stands for the whole chain. A step that breaks a limit
    leaves nothing, and the chain stops, unless a person has approved of just these results.
    """
    params = Params.load()
    metrics = read_json(evaluation / "metrics.json")
    was = read_json(evaluation_before / "metrics.json")
    measured = measure(
        metrics,
        was,
        read_images(evaluation / "predictions.arrow"),
        read_images(evaluation_before / "predictions.arrow") if was["tasks"] else None,
    )
    faults = broken(params.gate, measured)
    results = sha256_of(evaluation / "metrics.json")
    approval = params.approvals.get(task)
    if faults and (approval is None or approval.evaluation != results):
        late = "; what was approved were other results" if approval else ""
        raise InputError(
            f"gate: {task} {' and '.join(faults)}{late}; look at it (`sdlora audit diff {was['step']} {task}`), then "
            f"mend the step, or let it through with `sdlora approve {task} --by NAME --why REASON`"
        )
    with whole_folder(out) as folder:
        write_json(
            folder / "verdict.json",
            {
                "step": task,
                "previous": sha256_of(before / "verdict.json"),
                "record": sha256_of(model / "step.json"),
                "samples": read_json(split)["digest"],
                "evaluation": {path.name: sha256_of(path) for path in sorted(evaluation.iterdir())},
                "measured": measured,
                "limits": params.gate.model_dump(),
                "broken": faults,
                "approved": {"by": approval.by, "why": approval.why} if faults and approval else None,
            },
        )
        # The same bytes every time: the next fit depends on this file alone, and never on a limit or a test image.
        write_json(folder / "open.json", {"open": True})
    shown = {name: "-" if value is None else value for name, value in measured.items()}
    return [{"step": task, **shown, "verdict": "approved" if faults else "holds"}]
