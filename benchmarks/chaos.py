"""What becomes of a chain on two workers while everything around it dies: `make chaos`.

A real Prefect server, two workers in clones of their own (each on a disk of its own, where mounting is allowed), and an
S3 server as DVC remote and checkpoint store, all on the loopback interface. New tasks arrive one after the other, and
faults strike at random moments, drawn from --seed, until there were --faults of them. A supervisor starts dead workers
again; a run that has Failed is started again as a person would, and counted.

At the end must hold, or the command ends with status 1:

* every output is, byte for byte, what one undisturbed `sdlora run` makes of the same images: the entries of dvc.lock,
  metrics.json, what lies in both clones, and each object that dvc.lock names in the remote;
* no stage was begun again once its outputs and its run-cache entry were in the remote (the report, whose metrics.json
  lies in Git, is left out), and each second computation follows a fault that struck after the first had begun;
* of all that was started, nothing runs but the two workers.

A fault is recovered when something is done that was not done before it: a checkpoint of a later step, a stage, or the
run. Seconds lost are those from the fault until then, at the earliest from when it was undone (a process woken, the
server started): what would have passed anyway, until the next checkpoint or the end of a stage, is in them.

The results go to a JSON-lines file; --write puts the last one's table into docs/explanation/reliability.md, with
--faults 0 without another run.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import boto3
import numpy as np
import psutil
from PIL import Image
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings
from ruamel.yaml import YAML

from pipelines.orchestration.server import server_trouble
from pipelines.runtime.processes import end_group

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results/chaos.jsonl")
PAGE = Path("docs/explanation/reliability.md")
BEGIN, END = "<!-- chaos: begin -->", "<!-- chaos: end -->"

BRANCH, BUCKET = "sdlora/learned", "shared"
CLONE = "SDLORA_CHAOS_CLONE"
"""Environment variable: which worker a process belongs to, however it came to be."""
EPOCHS = 250
SETTINGS = {
    "batch_size": "4",
    "rank": "2",
    "checkpoint_seconds": "1",
    "checkpoint_store": f"s3://{BUCKET}/checkpoints",
}
WORKERS = f"""workers:
  pool: gpu
  schedule: null
  inbox: data/inbox
  branch: {BRANCH}
  push: origin
  heartbeat_seconds: 30
  dead_after_seconds: 60
  attempts: 3
"""
DISK = 300
"""MiB of the disk of each worker."""
STUCK_SECONDS = 300.0
FORGOTTEN_SECONDS = 20.0
"""A run that has been Crashed for so long waits for an automation that Prefect may hold back for 15 minutes."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(condition: Callable[[], object], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"waited {seconds:.0f} s in vain for {what}")
        time.sleep(0.1)


def paint(folder: Path, seed: int) -> None:
    """Pictures of two classes that no other seed makes, divided into training and test images."""
    for name in range(2):
        noise = np.random.default_rng([seed, name])
        pattern = noise.integers(0, 200, (8, 8))
        for part, count in (("train", 6), ("test", 2)):
            place = folder / part / f"c{seed:03d}-{name}"
            place.mkdir(parents=True)
            for index in range(count):
                noisy = pattern + noise.integers(0, 55, (8, 8))
                Image.fromarray(noisy.astype(np.uint8)).save(place / f"{index}.png")


