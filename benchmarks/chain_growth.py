"""What a chain costs by its age: files, bytes, dvc.lock, and what DVC takes to look at it and to add a task.

Made chains of so many tasks, in the layout of dvc.yaml, with small files in place of tensors and a stub in place of
every stage, which writes its outputs and nothing else. So what is measured is DVC's own cost, plain and unpatched, and
with this program's patches of it, and that of `sdlora status` and `sdlora run`, Prefect server and all. Seconds are CPU
seconds of all processes, because machines are seldom idle. Plain DVC with many tasks takes hours: `--without plain`.

    python benchmarks/chain_growth.py --tasks 5 50 200 1000
"""

import argparse
import contextlib
import json
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from dvc.fs import LocalFileSystem

from pipelines.planning.new_project import project_files
from pipelines.project.fingerprints import code_files
from pipelines.versioning.patches import apply_patches

PARTS = ("sdlora", "plain", "patched")
RESULTS = Path(__file__).parent / "results/chain_growth.jsonl"
STUB = """\
#!/bin/sh
# Leaves what a stage leaves, by number and name of files.
kind=$1
while test $# -gt 0; do
  case $1 in --out|--images|--evaluation|--gate|--metrics) flag=$1; shift; made="$made $kind$flag=$1" ;; esac
  shift
done
for each in $made; do
  out=${each#*=}
  case ${each%%=*} in
    code--out) mkdir -p $out; cp -r bin/code/. $out; continue ;;
    start--out) files='split.json classes.json' ;;
    split--out) files='split.json classes.json train.json samples.arrow test.arrow' ;;
    split--images) files='train.arrow' ;;
    fit--out) files='fit.json curve.csv factors head magnitudes memory' ;;
    backbone--out) files='step.json backbone.json backbone' ;;
    freeze--out) files='step.json direction head statistics drift magnitudes classifier' ;;
    start--evaluation|evaluate--out) files='metrics.json predictions.arrow' ;;
    start--gate|gate--out) files='verdict.json open.json' ;;
    report--out) files='report.html' ;;
    report--metrics) echo '{"last_accuracy": 1, "average_accuracy": 1, "forgetting": 0}' > $out; continue ;;
    *) continue ;;
  esac
  mkdir -p $out
  for name in $files; do echo "$out $name" > $out/$name; done
  if test ${each%%=*} = evaluate--out; then
    echo '{"tasks": [], "samples": [], "correct": [], "accuracy": [1]}' > $out/metrics.json
  fi
done
"""


def write_project(folder: Path, tasks: int) -> None:
    """Write a project of so many tasks, each with a source of its own, and the stub in place of the program."""
    for name, text in project_files("grown", example=False).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    params = folder / "params.yaml"
    params.write_text(params.read_text(encoding="utf-8").replace("tasks: {}\n", "tasks:\n"), encoding="utf-8")
    for number in range(1, tasks + 1):
        add_task(folder, number)
    for name, text in code_files().items():  # so that the program finds its own code in the chain
        (folder / "bin/code" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "bin/code" / name).write_text(text, encoding="utf-8", newline="\n")
    write_environment(folder)
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)


def write_environment(folder: Path) -> None:
    """Write a Python environment that has what this one has, and the stub as its `sdlora`."""
    prefix = Path(sys.prefix)
    (folder / "bin/sdlora").write_text(STUB)
    (folder / "bin/sdlora").chmod(0o755)
    (folder / "bin/python").symlink_to(Path(sys.executable).resolve())
    (folder / "pyvenv.cfg").write_text((prefix / "pyvenv.cfg").read_text())
    (folder / "lib").symlink_to(prefix / "lib")


def add_task(folder: Path, number: int) -> None:
    """Add a task to params.yaml, and a source for it."""
    task, source = f"t{number:02}", folder / f"data/raw/t{number:02}"
    source.mkdir(parents=True)
    for name in ("a", "b"):
        (source / name).write_text(f"{task} {name}")
    with (folder / "params.yaml").open("a") as file:
        file.write(
            f"  {task}: {{after: t{number - 1:02}, source: data/raw/{task}, classes: [{task}a, {task}b]}}\n"
        )


