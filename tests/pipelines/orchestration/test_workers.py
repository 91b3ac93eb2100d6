"""Workers of a real Prefect server on clones of a stand-in project: events, refusals, and a machine that dies."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from pipelines.orchestration.reconcile import has_shown_life
from pipelines.runtime.processes import end_group
from tests.support.folders import working_in
from tests.support.pictures import paint
from tests.support.prefect_home import copy_home
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import DVC_YAML, EVALUATE, FIT, REPORT
from tests.support.worker_site import Site, wait_for

pytestmark = pytest.mark.slow

BRANCH = "sdlora/learned"
WORKERS = """workers:
  pool: gpu
  schedule: "0 3 1 1 *"
  inbox: data/inbox
  branch: sdlora/learned
  push: origin
  heartbeat_seconds: 30
  dead_after_seconds: 60
  attempts: 3
"""
SLOW_FIT = FIT.replace("#!/bin/sh\n", "#!/bin/sh\nwhile test -f ../slow; do touch ../busy; sleep 0.2; done\n")


@pytest.fixture(scope="module")
def deployed(
    prefect_home: Path, prefect_preloaded: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The home of a server with the deployment, to be copied."""
    here = Site(tmp_path_factory.mktemp("deployed"), prefect_preloaded)
    try:
        prepare(here)
        home = copy_home(prefect_home, here.root / "prefect")
        here.serve()
        here.call("sdlora", "deploy")
    finally:
        here.end()
    return home


@pytest.fixture
def silent(deployed: Path, prefect_preloaded: dict[str, str], tmp_path: Path) -> Iterator[Site]:
    """A site whose server is not at work yet: it knows the deployment.

    There is one clone of a finished project of two tasks, and the inbox has new images.
    """
    here = Site(tmp_path, prefect_preloaded)
    try:
        prepare(here)
        copy_home(deployed, tmp_path / "prefect")
        yield here
    finally:
        here.end()


@pytest.fixture
def site(silent: Site, servers: dict[str, str]) -> Site:
    """That site with its server, where runs find fork servers and need none of their own."""
    silent.settings |= servers
    silent.serve()
    return silent


def prepare(here: Site) -> None:
    """Make the project with a clone, and the inbox."""
    origin = here.root / "origin"
    params = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("workers:")[0]
    params = params.partition("tasks:\n")[0] + WORKERS
    params += 'tasks:\n  t01: {after: t00, source: images, classes: ["a"]}\n'
    params += '  t02: {after: t01, source: images, classes: ["b"]}\n'
    files = {"dvc.yaml": DVC_YAML, "params.yaml": params, "code": "#", "images/readme": ""}
    files |= {"fit": SLOW_FIT, "evaluate": EVALUATE, "report": REPORT}
    files |= {".gitignore": "/ran\n/artifacts/\n/.sdlora/\n/data/\n"}
    shutil.copytree(REPOSITORY / ".dvc", origin / ".dvc", ignore=shutil.ignore_patterns("cache", "tmp"))
    (here.root / "remote").mkdir()
    with (origin / ".dvc/config").open("a") as config:
        config.write(f"['remote \"shared\"']\n    url = {here.root / 'remote'}\n")
    config_text = (origin / ".dvc/config").read_text()
    (origin / ".dvc/config").write_text(config_text.replace("[core]\n", "[core]\n    remote = shared\n"))
    for name, text in files.items():
        (origin / name).parent.mkdir(parents=True, exist_ok=True)
        (origin / name).write_text(text, encoding="utf-8")
        if text.startswith("#!"):
            (origin / name).chmod(0o755)
    person = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    # A first commit that is the same everywhere: the server was deployed to from another folder.
    dates = ("GIT_AUTHOR_DATE=2026-01-01T00:00Z", "GIT_COMMITTER_DATE=2026-01-01T00:00Z")
    here.call("git", "init", "-q", "-b", "main", folder=origin)
    here.call("env", *dates, "git", *person, "commit", "-q", "--allow-empty", "-m", "start", folder=origin)
    here.call("git", "add", ".", folder=origin)
    here.call("git", *person, "commit", "-qm", "first", folder=origin)
    paint(here.root / "inbox/animals/zebra", 1, 2)
    paint(here.root / "outside/cat", 2, 2)
    (here.root / "inbox/link").symlink_to(here.root / "outside")
    here.clone("one")