class Site:
    """The servers, the shared places, and two clones with a worker in each."""

    def __init__(self, root: Path, epochs: int) -> None:
        self.root, self.epochs = root, epochs
        self.api, self.store = free_port(), free_port()
        self.runs: set[str] = set()
        """Those of the chain; others look after them."""
        self.settings = {
            **{name: value for name, value in os.environ.items() if not name.startswith("PREFECT")},
            "PYTHONPATH": str(REPOSITORY),
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "OMP_NUM_THREADS": "1",
            "DO_NOT_TRACK": "1",
            "DVC_NO_ANALYTICS": "1",
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_HOME": str(root / "prefect"),
            "PREFECT_API_URL": f"http://127.0.0.1:{self.api}/api",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.store}",
        }
        self.clones = [root / "one", root / "two"]
        self.workers: dict[Path, subprocess.Popen[bytes]] = {}
        self.mounted: list[Path] = []
        self.server: subprocess.Popen[bytes] | None = None
        self.objects: subprocess.Popen[bytes] | None = None
        self.supervising = True
        self._supervisor = threading.Thread(target=self._supervise, daemon=True)

    def start(self, command: tuple[str, ...], folder: Path, **settings: str) -> subprocess.Popen[bytes]:
        with (self.root / f"{folder.name}.{Path(command[0]).name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                cwd=folder,
                env={**self.settings, "PWD": str(folder), **settings},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def call(self, *command: str, folder: Path) -> str:
        done = subprocess.run(command, cwd=folder, env=self.settings, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    def serve(self) -> None:
        place = self.root / "server"
        place.mkdir(exist_ok=True)
        command = ("prefect", "server", "start", "--no-ui", "--host", "127.0.0.1", "--port", str(self.api))
        self.server = self.start(command, place)
        wait_for(self.answers, 120, "the Prefect server")

    def answers(self) -> bool:
        return server_trouble(self.settings["PREFECT_API_URL"]) is None

    def build(self) -> None:
        """Everything, up to two workers that wait for work."""
        place = self.root / "store"
        place.mkdir()
        self.objects = self.start(("moto_server", "-H", "127.0.0.1", "-p", str(self.store)), place)
        make = urllib.request.Request(f"{self.settings['AWS_ENDPOINT_URL']}/{BUCKET}", method="PUT")
        wait_for(lambda: accepted(make), 60, "the S3 server")
        self.serve()
        self._make_origin()
        (self.root / "inbox").mkdir()
        for clone in self.clones:
            clone.mkdir()
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                options = ("-t", "tmpfs", "-o", f"size={DISK}m", "sdlora-chaos", str(clone))
                subprocess.run(["mount", *options], check=True, capture_output=True)
                self.mounted.append(clone)
            self.clone(clone)
        self.call("sdlora", "deploy", folder=self.clones[0])
        for clone in self.clones:
            self.work_in(clone)
        self._supervisor.start()

    def _make_origin(self) -> None:
        origin = self.root / "origin"
        skip = shutil.ignore_patterns("__pycache__", "cache", "tmp", "config.local")
        for name in ("pipelines", "sdlora", ".dvc"):
            shutil.copytree(REPOSITORY / name, origin / name, ignore=skip)
        for name in (".dvcignore", ".gitignore", "dvc.yaml"):
            shutil.copy(REPOSITORY / name, origin / name)
        paint(origin / "pictures", 0)
        text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("workers:")[0]
        for key, value in {"epochs": str(self.epochs), **SETTINGS}.items():
            text = re.sub(rf"^  {key}: .*$", f"  {key}: {value}", text, count=1, flags=re.MULTILINE)
        text = re.sub(r"^fetch:\n(  .*\n)+", "fetch: {}\n", text, flags=re.MULTILINE)
        text += WORKERS + 'tasks:\n  t01: {after: t00, source: pictures, classes: ["c000-0", "c000-1"]}\n'
        (origin / "params.yaml").write_text(text, encoding="utf-8")
        self.call("git", "init", "-q", "-b", "main", folder=origin)
        self.call("dvc", "remote", "add", "-d", "shared", f"s3://{BUCKET}/cache", folder=origin)
        self.call("git", "add", ".", folder=origin)
        person = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
        self.call("git", *person, "commit", "-qm", "first", folder=origin)

    def clone(self, folder: Path) -> None:
        self.call("git", "clone", "-q", str(self.root / "origin"), ".", folder=folder)
        (folder / "data").mkdir()
        (folder / "data/inbox").symlink_to(self.root / "inbox")

    def work_in(self, clone: Path) -> None:
        command = ("prefect", "worker", "start", "--pool", "gpu", "--limit", "1", "--name", clone.name)
        self.workers[clone] = self.start(command, clone, **{CLONE: str(clone)})

    def _supervise(self) -> None:
        """Start a worker again that has ended, as docs/how-to/workers.md says."""
        while self.supervising:
            for clone, worker in list(self.workers.items()):
                if worker.poll() is not None and self.supervising:
                    time.sleep(2)
                    self.work_in(clone)
            time.sleep(0.5)

    def processes(self, clone: Path) -> list[psutil.Process]:
        """All that belongs to a clone's worker, in whatever group or session, and to whatever parent."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                ours = process.environ().get(CLONE) == str(clone)
                if ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def active(self) -> Path | None:
        """The clone that a run is at work in."""
        return next((clone for clone in self.clones if self.part(clone, "flow")), None)

    def part(self, clone: Path, role: str) -> psutil.Process | None:
        """The process of a role: worker, flow (its child), dvc, or training (a stage, whichever it is)."""
        worker = self.workers[clone].pid
        for process in self.processes(clone):
            with contextlib.suppress(psutil.Error):
                words, parent = process.cmdline(), process.parent()
                above = parent.cmdline() if parent else []
                if {
                    "worker": process.pid == worker,
                    "flow": parent is not None
                    and parent.pid == worker
                    and process.environ().get("PREFECT__FLOW_RUN_ID") in self.runs,
                    "dvc": process.name() == "dvc repro"
                    or (words[3:4] == ["pipelines.versioning.patches"] and "push" not in words),
                    "training": "pipelines.cli.preloaded" in above
                    or any(word.endswith("bin/sdlora") for word in words[:2]),
                }[role]:
                    return process
        return None

    def close(self) -> None:
        self.supervising = False
        if self._supervisor.is_alive():
            self._supervisor.join()
        for process in (*self.workers.values(), self.server, self.objects):
            if process is not None:
                end_group(process)
        for clone in self.clones:
            for process in self.processes(clone):
                with contextlib.suppress(psutil.Error):
                    process.kill()
        for clone in self.mounted:
            subprocess.run(["umount", "-l", str(clone)], check=True)


def accepted(request: urllib.request.Request) -> bool:
    try:
        with urllib.request.urlopen(request) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


@dataclass(frozen=True)
class Computed:
    """A stage that was computed, by its journal."""

    clone: str
    began: float
    ended: float


@dataclass
class Watch:
    """What is done, and when, seen from outside: checkpoints, stages computed, what is in the remote."""

    site: Site
    progress: list[tuple[float, str]] = field(default_factory=list)
    computed: dict[str, list[Computed]] = field(default_factory=lambda: defaultdict(list))
    entries: set[bytes] = field(default_factory=set)
    """Lines of journals that have been counted: the branch brings those of one clone into the other."""
    seen: dict[str, float] = field(default_factory=dict)
    """Object of the remote → when it was first seen."""
    going: bool = True

    def __post_init__(self) -> None:
        settings = self.site.settings
        self.s3: Any = boto3.client(
            "s3",
            endpoint_url=settings["AWS_ENDPOINT_URL"],
            aws_access_key_id="testing",
            aws_secret_access_key="testing",
            region_name="us-east-1",
        )
        self._steps: dict[str, int] = {}
        self._thread = threading.Thread(target=self._look, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self.going = False
        self._thread.join()

    def names(self, prefix: str) -> list[str]:
        pages = self.s3.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        return [item["Key"] for page in pages for item in page.get("Contents", [])]

    def note(self, what: str) -> None:
        self.progress.append((time.time(), what))

    def _look(self) -> None:
        while self.going:
            self._look_at_checkpoints()
            self._look_at_journals()
            for name in self.names("cache/"):
                self.seen.setdefault(name, time.time())
            time.sleep(0.3)

    def _look_at_checkpoints(self) -> None:
        for name in self.names("checkpoints/"):
            _, key, file = name.split("/")
            step = int(file.partition("-")[0])
            if step > self._steps.get(key, -1):
                self._steps[key] = step
                self.note(f"checkpoint {key[:6]} {step}")

    def _look_at_journals(self) -> None:
        for clone in self.site.clones:
            with contextlib.suppress(OSError):
                *lines, _ = (clone / "ledger/journal.jsonl").read_bytes().split(b"\n")
                for line in lines:
                    if line not in self.entries:
                        self.entries.add(line)
                        self._count(clone.name, json.loads(line))

    def _count(self, clone: str, entry: dict[str, Any]) -> None:
        """Note that a stage was computed."""
        ended = datetime.fromisoformat(entry["ended"]).timestamp()
        if not self.computed[entry["stage"]] or entry["stage"] == "report":
            self.note(entry["stage"])
        self.computed[entry["stage"]].append(Computed(clone, ended - entry["seconds"], ended))

    def shared(self) -> dict[str, float]:
        """Stage → when its outputs and its run-cache entry were first all seen in the remote."""
        found: dict[str, float] = {}
        for name, when in list(self.seen.items()):
            if not name.startswith("cache/runs/"):
                continue
            entry = YAML(typ="safe").load(self.body(name))
            _, stage, task = entry["cmd"].split()[:3]
            label = stage if task.startswith("--") else f"{stage}@{task}"
            outs = [f"cache/files/md5/{out['md5'][:2]}/{out['md5'][2:]}" for out in entry["outs"]]
            if all(out in self.seen for out in outs):
                last = max(when, *(self.seen[out] for out in outs))
                found[label] = min(found.get(label, last), last)
        return found

    def body(self, name: str) -> bytes:
        return bytes(self.s3.get_object(Bucket=BUCKET, Key=name)["Body"].read())


class Operator:
    """Sends one new task after the other; starts a run again that has Failed, as a person would."""

    def __init__(self, site: Site, watch: Watch) -> None:
        self.site, self.watch = site, watch
        self.more = True
        self.tasks = 1
        self.runs = 0
        self.by_hand: list[str] = []
        """Why runs had to be started again."""
        self._folder: str | None = None
        self._run: Any = None
        self.idle = threading.Event()
        self._thread = threading.Thread(target=self._operate, daemon=True)
        self._thread.start()

    def _operate(self) -> None:
        while True:
            # The server may be away.
            with contextlib.suppress(Exception):
                if self._look():
                    break
            time.sleep(1)
        self.idle.set()

    def _look(self) -> bool:
        """Take the next step; return whether all is done."""
        url = self.site.settings["PREFECT_API_URL"]
        with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
            if self._run is not None:
                state = client.read_flow_run(self._run).state
                waited = state is not None and time.time() - state.timestamp.timestamp()
                forgotten = state is not None and state.is_crashed() and waited > FORGOTTEN_SECONDS
                if state is None or not (state.is_completed() or state.is_failed() or forgotten):
                    return False
                if state.is_completed():
                    self.watch.note(f"run {self._folder}")
                    if not self.more:
                        return True
                    self._folder = f"batch-{self.tasks:03d}"
                    paint(self.site.root / "inbox" / self._folder, self.tasks)
                    self.tasks += 1
                else:
                    self.by_hand.append("Crashed, and forgotten" if forgotten else str(state.message))
            deployment = client.read_deployment_by_name("learn/origin")
            parameters = {"folder": self._folder} if self._folder else {}
            self._run = client.create_flow_run_from_deployment(deployment.id, parameters=parameters).id
            self.site.runs.add(str(self._run))
            self.runs += 1
        return False


Undo = Callable[[], None]


@dataclass
class Fault:
    """One that has struck."""

    kind: str
    at: float
    during: str
    undone: float
    recovered: float | None = None


@dataclass
class Chaos:
    """Faults, each drawn and struck at a moment of its own."""

    site: Site
    watch: Watch
    draw: random.Random
    only: list[str]
    """Parts of the names of kinds; those of no name with one of them are left out."""
    struck: list[Fault] = field(default_factory=list)

    def kinds(self) -> dict[str, Callable[[], Undo | None]]:
        """All that can strike: what is called returns how it is undone, if it has to be."""
        found: dict[str, Callable[[], Undo | None]] = {}
        for role in ("training", "dvc", "flow", "worker"):
            for sign in (signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP):
                then = " for a while" if sign == signal.SIGSTOP else ""
                found[f"{sign.name} to {role}{then}"] = lambda r=role, s=sign: self.send(r, s)
        found["SIGSTOP to flow until it was given up"] = lambda: self.send("flow", signal.SIGSTOP, (65, 90))
        found["SIGSTOP to worker, then SIGKILL"] = lambda: self.send("worker", signal.SIGSTOP, kill=True)
        found["SIGSTOP to training, SIGKILL to all above it"] = self.orphan
        found["SIGKILL to all of a machine"] = self.machine
        found["server ended for a while"] = lambda: self.server(signal.SIGTERM)
        found["server killed for a while"] = lambda: self.server(signal.SIGKILL)
        found["checkpoint truncated, SIGKILL to training"] = self.truncate
        if self.site.mounted:
            found["disk full for a while"] = self.fill
        return {kind: work for kind, work in found.items() if any(part in kind for part in self.only)}

    def target(self, role: str) -> psutil.Process:
        found: list[psutil.Process] = []

        def find() -> bool:
            clone = self.site.active()
            process = self.site.part(clone, role) if clone else None
            found[:] = [process] if process else []
            return bool(found)

        wait_for(find, STUCK_SECONDS, f"a process of {role}")
        return found[0]

    def send(
        self, role: str, sign: signal.Signals, seconds: tuple[float, float] = (3, 20), *, kill: bool = False
    ) -> Undo | None:
        process = self.target(role)
        process.send_signal(sign)
        if sign != signal.SIGSTOP:
            return None
        pause = self.draw.uniform(*seconds)

        def wake() -> None:
            time.sleep(pause)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL if kill else signal.SIGCONT)

        return wake

    def orphan(self) -> None:
        training = self.target("training")
        ours = {process.pid for clone in self.site.clones for process in self.site.processes(clone)}
        above = [process for process in training.parents() if process.pid in ours]
        training.suspend()
        for process in above:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def machine(self) -> None:
        clone = self.site.active()
        if clone is None:
            clone = self.site.clones[0]
        for process in self.site.processes(clone):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()

    def server(self, sign: signal.Signals) -> Undo:
        server = self.site.server
        assert server is not None
        os.killpg(server.pid, sign)
        pause = self.draw.uniform(3, 25)

        def again() -> None:
            time.sleep(pause)
            end_group(server)
            self.site.serve()

        return again

    def truncate(self) -> None:
        before = set(self.watch.names("checkpoints/"))
        wait_for(lambda: set(self.watch.names("checkpoints/")) - before, STUCK_SECONDS, "a checkpoint")
        newest = max(set(self.watch.names("checkpoints/")) - before, key=lambda name: name.split("/")[2])
        self.target("training").kill()
        data = self.watch.body(newest)
        self.watch.s3.put_object(Bucket=BUCKET, Key=newest, Body=data[: len(data) // 2])

    def fill(self) -> Undo:
        clone = self.site.active()
        if clone is None or clone not in self.site.mounted:
            clone = self.site.mounted[0]
        ballast = clone / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(1 << 16))
                file.flush()
        pause = self.draw.uniform(5, 30)

        def free() -> None:
            time.sleep(pause)
            ballast.unlink()

        return free

    def strike(self, kind: str) -> None:
        """Wait until there is work, and a moment more; strike; undo."""
        wait_for(self.site.active, STUCK_SECONDS, "a run at work")
        time.sleep(self.draw.uniform(0, 8))
        while True:
            # A process may end between being found and being struck.
            with contextlib.suppress(psutil.NoSuchProcess):
                undo = self.kinds()[kind]()
                break
        now = time.time()
        fault = Fault(kind, at=now, during=self.doing(), undone=now)
        self.struck.append(fault)
        print(f"{len(self.struck):3} {time.strftime('%T')} {kind}, {fault.during}", flush=True)
        if undo is not None:
            undo()
            fault.undone = time.time()

    def doing(self) -> str:
        """The line of the run that is at work, as its worker shows it."""
        clone = self.site.active()
        log = self.site.root / f"{(clone or self.site.clones[0]).name}.prefect.log"
        lines = re.findall(r"\[ ?\d+/\d+\] (\S+)", log.read_text(errors="replace"))
        return f"at {lines[-1]}" if lines else "at the start"

    def settle(self) -> bool:
        """Note what has recovered; return whether all has."""
        for fault in self.struck:
            if fault.recovered is None:
                since = [when for when, _ in self.watch.progress if when > fault.undone]
                fault.recovered = since[0] if since else None
        return all(fault.recovered for fault in self.struck)

    def run(self, count: int) -> None:
        """Strike so many times, every kind before any comes again; a fifth of them before the last has recovered."""
        bag: list[str] = []
        while len(self.struck) < count:
            if not bag:
                bag = sorted(self.kinds())
                self.draw.shuffle(bag)
            self.strike(bag.pop())
            if self.draw.random() > 0.2:
                wait_for(self.settle, STUCK_SECONDS, f"recovery from {self.struck[-1].kind}")
        wait_for(self.settle, STUCK_SECONDS, "recovery from the last fault")


def undisturbed(site: Site) -> Path:
    """Compute the same chain in a clone of its own, without workers, server, remote or store."""
    folder = site.root / "undisturbed"
    folder.mkdir()
    site.clone(folder)
    params = site.call("git", "show", f"origin/{BRANCH}:params.yaml", folder=folder) + "\n"
    params = params.replace(SETTINGS["checkpoint_store"], "null")
    (folder / "params.yaml").write_text(params, encoding="utf-8")
    shutil.copy(REPOSITORY / ".dvc/config", folder / ".dvc/config")
    site.settings["PREFECT_API_URL"] = "http://127.0.0.1:1/api"
    site.call("sdlora", "run", folder=folder)
    return folder


def differences(site: Site, watch: Watch, reference: Path) -> Iterator[str]:
    """Say which outputs are not those of the undisturbed run."""
    origin = site.root / "origin"
    for name, content in (("dvc.lock", entries_of), ("metrics.json", bytes)):
        made = subprocess.run(["git", "show", f"{BRANCH}:{name}"], cwd=origin, capture_output=True).stdout
        if content(made) != content((reference / name).read_bytes()):
            yield f"{name} is not that of the undisturbed run"
    held = 0
    for clone in site.clones:
        for path in clone.glob("artifacts/**/*"):
            # Only the clone of the last run has the last report; it is compared as the remote has it.
            if path.is_file() and not path.is_relative_to(clone / "artifacts/report"):
                held += 1
                other = reference / path.relative_to(clone)
                if not (other.is_file() and other.read_bytes() == path.read_bytes()):
                    yield f"{path.relative_to(site.root)} is not that of the undisturbed run"
    named = [path for path in (reference / ".dvc/cache/files/md5").glob("??/*") if path.is_file()]
    remote = set(watch.names("cache/files/md5/"))
    metrics = hashlib.md5((reference / "metrics.json").read_bytes()).hexdigest()
    for path in named:
        name = f"cache/files/md5/{path.parent.name}/{path.name}"
        if path.parent.name + path.name == metrics:
            continue
        if name not in remote:
            yield f"{path.parent.name}{path.name} is missing in the remote"
        elif watch.body(name) != path.read_bytes():
            yield f"{path.parent.name}{path.name} is damaged in the remote"
    print(f"compared: {held} files in the clones, {len(named)} objects in the remote")


def entries_of(lock: bytes) -> object:
    """What a dvc.lock says of each stage; the order is that in which they were first run."""
    return dict(YAML(typ="safe").load(lock)["stages"])


def repeated(watch: Watch, struck: list[Fault]) -> Iterator[str]:
    """Say which stages were computed again without need."""
    shared = watch.shared()
    for label, times in watch.computed.items():
        if label == "report":
            continue
        for first, again in pairwise(times):
            if not any(first.began < fault.undone and fault.at < again.ended for fault in struck):
                yield f"{label} was computed again, and no fault had struck"
        late = [done for done in times if done.began > shared.get(label, float("inf"))]
        if late:
            yield f"{label} was begun again {late[0].began - shared[label]:.1f} s after it was in the remote"


def left(site: Site) -> list[str]:
    """What runs of all that was started, but the two workers."""
    workers = {worker.pid for worker in site.workers.values()}
    found = []
    for clone in site.clones:
        for process in site.processes(clone):
            if process.pid not in workers:
                with contextlib.suppress(psutil.Error):
                    found.append(f"{process.pid} {process.status()} {' '.join(process.cmdline())}")
    return found


def endure(faults: int, seed: int, root: Path, only: list[str], epochs: int) -> dict[str, Any]:
    """Run the whole thing; return what was measured, with what went wrong in `wrong`."""
    site = Site(root, epochs)
    watch: Watch | None = None
    wrong: list[str] = []
    try:
        site.build()
        watch = Watch(site)
        began = time.time()
        operator = Operator(site, watch)
        chaos = Chaos(site, watch, random.Random(seed), only)
        try:
            chaos.run(faults)
            operator.more = False
            wait_for(operator.idle.is_set, 2 * STUCK_SECONDS, "the end of the last run")
        except TimeoutError as error:
            return {"seed": seed, "wrong": [str(error)]} | facts(chaos, watch, operator, began)
        disturbed = facts(chaos, watch, operator, began)
        try:
            wait_for(lambda: not left(site), 90, "the end of all processes")
        except TimeoutError:
            wrong += [f"left: {line}" for line in left(site)]
        site.supervising = False
        watch.stop()
        for worker in site.workers.values():
            end_group(worker)
        wrong += repeated(watch, chaos.struck)
        wrong += differences(site, watch, undisturbed(site))
        return {"seed": seed, "wrong": wrong} | disturbed
    finally:
        if watch is not None:
            watch.stop()
        site.close()


def facts(chaos: Chaos, watch: Watch, operator: Operator, began: float) -> dict[str, Any]:
    computed = {label: len(times) for label, times in watch.computed.items() if label != "report"}
    return {
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "day": time.strftime("%F"),
        "seconds": round(time.time() - began),
        "tasks": operator.tasks,
        "runs": operator.runs,
        "by hand": operator.by_hand,
        "stages": len(computed),
        "computed": sum(computed.values()),
        "disk": bool(chaos.site.mounted),
        "faults": [
            {
                "kind": fault.kind,
                "at": round(fault.at - began, 1),
                "during": fault.during,
                "lost": round(fault.recovered - fault.at, 1) if fault.recovered else None,
            }
            for fault in chaos.struck
        ],
    }


def table(result: dict[str, Any]) -> str:
    """The faults of one run by their kinds, as Markdown."""
    faults = result["faults"]
    lines = ["| fault | times | recovered | seconds lost: median, most |", "| --- | --- | --- | --- |"]
    for kind in sorted({fault["kind"] for fault in faults}):
        lost = [fault["lost"] for fault in faults if fault["kind"] == kind]
        known = [seconds for seconds in lost if seconds is not None]
        spent = f"{statistics.median(known):.0f}, {max(known):.0f}" if known else "–"
        lines.append(f"| {kind} | {len(lost)} | {len(known)} | {spent} |")
    known = [fault["lost"] for fault in faults if fault["lost"] is not None]
    lines.append(
        f"| all | {len(faults)} | {len(known)} | {statistics.median(known or [0]):.0f}, {max(known or [0]):.0f} |"
    )
    return "\n".join(lines)


def summary(result: dict[str, Any]) -> str:
    """The rest of what was measured, in sentences."""
    again = result["computed"] - result["stages"]
    hand = Counter(re.sub(r" \(.*", "", line) for line in result["by hand"])
    reasons = "".join(f"; {count} of them: {line}" for line, count in hand.items())
    return (
        f"Seed {result['seed']}, {result['day']}, {result['machine']}, shared with other work: "
        f"{len(result['faults'])} faults in {result['seconds'] / 60:.0f} minutes, {result['tasks']} tasks. "
        f"{result['stages']} stages were computed {result['computed']} times: {again} again, after a fault. "
        f"Started again by hand: {len(result['by hand'])}{reasons}."
    )


def write(results: Path) -> None:
    """Put the last result's table between the markers of docs/explanation/reliability.md."""
    result = json.loads(results.read_text(encoding="utf-8").splitlines()[-1])
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    text = textwrap.fill(summary(result), 118)
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n\n{table(result)}\n{END}{after}", encoding="utf-8")


def main() -> int:
    """Endure; print the table, and what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--faults", type=int, default=50, help="how many strike")
    parser.add_argument("--seed", type=int, default=0, help="draws them")
    parser.add_argument(
        "--only", action="append", metavar="PART", help="kinds with this in their name; may be repeated"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS, help="of each fit, that faults strike in")
    parser.add_argument("--results", type=Path, default=RESULTS, help="gets a line")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} at the end")
    parser.add_argument("--keep", type=Path, help="an empty folder to work in, which stays")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(143))  # all that was started ends with this
    if arguments.faults and not passes(arguments):
        return 1
    if arguments.write:
        write(arguments.results)
    return 0


def passes(arguments: argparse.Namespace) -> bool:
    """Endure, print and keep the result; return whether all held that must hold."""
    with TemporaryDirectory(prefix="sdlora-chaos-") as folder:
        root = (arguments.keep or Path(folder)).resolve()
        root.mkdir(parents=True, exist_ok=True)
        result = endure(arguments.faults, arguments.seed, root, arguments.only or [""], arguments.epochs)
    print(f"{table(result)}\n\n{summary(result)}")
    for line in result["wrong"]:
        print(f"wrong: {line}")
    if not result["wrong"]:
        arguments.results.parent.mkdir(exist_ok=True)
        with arguments.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, sort_keys=True) + "\n")
    return not result["wrong"]


if __name__ == "__main__":
    sys.exit(main())
