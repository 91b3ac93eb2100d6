"""Check a bundle of `sdlora audit bundle` against a checkout. It needs nothing but Python 3.11.

Exit status 0: all holds. 1: something does not. 2: it cannot be checked. The format: ledger-format.md."""

import argparse
import base64
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TYPES = ["application/vnd.in-toto+json", "https://in-toto.io/Statement/v1", "urn:sdlora:ledger-step:v1"]
Json = dict[str, Any]


def require(holds: object, fault: str) -> None:
    """End with status 1 where something does not hold."""
    if not holds:
        sys.exit(f"{fault}\nthe bundle does not hold")


def is_signed(key: Path, entry: Json, data: bytes) -> bool:
    """Return whether a signature of some bytes is that of a key."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    kind = "pem" if key.read_bytes().startswith(b"-----") else "ssh"
    own = getattr(serialization, f"load_{kind}_public_key")(key.read_bytes())
    how = [ec.ECDSA(getattr(hashes, f"SHA{min(own.key_size, 512)}")())] if hasattr(own, "curve") else []
    try:
        return own.verify(base64.b64decode(entry["sig"]), data, *how) is None
    except InvalidSignature:
        return False


def opened(line: bytes, key: Path | None) -> Json:
    """Return the statement in an envelope, its signature checked where there is a key."""
    sealed = json.loads(line)
    kind, payload = sealed["payloadType"], base64.b64decode(sealed["payload"], validate=True)
    data = b"DSSEv1 %d %b %d %b" % (len(kind.encode()), kind.encode(), len(payload), payload)
    require(not key or any(is_signed(key, its, data) for its in sealed["signatures"]), f"not signed by {key}")
    statement: Json = json.loads(payload)
    require([kind, statement["_type"], statement["predicateType"]] == TYPES, "a statement is of other types")
    return statement


def check_files(root: Path, statement: Json) -> Json:
    """Check every file that a statement describes. Return the digests in each folder of a step, by name."""
    told, files = statement["predicate"], dict[str, Any]()
    for entry in [*statement["subject"], *told["materials"], *told["classifier"]]:
        name, digest = entry["name"], entry["digest"]["sha256"]
        top, kind, step, *rest = parts = [*name.split("/"), ""]
        require(top and ".." not in parts and (root / name).is_file(), f"{name}: not in the checkout")
        found = hashlib.sha256((root / name).read_bytes()).hexdigest()
        require(found == digest, f"{name}: not the file of the bundle")
        files.setdefault(f"{kind}/{step}", {})["/".join(rest[:-1])] = digest
    for part, kind in (("record", "model"), ("verdict", "gate"), ("metrics", "evaluation")):
        path = root / f"artifacts/{kind}/{told['record']['step']}/{'step' if kind == 'model' else part}.json"
        require(json.loads(path.read_bytes()) == told[part], f"{path}: not the {part} of the bundle")
    return files


def check_step(root: Path, told: Json, files: Json, before: Json) -> Json:
    """Check that a step follows from its files and the step before. Return what the next one follows from."""
    record, verdict, step = told["record"], told["verdict"], told["record"]["step"]
    model, folder, split = files[f"model/{step}"], root / "artifacts/model" / step, root / "artifacts/split"
    rows = [
        *((f"previous {its}", told[its]["previous"], before.get(its)) for its in ("record", "verdict")),
        ("files of the model", {**record["files"], "step.json": model["step.json"]}, model),
        ("number of these files", sum(path.is_file() for path in folder.rglob("*")), len(model)),
        ("step and backbone", [step, record["backbone"]], [verdict["step"], (before or record)["backbone"]]),
    ]
    if before and record.get("format") == 2:  # it names its own files and classes, and the step before
        record = {**record, "files": before["files"] | record["files"], "tasks": [*before["tasks"], step]}
        record["classes"] = before["classes"] + record["classes"]
    if before:
        receipt = root / "ledger/retired" / step / "receipt.json"  # stands for images that were deleted
        packed = files.get(f"train/{step}", {}).get("train.arrow")
        images = packed or json.loads(receipt.read_bytes())["train"]["sha256"]
        new = range(len(before["classes"]), len(record["classes"]))
        kept = 0 if record["needs_old_images"] else 1 if record["method"] == "finetune" else 2
        frozen = ("head/", "directions/")[:kept]
        rows += [
            ("tasks", record["tasks"], [*before["tasks"], step]),
            ("earlier classes", before["classes"], record["classes"][: new.start]),
            ("new classes", {*record.get("step_classes", {}).get(step, new)} - {*range(new.start)}, {*new}),
            ("images", [record["images"][step]] * 2, [images, record["split"]["images"]]),
            ("training samples", record["split"], json.loads((split / step / "train.json").read_bytes())),
            ("samples", verdict["samples"], json.loads((split / step / "split.json").read_bytes())["digest"]),
            *((p, its[p], files[f"{p}/{step}"]) for p, its in (("fit", record), ("evaluation", verdict))),
            ("record of the verdict", verdict["record"], model["step.json"]),
            ("drift", verdict["measured"].get("drift"), record.get("freezing", {}).get("drift_loss")),
            *((n, d, record["files"].get(n, d)) for n, d in before["files"].items() if n.startswith(frozen)),
            *gate_of(verdict, told["metrics"], before["metrics"]),
        ]
    for what, value, other in rows:
        require(value == other, f"{step}: {what}: the records do not agree")
    hashes = {"record": model["step.json"], "verdict": files[f"gate/{step}"]["verdict.json"]}
    return {**record, **hashes, "metrics": told["metrics"]}


def gate_of(verdict: Json, metrics: Json, before: Json) -> Iterator[tuple[str, object, object]]:
    """Yield what a verdict says beside what follows from accuracies and limits."""
    then, now = ([r / n for r, n in zip(m["correct"], m["samples"], strict=True)] for m in (before, metrics))
    fall = round(max(was - share for was, share in zip(then, now, strict=False)), 6) if then else None
    got, limits = verdict["measured"], verdict["limits"]
    given = [n for n in got if None not in (got[n], limits.get(n))]
    broken = {n for n in given if (limits[n] > got[n] if n == "new_task" else got[n] > limits[n])}
    if limits.get("on") != "validation":  # those are measured in validation.arrow, which takes Arrow to read
        yield "measured accuracies", (got["fall"], got["new_task"]), (fall, round(now[-1], 6))
    yield "broken limits", [set(verdict["broken"]), bool(broken and not verdict["approved"])], [broken, False]


def main() -> None:
    """Check a bundle: every step in its order, their number, the journal. Say the head of the chain."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("checkout", type=Path, nargs="?", default=Path())
    parser.add_argument("--key", type=Path, help="public key that all statements are signed with")
    parser.add_argument("--expect", metavar="HEAD", help="head that is known from elsewhere")
    asked = parser.parse_args()
    root, before, path = asked.checkout, dict[str, Any](), asked.checkout / "ledger/journal.jsonl"
    statements = [opened(line, asked.key) for line in asked.bundle.read_bytes().splitlines()]
    head, last = statements[-1]["predicate"]["chain"]["head"], len(statements) - 1
    lines = path.read_bytes().splitlines() if path.is_file() else []
    journal = {hashlib.sha256(line).hexdigest(): json.loads(line) for line in lines}
    require(all(n in journal for x in journal.values() for n in x["previous"]), "the journal lacks a line")
    for position, statement in enumerate(statements):
        told, files = statement["predicate"], check_files(root, statement)
        step, place = told["record"]["step"], {"position": position, "steps": last, "head": head}
        before = check_step(root, told, files, before)
        require(told["chain"] == place, f"{step}: not its place in a chain of {last} steps: {told['chain']}")
        require(all(line in journal.values() for line in told["journal"]), f"{step}: the journal is another")
        sys.stdout.write(f"{step:6}  holds  {before['verdict'][:12]}\n")
    steps, found = json.loads((root / "metrics.json").read_bytes())["steps"], before["verdict"]
    require(steps == last, f"metrics.json: it is of {steps} steps, the bundle of {last}")
    require(found == head == (asked.expect or head), f"the head is {found}, expected {asked.expect or head}")
    sys.stdout.write(f"the bundle holds; its head is {head}\n")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ImportError) as error:
        sys.stderr.write(f"cannot be checked: {type(error).__name__}: {error}\n")
        sys.exit(2)
