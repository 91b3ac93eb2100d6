"""A step's evaluation beside the fit of the next task: two stages at once, in one run of one folder."""

from __future__ import annotations

import contextvars
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from pipelines.files import write_json
from pipelines.params import Params
from pipelines.plan import Plan
from pipelines.processes import STOP_SECONDS, signal_group
from pipelines.repro import Apart, Process, bring


def side_by_side(plan: Plan, params: Params) -> tuple[list[str], dict[str, Path]]:
    """Order the stale stages; also find the evaluations to make beside the next fit, each with its gate's folder.

    A gate that no limit can close lets the next task be learned before its verdict is written, so it comes after the
    next fit. With a limit a fit waits for the verdict, and so for the evaluation.
    """
    stale = plan.stale()
    if any(limit is not None for limit in params.gate.model_dump().values()):
        return stale, {}
    following = {
        need: fit
        for fit in stale
        if fit.startswith("fit@")
        for need in plan.needs[fit] & set(stale)
        if need.startswith("gate@")
    }
    put_off = {fit: gate for gate, fit in following.items()}
    order: list[str] = []
    for name in stale:
        if name not in following:
            order.append(name)
        if name in put_off:
            order.append(put_off[name])
    evaluations = {gate.replace("gate@", "evaluate@", 1): Path(plan.outs[gate][0]) for gate in following}
    return order, {name: folder for name, folder in evaluations.items() if name in order}


def room_beside(devices: int) -> Mapping[str, str] | None:
    """The environment of an evaluation beside a fit on so many devices; None where it would take memory from the fit.

    A fit that runs out of memory goes on with the last bits of another machine, so it never shares an accelerator.
    """
    if sys.platform != "linux":
        return None
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    found = [path.name.removeprefix("nvidia") for path in Path("/dev").glob("nvidia[0-9]*")]
    there = sorted(found, key=int) if visible is None else [name for name in visible.split(",") if name]
    if not found or not there:
        return {}
    return {"CUDA_VISIBLE_DEVICES": there[-1]} if len(there) > devices else None


def open_beforehand(gate: Path) -> None:
    """Leave what lets the next task be learned, as the stage `gate` will, where no limit can close it."""
    path = gate / "open.json"
    if not path.exists():
        write_json(path, {"open": True})


class Beside:
    """One stage that is brought up to date meanwhile; what it prints is kept until it is joined."""

    def __init__(self, name: str, *, pull: bool, settings: Mapping[str, str]) -> None:
        self.name = name
        self.lines: list[str] = []
        self.seconds = 0.0
        self._pull, self._settings = pull, settings
        self._cached = False
        self._error: BaseException | None = None
        self._process: Process | None = None
        self._stopping = threading.Event()
        context = contextvars.copy_context()  # the flow run that the stage's own belongs to
        self._thread = threading.Thread(target=context.run, args=(self._work,))
        self._thread.start()

    def _work(self) -> None:
        started = time.monotonic()
        apart = Apart(show=self.lines.append, begun=self._begun, settings=self._settings)
        try:
            self._cached = bring(self.name, pull=self._pull, apart=apart)
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - started

    def _begun(self, process: Process) -> None:
        self._process = process
        if self._stopping.is_set():
            signal_group(process, signal.SIGTERM)

    def join(self) -> bool:
        """Wait for its end; return whether its outputs came from the cache.

        Raises:
            StageFailedError: it ended badly.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._cached

    def stop(self) -> None:
        """End it, and what it has started."""
        self._stopping.set()
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if self._process is not None:
                signal_group(self._process, sign)
            self._thread.join(STOP_SECONDS)
            if not self._thread.is_alive():
                return
