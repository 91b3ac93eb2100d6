"""What people and dvc.yaml type, and the entry points of preloaded processes."""