def test_new_images_become_a_task_and_anything_else_is_refused(site: Site) -> None:
    site.work_in(site.root / "one")
    for payload, said in (  # more that is refused stands in test_worker_flows and test_inbox
        ({"folder": "../outside"}, "not the name of a folder"),
        ({"other": "animals"}, "names no folder"),
    ):
        run = site.announce(payload)
        assert run.state.is_failed()
        assert said in run.state.message
        assert "\n" not in run.state.message
    assert not (site.root / "one/ran").exists()

    command = ("prefect", "event", "emit", "sdlora.task-data.arrived", "--resource-id", "sdlora.inbox.origin")
    payload = ("--payload", json.dumps({"folder": "animals"}))
    run = site.ended(site.begun_by(lambda: site.call(*command, *payload)))
    assert run.state.is_completed(), run.state.message
    head = site.call("git", "rev-parse", BRANCH, folder=site.root / "origin")
    assert head[:10] in run.state.message
    changed = site.call("git", "show", "--name-only", "--format=%s", BRANCH, folder=site.root / "origin")
    assert changed.split("\n") == ["Learn animals", "", "dvc.lock", "metrics.json", "params.yaml"]
    params = site.call("git", "show", f"{BRANCH}:params.yaml", folder=site.root / "origin")
    assert "t03: {after: t02, source: data/inbox/animals, classes: [zebra]}" in params
    ran = (site.root / "one/ran").read_text().splitlines()
    assert ran == ["fit t01", "evaluate t01", "fit t02", "evaluate t02", "fit t03", "evaluate t03", "report"]

    again = site.announce({"folder": "animals"})
    assert again.state.message == f"all up to date; {BRANCH} is as it was"
    assert (site.root / "one/ran").read_text().splitlines() == ran


GATE = """#!/bin/sh
if test "$1" = t01 && ! grep -q 'by: Ana' params.yaml; then
  echo '{"status": 2, "kind": "gate", "line": "error: t01 made an old task fall"}' > "$SDLORA_OUTCOME_FILE"
  exit 2
fi
mkdir -p artifacts/gate
echo open > artifacts/gate/$1
"""
GATE_STAGE = """
  gate:
    foreach: ${tasks}
    do:
      cmd: ./gate ${key}
      params:
        - approvals
      deps:
        - gate
        - artifacts/evaluation/${key}
      outs:
        - artifacts/gate/${key}
"""


EVALUATE_FOR_REAL = f"""#!{sys.executable}
import sys
from pathlib import Path
sys.path.insert(0, {str(REPOSITORY)!r})
from tests.support.evaluations import write_evaluation
task = sys.argv[1]
print(f"evaluate {{task}}", file=Path("ran").open("a"))
write_evaluation(Path("artifacts/evaluation") / task, [("a", "t01", 0, 1, 0.5)])
"""


def test_a_closed_gate_suspends_the_run_until_somebody_says_who_and_why(site: Site) -> None:
    from prefect.flow_runs import resume_flow_run
    from prefect.settings import PREFECT_API_URL, temporary_settings

    one = site.root / "one"
    (one / "dvc.yaml").write_text(DVC_YAML.rstrip() + GATE_STAGE, encoding="utf-8")
    for name, script in (("gate", GATE), ("evaluate", EVALUATE_FOR_REAL)):
        (one / name).write_text(script, encoding="utf-8")
        (one / name).chmod(0o755)
    limits = (one / "params.yaml").read_text(encoding="utf-8").replace("  new_task:  ", "  new_task: 0.9")
    (one / "params.yaml").write_text(limits, encoding="utf-8")
    start = (
        "artifacts/evaluation/t00",
        '{"step": "t00", "tasks": [], "accuracy": [], "correct": [], "samples": []}',
    )
    (one / start[0]).mkdir(parents=True)
    (one / start[0] / "metrics.json").write_text(start[1], encoding="utf-8")
    person = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    site.call("git", *person, "commit", "-qam", "a gate", folder=one)
    worker = psutil.Process(site.work_in(one).pid)
    run = site.begin()
    wait_for(lambda: site.run(run).state.is_paused(), 120)
    # A suspended run holds no process. (Resumed before its process has ended, it ends Prefect's worker.)
    wait_for(lambda: not worker.children(), 60)
    assert site.run(run).state.name == "Suspended"
    assert (one / "ran").read_text().splitlines() == ["fit t01", "evaluate t01"]

    with temporary_settings({PREFECT_API_URL: site.settings["PREFECT_API_URL"]}):
        resume_flow_run(run, run_input={"by": "Ana", "why": "a new camera"})
    done = site.ended(run, 120)
    assert done.state.is_completed(), done.state.message
    ran = (one / "ran").read_text().splitlines()
    assert ran == ["fit t01", "evaluate t01", "fit t02", "evaluate t02", "report"]
    params = site.call("git", "show", f"{BRANCH}:params.yaml", folder=site.root / "origin")
    assert "why: a new camera" in params


