"""Stage `code`: for each stage the fingerprint of its code, which is what the stage depends on."""

from __future__ import annotations

from pathlib import Path

from pipelines.project.files import whole_folder
from pipelines.project.fingerprints import code_files, require_own_code, stage_fingerprint
from pipelines.project.layout import STAGES
from pipelines.runtime.stage import StageResult, stage


@stage
def code(*, out: Path) -> StageResult:
    """Leave the fingerprint of each stage's code, and the hash of each packaged data set.

    They are of the code that runs.

    Args:
        out: Folder to leave; an existing one is replaced as a whole.
    """
    require_own_code()
    found = {kind: stage_fingerprint(kind) for kind in STAGES}
    with whole_folder(out) as folder:
        for name, text in code_files().items():
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    return StageResult(
        [
            {"stage": kind, "definitions": len(fingerprint.lines), "sha256": fingerprint.sha256[:12]}
            for kind, fingerprint in found.items()
        ]
    )
