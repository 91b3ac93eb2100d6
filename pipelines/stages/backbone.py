"""Stage `backbone`: the frozen base of the chain, step t00."""

from pathlib import Path

from pipelines.project.errors import InputError
from pipelines.project.files import sha256_of, whole_folder
from pipelines.project.params import read_params
from pipelines.project.settings import BackboneChoice
from pipelines.runtime.console import log_line
from pipelines.runtime.stage import StageResult, stage


def _check_file(weights: Path, expected: str | None) -> None:
    """Refuse a weight file that is missing or not the one whose hash is written down."""
    if not weights.is_file():
        raise InputError(
            f"{weights}: no such weight file; correct backbone.weights in params.yaml or set it to null"
        )
    found = sha256_of(weights)
    if found != expected:
        raise InputError(
            f"{weights}: its sha256 is {found}, params.yaml: backbone.sha256 says {expected}; restore the file, or "
            "write down the new hash to start the chain from it"
        )


@stage
def backbone(*, out: Path) -> StageResult:
    """Leave the backbone that params.yaml names: weights, preprocessing, ledger record of step t00.

    Args:
        out: Folder to leave; an existing one is replaced as a whole.
    """
    from sdlora.backbones import create_backbone, write_backbone

    choice = read_params("backbone", BackboneChoice)
    if choice.weights:
        _check_file(Path(choice.weights), choice.sha256)
    created = create_backbone(
        choice.name,
        weights=Path(choice.weights) if choice.weights else None,
        image_size=choice.image_size,
        input_normalisation=choice.input_normalisation,
        say=lambda line: log_line(f"backbone: {line}"),
    )
    with whole_folder(out) as folder:
        record = write_backbone(folder, created)
    channels, height, width = created.input_size
    return StageResult(
        [
            {
                "backbone": choice.name,
                "parameters": sum(parameter.numel() for parameter in created.model.parameters()),
                "input": f"{channels}×{height}×{width}",
                "sha256": record["backbone"][:12],
            }
        ]
    )
