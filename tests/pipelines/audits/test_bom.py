"""A bill of materials is valid CycloneDX, and names what the ledger names."""

from __future__ import annotations

import json
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from sdlora.ledger import read_record
from tests.support.commands import call_here, said_here

pytestmark = pytest.mark.slow


@pytest.fixture
def project(finished: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished project, as the working directory."""
    folder = shutil.copytree(finished[0], tmp_path / "project")
    monkeypatch.chdir(folder)
    return folder


def bill(project: Path, *options: str) -> dict[str, Any]:
    """The bill of a step, found valid by the library's own validator."""
    call_here(project, "audit", "bom", "model.cdx.json", *options)
    text = Path("model.cdx.json").read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    found: dict[str, Any] = json.loads(text)
    return found


def test_a_bill_names_backbone_images_steps_and_libraries_by_what_the_ledger_holds(project: Path) -> None:
    found = bill(project)
    record = read_record(Path("artifacts/model/t02"))
    parts = {part["name"]: part for part in found["components"]}
    hashes = {name: part["hashes"][0]["content"] for name, part in parts.items() if "hashes" in part}
    assert hashes == {
        "glyph_vit": record["backbone"],
        "t01": record["previous"],
        "t01-images": record["images"]["t01"],
        "t02-images": record["images"]["t02"],
    }
    assert parts["glyph_vit"]["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    assert {name: parts[name]["version"] for name in record["versions"]} == record["versions"]
    assert parts["torch"]["purl"] == f"pkg:pypi/torch@{record['versions']['torch']}"
    own = found["metadata"]["component"]
    digest = sha256(Path("artifacts/model/t02/step.json").read_bytes()).hexdigest()
    assert (own["name"], own["hashes"][0]["content"]) == ("t02", digest)
    assert own["modelCard"]["modelParameters"]["datasets"] == [{"ref": "t01-images"}, {"ref": "t02-images"}]
    needs = {entry["ref"]: set(entry.get("dependsOn", ())) for entry in found["dependencies"]}
    assert {"t01", "t02-images", "torch"} <= needs["t02"]
    assert {"glyph_vit", "t01-images"} <= needs["t01"]
    assert bill(project) == found


def test_a_bill_of_an_export_lists_its_files_and_is_of_its_step(project: Path) -> None:
    call_here(project, "export", "timm", "out", "--step", "t01")
    own = bill(project, "--export", "out")["metadata"]["component"]
    assert own["name"] == "t01"
    listed = {part["name"]: part["hashes"][0]["content"] for part in own["components"]}
    assert listed == {path.name: sha256(path.read_bytes()).hexdigest() for path in Path("out").iterdir()}
    for options, fault in (
        (("--export", "out", "--step", "t02"), "out: it was not made of t02 as it stands here"),
        (("--export", "artifacts"), "artifacts: no export there"),
        (("--step", "t09"), "there is no step 't09'; known are t01, t02"),
    ):
        assert fault in said_here(project, "audit", "bom", "other.json", *options, status=2)[1]
    Path("artifacts/fit/t01/fit.json").chmod(0o644)
    Path("artifacts/fit/t01/fit.json").write_text("{}")
    assert "chain that does not hold" in said_here(project, "audit", "bom", "other.json", status=2)[1]
    assert not Path("other.json").exists()
