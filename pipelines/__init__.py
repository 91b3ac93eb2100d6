"""The stages of the pipeline, the flows that run them, and the command line."""
