"""What a run costs beside its fits, in wall and CPU seconds, and how that grows with the number of tasks.

Three parts. `digits`: the chain of the shipped params.yaml from nothing, by `sdlora run` with its own Prefect server
and by `dvc repro` alone, and the same again with nothing to do. `stages`: each stage of that chain as a process of its
own. `tasks`: chains of so many tasks of two tiny classes, one epoch each; then what there is to do when nothing is to
be done, and what one more task costs beside its fit.

The stages of a long chain are called one after the other in one process, and entered into dvc.lock at once through
DVC's own interface; the result is what `dvc repro` would leave, made in minutes and not in hours, and that it is up to
date is DVC's own word.

Every figure is of a process of its own. CPU seconds are those of all processes that it started. The results go to a
JSON-lines file; on a machine that has other work the CPU seconds are the better ones.
"""

import argparse
import contextlib
import copy
import ctypes
import json
import os
import platform
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
RESULTS = Path("benchmarks/results/fixed_costs.jsonl")
PARTS = ("digits", "stages", "tasks")
TRACKED = (
    "pipelines",
    "sdlora",
    "dvc.yaml",
    "params.yaml",
    ".dvcignore",
    ".gitignore",
    ".dvc/config",
    ".dvc/plots",
)
SPARE = 4
"""Tasks that a chain has images for beside those that it has learned."""


def make_project(folder: Path) -> None:
    """Lay a copy of the project, without results, into a folder."""
    skip = shutil.ignore_patterns("__pycache__")
    for name in TRACKED:
        source, target = REPOSITORY / name, folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=skip)
        else:
            shutil.copy(source, target)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


def cost(folder: Path, *command: str) -> dict[str, float]:
    """Run a command in a folder; return its wall seconds, and the CPU seconds of all that it started."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "DVC_NO_ANALYTICS": "1"}
    environment = {**os.environ, **settings}
    environment.pop("PREFECT_API_URL", None)
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    wall = time.monotonic() - started
    with contextlib.suppress(ChildProcessError):
        while True:  # what a stage has left behind, which ends with DVC
            os.wait()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: status {done.returncode}\n{done.stdout}{done.stderr}")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"wall": round(wall, 2), "cpu": round(cpu, 2)}


def adopt_orphans() -> None:
    """Have this process wait for, and count, processes whose parent ended before them (Linux)."""
    pr_set_child_subreaper = 36
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(pr_set_child_subreaper, 1, 0, 0, 0)


def median_cost(folder: Path, *command: str, times: int = 3) -> dict[str, float]:
    """The medians of several runs of a command that changes nothing."""
    runs = [cost(folder, *command) for _ in range(times)]
    return {key: round(statistics.median(run[key] for run in runs), 2) for key in ("wall", "cpu")}


def fit_seconds(folder: Path) -> float:
    """What the fits of a chain took, by its journal."""
    lines = map(json.loads, (folder / "ledger/journal.jsonl").read_text().splitlines())
    return round(sum(line["seconds"] for line in lines if line["stage"].startswith("fit@")), 2)


def idle_costs(folder: Path) -> dict[str, dict[str, float]]:
    """What a chain costs that is up to date."""
    return {
        "nothing to do, dvc repro": median_cost(folder, "dvc", "repro"),
        "nothing to do, sdlora run": median_cost(folder, "sdlora", "run"),
        "sdlora status": median_cost(folder, "sdlora", "status"),
    }


def digits(folder: Path) -> Iterator[dict[str, Any]]:
    """The shipped chain from nothing, both ways."""
    for name, command in (("sdlora run", ("sdlora", "run")), ("dvc repro", ("dvc", "repro"))):
        project = folder / name.partition(" ")[0]
        make_project(project)
        figures = cost(project, *command)
        fits = fit_seconds(project)
        yield {
            "part": "digits",
            "what": name,
            **figures,
            "fits": fits,
            "beside": round(figures["wall"] - fits, 2),
        }
    for what, figures in idle_costs(project).items():
        yield {"part": "digits", "what": what, **figures}
    yield {"part": "digits", "what": "sdlora --help", **median_cost(project, "sdlora", "--help", times=5)}


def stages(folder: Path) -> Iterator[dict[str, Any]]:
    """Every kind of stage by itself, on the last task of the shipped chain."""
    project = folder / "dvc"
    if not (project / "dvc.lock").is_file():
        make_project(project)
        cost(project, "dvc", "repro")
    listed = subprocess.run(
        [sys.executable, "-c", COMMANDS], cwd=project, capture_output=True, text=True, check=True
    )
    for command in json.loads(listed.stdout):
        _, kind, *words = command.split()
        if kind == "fetch":
            continue
        left = LEFT.get(kind, ("--out",))
        for place, word in enumerate(words):
            if word in left:
                words[place + 1] = f"scratch/{words[place + 1]}"
        yield {"part": "stages", "what": kind, **cost(project, "sdlora", kind, *words)}


LEFT = {
    "start": ("--out", "--evaluation", "--gate"),
    "split": ("--out", "--images"),
    "report": ("--out", "--metrics"),
}
"""Options of a stage that name what it leaves, where that is more than `--out`."""

COMMANDS = """
import json
from dvc.repo import Repo
last = {}
for stage in Repo().index.stages:
    last[stage.addressing.partition("@")[0]] = stage.cmd