def test_where_a_machine_died_another_one_goes_on(site: Site) -> None:
    (site.root / "slow").touch()
    first = psutil.Process(site.work_in(site.root / "one").pid)
    command = ("prefect", "deployment", "run", "learn/origin", "--param", "folder=animals")
    run = site.begun_by(lambda: site.call(*command))
    wait_for((site.root / "busy").exists, 90)
    # What a fork server has forked for the worker is no child of it, but works in its clone.
    machine = [*working_in(site.root / "one"), first, *first.children(recursive=True)]
    while machine:
        for process in machine:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(machine, timeout=60)
        machine = working_in(site.root / "one")
    (site.root / "slow").unlink()
    site.work_in(site.clone("two"))
    done = site.ended(run, 240)
    assert done.state.is_completed(), done.state.message
    assert done.run_count == 2
    assert (site.root / "two/ran").read_text().splitlines()[-3:] == ["fit t03", "evaluate t03", "report"]
    assert "t03" in site.call("git", "show", f"{BRANCH}:params.yaml", folder=site.root / "origin")


def test_a_worker_tells_the_runs_that_are_alive_from_those_that_were_overlooked(site: Site) -> None:
    from prefect.client.orchestration import get_client
    from prefect.events import Event, Resource
    from prefect.settings import PREFECT_API_URL, temporary_settings

    url = site.settings["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        resources = [f"prefect.flow-run.{uuid4()}" for _ in range(2)]
        event = Event(
            event="prefect.flow-run.heartbeat", resource=Resource({"prefect.resource.id": resources[0]})
        )
        client.request("POST", "/events", json=[event.model_dump(mode="json")])
        minute = timedelta(minutes=1)
        wait_for(lambda: has_shown_life(client, resources[0], minute), 60)
        assert not has_shown_life(client, resources[1], minute)
        assert not has_shown_life(client, resources[0], timedelta(0))

        site.work_in(site.root / "one")
        tend = client.read_deployment_by_name("tend/origin").id
        run = client.create_flow_run_from_deployment(tend).id
        wait_for(lambda: client.read_flow_run(run).state.is_final(), 120)
        state = client.read_flow_run(run).state
        assert (state.name, state.message) == ("Completed", "nothing was overlooked")


def test_the_clock_starts_what_the_deployments_say(silent: Site) -> None:
    """With SQLAlchemy 2.1 the server made no run of any schedule, and said so in its log only."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowFilter, FlowFilterName
    from prefect.settings import PREFECT_API_URL, temporary_settings

    site = silent
    del site.settings["PREFECT_SERVER_SERVICES_SCHEDULER_ENABLED"]
    site.serve()
    url = site.settings["PREFECT_API_URL"]
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:

        def begins(flow: str) -> list[datetime]:
            named = FlowFilter(name=FlowFilterName(any_=[flow]))
            return sorted(run.expected_start_time for run in client.read_flow_runs(flow_filter=named))

        wait_for(lambda: begins("learn") and len(begins("tend")) > 1, 90)
        assert {(begin.month, begin.day, begin.hour) for begin in begins("learn")} == {(1, 1, 3)}
        first, second, *_ = begins("tend")
        assert (second - first).total_seconds() == 120


def test_a_run_that_two_workers_are_given_in_one_moment_is_worked_at_by_one(site: Site) -> None:
    """What a worker starts is started twice, as after a race in the server's database."""
    run = site.begin()
    folders = [site.root / "one", site.clone("two")]
    starts = [
        site.start(
            ("python", "-m", "prefect.engine"),
            folder,
            f"{folder.name}-engine",
            PREFECT__FLOW_RUN_ID=str(run),
        )
        for folder in folders
    ]
    assert [start.wait(120) for start in starts] == [0, 0]
    logs = [(site.root / f"{folder.name}-engine.log").read_text() for folder in folders]
    assert sorted("giving way" in log for log in logs) == [False, True]
    assert site.run(run).state.is_completed()
    ran = [(folder / "ran").read_text().splitlines() for folder in folders if (folder / "ran").exists()]
    assert ran == [["fit t01", "evaluate t01", "fit t02", "evaluate t02", "report"]]


def test_a_server_that_goes_away_for_a_while_costs_nothing_that_was_done(site: Site) -> None:
    (site.root / "slow").touch()
    site.work_in(site.root / "one")
    run = site.begin()
    wait_for((site.root / "busy").exists, 90)
    end_group(site.processes[0])
    (site.root / "slow").unlink()
    wait_for((site.root / "one/artifacts/evaluation/t01").exists, 90)
    site.serve()
    done = site.ended(run, 300)
    assert done.state.is_completed(), done.state.message
    ran = (site.root / "one/ran").read_text().splitlines()
    assert ran == ["fit t01", "evaluate t01", "fit t02", "evaluate t02", "report"]
