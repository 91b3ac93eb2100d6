"""Every environment variable of this program: its name, who sets it, and what it means.

People set `SDLORA_DECODED_GIB`, `SDLORA_IMAGES_GIB` and `SDLORA_PROJECT`. The others are how processes of this program
tell each other something, where DVC, which stands between them, passes nothing on.
"""

DECODED_GIB = "SDLORA_DECODED_GIB"
"""Set by people: how many GiB the decoded images in `.sdlora/decoded` may take; 0 keeps none."""

IMAGES_GIB = "SDLORA_IMAGES_GIB"
"""Set by people: how many GiB the decoded images of a fit may take, on its device and in main memory each.

Half of what is free if it is not set. Where they lie changes no value."""

PROJECT = "SDLORA_PROJECT"
"""Set by people: the clone that a worker works in, where that is not the folder that it was started in."""

PARENT_FLOW_RUN = "SDLORA_PARENT_FLOW_RUN"
"""Set by `sdlora run` for a stage: the id of the outer flow run that the stage belongs to."""

OUTCOME_FILE = "SDLORA_OUTCOME_FILE"
"""Set by `sdlora run` for a stage: a file for its outcome, because DVC passes on no line and no exit status."""

STAGE_SOCKET = "SDLORA_WARM"
"""Set by `sdlora run` for stages: where the process listens that has loaded their libraries."""

DVC_SOCKET = "SDLORA_WARM_DVC"
"""Set by `sdlora run` for itself: where the process listens that has loaded DVC."""
