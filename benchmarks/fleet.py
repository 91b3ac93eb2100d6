"""How many runs a real scheduler places on a fleet of workers, and what is full first.

A Prefect server on Postgres, both on 127.0.0.1, and as many workers as asked for. A worker is Prefect's own process
worker with its polling, claiming, heartbeats, events and logs. Only what it starts is a stub: no process, which would
belong to another machine, but the states of a run, told to the server by the worker itself. So many workers share a
Python process. `--real` starts `prefect worker start` and a process for each run in their place, for comparison.

Parts, for each number of workers:

* idle: the workers poll, and there is nothing to do.
* long queue: 400 runs wait when the workers begin. Runs placed a minute are those that start within a minute.
* short queue: no more than 20 wait at any time.
* arrivals: runs come evenly, half as many a minute as were placed of a short queue. Latency is from scheduled to
  started.

Then `kill`: of the processes that hold the workers one is killed by its id, with a run in the hands of each of its
workers; the automations of `sdlora deploy` have to find them. And `questions`: what a run asks the server at its
start, where so many others are at work.

CPU is in cores: the server, Postgres with all its processes, the workers, and whatever else the machine does.

    python benchmarks/fleet.py --workers 1 10 50 100
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from uuid import UUID

import psutil
from prefect import flow
from prefect.client.orchestration import PrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId
from prefect.client.schemas.objects import FlowRun
from prefect.events import emit_event
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Running, Scheduled
from prefect.utilities.engine import propose_state
from prefect.workers.process import ProcessJobConfiguration, ProcessWorker, ProcessWorkerResult

from pipelines.orchestration.deploy import automations
from pipelines.orchestration.names import WORK_TAG
from pipelines.orchestration.pages import read_all
from pipelines.orchestration.reconcile import reschedule_orphaned_runs
from pipelines.orchestration.server import server_trouble
from pipelines.project.environment import WORKERS_PROJECT
from pipelines.project.settings import Workers
from pipelines.runtime.processes import end_group

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results/fleet.jsonl"
PROJECT = "birds"
IN_A_PROCESS = 25
"""Workers that share a Python process: some 100 MB of memory each such process."""
SECONDS = "SDLORA_FLEET_SECONDS"
"""Environment variable: how long a stub fit takes."""
WINDOW = 40.0
"""Seconds that each part is looked at."""
LONG, SHORT = 400, 20
"""Runs that wait."""
BEGUN = ("RUNNING", "COMPLETED")
DEAD_AFTER, FIT_OF_THE_KILLED = 60, 40.0
_SOON = 20
"""Seconds after which a run without a sign of life counts as dead where only questions are timed."""


@flow(name="stub")
def stub_fit() -> None:
    """Take as long as a stub fit takes, in a process of its own."""
    time.sleep(float(os.environ.get(SECONDS, "0")))


class StubWorker(ProcessWorker):
    """Prefect's process worker, but for the process: the worker tells the states of a run itself."""

    type = "stub"

    async def run(
        self,
        flow_run: FlowRun,
        configuration: ProcessJobConfiguration,
        task_status: Any = None,  # noqa: ANN401 - as Prefect has it
    ) -> ProcessWorkerResult:
        """Tell that a run is Running, wait, and tell that it is Completed."""
        if task_status is not None:
            task_status.started(os.getpid())
        await propose_state(self.client, Running(), flow_run_id=flow_run.id)
        emit_heartbeat(flow_run.id)
        await asyncio.sleep(float(os.environ.get(SECONDS, "0")))
        await propose_state(self.client, Completed(), flow_run_id=flow_run.id)
        return ProcessWorkerResult(identifier=str(flow_run.id), status_code=0)


def emit_heartbeat(run: UUID) -> None:
    """Give a run's sign of life."""
    emit_event("prefect.flow-run.heartbeat", resource={"prefect.resource.id": f"prefect.flow-run.{run}"})


async def work(pool: str, names: Sequence[str]) -> None:
    """Be several workers at once, each with one run at a time. A name is that of its queue, a dash, and a number."""
    async with asyncio.TaskGroup() as group:
        for name in names:
            queue = name.partition("-")[0]
            asked = None if queue == "default" else [queue]
            worker = StubWorker(work_pool_name=pool, work_queues=asked, name=f"{pool}-{name}", limit=1)
            group.create_task(worker.start(printer=lambda *_: None))


