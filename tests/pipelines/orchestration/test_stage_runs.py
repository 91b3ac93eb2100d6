"""A stage is its plain function; a Prefect server shows it, and never decides what becomes of it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from pipelines.orchestration.server import PREFECT_SETTINGS
from pipelines.orchestration.stage_runs import launch, make_flow
from pipelines.project.environment import (
    OUTCOME_FILE,
    PARENT_FLOW_RUN,
    PREFECT_SECONDS,
    WORKERS_PROJECT,
)
from pipelines.runtime.stage import Stage, StageResult, stage
from pipelines.runtime.stage_outcome import DONE, StageOutcome, read_outcome
from tests.support.bad_server import bad_server
from tests.support.commands import finish_forked
from tests.support.forked_python import PREFECT_SOCKET
from tests.support.prefect_home import copy_home
from tests.support.repository import REPOSITORY


@stage
def measure(task: str, *, out: Path) -> StageResult:
    """A stage that leaves a file."""
    out.write_text(task)
    return StageResult([{"task": task, "accuracy": 0.5}])


BIRDS = {WORKERS_PROJECT: "birds"}


def run_script(text: str, folder: Path, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process of its own, as DVC runs a stage."""
    script = folder / "program.py"
    script.write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **settings}
    return subprocess.run(
        [sys.executable, str(script)],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def run_forked(
    text: str, folder: Path, servers: dict[str, str], **settings: str
) -> subprocess.CompletedProcess[str]:
    """Run a Python program in a process that has Prefect already, as the fork server of stages runs a stage."""
    script = folder / "program.py"
    script.write_text(text, encoding="utf-8")
    environment = {**os.environ, **PREFECT_SETTINGS, **settings}
    return finish_forked(servers[PREFECT_SOCKET], folder, ["python", str(script)], environment)


MEASURE = """
from pathlib import Path
from pipelines.orchestration.stage_runs import launch
from pipelines.runtime.stage import StageResult, stage

@stage
def measure(task, *, out):
    out.write_text(task)
    return StageResult([{"task": task, "accuracy": 0.5}])

launch(measure, task="t07", out=Path("out"))
"""


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a stage cost is written into the working directory."""
    monkeypatch.chdir(tmp_path)


def test_a_stage_called_is_its_plain_function(tmp_path: Path) -> None:
    assert measure.name == "measure"
    assert measure("t01", out=tmp_path / "out") == measure.fn("t01", out=tmp_path / "out")


def test_without_a_server_the_function_runs_plainly_and_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    launch(measure, task="t02", out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "t02"
    line = "prefect: no server (PREFECT_API_URL is not set); running measure@t02 plainly\n"
    assert capsys.readouterr().err == line


@pytest.mark.parametrize("url", ["http://127.0.0.1:1/api", "http://no such host/api", "nonsense"])
def test_a_server_that_does_not_answer_is_not_waited_for(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", url)
    launch(measure, task="t02", out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "t02"
    assert (
        capsys.readouterr().err
        == f"prefect: no server ({url} does not answer); running measure@t02 plainly\n"
    )


def test_a_plain_stage_loads_no_prefect(tmp_path: Path) -> None:
    done = run_script(MEASURE + "import sys; assert 'prefect' not in sys.modules", tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def broken_server() -> Iterator[str]:
    """A server that says it is well and then fails at everything."""

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path.endswith("/health") else 500)
            self.end_headers()

        def do_POST(self) -> None:
            self.send_response(500)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Broken)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/api"
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.mark.slow
def test_a_server_that_fails_at_once_costs_two_lines(
    broken_server: str, prefect_preloaded: dict[str, str], tmp_path: Path
) -> None:
    done = run_forked(MEASURE, tmp_path, prefect_preloaded, PREFECT_API_URL=broken_server)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "t07"
    lines = done.stderr.splitlines()
    assert len(lines) == 2, done.stderr
    assert lines[0].startswith("prefect: the server failed (")
    assert lines[1] == "prefect: measure@t07 was not started by the server; running it plainly"


@pytest.mark.slow
@pytest.mark.parametrize("how", ["slow", "busy"])
def test_a_server_that_takes_for_ever_is_gone_without_after_a_while(
    how: str, prefect_url: str, prefect_preloaded: dict[str, str], tmp_path: Path
) -> None:
    """First from the beginning, then after it was well until the work began."""
    patience = {PREFECT_SECONDS: "2"}
    with bad_server(how) as url:
        done = run_forked(MEASURE, tmp_path, prefect_preloaded, PREFECT_API_URL=url, **patience)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [
        "prefect: the server failed (no answer within 2 s); measure@t07 does not depend on it",
        "prefect: measure@t07 was not started by the server; running it plainly",
    ]
    assert (tmp_path / "out").read_text() == "t07"
    (tmp_path / "out").unlink()

    text = MEASURE.replace("t07", "t08").replace(
        "    out.write_text", "    Path('begins').touch()\n    out.write_text"
    )
    text += "from pipelines.runtime.deadline import end_if_given_up\nend_if_given_up(0)\n"
    settings = {**patience, **BIRDS, "PREFECT_HOME": str(tmp_path / "home")}
    with bad_server(how, real=prefect_url, begins=tmp_path / "begins") as url:
        done = run_forked(text, tmp_path, prefect_preloaded, PREFECT_API_URL=url, **settings)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "t08"
    assert (
        done.stderr
        == "prefect: the server failed (no answer within 2 s); measure@t08 does not depend on it\n"
    )


@pytest.mark.slow
def test_a_server_that_dies_in_the_middle_does_not_fail_finished_work(
    prefect_home: Path, prefect_preloaded: dict[str, str], tmp_path: Path
) -> None:
    copy_home(prefect_home, tmp_path / "prefect")
    done = run_forked(
        """
import os
from pathlib import Path
from pipelines.runtime.progress import progress
from pipelines.orchestration.server import prefect_server
from pipelines.orchestration.stage_runs import current_flow_run, launch
from pipelines.runtime.stage import StageResult, stage

@stage
def measure(task, *, out):
    assert current_flow_run()
    with progress("measure", total=2) as bar:
        bar.update(1)
        # The server is the only child of this process.
        os.kill(int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0]), 9)
        bar.update(2)
    out.write_text(task)
    return StageResult([{"task": task}])

