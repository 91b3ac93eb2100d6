"""A model of any step in use: predict with it and export it."""
