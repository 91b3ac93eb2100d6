"""Images that DVC keeps by a file of their own: `dvc add data/raw/NAME` writes data/raw/NAME.dvc."""

from __future__ import annotations

from pathlib import Path


def pointer_of(path: Path) -> Path | None:
    """Return the file by which DVC keeps a path, or a folder that it is in. None where there is none."""
    places = (place.with_name(f"{place.name}.dvc") for place in (path, *path.parents) if place.name)
    return next((place for place in places if place.is_file()), None)
