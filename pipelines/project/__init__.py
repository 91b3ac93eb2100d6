"""A project's parameters, files, errors and code fingerprints."""
