"""`sdlora audit bundle`: the ledger as in-toto statements, for those who have not got this program.

docs/reference/ledger-format.md describes what is written, and docs/reference/verify_bundle.py checks it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipelines.audits.envelopes import STATEMENT, SigningKey, envelope_of, model_signature, read_certificates
from pipelines.audits.verify import verify
from pipelines.data.packed import PACKED
from pipelines.ledger.receipts import receipt_of
from pipelines.project.errors import InputError
from pipelines.project.files import read_json, sha256_of, write_json, write_whole
from pipelines.project.layout import (
    BACKBONE,
    CODE,
    EVALUATIONS,
    FITS,
    GATES,
    JOURNAL,
    LEDGER,
    MODELS,
    SPLITS,
    TRAINED,
    StageName,
)
from pipelines.project.params import Params
from pipelines.versioning.artifacts import ArtifactStore, read_lock
from sdlora.ledger import RECORD

_PREDICATE = "urn:sdlora:ledger-step:v1"
"""The type of what a statement says of a step. Where a field gets another meaning, its version changes."""
_MADE_BY = {"split": SPLITS, "fit": FITS, "freeze": MODELS, "evaluate": EVALUATIONS, "gate": GATES}
"""Stage → where it leaves the files of a step."""
_CLASSIFIER = ("head", "statistics", "drift", "classifier.safetensors", "unknown.safetensors", "settled")
"""What of a model folder turns features into scores: files, and folders of files (the last one in format 1)."""
_Descriptor = dict[str, Any]
"""A file as in-toto describes one: its name in a checkout, and its digest."""


def bundle(file: Path, *, key: Path | None, certificates: Path | None, signatures: Path | None) -> list[str]:
    """Verify the whole chain, and write a statement for each of its steps. Return lines to print.

    Args:
        file: the JSON lines to write, an envelope each.
        key: a private key to sign with.
        certificates: those of the key, as PEM, its own first: signatures of model folders carry them.
        signatures: a folder for a signature of each model folder, as OpenSSF Model Signing writes them.
    """
    signer = SigningKey.read(key) if key else None
    if signatures and (signer is None or not signer.on_curve):
        raise InputError(
            "audit bundle: --model-signatures needs a --key that OpenSSF Model Signing knows; make one with `openssl "
            "ecparam -name prime256v1 -genkey -noout -out FILE`"
        )
    if certificates and not signatures:
        raise InputError(
            "audit bundle: --certificates stand in model signatures; name a folder by --model-signatures"
        )
    chain = read_certificates(certificates, signer) if certificates and signer else []
    findings = list(verify())
    if findings[-1].fault:
        raise InputError(
            f"{findings[-1].step}: {findings[-1].fault}; a chain that does not hold is not put into a bundle"
        )
    params = Params.load()
    with TemporaryDirectory(prefix="sdlora-bundle-") as scratch:
        ledger = _Ledger(ArtifactStore(read_lock(params), Path(scratch)), ("t00", *params.tasks))
        statements = {step: ledger.statement(step) for step in ledger.steps}
    lines = [json.dumps(envelope_of(statement, signer), sort_keys=True) for statement in statements.values()]
    write_whole(file, "".join(f"{line}\n" for line in lines).encode())
    said = [f"{file}: {len(lines)} steps, {f'signed by {signer.fingerprint}' if signer else 'not signed'}"]
    if signatures and signer:
        for step, statement in statements.items():
            folder = f"{(MODELS / step).as_posix()}/"
            digests = {
                its["name"].removeprefix(folder): its["digest"]["sha256"] for its in statement["subject"]
            }
            write_json(signatures / f"{step}.sig", model_signature(step, digests, signer, chain))
        said.append(f"{signatures}: {len(lines)} signatures of model folders")
    return [*said, f"the chain holds; its head is {ledger.head}"]


@dataclass(frozen=True)
class _Ledger:
    """A chain whose steps are put into statements."""

    place: ArtifactStore
    steps: tuple[str, ...]
    _hashes: dict[Path, str] = field(default_factory=dict, init=False)
    """What was read, so that no file is read twice."""

    @cached_property
    def head(self) -> str:
        """The hash of the last verdict."""
        return self._hash(GATES / self.steps[-1] / "verdict.json")

    @cached_property
    def _journal(self) -> list[dict[str, Any]]:
        """The lines of the journal. None where nothing was computed here."""
        lines = JOURNAL.read_bytes().splitlines() if JOURNAL.is_file() else []
        try:
            found = [json.loads(line) for line in lines]
            if all(isinstance(its["stage"], str) and isinstance(its["output"], dict) for its in found):
                return found
        except (ValueError, TypeError, KeyError):
            pass
        raise InputError(
            f"{JOURNAL}: a line of it is none of a journal; restore the file from version control"
        )

    def statement(self, step: str) -> dict[str, Any]:
        """Return a statement of in-toto: the model folder of a step was made as its predicate says."""
        subject = self._files(MODELS / step)
        metrics = self._json(EVALUATIONS / step / "metrics.json")
        return {
            "_type": STATEMENT,
            "subject": subject,
            "predicateType": _PREDICATE,
            "predicate": {
                "chain": {
                    "position": self.steps.index(step),
                    "steps": len(self.steps) - 1,
                    "head": self.head,
                },
                "record": self._json(MODELS / step / RECORD),
                "verdict": self._json(GATES / step / "verdict.json"),
                "metrics": metrics,
                "classifier": [
                    its
                    for its in subject
                    if Path(its["name"]).relative_to(MODELS / step).parts[0] in _CLASSIFIER
                ],
                "materials": self._described(self._materials(step)),
                "journal": [line for line in self._journal if self._is_of(line, step)],
            },
        }

    def _materials(self, step: str) -> Iterator[Path]:
        """Yield the files that a step was made of, or judged by, beside its model folder."""
        yield from (*self._paths(EVALUATIONS / step), *self._paths(GATES / step))
        if step == BACKBONE.name:
            return
        yield from self._paths(FITS / step)
        own = {"classes.json", "split.json", "train.json", f"{step}.arrow"}
        # What a split hands on of earlier tasks stands among the materials of their own steps.
        yield from (path for path in self._paths(SPLITS / step) if path.name in own)
        # Of images that were deleted there is a receipt in their place.
        images, receipt = TRAINED / step / PACKED, receipt_of(step)
        yield receipt if receipt.is_file() else images
        record = self._json(MODELS / step / RECORD)
        if str(CODE) in self.place.lock.outs:  # a chain of before fingerprints has none
            code = {CODE / kind: digest for kind, digest in record["code"].items()}
            yield from (path for path, digest in code.items() if self._hash(path) == digest)

    def _is_of(self, line: dict[str, Any], step: str) -> bool:
        """Return whether a line of the journal is about just the files that a step has."""
        stage = StageName.parse(line["stage"])
        if stage.item != step or stage.kind not in _MADE_BY:
            return False
        folder = _MADE_BY[stage.kind] / step
        there = set(self._paths(folder))
        return all(
            folder / name in there and self._hash(folder / name) == digest
            for name, digest in line["output"].items()
        )

    def _files(self, folder: Path) -> list[_Descriptor]:
        """Return all files of an output of a stage."""
        return self._described(self._paths(folder))

    def _described(self, paths: Iterable[Path]) -> list[_Descriptor]:
        """Return files by the names that they have in a checkout, with their digests."""
        return [{"name": path.as_posix(), "digest": {"sha256": self._hash(path)}} for path in sorted(paths)]

    def _paths(self, folder: Path) -> list[Path]:
        """Return the names that the files of an output have in a checkout."""
        found = self.place.find(folder)
        return [folder / path.relative_to(found) for path in found.rglob("*") if path.is_file()]

    def _hash(self, path: Path) -> str:
        """Return the SHA-256 of a file by the name that it has in a checkout."""
        if path not in self._hashes:
            self._hashes[path] = sha256_of(self._found(path))
        return self._hashes[path]

    def _json(self, path: Path) -> dict[str, Any]:
        """Read a file by the name that it has in a checkout."""
        found: dict[str, Any] = read_json(self._found(path))
        return found

    def _found(self, path: Path) -> Path:
        """Return where a file can be read: in the workspace, or in DVC's cache or remote."""
        if path.is_relative_to(LEDGER):
            return path
        out = CODE if path.is_relative_to(CODE) else Path(*path.parts[:3])
        return self.place.find(out) / path.relative_to(out)
