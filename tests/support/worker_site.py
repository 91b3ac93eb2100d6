"""A Prefect server, a shared remote, and clones with workers, on one machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from pipelines.runtime.processes import end_group
from pipelines.versioning.repro import Process
from tests.support.commands import finish_forked, fork
from tests.support.forked_python import PREFECT_SOCKET
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import NO_LIBRARIES

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient


_PRELOADED = ("prefect", "python", "sdlora")
"""Programs that are forked."""


class Site:
    """A server, a shared remote and inbox, and any number of clones with a worker in each."""

    def __init__(self, root: Path, preloaded: dict[str, str]) -> None:
        """`preloaded` names the fork server that has loaded Prefect."""
        self.root, self._preloaded = root, preloaded[PREFECT_SOCKET]
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.settings = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(NO_LIBRARIES), str(REPOSITORY)]),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PREFECT_HOME": str(root / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{port}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED": "false",
            **preloaded,
        }
        self.processes: list[Process] = []
        self._port = port
        self._client: SyncPrefectClient | None = None

    @property
    def client(self) -> SyncPrefectClient:
        """A client that is made once: each makes a connection of its own, and most of what a question costs is that."""
        from prefect.client.orchestration import get_client
        from prefect.settings import PREFECT_API_URL, temporary_settings

        if self._client is None:
            with temporary_settings({PREFECT_API_URL: self.settings["PREFECT_API_URL"]}):
                self._client = get_client(sync_client=True).__enter__()
        return self._client

    def end(self) -> None:
        """Close the client, and end whatever was started."""
        if self._client is not None:
            self._client.__exit__(None, None, None)
        for process in reversed(self.processes):
            end_group(process)

    def serve(self) -> Process:
        command = ("prefect", "server", "start", "--no-ui", "--host", "127.0.0.1", "--port", str(self._port))
        process = self.start(command, self.root, "server")
        wait_for(lambda: answers(self.settings["PREFECT_API_URL"]), 60)
        return process

    def start(self, command: tuple[str, ...], folder: Path, name: str, **settings: str) -> Process:
        settings = {**self.settings, "PWD": str(folder), **settings}
        process: Process
        with (self.root / f"{name}.log").open("wb") as log:
            if command[0] in _PRELOADED:
                process = fork(self._preloaded, folder, command, settings, log, log)
            else:
                process = subprocess.Popen(
                    command,
                    cwd=folder,
                    env=settings,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        self.processes.append(process)
        return process

    def call(self, *command: str, folder: Path | None = None) -> str:
        done = self.finish(*command, folder=folder or self.root / "one")
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def finish(self, *command: str, folder: Path) -> subprocess.CompletedProcess[str]:
        """Run a command in a folder to its end, whatever that is."""
        if command[0] in _PRELOADED:
            return finish_forked(self._preloaded, folder, command, {**self.settings, "PWD": str(folder)})
        return subprocess.run(
            command, cwd=folder, env=self.settings, capture_output=True, text=True, timeout=120
        )

    def clone(self, name: str) -> Path:
        folder = self.root / name
        self.call("git", "clone", "-q", str(self.root / "origin"), name, folder=self.root)
        (folder / "data").mkdir()
        (folder / "data/inbox").symlink_to(self.root / "inbox")
        return folder

    def work_in(self, folder: Path) -> Process:
        command = ("prefect", "worker", "start", "--pool", "gpu", "--limit", "1", "--name", folder.name)
        return self.start(command, folder, folder.name, CUDA_VISIBLE_DEVICES="0")

    def runs(self) -> list[Any]:
        from prefect.client.schemas.filters import FlowFilter, FlowFilterName
        from prefect.client.schemas.sorting import FlowRunSort

        return self.client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["learn"])),
            sort=FlowRunSort.EXPECTED_START_TIME_ASC,
        )

    def announce(self, payload: dict[str, str]) -> Any:  # noqa: ANN401 - Prefect's FlowRun
        """Send the event as `prefect event emit` does; wait for the end of the run that it starts."""
        from prefect.events import Event, Resource

        event = Event(
            event="sdlora.task-data.arrived",
            resource=Resource({"prefect.resource.id": "sdlora.inbox.origin"}),
            payload=payload,
        ).model_dump(mode="json")
        return self.ended(self.begun_by(lambda: self.client.request("POST", "/events", json=[event])))

    def begun_by(self, act: Callable[[], object]) -> UUID:
        """Do what starts a run; wait for it."""
        known = {run.id for run in self.runs()}
        act()
        wait_for(lambda: {run.id for run in self.runs()} - known, 60)
        (new,) = {run.id for run in self.runs()} - known
        return new

    def begin(self) -> UUID:
        """Start a run of the deployment."""
        deployment = self.client.read_deployment_by_name("learn/origin").id
        return self.begun_by(lambda: self.client.create_flow_run_from_deployment(deployment))

    def ended(self, run: UUID, seconds: float = 120) -> Any:  # noqa: ANN401 - Prefect's FlowRun
        def has_ended() -> bool:
            state = self.run(run).state
            return bool(state.is_completed() or state.is_failed())

        wait_for(has_ended, seconds)
        return self.run(run)

    def run(self, identity: UUID) -> Any:  # noqa: ANN401 - Prefect's FlowRun
        return self.client.read_flow_run(identity)


def answers(url: str) -> bool:
    from pipelines.orchestration.server import server_trouble

    return server_trouble(url) is None


def wait_for(condition: Callable[[], object], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.7)  # each question is work for the server