with prefect_server(Path("prefect")) as wait:
    wait()
    launch(measure, task="t07", out=Path("out"))
""",
        tmp_path,
        prefect_preloaded,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "t07"
    assert "Traceback" not in done.stderr
    assert "prefect: " in done.stderr


@pytest.mark.slow
def test_work_that_was_told_to_stop_is_not_begun_again_when_the_server_is_gone_too(
    prefect_home: Path, prefect_preloaded: dict[str, str], tmp_path: Path
) -> None:
    """As when `sdlora run` is killed: its server dies, and the fit stops on SIGTERM."""
    copy_home(prefect_home, tmp_path / "prefect")
    done = run_forked(
        """
import os
from pathlib import Path
from pipelines.orchestration.server import prefect_server
from pipelines.orchestration.stage_runs import launch
from pipelines.runtime.stage import StageResult, stage

@stage
def measure(task):
    with Path("begun").open("a") as file:
        file.write("once\\n")
    os.kill(int(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()[0]), 9)
    raise SystemExit(143)

with prefect_server(Path("prefect")) as wait:
    wait()
    launch(measure, task="t07")
""",
        tmp_path,
        prefect_preloaded,
    )
    assert done.returncode == 143, done.stderr
    assert (tmp_path / "begun").read_text() == "once\n"


@pytest.mark.slow
def test_with_a_server_a_stage_is_a_flow_run_below_the_outer_one(
    prefect_url: str, prefect_preloaded: dict[str, str], tmp_path: Path
) -> None:
    outer = f"""
import os, json, subprocess, sys
from pathlib import Path
from pipelines.orchestration.stage_runs import current_flow_run, run_linked
from pipelines.runtime.stage import Stage, StageResult

def child():
    program = Path("child.py")
    program.write_text({MEASURE!r})
    os.environ[{PARENT_FLOW_RUN!r}] = current_flow_run()
    subprocess.run([sys.executable, str(program)], check=True)
    Path("outer").write_text(current_flow_run())
    return StageResult([])

run_linked(Stage("outer", child), "outer", {{}})

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, FlowRunFilter
with get_client(sync_client=True) as client:
    run, = client.read_flow_runs(flow_run_filter=FlowRunFilter(name={{"any_": ["measure@t07"]}}))
    table, = client.read_artifacts(artifact_filter=ArtifactFilter(key={{"any_": ["birds-measure-t07"]}}))
    tracked = client.read_task_run(run.parent_task_run_id)
    found = {{
        "state": run.state.name, "parent": str(tracked.flow_run_id), "tracked": tracked.state.name,
        "parameters": run.parameters, "table": json.loads(table.data),
    }}
