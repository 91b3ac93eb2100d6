"""The stale stages of a plan, brought up to date one after the other. An evaluation may overlap the next fit."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from functools import partial

from pipelines.orchestration.overlap import (
    BackgroundStage,
    Order,
    open_early,
    overlap_environment,
    overlapped_order,
)
from pipelines.orchestration.run_notes import current_note
from pipelines.orchestration.stage_runs import current_flow_run
from pipelines.project.environment import PARENT_FLOW_RUN
from pipelines.project.params import Params
from pipelines.runtime.console import echo
from pipelines.runtime.machines import devices_of_fit
from pipelines.runtime.processes import environment
from pipelines.runtime.stage import Rows
from pipelines.versioning.lock_order import order_of_dvc
from pipelines.versioning.plan import Plan, read_plan
from pipelines.versioning.remote import fetch_images, fetch_inputs, mark_unpushed, push
from pipelines.versioning.repro import StageFailedError, reproduce_stage


def do_nothing() -> None:
    """Do nothing: the default of what is called between stages."""


def bring_up_to_date(
    params: Params,
    plan: Plan,
    *,
    partial_checkout: bool = False,
    before_each: Callable[[], None] = do_nothing,
    progressed: Callable[[], None] = do_nothing,
) -> Rows:
    """Run the stale stages in order. A stage whose inputs turn out to be what they were is left alone.

    Args:
        params: The project's parameters.
        plan: What is stale.
        partial_checkout: Fetch from the remote what a stage reads and this machine does not hold.
        before_each: Called before each stage.
        progressed: Called after each stage that was computed.

    Returns:
        A row for each stage that was run, or taken from the cache.
    """
    parent = environment({PARENT_FLOW_RUN: current_flow_run() or current_note() or ""})
    with parent, order_of_dvc(plan.outs, plan.deps):
        return _StaleStages(params, plan, partial_checkout, before_each, progressed).run()


class _StaleStages:
    """How far the stages of a plan are: what was done, and what is at work in the background."""

    def __init__(
        self,
        params: Params,
        plan: Plan,
        partial_checkout: bool,
        before_each: Callable[[], None],
        progressed: Callable[[], None],
    ) -> None:
        self._params, self._plan = params, plan
        self._partial_checkout = partial_checkout
        self._before_each, self._progressed = before_each, progressed
        self._read_plan = partial(read_plan, params.tasks, partial_checkout=partial_checkout)
        self._newest, self._outdated = plan, False
        self._overlap = overlap_environment(devices_of_fit(params.training.devices))
        self._order = (
            Order(plan.stale(), set(), {}) if self._overlap is None else overlapped_order(plan, params)
        )
        total = len(self._order.stages)
        self._headings = {
            name: f"[{n:{len(str(total))}}/{total}] {name}" for n, name in enumerate(self._order.stages, 1)
        }
        self._background: BackgroundStage | None = None
        self._rows: Rows = []

    def run(self) -> Rows:
        """Bring all stages up to date. Return a row for each that was not left alone."""
        try:
            for name in self._order.stages:
                self._wait_for_what_it_needs(name)
                if self._is_stale(name):
                    self._start(name)
                else:
                    echo(f"{self._headings[name]}  inputs are as before")
            self._join()
        except StageFailedError:
            with contextlib.suppress(StageFailedError):  # its failure comes again; what it has done is kept
                self._join()
            raise
        except BaseException:
            if self._background is not None:
                self._background.stop()
            raise
        return self._rows

    def _wait_for_what_it_needs(self, name: str) -> None:
        """Wait for the stage in the background if another needs it, or its place there."""
        if self._background is not None and (
            self._background.name in self._plan.needs[name] or name in self._order.overlapped
        ):
            self._join()
        if name in self._order.opened_early:
            open_early(self._order.opened_early[name])

    def _is_stale(self, name: str) -> bool:
        """Return whether a stage is stale, once all that it needs is up to date."""
        if self._plan.reasons[name]:
            return True
        if self._outdated:
            self._join()
            self._newest, self._outdated = self._read_plan(), False
        return bool(self._newest.reasons[name])

    def _start(self, name: str) -> None:
        """Run a stage, or begin it in the background."""
        self._before_each()
        echo(f"{self._headings[name]} …")
        started = time.monotonic()
        fetch_images(name, self._plan)
        if self._partial_checkout:
            fetch_inputs(name, self._plan, self._params)
        self._outdated = True
        if self._plan.remote:
            mark_unpushed(name)
        if self._overlap is not None and name in self._order.overlapped:
            self._background = BackgroundStage(name, pull=self._plan.remote, settings=self._overlap)
            return
        cached = reproduce_stage(name, pull=self._plan.remote)
        self._note(name, time.monotonic() - started, cached=cached)

    def _join(self) -> None:
        """Wait for the stage in the background, if there is one."""
        background = self._background
        if background is None:
            return
        try:
            cached = background.join()
        except StageFailedError:
            self._background = None
            background.print_all()
            raise
        self._background = None
        background.print_all()
        self._note(background.name, background.seconds, cached=cached)

    def _note(self, name: str, seconds: float, *, cached: bool) -> None:
        """Share what a stage has left, and tell that it is done."""
        if self._plan.remote:
            push(name)
        if not cached:
            self._progressed()
        echo(f"{self._headings[name]}  {'from the cache' if cached else 'done'}, {seconds:.1f} s")
        self._rows.append(
            {"stage": name, "seconds": round(seconds, 1), "from cache": "yes" if cached else "no"}
        )
