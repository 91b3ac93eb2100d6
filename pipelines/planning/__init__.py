"""What is decided before a run: tasks, experiments, the inbox, approvals, and the look at new images."""
