"""What changed between two steps: answers, weights, features, each figure from their files."""

from __future__ import annotations

from pipelines.audits.answer_changes import compared_answers
from pipelines.audits.feature_changes import compared_features
from pipelines.audits.steps import AuditedStep, Figures, ancestors, same_images, test_pictures
from pipelines.audits.weight_changes import compared_weights
from pipelines.reports.format import flattened


def compare(then: AuditedStep, now: AuditedStep, *, features: bool) -> Figures:
    """Return all figures, as JSON can hold them but for NaN. What is null could not be known, as `notes` says."""
    notes: list[str] = []
    pictures = test_pictures(then, of=None), test_pictures(now, of=None)
    same = same_images(*pictures)
    return {
        "then": _facts_of(then),
        "now": _facts_of(now),
        "relation": _relation(then, now),
        "kept": _kept_files(then, now),
        "parameters": _changed_parameters(then, now),
        "images": {
            "compared": len(same),
            "then": len(pictures[0]),
            "now": len(pictures[1]),
            "other_picture": len(pictures[0].keys() & pictures[1].keys()) - len(same),
        },
        **compared_answers(then, now, same, notes),
        "weights": compared_weights(then, now, notes),
        "features": compared_features(then, now, pictures, notes) if features else None,
        "notes": notes,
    }


def _facts_of(step: AuditedStep) -> Figures:
    """Return which step this is."""
    return {
        "step": step.name,
        "shown": step.shown,
        "record": step.hash,
        "tasks": step.tasks,
        "classes": len(step.classes),
        **{key: step.record.get(key) for key in ("method", "formulation", "head")},
    }


def _relation(then: AuditedStep, now: AuditedStep) -> str:
    """Return what the ledger says of two steps."""
    if then.hash == now.hash:
        return "the same step"
    if then.hash in ancestors(now):
        return f"{now.shown} continues {then.shown}"
    if now.hash in ancestors(then):
        return f"{then.shown} continues {now.shown}"
    return f"two runs of {now.name}" if then.name == now.name else "steps of two chains"


def _kept_files(then: AuditedStep, now: AuditedStep) -> Figures:
    """Return the frozen files of `then` (directions, trained head rows): their number, and those that `now` has
    otherwise.
    """
    frozen = {
        name: digest
        for name, digest in then.record["files"].items()
        if name.startswith(("directions/", "head/"))
    }
    differing = [name for name in sorted(frozen) if now.record["files"].get(name) != frozen[name]]
    return {"frozen": len(frozen), "differing": differing}


def _changed_parameters(then: AuditedStep, now: AuditedStep) -> list[Figures]:
    """Return the parameters in which two records differ."""
    before, after = (flattened(step.record.get("parameters", {})) for step in (then, now))
    if then.name == "t00" or now.name == "t00":
        return []
    return [
        {"name": name, "then": before.get(name), "now": after.get(name)}
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name)
    ]
