"""A step's evaluation overlaps the fit of the next task: two stages at once, in one run of one folder."""

from __future__ import annotations

import contextvars
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from pipelines.project.files import write_json
from pipelines.project.layout import StageName
from pipelines.project.params import Params
from pipelines.runtime.console import echo
from pipelines.runtime.processes import STOP_SECONDS, signal_group
from pipelines.versioning.plan import Plan
from pipelines.versioning.repro import ConcurrentOptions, Process, reproduce_stage


class Order(NamedTuple):
    """Stale stages in the order in which they begin, and what overlaps."""

    stages: list[str]
    overlapped: set[str]
    """evaluations, each made while what follows it goes on"""
    opened_early: dict[str, Path]
    """fit → the folder of the gate that lets it begin, and whose verdict is written when the fit has ended"""


def overlapped_order(plan: Plan, params: Params) -> Order:
    """Order the stale stages so that each step is evaluated while the next is fitted.

    A gate that no limit can close lets the next task be learned before its verdict is written, so it comes after the
    next fit. With a limit a fit waits for the verdict, and so for the evaluation.
    """
    stale = plan.stale()
    if any(limit is not None for limit in params.gate.limits.values()):
        return Order(stale, set(), {})
    gates = {
        fit: need
        for fit in stale
        if StageName.parse(fit).kind == "fit"
        for need in plan.needs[fit] & set(stale)
        if StageName.parse(need).kind == "gate"
    }
    put_off = set(gates.values())
    stages: list[str] = []
    for name in stale:
        if name not in put_off:
            stages.append(name)
        if name in gates:
            stages.append(gates[name])
    evaluations = {str(StageName("evaluate", StageName.parse(gate).item)) for gate in put_off}
    opened = {fit: Path(plan.outs[gate][0]) for fit, gate in gates.items()}
    return Order(stages, evaluations & set(stale), opened)


def overlap_environment(devices: int) -> Mapping[str, str] | None:
    """Return the environment of an evaluation that overlaps a fit on so many devices. None where it must not overlap.

    It must not take memory from the fit: a fit that runs out of memory goes on with the last bits of another machine.
    So it never shares an accelerator. Of accelerators that are not NVIDIA's it is not known how many there are.
    """
    if sys.platform != "linux" or any(Path("/dev", name).exists() for name in ("dxg", "kfd")):
        return None
    found = len(list(Path("/dev").glob("nvidia[0-9]*")))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    # CUDA counts those of this container from 0, whatever their files are called.
    there = [str(n) for n in range(found)] if visible is None else [n for n in visible.split(",") if n]
    if not found or not there:
        return {}
    return {"CUDA_VISIBLE_DEVICES": there[-1]} if len(there) > devices else None


def open_early(gate: Path) -> None:
    """Write what lets the next task be learned, as the stage `gate` will, where no limit can close it."""
    path = gate / "open.json"
    if not path.exists():
        write_json(path, {"open": True})


class BackgroundStage:
    """A stage that is brought up to date in the background. What it prints is kept until it is joined."""

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
        self._thread = threading.Thread(target=context.run, args=(self._work,), daemon=True)
        self._thread.start()

    def _work(self) -> None:
        started = time.monotonic()
        concurrent = ConcurrentOptions(show=self.lines.append, begun=self._begun, settings=self._settings)
        try:
            self._cached = reproduce_stage(self.name, pull=self._pull, concurrent=concurrent)
        except BaseException as error:
            self._error = error
        self.seconds = time.monotonic() - started

    def _begun(self, process: Process) -> None:
        self._process = process
        if self._stopping.is_set():
            signal_group(process, signal.SIGTERM)

    def join(self) -> bool:
        """Wait for its end. Return whether its outputs came from the cache.

        Raises:
            StageFailedError: it ended badly.
        """
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self._cached

    def print_all(self) -> None:
        """Print what it printed."""
        for line in self.lines:
            echo(line)

    def stop(self) -> None:
        """End it, and what it has started."""
        self._stopping.set()
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if self._process is not None:
                signal_group(self._process, sign)
            self._thread.join(STOP_SECONDS)
            if not self._thread.is_alive():
                return