class Usage(NamedTuple):
    """CPU seconds so far."""

    clock: float
    server: float
    postgres: float
    workers: float
    machine: float

    def share_since(self, before: "Usage") -> dict[str, float]:
        """Return the cores that each has taken since then."""
        passed = self.clock - before.clock
        used = {name: getattr(self, name) - getattr(before, name) for name in self._fields[1:]}
        used["others"] = max(
            0.0, used.pop("machine") - sum(used[name] for name in ("server", "postgres", "workers"))
        )
        return {name: round(seconds / passed, 2) for name, seconds in used.items()}


class Kind(NamedTuple):
    """Which workers."""

    workers: int
    real: bool = False
    query_seconds: float = 10.0
    fit_seconds: float = 0.0
    queues: int = 1
    """Of the pool: each worker asks for the runs of one, and runs go to one after the other."""


class Site:
    """The database, the server and the processes of workers, and their CPU time."""

    def __init__(self, root: Path, page: int) -> None:
        self.root, self.page, self.pools = root, page, 0
        root.chmod(0o755)  # for the user that Postgres runs as
        self.database_port, port = free_port(), free_port()
        self.api = f"http://127.0.0.1:{port}/api"
        address = f"postgresql+asyncpg://prefect@127.0.0.1:{self.database_port}/prefect"
        self.settings = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT")},
            "PYTHONPATH": str(REPOSITORY),
            "DO_NOT_TRACK": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_HOME": str(root / "prefect"),
            "PREFECT_API_URL": self.api,
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": address,
            "PREFECT_SERVER_API_DEFAULT_LIMIT": str(page),
        }
        self.processes: list[subprocess.Popen[bytes]] = []
        self.workers: list[subprocess.Popen[bytes]] = []
        self.ended_workers = 0.0
        self.postgres = self._start_postgres()
        command = (sys.executable, "-m", "prefect", "server", "start", "--no-ui")
        self.server = self.start((*command, "--host", "127.0.0.1", "--port", str(port)), "server")
        wait_for(lambda: server_trouble(self.api) is None, 180, "the Prefect server")

    def start(self, command: Sequence[str], name: str, **options: Any) -> subprocess.Popen[bytes]:  # noqa: ANN401
        """Start a process with a log of its name."""
        with (self.root / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                cwd=self.root,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **{"env": self.settings, **options},
            )
        self.processes.append(process)
        return process

    def _start_postgres(self) -> subprocess.Popen[bytes]:
        """Start a database with Postgres's own settings, as the user that its package makes where this one is root."""
        data = self.root / "database"
        data.mkdir()
        who: dict[str, Any] = {}
        if os.geteuid() == 0:
            who = {"user": "postgres", "group": "postgres", "extra_groups": []}
            shutil.chown(data, "postgres", "postgres")
        made = (postgres("initdb"), "-D", str(data), "-U", "prefect", "-A", "trust", "--no-sync")
        subprocess.run(made, check=True, capture_output=True, cwd=data, **who)
        address = ("-h", "127.0.0.1", "-p", str(self.database_port))
        process = self.start((postgres("postgres"), "-D", str(data), *address, "-k", ""), "postgres", **who)
        ready = (postgres("pg_isready"), "-q", *address)
        wait_for(lambda: subprocess.run(ready).returncode == 0, 60, "Postgres")
        subprocess.run((postgres("createdb"), *address, "-U", "prefect", "prefect"), check=True)
        return process

    def start_workers(self, pool: str, kind: Kind) -> None:
        """Start workers, and wait until the server has heard of each."""
        count, real = kind.workers, kind.real
        settings = {"PREFECT_WORKER_QUERY_SECONDS": str(kind.query_seconds), SECONDS: str(kind.fit_seconds)}
        environment = {"env": {**self.settings, **settings}}
        names = [f"{queue_of(index, kind.queues)}-{index:03d}" for index in range(count)]
        for first in range(0, count, 1 if real else IN_A_PROCESS):
            log = f"workers-{pool}-{first:03d}"
            some = names[first : first + IN_A_PROCESS]
            command = [sys.executable, __file__, "--be", pool, *some]
            if real:
                command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool, "--limit", "1"]
            self.workers.append(self.start(command, log, **environment))
        with get_client(sync_client=True) as client:
            wait_for(
                lambda: len(read_all(client.read_workers_for_work_pool, pool)) >= count,
                120,
                f"{count} workers",
            )

    def stop_workers(self) -> None:
        """End the workers, and keep what they have used."""
        self.ended_workers += sum(cpu_seconds(process.pid) for process in self.workers)
        for process in self.workers:
            end_group(process)
        self.workers.clear()

    def usage(self) -> Usage:
        """Return what all have used so far."""
        machine = psutil.cpu_times()
        return Usage(
            time.monotonic(),
            cpu_seconds(self.server.pid),
            cpu_seconds(self.postgres.pid),
            self.ended_workers + sum(cpu_seconds(process.pid) for process in self.workers),
            sum(machine) - machine.idle - machine.iowait - machine.guest - machine.guest_nice,
        )

    def database_bytes(self) -> int:
        """Return how large the database is."""
        address = ("-h", "127.0.0.1", "-p", str(self.database_port), "-U", "prefect")
        query = (postgres("psql"), *address, "-Atc", "select pg_database_size('prefect')", "prefect")
        return int(subprocess.run(query, check=True, capture_output=True, text=True).stdout)

    def lost_claims(self, pool: str) -> int:
        """Return how often a worker wanted a run that another had taken."""
        logs = self.root.glob(f"workers-{pool}-*.log")
        return sum(log.read_text(errors="replace").count("Aborted submission") for log in logs)

    def close(self) -> None:
        """End all that was started, the database last."""
        self.stop_workers()
        for process in reversed(self.processes):
            end_group(process)


