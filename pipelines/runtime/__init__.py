"""What a process needs to run: processes, the fork server, locks, checkpoints, progress."""