print(json.dumps(list(last.values())))
"""


def tasks(folder: Path, number: int) -> Iterator[dict[str, Any]]:
    """A chain of so many tasks that is up to date, and one task more."""
    project = folder / f"tasks{number}"
    make_project(project)
    paint(project / "data/raw/tiny", 2 * (number + SPARE))
    write_params(project, number)
    made = cost(project, sys.executable, str(Path(__file__).resolve()), "--make", str(number))
    yield {"part": "tasks", "tasks": number, "what": "made in one process", **made}
    for what, figures in idle_costs(project).items():
        yield {"part": "tasks", "tasks": number, "what": what, **figures}
    write_params(project, number + 1)
    before = fit_seconds(project)
    more = cost(project, "sdlora", "run")
    fit = round(fit_seconds(project) - before, 2)
    yield {"part": "tasks", "tasks": number, "what": "one task more, sdlora run", **more, "fits": fit}
    report = cost(
        project,
        "sdlora",
        "report",
        "--artifacts",
        "artifacts",
        "--out",
        "scratch",
        "--metrics",
        "scratch.json",
    )
    yield {"part": "tasks", "tasks": number, "what": "report", **report}
    sizes = {name: (project / name).stat().st_size for name in ("dvc.lock", "artifacts/report/report.html")}
    yield {"part": "tasks", "tasks": number, "what": "bytes", **sizes}


def key(number: int) -> str:
    """The name of a task: t01, t02 … t100."""
    return f"t{number:02}"


def paint(folder: Path, classes: int) -> None:
    """Classes of a pattern with noise each: two training images and a test image of 8 × 8 grey pixels."""
    import numpy as np
    from PIL import Image

    for index in range(classes):
        random = np.random.default_rng(index)
        pattern = random.integers(0, 200, (8, 8))
        for part, count in (("train", 2), ("test", 1)):
            place = folder / part / f"c{index:04}"
            place.mkdir(parents=True)
            for image in range(count):
                noisy = pattern + random.integers(0, 55, (8, 8))
                Image.fromarray(noisy.astype(np.uint8)).save(place / f"{image}.png")


def write_params(folder: Path, number: int) -> None:
    """The shipped parameters with so many tasks of two classes, and little to do for each."""
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").partition("tasks:\n")[0]
    text = re.sub(r"^fetch:\n(  .*\n)+", "fetch: {}\n", text, flags=re.MULTILINE)
    for name, value in {"epochs": 1, "batch_size": 4, "rank": 2}.items():
        text = re.sub(rf"^  {name}: \d+", f"  {name}: {value}", text, count=1, flags=re.MULTILINE)
    lines = []
    for index in range(1, number + 1):
        before = key(index - 1) if index > 1 else "t00"
        classes = f'["c{2 * index - 2:04}", "c{2 * index - 1:04}"]'
        lines.append(f"  {key(index)}: {{after: {before}, source: data/raw/tiny, classes: {classes}}}\n")
    (folder / "params.yaml").write_text(text + "tasks:\n" + "".join(lines), encoding="utf-8")


def make(number: int) -> None:
    """Call all stages of the project in this folder, then have DVC enter what they left into dvc.lock."""
    from pipelines.cli.app import app
    from pipelines.ledger import journal

    journal.current_commit = journal._person = lambda: None  # git is asked at each stage otherwise
    from dvc.repo import Repo, lock_repo

    from pipelines.project.params import Params
    from pipelines.versioning.patches import apply_patches
    from pipelines.versioning.plan import read_plan

    apply_patches()  # else DVC parses params.yaml for each stage
    names = list(Params.load().tasks)
    order = read_plan(names).order
    repo = Repo()
    with lock_repo(repo):
        stages = {stage.addressing: stage for stage in repo.stage.load_all("dvc.yaml")}
        for name in order:
            app(stages[name].cmd.split()[1:], standalone_mode=False)
            stages[name].save()
            stages[name].commit()
            for dependency in stages[name].deps:  # they share what was parsed: anchors in dvc.lock
                dependency.hash_info = copy.deepcopy(dependency.hash_info)
        (file,) = {stage.dvcfile for stage in stages.values()}
        file.dump_stages([stages[name] for name in order], update_pipeline=False)


def show(row: Mapping[str, Any]) -> None:
    """Print one result as a line."""
    head = f"{row['part']:7} {row.get('tasks', ''):>4} {row['what']:26}"
    rest = "  ".join(
        f"{name} {value}" for name, value in row.items() if name not in ("part", "tasks", "what")
    )
    print(f"{head} {rest}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--tasks", nargs="+", type=int, default=[5, 50, 200])
    parser.add_argument("--quick", action="store_true", help="5 and 20 tasks only")
    parser.add_argument(
        "--folder", type=Path, help="work here and leave the chains; a folder that is deleted if not given"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--make", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.make:
        make(arguments.make)
        return
    adopt_orphans()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="sdlora-costs-"))
        )
        rows = []
        parts = {
            "digits": lambda: digits(folder),
            "stages": lambda: stages(folder),
            "tasks": lambda: (
                row for n in ([5, 20] if arguments.quick else arguments.tasks) for row in tasks(folder, n)
            ),
        }
        for part in arguments.parts:
            for row in parts[part]():
                rows.append(row)
                show(row)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "load": os.getloadavg(),
    }
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine, "at": time.strftime("%Y-%m-%d"), "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