def queue_of(index: int, queues: int) -> str:
    """Return the queue of a worker, or of a run."""
    return f"queue{index % queues}" if queues > 1 else "default"


def postgres(name: str) -> str:
    """Return the path of a program of Postgres: on the PATH, or where Debian puts it."""
    found = shutil.which(name) or next(
        map(str, sorted(Path("/usr/lib/postgresql").glob(f"*/bin/{name}"))), None
    )
    if found is None:
        raise SystemExit(f"fleet: no program {name}; install Postgres (Debian: apt install postgresql)")
    return found


def cpu_seconds(pid: int) -> float:
    """Return the CPU seconds of a process, of those below it, and of those that it has waited for."""
    try:
        top = psutil.Process(pid)
        times = [process.cpu_times() for process in (top, *top.children(recursive=True))]
    except psutil.NoSuchProcess:
        return 0.0
    waited = sum(each.children_user + each.children_system for each in times)
    return waited + sum(each.user + each.system for each in times)


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Any, seconds: float, what: str) -> None:  # noqa: ANN401
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.5)


async def submit(deployment: UUID, count: int, *, queues: int = 1, over: float = 0.0) -> float:
    """Submit runs, at once by eight at a time or evenly over so many seconds. Return the seconds that it took."""
    begun, places = time.monotonic(), asyncio.Semaphore(8)

    async def one(client: PrefectClient, index: int) -> None:
        await asyncio.sleep(over * index / count)
        async with places:
            queue = queue_of(random.randrange(queues), queues)
            await client.create_flow_run_from_deployment(deployment, state=Scheduled(), work_queue_name=queue)

    async with get_client() as client:
        await asyncio.gather(*(one(client, index) for index in range(count)))
    return time.monotonic() - begun


def runs_of(client: Any, deployment: UUID) -> list[FlowRun]:  # noqa: ANN401
    """Return all runs of a deployment."""
    of_it = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    return read_all(client.read_flow_runs, flow_run_filter=of_it)


def count(client: Any, deployment: UUID, *states: str) -> int:  # noqa: ANN401
    """Return how many runs of a deployment are in one of these states."""
    of_it = {"deployments": {"id": {"any_": [str(deployment)]}}}
    query = {**of_it, "flow_runs": {"state": {"type": {"any_": states}}}}
    return int(client.request("POST", "/flow_runs/count", json=query).json())


def latency(runs: Sequence[FlowRun]) -> dict[str, float]:
    """Return seconds from scheduled to started."""
    waits = sorted(
        (run.start_time - run.expected_start_time).total_seconds()
        for run in runs
        if run.start_time and run.expected_start_time
    )
    return {
        "median": round(statistics.median(waits), 2),
        "p95": round(waits[int(0.95 * (len(waits) - 1))], 2),
    }


def measure(site: Site, kind: Kind) -> Iterator[dict[str, Any]]:
    """Measure a number of workers: idle, on a short and a long queue, and on runs that arrive."""
    about = {**kind._asdict(), "runs in an answer": site.page}
    short = on_a_queue(site, kind, SHORT)
    yield {"part": "idle", **about, "used cores": idle(site, kind)}
    yield {"part": "short queue", **about, **short}
    yield {"part": "long queue", **about, **on_a_queue(site, kind, LONG)}
    yield {
        "part": "arrivals",
        **about,
        **on_arrivals(site, kind, max(4, round(short["placed a minute"] / 2))),
    }


