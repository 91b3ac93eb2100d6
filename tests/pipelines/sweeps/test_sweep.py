"""Sweeps: which chains they are made of, what they share, what comes out, and how they end."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
from rich.console import Console
from typer.testing import CliRunner

from pipelines.audits.retire.command import retire
from pipelines.cli.app import app
from pipelines.orchestration.attempts import Attempts
from pipelines.project.errors import InputError
from pipelines.project.layout import TURNS
from pipelines.project.params import Params
from pipelines.sweeps.grid import default_name, make_chains, read_axes
from pipelines.sweeps.here import may_begin, only_sweep
from pipelines.sweeps.results import Result, as_json, result_table, write_table
from pipelines.sweeps.workspace import Workspace, make_workspace, read_project
from pipelines.versioning.plan import read_plan
from tests.support.commands import call, environment
from tests.support.folders import working_in
from tests.support.forked_python import forking
from tests.support.prefect_home import copy_home
from tests.support.repository import REPOSITORY
from tests.support.stand_in_chain import DVC_YAML, EVALUATE, FIT, REPORT, preload_nothing
from tests.support.worker_site import Site


def wait_for(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.2)


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped parameters, in a folder of their own."""
    shutil.copy(REPOSITORY / "params.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "params.yaml"


# Which chains


def test_a_sweep_is_the_product_of_its_values_each_a_whole_valid_file(params: Path) -> None:
    chains = make_chains(read_axes(["seed=1994,1993", "adapter.method=sdlora,olora"]))

    assert [chain.title for chain in chains] == [
        "adapter.method=olora seed=1993",
        "adapter.method=olora seed=1994",
        "adapter.method=sdlora seed=1993",
        "adapter.method=sdlora seed=1994",
    ]
    before = Params.load()
    for chain in chains:
        read = Params.parse(chain.params, origin="chain")
        assert (read.adapter.method, read.seed) == tuple(chain.values.values())
        assert read.tasks == before.tasks
        assert len(chain.params.splitlines()) == len(params.read_text().splitlines())
    assert len({chain.name for chain in chains}) == 4


def test_the_same_sweep_typed_otherwise_is_the_same(params: Path) -> None:
    one, other = (
        read_axes(["seed=2,1", "adapter.penalty=0.5,null"]),
        read_axes(["adapter.penalty=null,0.5", "seed=1,2"]),
    )
    assert list(one.items()) == list(other.items())
    assert default_name(one) == default_name(other)
    assert default_name(one) != default_name(read_axes(["seed=1,3", "adapter.penalty=null,0.5"]))


def test_lists_and_blocks_are_values_as_in_the_file(params: Path) -> None:
    chains = make_chains(read_axes(["adapter.targets=[q, v],null", "adapter.rank_schedule={t01: 8}"]))
    found = [Params.parse(chain.params, origin="chain").adapter for chain in chains]
    assert [adapter.targets for adapter in found] == [("q", "v"), None]
    assert all(dict(adapter.rank_schedule) == {"t01": 8} for adapter in found)


def test_a_chain_keeps_its_name_when_the_sweep_grows(params: Path) -> None:
    few = {chain.title: chain.name for chain in make_chains(read_axes(["seed=2,3"]))}
    many = {chain.title: chain.name for chain in make_chains(read_axes(["seed=1,2,3"]))}
    assert few.items() <= many.items()


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("seed", "expected KEY=VALUE,VALUE"),
        ("seed=", "expected KEY=VALUE,VALUE"),
        ("seed=1,1", "seed: the value 1 stands there twice"),
        ("seed=[1", "sweep: seed: line 1: not valid YAML"),
        ("rank=1,2", "rank: no such parameter"),
        ("adapter=1", "adapter is a block of parameters"),
        ("tasks=1,2", "tasks is not swept: the order of the classes"),
        ("fetch.digits.seed=1,2", r"fetch\.digits\.seed is not swept"),
        ("gate.fall=0.1", "gate.fall is not swept: a limit"),
        ("approvals.t01=1", "approvals.t01 is not swept"),
        ("workers.pool=a,b", "workers.pool is not swept"),
        ("training.checkpoint_seconds=1,2", "it changes nothing"),
        ("adapter.metod=sdlora", r"adapter.metod=sdlora: adapter.metod: unknown key; did you mean method\?"),
        ("seed.x=1", r"seed\.x: no such parameter"),
        ("seed=2026-01-01", "is a date"),
        ("seed=one", "seed: expected a whole number, found the text"),
        ("training.epochs=0,1,2", "training.epochs=0: training.epochs: expected at least 1"),
        ("adapter.rank=-1,0,1", "found -1; correct it; 2 of 3 combinations are not valid"),
        ("adapter.method=joint,sdlora", r"method=joint: adapter.head: found \"rgda\", expected linear"),
    ],
)
def test_what_cannot_be_swept_is_one_line_before_anything_is_made(
    params: Path, argument: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as fault:
        make_chains(read_axes([argument]))
    assert "\n" not in str(fault.value)
    assert list(params.parent.iterdir()) == [params]


def test_a_key_stands_once_and_chains_begin_with_images_that_are_there(params: Path) -> None:
    with pytest.raises(InputError, match="seed stands there twice"):
        read_axes(["seed=1", "seed=2"])
    text = params.read_text()
    old = "t01: {after: t00, source: data/raw/digits"
    assert old in text
    params.write_text(text.replace(old, "t01: {after: t00, source: ledger/retired/t01"))
    with pytest.raises(InputError, match="the images of t01 are deleted"):
        make_chains(read_axes(["seed=1"]))


# What comes out


def results_of(*numbers: float | None) -> list[Result]:
    return [
        Result(error="it broke")
        if number is None
        else Result({"last_accuracy": number, "average_accuracy": number + 0.01, "forgetting": 0.1 / 3})
        for number in numbers
    ]


def test_the_table_has_every_chain_and_the_spread_over_seeds(params: Path, tmp_path: Path) -> None:
    axes = read_axes(["seed=1,2,3", "adapter.method=olora,sdlora"])
    results = results_of(0.9, 0.8, 0.7, 0.5, None, None)
    table = as_json(axes, make_chains(axes), results)
    write_table(tmp_path / "sweep/x", table)
    first = {path.name: path.read_bytes() for path in (tmp_path / "sweep/x").iterdir()}
    write_table(tmp_path / "sweep/x", as_json(axes, make_chains(axes), results))

    assert first == {path.name: path.read_bytes() for path in (tmp_path / "sweep/x").iterdir()}
    assert set(first) == {"table.csv", "table.json"}
    rows = list(csv.DictReader(first["table.csv"].decode().splitlines()))
    assert rows[0] == {
        "adapter.method": "olora",
        "seed": "1",
        "last_accuracy": "0.9",
        "average_accuracy": "0.91",
        "forgetting": "0.033333",
        "error": "",
    }
    assert [row["error"] for row in rows] == ["", "", "", "", "it broke", "it broke"]
    olora, sdlora = json.loads(first["table.json"])["over_seeds"]
    assert olora["values"] == {"adapter.method": "olora"}
    assert olora["last_accuracy"] == {"mean": 0.8, "deviation": 0.1}
    assert (sdlora["seeds"], sdlora["of"]) == (1, 3)
    assert sdlora["last_accuracy"] == {"mean": 0.5, "deviation": None}


def printed(table: dict[str, object]) -> list[list[str]]:
    """The cells of the printed table."""
    console = Console(width=200)
    with console.capture() as capture:
        console.print(result_table(table))
    lines = [line for line in capture.get().splitlines() if "│" in line]
    return [[cell.strip() for cell in line.strip("│").split("│")] for line in lines]


def test_the_printed_table_has_a_line_for_each_combination_and_for_each_failure(params: Path) -> None:
    axes = read_axes(["seed=1,2,3", "adapter.method=olora,sdlora"])
    lines = printed(as_json(axes, make_chains(axes), results_of(0.9, 0.8, 0.7, 0.5, 0.6, None)))
    assert lines == [
        ["olora", "3", "80.0 ± 10.0", "81.0 ± 10.0", "3.3 ± 0.0", ""],
        ["sdlora", "2 of 3", "55.0 ± 7.1", "56.0 ± 7.1", "3.3 ± 0.0", ""],
        ["sdlora", "3", "failed", "", "", "it broke"],
    ]
    axes = read_axes(["adapter.rank=2,4"])
    lines = printed(as_json(axes, make_chains(axes), results_of(0.9, 0.8)))
    assert lines == [["2", "90.0", "91.0", "3.3"], ["4", "80.0", "81.0", "3.3"]]


def test_of_chains_with_the_same_fits_one_is_at_work_at_a_time() -> None:
    spaces = [Workspace(Path(name), fits=fits) for name, fits in zip("abcd", "1122", strict=True)]
    assert may_begin([0, 1, 2, 3], {}, spaces) == [0, 2]
    assert may_begin([1, 2, 3], {0: None}, spaces) == [2]
    assert may_begin([1, 3], {2: None}, spaces) == [1]


# The whole, on stand-in stages that note in `ran` beside the images that they ran

START = ("mkdir -p artifacts/model && echo start > artifacts/model/t00", "./start")
HERE = '"$(dirname "$(readlink -f images/readme)")/../'
NOTE = f'mkdir -p artifacts/model; echo "$(basename $0) $1" >> {HERE}ran"\n'
BUSY = f'while test -f {HERE}slow"; do touch {HERE}busy"; sleep 0.1; done\n'
RANK = "grep '^  rank:' params.yaml >> artifacts/model/$1\n"
HOW = "(cat artifacts/model/$1; sed -n '/^evaluation:/,/^gate/p' params.yaml) > artifacts/evaluation/$1/how\n"
FAIL = """if grep -q 'batch_size: 13' params.yaml; then
  echo '{"status": 2, "kind": "input", "line": "error: unlucky"}' > "$SDLORA_OUTCOME_FILE"
  echo 'error: unlucky' >&2; exit 2
fi
"""


def without_head(script: str) -> str:
    """The lines of a script that do something else than to note that it ran."""
    return "".join(
        line for line in script.splitlines(True) if not line.startswith("#!") and ">> ran" not in line
    )


@pytest.fixture
def project(make_project: Callable[[dict[str, str]], Path], monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project of two tasks of which the rank, and nothing else, reaches a fit."""
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0]
    text += 'tasks:\n  t01: {after: t00, source: images, classes: ["a"]}\n'
    text += '  t02: {after: t01, source: images, classes: ["b"]}\n'
    stages = DVC_YAML.replace(*START).replace("- code\n", "- start\n")
    stages = stages.replace(
        "      - artifacts/evaluation\n", "      - artifacts/evaluation\n      - report\n"
    )
    for stage, its in (
        ("fit", "deps:\n        - ${item.source}\n"),
        ("evaluate", "params:\n        - evaluation\n      deps:\n"),
    ):
        stages = stages.replace(f"deps:\n        - {stage}\n", f"{its}        - {stage}\n")
    stages = stages.replace("        - tasks.${key}\n", "")
    scripts = {
        "start": "echo start > artifacts/model/t00\n",
        "fit": BUSY + FIT + RANK,
        "evaluate": EVALUATE + HOW + FAIL,
        "report": REPORT,
    }
    scripts = {name: f"#!/bin/sh\n{NOTE}{without_head(text)}" for name, text in scripts.items()}
    files = {"dvc.yaml": stages, "params.yaml": text, "images/readme": ""}
    folder = make_project({**files, **scripts, ".gitignore": "/ran\n/artifacts/\n/.sdlora/\n"})
    for name in scripts:
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:1/api")
    preload_nothing(monkeypatch)
    return folder


def ran(folder: Path) -> list[str]:
    """What ran since the last call, sorted: chains run side by side."""
    text = (folder / "ran").read_text() if (folder / "ran").exists() else ""
    (folder / "ran").unlink(missing_ok=True)
    return sorted(line.strip() for line in text.splitlines())


@pytest.fixture
def forked(preloaded: None, servers: dict[str, str]) -> Iterator[None]:
    """Have the runs of a sweep forked, which would load DVC each."""
    with forking(servers):
        yield


def sweep(*arguments: str) -> tuple[int, str]:
    """Call `sdlora sweep` in this process; return its status and what it printed."""
    done = CliRunner().invoke(app, ["sweep", *arguments], env={"COLUMNS": "200"})
    return (
        (done.exit_code, done.output)
        if done.exception is None
        else (done.exit_code, f"{done.output}{done.exception}")
    )


FIT_ONE = ["fit t01", "fit t02"]
TEST_ONE = ["evaluate t01", "evaluate t02", "report"]


def test_a_workspace_has_the_code_of_its_beginning_the_images_and_the_caches(project: Path) -> None:
    with (project / ".dvc/config").open("a") as config:
        config.write("['remote \"shared\"']\n    url = ../../remote\n")
    (project / "params.yaml").write_text(
        (project / "params.yaml")
        .read_text()
        .replace("weights:  ", "weights: mine.safetensors")
        .replace("sha256:  ", f"sha256: {'a' * 64}")
    )
    before = read_plan(["t01", "t02"])
    (chain,) = make_chains(read_axes(["adapter.rank=3"]))
    shared = read_project()
    space = make_workspace(shared, "x", chain.name, chain.params)
    again = make_workspace(read_project(), "x", chain.name, chain.params)

    assert space == again
    folder = space.folder
    assert folder.parent == project / ".sdlora/sweeps/x"
    assert Params.load(folder / "params.yaml").adapter.rank == 3
    assert (folder / "images").resolve() == project / "images"
    assert (folder / "mine.safetensors").readlink() == project / "mine.safetensors"
    settings = call(folder, "dvc", "config", "--list")
    assert f"remote.shared.url={project.parent / 'remote'}" in settings
    assert f"cache.dir={project / '.dvc/cache'}" in settings
    code = (folder / "fit").read_text()
    (project / "fit").write_text("edited meanwhile")
    assert (folder / "fit").read_text() == code
    assert os.access(folder / "fit", os.X_OK)
    assert read_project().code != shared.code
    assert read_plan(["t01", "t02"]).order == before.order
    assert call(project, "git", "status", "--porcelain", "--", ".sdlora") == ""


def test_images_are_not_retired_while_chains_of_sweeps_may_hold_them(project: Path) -> None:
    (chain,) = make_chains(read_axes(["seed=3"]))
    make_workspace(read_project(), "x", chain.name, chain.params)
    with pytest.raises(InputError, match=r"delete \.sdlora/sweeps"):
        retire("t01", by="somebody", why="asked to", dry=True, yes=False)


def test_stages_are_the_same_for_chains_that_differ_elsewhere(project: Path) -> None:
    chains = make_chains(read_axes(["adapter.rank=2,4", "evaluation.batch_size=8,16"]))
    shared = read_project()
    spaces = [make_workspace(shared, "x", chain.name, chain.params) for chain in chains]
    turns = [json.loads((space.folder / TURNS).read_text())["stages"] for space in spaces]
    kinds = {name: [turn[name] for turn in turns] for name in turns[0]}
    shape = {name: [keys.index(key) for key in keys] for name, keys in kinds.items()}
    assert shape == {
        "start": [0, 0, 0, 0],
        **{key: [0, 0, 2, 2] for key in ("fit@t01", "fit@t02")},
        **{key: [0, 1, 2, 3] for key in ("evaluate@t01", "evaluate@t02", "report")},
    }
    assert [space.fits for space in spaces] == kinds["fit@t02"]


@pytest.mark.parametrize("name", ["..", "a/b", "", ".hidden", "x" * 99])
def test_a_name_from_elsewhere_leads_nowhere_else(project: Path, name: str) -> None:
    (chain,) = make_chains(read_axes(["seed=3"]))
    shared = read_project()
    for sweep_name, chain_name in ((name, "chain"), ("sweep", name)):
        with pytest.raises(InputError, match="is not one for a folder"):
            make_workspace(shared, sweep_name, chain_name, chain.params)


def test_a_worker_with_other_code_and_paths_that_lead_out_are_refused(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines.sweeps.flow import run_chain

    monkeypatch.setenv("SDLORA_PROJECT", str(project))
    (chain,) = make_chains(read_axes(["seed=3"]))
    with pytest.raises(InputError, match=r"has other code"):
        run_chain("x", "chain", chain.params, read_project().code[::-1], Attempts(uuid4()))
    out = chain.params.replace("weights:  ", "weights: ../../../../mine.safetensors")
    out = out.replace("sha256:  ", f"sha256: {'a' * 64}")
    with pytest.raises(InputError, match="leads out of the project"):
        make_workspace(read_project(), "x", "chain", out)
    assert not (project / ".sdlora/sweeps/x").exists()


def test_many_chains_a_lost_server_and_a_second_sweep_are_refused(project: Path) -> None:
    many = f"seed={','.join(map(str, range(21)))}"
    assert "these are 21 chains" in sweep(many)[1]
    assert "no Prefect server (http://127.0.0.1:1/api does not answer)" in sweep("seed=1,2")[1]
    with only_sweep("x"):
        assert "x is at work already" in sweep("seed=1,2", "--out", "sweep/x", "--local", "1")[1]
    assert not (project / "sweep").exists()
    assert ran(project) == []


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_what_chains_have_in_common_is_computed_once(project: Path) -> None:
    wanted = ["adapter.rank=2,4", "evaluation.batch_size=8,16", "--out", "sweep/x", "--local", "3"]
    status, output = sweep(*wanted)

    assert status == 0, output
    # The rank reaches the fits, and the batch size of the test does not.
    assert ran(project) == sorted(["start", *2 * FIT_ONE, *4 * TEST_ONE])
    table = json.loads((project / "sweep/x/table.json").read_text())
    assert [row["last_accuracy"] for row in table["chains"]] == [0.875] * 4
    assert "[1/4] adapter.rank=2 evaluation.batch_size=8 …\n" in output
    assert "[4/4] adapter.rank=4 evaluation.batch_size=16  last accuracy 87.5 %, " in output
    assert "sweep/x/table.csv" in output

    before = (project / "sweep/x/table.csv").read_bytes()
    assert sweep(*wanted)[0] == 0
    assert ran(project) == []
    assert (project / "sweep/x/table.csv").read_bytes() == before


@pytest.mark.slow
@pytest.mark.usefixtures("forked")
def test_a_chain_that_fails_is_a_line_and_the_others_go_on(project: Path) -> None:
    status, output = sweep("evaluation.batch_size=8,13,16", "--out", "sweep/x", "--local", "1")

    assert status == 1
    assert ran(project) == sorted(["start", *FIT_ONE, *2 * TEST_ONE, "evaluate t01"])
    rows = json.loads((project / "sweep/x/table.json").read_text())["chains"]
    assert [row["last_accuracy"] for row in rows] == [0.875, None, 0.875]
    assert rows[1]["error"] == "unlucky"
    log = output.partition("all that it said: ")[2].partition("\n")[0]
    assert "unlucky" in Path(log).read_text()


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded")
def test_killed_in_a_fit_it_leaves_nothing_behind_and_goes_on(
    finished: tuple[Path, str], tmp_path: Path
) -> None:
    """The project's own chain is one of the two: every number and every stage of it is there already."""
    folder = tmp_path / "project"
    shutil.copytree(finished[0], folder, symlinks=True)
    own = Params.load(folder / "params.yaml").seed
    command = ["sdlora", "sweep", f"seed=7,{own}", "--out", "sweep/x", "--local", "1"]
    first = subprocess.Popen(command, cwd=folder, env=environment(), stdout=subprocess.DEVNULL)
    wait_for(
        lambda: any(
            "fit@t01 …" in log.read_text() for log in folder.glob(".sdlora/sweeps/x/*/.sdlora/run.log")
        )
    )
    family = psutil.Process(first.pid).children(recursive=True)
    first.send_signal(signal.SIGKILL)
    first.wait()
    # Also for the last of them to be forgotten: DVC takes the locks of a process whose number is in use for held.
    assert psutil.wait_procs(family, timeout=60)[1] == []
    assert not working_in(folder)
    assert not (folder / "sweep").exists()

    output = call(folder, *command)

    rows = json.loads((folder / "sweep/x/table.json").read_text())["chains"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert [row["values"]["seed"] for row in rows] == [7, own]
    assert rows[1]["last_accuracy"] == metrics["last_accuracy"]
    assert rows[0]["error"] is None
    assert "mean ± standard deviation over seeds" in output
    (journal,) = folder.glob(".sdlora/sweeps/x/7-*/ledger/journal.jsonl")
    made = {json.loads(line)["stage"].partition("@")[0] for line in journal.read_text().splitlines()}
    assert made == {"fit", "freeze", "evaluate", "gate", "report"}
    assert not list(folder.glob(f".sdlora/sweeps/x/{own}-*/ledger/journal.jsonl"))


@pytest.mark.slow
@pytest.mark.usefixtures("preloaded")
def test_a_worker_of_a_real_server_computes_each_chain_in_its_own_clone(
    project: Path, prefect_home: Path, prefect_preloaded: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "remote").mkdir()
    call(project, "dvc", "remote", "add", "-d", "shared", str(tmp_path / "remote"))
    person = ("-c", "user.name=tester", "-c", "user.email=tester@localhost")
    call(project, "git", "add", ".")
    call(project, "git", *person, "commit", "-qm", "first")
    (tmp_path / "origin").symlink_to(project)
    site = Site(tmp_path, prefect_preloaded)
    copy_home(prefect_home, tmp_path / "prefect")
    try:
        site.serve()
        wanted = ["sdlora", "sweep", "evaluation.batch_size=8,13", "--out", "sweep/x"]
        early = site.finish(*wanted, folder=project)
        assert (early.returncode, early.stdout) == (2, "")
        assert "no deployment sweep/project; call sdlora deploy" in early.stderr
        site.call("sdlora", "deploy", folder=project)
        one = site.clone("one")
        site.work_in(one)
        done = site.finish(*wanted, folder=project)
    finally:
        site.end()
    assert done.returncode == 1, done.stdout + done.stderr
    assert ran(project) == []
    assert ran(one) == sorted(["start", *FIT_ONE, *TEST_ONE, "evaluate t01"])
    rows = json.loads((project / "sweep/x/table.json").read_text())["chains"]
    assert [row["last_accuracy"] for row in rows] == [0.875, None]
    assert rows[1]["error"] == "unlucky"