def fill(folder: Path) -> None:
    """Leave the outputs of all stages as the stub would, and write dvc.lock once."""
    from dvc.dependency import param
    from dvc.repo import Repo, lock_repo

    apply_patches()
    load = param.load_path
    contents = load(str(folder / "params.yaml"), LocalFileSystem())
    param.load_path = lambda *_, **__: contents  # which DVC reads anew for each stage
    with contextlib.chdir(folder), contextlib.closing(Repo()) as repo, lock_repo(repo):
        stages = repo.stage.load_all("dvc.yaml")
        for stage in stages:
            subprocess.run(stage.cmd, shell=True, check=True, env=environment(folder))
        for stage in stages:
            stage.save(run_cache=False)
            stage.commit()
        stages[0].dvcfile.dump_stages(stages, update_pipeline=False)
    param.load_path = load


def environment(folder: Path) -> dict[str, str]:
    """The stub is what dvc.yaml calls, and DVC is that of this environment."""
    path = os.pathsep.join([str(folder / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "DVC_NO_ANALYTICS": "1"}


@contextlib.contextmanager
def measured(found: dict[str, float], name: str) -> Iterator[None]:
    """Note CPU seconds of the processes that are started and end here, and the wall seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    yield
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found[name] = round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 2)
    found[f"{name}, wall"] = round(time.monotonic() - began, 2)


def dvc(folder: Path, *words: str, patched: bool) -> str:
    """Call DVC, plain or as this program patches it, and return what it says."""
    module = "pipelines.versioning.patches" if patched else "dvc"
    command = [sys.executable, "-P", "-m", module, *words]
    done = subprocess.run(
        command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=True
    )
    return done.stdout


def sdlora(folder: Path, command: str) -> str:
    """Call this program in a project."""
    done = subprocess.run(
        [folder / "bin/python", "-P", "-m", "pipelines", command],
        cwd=folder,
        env=environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def measure_sdlora(folder: Path, number: int, found: dict[str, float]) -> None:
    """Measure `sdlora` with nothing to do, the first time and then, and with the task of a number to learn."""
    time.sleep(3)  # what has just changed is not remembered
    with measured(found, "sdlora status, the first time"):
        sdlora(folder, "status")
    for command in ("status", "run"):
        with measured(found, f"sdlora {command}"):
            said = sdlora(folder, command)
        assert "all up to date" in said, said[-2000:]
    add_task(folder, number)
    with measured(found, "one task more, sdlora run"):
        said = sdlora(folder, "run")
    assert "[6/6] report  " in said, said[-2000:]


def grow(tasks: int, parts: Collection[str]) -> dict[str, float]:
    """Make a chain of so many tasks, and measure it."""
    found: dict[str, float] = {"tasks": tasks}
    number = tasks
    with TemporaryDirectory(prefix="sdlora-growth-") as name:
        folder = Path(name)
        write_project(folder, tasks)
        fill(folder)
        files = [path for path in (folder / "artifacts").rglob("*") if path.is_file()]
        found |= {"files": len(files), "lock, KiB": round((folder / "dvc.lock").stat().st_size / 1024)}
        if "sdlora" in parts:
            (folder / ".sdlora").mkdir()
            number += 1
            measure_sdlora(folder, number, found)
        for which in [part for part in ("plain", "patched") if part in parts]:
            patched = which == "patched"
            with measured(found, f"status, {which}"):
                dvc(folder, "status", patched=patched)
            with measured(found, f"no-op repro, {which}"):
                said = dvc(folder, "repro", patched=patched)
            assert "Running stage 'fit" not in said, said
            number += 1
            add_task(folder, number)
            with measured(found, f"one task more, {which}"):
                said = dvc(folder, "repro", patched=patched)
            assert said.count("Running stage") <= 8, said
    return found


def main() -> None:
    """Measure chains of some lengths, print a table, and note each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", type=int, default=[5, 50, 200])
    parser.add_argument("--without", nargs="+", choices=PARTS, default=[])
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for tasks in arguments.tasks:
        found = grow(tasks, set(PARTS) - {*arguments.without})
        print("  ".join(f"{name} {value}" for name, value in found.items()), flush=True)
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps({"machine": platform.machine(), "cores": os.cpu_count(), **found}) + "\n")


if __name__ == "__main__":
    main()