@contextlib.contextmanager
def deployed(site: Site, *, real: bool = False, queues: int = 1) -> Iterator[tuple[Any, str, UUID]]:
    """Make a pool, and a deployment of the stub on it. Stop the workers at the end. Yield a client and both."""
    site.pools += 1
    pool = f"pool-{site.pools}"
    kind: type[ProcessWorker] = ProcessWorker if real else StubWorker
    template = kind.get_default_base_job_template()
    with get_client(sync_client=True) as client:
        client.create_work_pool(WorkPoolCreate(name=pool, type=kind.type, base_job_template=template))
        for index in range(queues if queues > 1 else 0):
            client.create_work_queue(queue_of(index, queues), work_pool_name=pool)
        deployment = client.create_deployment(
            client.create_flow(stub_fit),
            name=pool,
            tags=[WORK_TAG],
            work_pool_name=pool,
            path=str(REPOSITORY),
            entrypoint="benchmarks/fleet.py:stub_fit",
            job_variables={"working_dir": str(REPOSITORY)} if real else {},
        )
        yield client, pool, deployment
        site.stop_workers()
        client.delete_deployment(deployment)


def idle(site: Site, kind: Kind) -> dict[str, float]:
    """Return the cores that are used while workers ask in vain."""
    with deployed(site, real=kind.real, queues=kind.queues) as (_, pool, _):
        site.start_workers(pool, kind)
        before = site.usage()
        time.sleep(WINDOW / 2)
        return site.usage().share_since(before)


def on_a_queue(site: Site, kind: Kind, waiting: int) -> dict[str, Any]:
    """Measure how fast runs start of which so many wait. A short queue is kept as long as it is."""
    with deployed(site, real=kind.real, queues=kind.queues) as (client, pool, deployment):
        taken = asyncio.run(submit(deployment, waiting, queues=kind.queues))
        site.start_workers(pool, kind)
        while not (first := count(client, deployment, *BEGUN)):
            time.sleep(0.2)
        before, begun = site.usage(), time.monotonic()
        while time.monotonic() < begun + WINDOW and (left := count(client, deployment, "SCHEDULED")):
            if waiting == SHORT and left < SHORT:
                asyncio.run(submit(deployment, SHORT - left, queues=kind.queues))
            time.sleep(0.5)
        passed, used = time.monotonic() - begun, site.usage().share_since(before)
        started = count(client, deployment, *BEGUN)
        return {
            "submitted a minute": round(60 * waiting / taken),
            "placed a minute": round(60 * (started - first) / passed, 1),
            "lost claims a run": round(site.lost_claims(pool) / started, 2),
            "used cores": used,
        }


def on_arrivals(site: Site, kind: Kind, coming: int) -> dict[str, Any]:
    """Measure how long so many runs wait that come evenly."""
    with deployed(site, real=kind.real, queues=kind.queues) as (client, pool, deployment):
        site.start_workers(pool, kind)
        empty, before = site.database_bytes(), site.usage()
        asyncio.run(submit(deployment, coming, queues=kind.queues, over=WINDOW))
        wait_for(lambda: count(client, deployment, "COMPLETED") == coming, 300, "what arrived")
        used = site.usage().share_since(before)
        return {
            "runs": coming,
            "latency": latency(runs_of(client, deployment)),
            "database bytes a run": round((site.database_bytes() - empty) / coming),
            "used cores": used,
        }


