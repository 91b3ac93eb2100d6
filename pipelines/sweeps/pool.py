"""The chains of a sweep on the workers of a Prefect server: each is a flow run of the deployment sweep/workers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from uuid import UUID

from pipelines.orchestration.deployment_runs import DeploymentRuns, deployment_runs
from pipelines.orchestration.names import SWEEP, deployment_name, project_name
from pipelines.orchestration.reconcile import reschedule_crashed_runs
from pipelines.orchestration.server import patience
from pipelines.project.error_text import one_line
from pipelines.project.errors import InputError
from pipelines.runtime.console import echo, log_line
from pipelines.runtime.deadline import within
from pipelines.sweeps.grid import Chain, short_hash
from pipelines.sweeps.here import chain_label, may_begin, only_sweep
from pipelines.sweeps.results import RESULT, Result
from pipelines.sweeps.workspace import Project, Workspace, make_workspace, read_project

_TAG = "sdlora-sweep"
_POLL_SECONDS = 2.0


def run_on_pool(name: str, chains: Sequence[Chain]) -> list[Result]:
    """Have the workers bring all chains up to date. Return what came of each, in order.

    Where this process ends the runs go on. Called again, it waits for those that are at work, and has the others
    begin again, which costs little: what is done comes from the DVC remote.

    Raises:
        InputError: nothing is deployed.
    """
    with only_sweep(name):
        project = read_project()
        spaces = [make_workspace(project, name, chain.name, chain.params) for chain in chains]
        with deployment_runs(SWEEP) as runs:
            if runs is None:
                raise InputError(
                    f"sweep: the server has no deployment {deployment_name(SWEEP, project_name())}; call sdlora deploy,"
                    " or add --local 1 to compute here"
                )
            return _Pool(runs, name, project, chains, spaces).wait()


class _Pool:
    """The flow runs of a sweep: those that are scheduled or at work, and the results of those that ended."""

    def __init__(
        self,
        runs: DeploymentRuns,
        name: str,
        project: Project,
        chains: Sequence[Chain],
        spaces: Sequence[Workspace],
    ) -> None:
        self._runs, self._name, self._project = runs, name, project
        self._chains, self._spaces = chains, spaces
        self._working = {
            index: run
            for index, chain in enumerate(chains)
            if (run := runs.unfinished([_TAG, self._tag(chain)]))
        }
        self._told: dict[int, str] = {}
        self._results: dict[int, Result] = {}

    def wait(self) -> list[Result]:
        """Schedule what may begin and look at what is at work, until all have ended. A server may be gone meanwhile."""
        import httpx

        well = True
        while len(self._results) < len(self._chains):
            try:
                with within(patience()):
                    self._begin()
                    self._look()
                    self._reschedule_crashed()
                well = True
            except (httpx.TransportError, httpx.HTTPStatusError, TimeoutError) as trouble:
                if isinstance(trouble, httpx.HTTPStatusError) and trouble.response.status_code < 500:
                    raise
                if well:
                    log_line(
                        f"prefect: the server failed ({one_line(trouble)}); waiting for it, the workers go on"
                    )
                well = False
            time.sleep(_POLL_SECONDS)
        return [self._results[index] for index in range(len(self._chains))]

    def _begin(self) -> None:
        waiting = [i for i in range(len(self._chains)) if i not in self._working and i not in self._results]
        for index in may_begin(waiting, self._working, self._spaces):
            chain = self._chains[index]
            self._working[index] = self._runs.submit(
                chain.title,
                {
                    "name": self._name,
                    "chain": chain.name,
                    "params": chain.params,
                    "code": self._project.code,
                },
                [_TAG, self._tag(chain)],
            )

    def _look(self) -> None:
        states = self._runs.states(self._working.values())
        for index, run in list(self._working.items()):
            state = states[run]
            if state is None:
                continue
            result = None
            if state.completed:
                result = self._numbers(run)
            elif state.failed:
                result = Result(error=" ".join((state.message or state.name).split()))
            line = result.line if result else state.name.lower()
            if self._told.get(index) != line:
                echo(f"{chain_label(index, self._chains)}  {line}")
                self._told[index] = line
            if result is not None:
                self._results[index] = result
                del self._working[index]

    def _reschedule_crashed(self) -> None:
        """Schedule what the server has overlooked, as nobody else may until another run begins."""
        if "crashed" in self._told.values():
            reschedule_crashed_runs()

    def _numbers(self, run: UUID) -> Result:
        rows = self._runs.table(run, RESULT)
        if rows is None:
            return Result(error="completed without a result on the server; call the sweep again")
        (row,) = rows
        return Result(numbers=row)

    def _tag(self, chain: Chain) -> str:
        """Return a tag that is the same for runs that do the same."""
        return f"{chain.name}-{short_hash([self._name, self._project.code, chain.params])}"
