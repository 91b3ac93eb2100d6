"""Every environment variable of this program: its name, who sets it, and what it means.

People set `SDLORA_DECODED_GIB`, `SDLORA_IMAGES_GIB`, `SDLORA_PLAIN_DVC`, `SDLORA_PREFECT_SECONDS` and
`SDLORA_PROJECT`. The others are how processes of this program tell each other something, where DVC or Prefect, which
stands between them, passes nothing on.
"""

DECODED_GIB = "SDLORA_DECODED_GIB"
"""Set by people: how many GiB the decoded images in `.sdlora/decoded` may take; 0 keeps none."""

IMAGES_GIB = "SDLORA_IMAGES_GIB"
"""Set by people: how many GiB the decoded images of a fit may take, on its device and in main memory each.

Half of what is free if it is not set. Where they lie changes no value."""

PLAIN_DVC = "SDLORA_PLAIN_DVC"
"""Set by people: where it is 1, DVC does everything itself, each command in a process of its own.

No patch is applied, the stages that `sdlora` looks at are asked one by one, and DVC has no fork server: that is no
patch, but its process holds more of DVC than its documented commands. What comes out is the same."""

PROJECT = "SDLORA_PROJECT"
"""Set by people: the clone that a worker works in, where that is not the folder that it was started in."""

PARENT_FLOW_RUN = "SDLORA_PARENT_FLOW_RUN"
"""Set by `sdlora run` for a stage: the id of the outer flow run that the stage belongs to, or that of its note."""

HISTORY_FILE = "SDLORA_HISTORY_FILE"
"""Set by `sdlora run` and `sdlora sweep` where no Prefect server is named: the file that runs are noted in."""

OUTCOME_FILE = "SDLORA_OUTCOME_FILE"
"""Set by `sdlora run` for a stage: a file for its outcome, because DVC passes on no line and no exit status."""

STAGE_SOCKET = "SDLORA_STAGE_SERVER"
"""Set by `sdlora run` for stages: where the fork server listens that has loaded their libraries.

A run that finds it set uses that one, and starts none."""

DVC_SOCKET = "SDLORA_DVC_SERVER"
"""Set by `sdlora run` for itself: where the fork server listens that has loaded DVC."""

PATCHES_SAID = "SDLORA_PATCHES_SAID"
"""Set by a process that has said why patches of DVC stay away, for those that it starts: one line is enough."""

PREFECT_SECONDS = "SDLORA_PREFECT_SECONDS"
"""Set by people: how long a Prefect server may take for what it is asked at one time; 30 s if it is not set.

A run goes on without one that takes longer."""

WORKERS_PROJECT = "SDLORA_WORKERS_PROJECT"
"""Set by `sdlora deploy` for runs on workers: what the project is called on the Prefect server."""

WORKERS_REPOSITORY = "SDLORA_WORKERS_REPOSITORY"
"""Set by `sdlora deploy` for runs on workers: the first commit of the repository that the project is in."""
