"""The doctor: what is wrong, or looks wrong, with the images of tasks and with the machine, before any training."""
