"""The stages of dvc.yaml, one file each: they never import each other and meet through files."""
