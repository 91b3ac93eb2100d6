"""Resolve the lowest versions that pyproject.toml allows: each lower bound must be what they agree on."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).parents[1] / "pyproject.toml"
EXTRAS = ("bom", "export", "s3")


def resolved(*extras: str) -> dict[str, Version]:
    """Return the lowest versions that go together, without building or installing anything."""
    extras = tuple(word for extra in extras for word in ("--extra", extra))
    command = ["pip", "compile", "--quiet", "--no-header", "--no-annotate", "--no-build", *extras]
    lowest = ["--resolution", "lowest-direct", "--python-version", "3.11", str(PROJECT)]
    done = subprocess.run(
        [sys.executable, "-m", "uv", *command, *lowest], stdout=subprocess.PIPE, text=True, check=True
    )
    pairs = (line.split(";")[0].strip().split("==") for line in done.stdout.splitlines() if "==" in line)
    return {canonicalize_name(name.partition("[")[0]): Version(version) for name, version in pairs}


def is_untrue(line: str, found: dict[str, Version]) -> bool:
    """Return whether the lower bound of a dependency is not what installs, and say so."""
    requirement = Requirement(line)
    bounds = [Version(part.version) for part in requirement.specifier if part.operator == ">="]
    lowest = found[canonicalize_name(requirement.name)]
    if bounds != [lowest]:
        sys.stderr.write(f"pyproject.toml: {line}: the lowest version that installs is {lowest}\n")
    return bounds != [lowest]


def main() -> int:
    """Compare bounds with what was resolved; return the exit status."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    extra_lines = [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    faults = 0
    for lines, found in ((project["dependencies"], resolved()), (extra_lines, resolved(*EXTRAS))):
        faults += sum(1 for line in lines if is_untrue(line, found))
    return int(faults > 0)


if __name__ == "__main__":
    sys.exit(main())
