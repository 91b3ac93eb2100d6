"""What a step's record says of its fit, from the fit folder."""

from pathlib import Path


def last_epoch(fit: Path) -> dict[str, float]:
    """Loss and accuracy on the task's own training images in the last pass over them. Nothing where none was made."""
    from sdlora.fit_folder import read_curve

    curve = read_curve(fit)
    return {"loss": curve[-1].loss, "training_accuracy": curve[-1].accuracy} if curve else {}


def learned_magnitudes(fit: Path) -> dict[str, list[float]]:
    """Task → its magnitudes as the fit left them, to six decimals."""
    from sdlora.fit_folder import FIT_MAGNITUDES
    from sdlora.tensors import read_tensors

    return {
        name: [round(value, 6) for value in alpha.tolist()]
        for name, alpha in read_tensors(fit / FIT_MAGNITUDES).items()
    }