def kill(site: Site) -> Iterator[dict[str, Any]]:
    """Kill one of two processes of workers by its id, and see its runs found, and no others begun again."""
    half = IN_A_PROCESS
    with deployed(site) as (client, pool, deployment):
        settings = Workers(
            pool=pool,
            schedule=None,
            inbox="data/inbox",
            branch=None,
            push=None,
            heartbeat_seconds=30,
            dead_after_seconds=DEAD_AFTER,
            attempts=3,
        )
        for automation in automations(PROJECT, settings, [deployment]):
            client.create_automation(automation)
        site.start_workers(pool, Kind(2 * half, query_seconds=2.0, fit_seconds=FIT_OF_THE_KILLED))
        asyncio.run(submit(deployment, 2 * half))
        wait_for(
            lambda: sum(run.start_time is not None for run in runs_of(client, deployment)) == 2 * half,
            120,
            "a run on each worker",
        )
        victim = site.workers[0]
        theirs = {f"{pool}-{queue_of(index, 1)}-{index:03d}" for index in range(half)}
        held = {
            run.id
            for run in runs_of(client, deployment)
            if run.labels.get("prefect.worker.name") in theirs and run.state and run.state.is_running()
        }
        killed = datetime.now(UTC)
        os.kill(victim.pid, signal.SIGKILL)
        victim.wait()
        wait_for(lambda: count(client, deployment, "COMPLETED") == 2 * half, 600, "the killed workers' runs")
        again = {}
        for run in runs_of(client, deployment):
            states = client.read_flow_run_states(run.id)
            begun = sorted(state.timestamp for state in states if state.is_running())
            if len(begun) > 1:
                again[run.id] = (begun[-1] - killed).total_seconds()
        yield {
            "part": "kill",
            "workers": 2 * half,
            "killed workers": half,
            "their runs": len(held),
            "found": len(held & set(again)),
            "others begun again": len(set(again) - held),
            "dead after seconds": DEAD_AFTER,
            "seconds until at work again": {
                "median": round(statistics.median(again.values()), 1),
                "most": round(max(again.values()), 1),
            },
        }


def questions(site: Site, at_work: int) -> Iterator[dict[str, Any]]:
    """Time what each run asks at its start, where so many others are at work and none has died."""
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(client.create_flow(stub_fit), name=PROJECT, tags=[WORK_TAG])
        runs = [client.create_flow_run_from_deployment(deployment, state=Running()) for _ in range(at_work)]
        time.sleep(3 * _SOON)  # a run is asked about that began so long ago
        for run in runs:
            emit_heartbeat(run.id)
        time.sleep(_SOON)
        before = site.usage()
        begun = time.monotonic()
        found = reschedule_orphaned_runs(_SOON)
        seconds = time.monotonic() - begun
        yield {
            "part": "questions",
            "at work": at_work,
            "seconds": round(seconds, 2),
            "found": found,
            "used cores": site.usage().share_since(before),
        }
        client.delete_deployment(deployment)


@contextlib.contextmanager
def open_site(page: int) -> Iterator[Site]:
    """Start a database and a server in a folder of their own. End them, and all workers, afterwards."""
    with TemporaryDirectory(prefix="sdlora-fleet-") as folder:
        site = Site(Path(folder), page)
        try:
            with temporary_settings({PREFECT_API_URL: site.api}):
                yield site
        finally:
            site.close()


def main() -> None:
    """Measure, print and keep."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--workers", type=int, nargs="*", default=[1, 10, 50, 100], help="how many, one after the other"
    )
    parser.add_argument("--real", type=int, nargs="*", default=[], help="so many with a process for each run")
    parser.add_argument(
        "--query", type=float, nargs="*", default=[10.0], help="seconds between two polls of a worker"
    )
    parser.add_argument("--queues", type=int, default=1, help="of each pool, with as many workers each")
    parser.add_argument("--page", type=int, default=200, help="runs in an answer of the server, at most")
    parser.add_argument("--kill", action="store_true", help="kill a process of workers")
    parser.add_argument("--at-work", type=int, nargs="*", default=[], help="runs at work while another asks")
    parser.add_argument("--results", type=Path, default=RESULTS, help="gets a line for each part")
    parser.add_argument("--be", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.be:
        pool, *names = arguments.be
        asyncio.run(work(pool, names))
        return
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # all that was started ends with this
    os.environ[WORKERS_PROJECT] = PROJECT
    machine = {
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "day": datetime.now(UTC).date().isoformat(),
    }
    with open_site(arguments.page) as site:
        for row in rows(site, arguments):
            row = {**machine, **row, "load": [round(each, 1) for each in os.getloadavg()]}
            print(json.dumps(row), flush=True)
            arguments.results.parent.mkdir(exist_ok=True)
            with arguments.results.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def rows(site: Site, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measure all that was asked for."""
    for query in arguments.query:
        for count in arguments.workers:
            yield from measure(site, Kind(count, query_seconds=query, queues=arguments.queues))
        for count in arguments.real:
            yield from measure(site, Kind(count, real=True, query_seconds=query))
    if arguments.kill:
        yield from kill(site)
    for count in arguments.at_work:
        yield from questions(site, count)


if __name__ == "__main__":
    main()
