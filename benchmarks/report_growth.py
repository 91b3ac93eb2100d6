"""What the report of a long chain costs and how large it gets: seconds, memory, page and files of plots.

The chain is made up: ten classes a task and two test images of each, small directions, answers at random. All that the
stage reads is there, in the layout that the other stages leave.

    python benchmarks/report_growth.py --tasks 50 200 1000
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.support.reported_project import write_project

RESULTS = Path(__file__).parent / "results/report_growth.jsonl"
REPORT = ("report", "--artifacts", "artifacts", "--out", "artifacts/report", "--metrics", "metrics.json")


def grow(folder: Path, tasks: int) -> dict[str, float]:
    """Write the files of a chain of so many tasks into a folder, and measure its report."""
    names = {f"t{number:02}": [f"{number}.{index}" for index in range(10)] for number in range(1, tasks + 1)}
    write_project(folder, names, images=2)
    (folder / "dvc.yaml").touch()  # a stage is called in the folder of a project
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-P", "-m", "pipelines", *REPORT]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    page = folder / "artifacts/report/report.html"
    rest = [path for path in page.parent.rglob("*.csv")]
    return {
        "tasks": tasks,
        "seconds": round(seconds, 1),
        "CPU": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "peak memory, MiB": round(after.ru_maxrss / 1024),
        "report.html, KiB": round(page.stat().st_size / 1024),
        "CSV files, KiB": round(sum(path.stat().st_size for path in rest) / 1024),
    }


def main() -> None:
    """Measure chains of some lengths, print a line and note each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", nargs="+", type=int, default=[50, 200])
    parser.add_argument("--keep", type=Path, help="a new folder for the chains, to look at their reports")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    for tasks in arguments.tasks:
        with TemporaryDirectory(prefix="sdlora-report-") as name:
            found = grow((arguments.keep or Path(name)) / str(tasks), tasks)
        sys.stdout.write("  ".join(f"{name} {value}" for name, value in found.items()) + "\n")
        sys.stdout.flush()
        arguments.results.parent.mkdir(parents=True, exist_ok=True)
        with arguments.results.open("a") as file:
            file.write(json.dumps({"machine": platform.machine(), "cores": os.cpu_count(), **found}) + "\n")


if __name__ == "__main__":
    main()
