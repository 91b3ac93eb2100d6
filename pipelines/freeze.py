"""Stage `freeze`: turn a fit into a step: directions and magnitudes frozen, a record added to the ledger."""

from pathlib import Path

from pipelines.errors import InputError
from pipelines.files import read_json, sha256_of, whole_folder
from pipelines.stage import Summary, stage


@stage
def freeze(task: str, *, fit: Path, before: Path, out: Path) -> Summary:
    """Leave the model folder of `task` in `out`: what `before` holds, byte for byte, and what `fit` has learned."""
    from sdlora.fit_folder import read_fit
    from sdlora.formulations import FORMULATIONS
    from sdlora.ledger import record_hash
    from sdlora.methods import METHODS
    from sdlora.model_folder import read_model, write_model
    from sdlora.training import freeze as freeze_fit

    described = read_json(fit / "fit.json")
    if described["task"] != task:
        raise InputError(f"{fit}: this is the fit of {described['task']}, expected {task}; run `sdlora run`")
    adapter = described["adapter"]
    learned, record = read_model(before)
    tasks = [*record["tasks"], task]
    result = read_fit(fit, task=task, targets=described["targets"], tasks=tasks)
    frozen = freeze_fit(
        learned, result, method=METHODS[adapter["method"]], formulation=FORMULATIONS[adapter["formulation"]]
    )
    seen = [*record["classes"], *described["classes"]]
    with whole_folder(out) as folder:
        written = write_model(
            folder,
            frozen,
            {
                "step": task,
                "previous": record_hash(before),
                "backbone": record["backbone"],
                "tasks": tasks,
                "classes": seen,
                "directions": list(frozen.directions),
                "targets": described["targets"],
                "method": adapter["method"],
                "formulation": adapter["formulation"],
                "rank": adapter["rank"],
                "parameters": {key: described[key] for key in ("adapter", "training", "seed")},
                "learned_magnitudes": {
                    name: [round(value, 6) for value in alpha.tolist()]
                    for name, alpha in result.magnitudes.items()
                },
                "magnitudes": {
                    name: round(alpha.mean().item(), 6) for name, alpha in frozen.magnitudes.items()
                },
                "fit": {path.name: sha256_of(path) for path in sorted(fit.iterdir())},
            },
            before=before,
        )
    return [
        {
            "step": task,
            "directions": len(frozen.directions),
            "classes": len(seen),
            "record": record_hash(out)[:12],
            "previous": written["previous"][:12],
        }
    ]