Path("found.json").write_text(json.dumps(found))
"""
    done = run_forked(
        outer,
        tmp_path,
        prefect_preloaded,
        PREFECT_API_URL=prefect_url,
        PREFECT_HOME=str(tmp_path / "home"),
        **BIRDS,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert json.loads((tmp_path / "found.json").read_text()) == {
        "state": "Completed",
        "parent": (tmp_path / "outer").read_text(),
        "tracked": "Completed",
        "parameters": {"task": "t07", "out": "out"},
        "table": [{"task": "t07", "accuracy": 0.5}],
    }


@pytest.mark.slow
def test_an_error_of_the_work_is_the_stages_error_and_not_prefects(
    prefect_url: str, prefect_preloaded: dict[str, str], tmp_path: Path
) -> None:
    done = run_forked(
        """
from pipelines.project.errors import InputError
from pipelines.orchestration.stage_runs import launch
from pipelines.runtime.stage import StageResult, stage

@stage
def measure(task):
    raise InputError("params.yaml: no such task")

try:
    launch(measure, task="t07")
except InputError as error:
    print(error)
""",
        tmp_path,
        prefect_preloaded,
        PREFECT_API_URL=prefect_url,
        PREFECT_HOME=str(tmp_path / "home"),
    )
    assert done.stdout == "params.yaml: no such task\n"
    assert done.stderr == ""


def test_without_a_flow_run_no_document_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> dict[str, str]:
        raise AssertionError("nobody would see it")

    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    launch(Stage("measure", lambda out: StageResult([], documents=make)), out=tmp_path / "out")


@pytest.mark.slow
def test_what_prefect_cannot_show_costs_a_line_and_nothing_more(
    prefect_url: str, prefect_preloaded: dict[str, str], tmp_path: Path
) -> None:
    done = run_forked(
        """
from pathlib import Path
from pipelines.orchestration.stage_runs import launch
from pipelines.runtime.stage import StageResult, stage

@stage
def measure(out):
    out.write_text("done")
    texts = {"measure-text": "# Good", "No such KEY": "# Bad", "measure-more": "# More"}
    return StageResult([{"task": "t07"}], documents=lambda: texts)

launch(measure, out=Path("out"))

from prefect.client.orchestration import get_client
with get_client(sync_client=True) as client:
    found = {artifact.key: artifact.data for artifact in client.read_artifacts()}
    print(found["birds-measure-text"], "birds-measure-more" in found)
""",
        tmp_path,
        prefect_preloaded,
        PREFECT_API_URL=prefect_url,
        PREFECT_HOME=str(tmp_path / "home"),
        **BIRDS,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out").read_text() == "done"
    assert done.stdout == "# Good False\n"
    (line,) = done.stderr.splitlines()
    assert line.startswith("prefect: no No such KEY of measure (")


def test_the_flow_of_a_stage_is_named_after_it_and_caches_nothing() -> None:
    flow = make_flow(measure.fn, "measure")
    assert flow.name == "measure"
    assert flow.persist_result is False
    assert flow.retries == 0


def test_a_stage_dies_with_the_process_that_started_it(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(
        """
import os, time
from pathlib import Path
from pipelines.orchestration.stage_runs import launch
from pipelines.runtime.stage import StageResult, stage

@stage
def wait():
    Path("pid").write_text(str(os.getpid()))
    time.sleep(60)

launch(wait)
"""
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", f"import subprocess; subprocess.run([{sys.executable!r}, 'child.py'])"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
    child = int((tmp_path / "pid").read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    wait_for(lambda: not running(child))


def running(pid: int) -> bool:
    """Whether a process is there and not just waiting to be buried."""
    try:
        return "(zombie)" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def test_the_names_of_the_environment_do_not_change_by_accident() -> None:
    """Other programs set and read them."""
    assert (OUTCOME_FILE, PARENT_FLOW_RUN) == ("SDLORA_OUTCOME_FILE", "SDLORA_PARENT_FLOW_RUN")


def test_a_stage_that_ran_leaves_its_outcome_where_it_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv(OUTCOME_FILE, str(tmp_path / "outcome.json"))
    assert read_outcome(tmp_path / "outcome.json") is None
    launch(measure, task="t02", out=tmp_path / "out")
    assert read_outcome(tmp_path / "outcome.json") == StageOutcome(0, DONE)
