"""What one large task costs each stage: seconds, peak memory, images a second, and a floor measured beside it.

Makes a project with one task of many tiny files in class folders (seeded), and calls every stage as a process of
its own, as dvc.yaml does: doctor, split, fit (one epoch of the head on a frozen backbone, a tiny one of random
weights), freeze, evaluate, gate, report.

The floor of `doctor` and `split` is to read and decode the files, and to do nothing with them. That of `fit`, `freeze`
and `evaluate` is to decode packed images and to bring them through the backbone once. Both are measured on a sample, in
as many threads as the stages use (OMP_NUM_THREADS). Peak memory is VmHWM, which counts mapped files too, and of that
what the process itself has (RssAnon), in MiB, of the largest of the stage's process and its children.

    python benchmarks/million_images.py                                    # 20,000 images of 200 classes
    python benchmarks/million_images.py --images 1000000 --classes 10000
    python benchmarks/million_images.py --images 10000 --classes 100 --side 224    # JPEG files of this size
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from pipelines.data.decoding import decode
from pipelines.data.packed import read_images
from pipelines.planning.new_project import project_files
from sdlora.backbones import read_backbone
from sdlora.preprocessing import Preprocessing, normalise

RESULTS = Path(__file__).parent / "results/million_images.jsonl"
SOURCE = Path("data/raw/many")
_JPEG_FROM = 64
"""Pixels on a side from which images are JPEG files, as photographs are; smaller ones are PNG files."""
ROOM = "1"
"""GiB that decoded images and features may take in memory; more of them are mapped from a file."""
SAMPLE = 5000
"""Images that a floor is measured on."""
BACKBONE = "test_vit.r160_in1k"
"""The smallest vision transformer of timm, at 32×32 pixels."""
SETTINGS = {
    "name": BACKBONE,
    "weights": "random.safetensors",
    "image_size": "32",
    "method": "frozen",
    "epochs": "1",
    "batch_size": "256",
}
"""What the project has another value for than a new one."""
FIRST = (
    "start --out artifacts/split/t00 --evaluation artifacts/evaluation/t00 --gate artifacts/gate/t00",
    "backbone --out artifacts/model/t00",
)
"""The stages before the first task."""
COMMANDS = {
    "doctor": "doctor",
    "split": "split t01 --source data/raw/many --before artifacts/split/t00 --out artifacts/split/t01 "
    "--images artifacts/train/t01",
    "fit": "fit t01 --train artifacts/split/t01/train.json --images artifacts/train "
    "--classes artifacts/split/t01/classes.json --before artifacts/model/t00 --backbone artifacts/model/t00 "
    "--out artifacts/fit/t01",
    "freeze": "freeze t01 --fit artifacts/fit/t01 --train artifacts/split/t01/train.json --images artifacts/train "
    "--before artifacts/model/t00 --backbone artifacts/model/t00 --out artifacts/model/t01",
    "evaluate": "evaluate t01 --model artifacts/model/t01 --backbone artifacts/model/t00 --split artifacts/split/t01 "
    "--out artifacts/evaluation/t01",
    "gate": "gate t01 --model artifacts/model/t01 --split artifacts/split/t01/split.json "
    "--evaluation artifacts/evaluation/t01 --evaluation-before artifacts/evaluation/t00 --before artifacts/gate/t00 "
    "--out artifacts/gate/t01",
    "report": "report --artifacts artifacts --out artifacts/report --metrics metrics.json",
}
"""The stages as dvc.yaml calls them, and the doctor before them."""


def class_name(index: int) -> str:
    """The name of a class."""
    return f"c{index:05}"


def paint(folder: Path, each: int, side: int, seed: int, index: int) -> None:
    """Write the images of one class: its coarse pattern, with a pattern and noise of each image's own."""
    random = np.random.default_rng([seed, index])
    place = folder / class_name(index)
    place.mkdir(parents=True)
    coarse = random.integers(0, 110, (1, 4, 4)) + random.integers(0, 110, (each, 4, 4))
    pixels = coarse.repeat(side // 4, axis=1).repeat(side // 4, axis=2)
    pixels = (pixels + random.integers(0, 36, (each, side, side))).astype(np.uint8)
    for number, image in enumerate(pixels):
        if side < _JPEG_FROM:
            Image.fromarray(image).save(place / f"{number}.png", compress_level=1)
        else:
            Image.fromarray(image).convert("RGB").save(place / f"{number}.jpg")


def write_project(folder: Path, images: int, classes: int, side: int, seed: int) -> None:
    """Write a project of one task, and its images."""
    for name, text in project_files("many", example=False).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    torch.manual_seed(seed)
    weights = timm.create_model(BACKBONE.partition(".")[0], img_size=32).state_dict()
    save_file(weights, folder / "random.safetensors")
    digest = hashlib.sha256((folder / "random.safetensors").read_bytes()).hexdigest()
    params = folder / "params.yaml"
    text = params.read_text(encoding="utf-8")
    for key, value in {**SETTINGS, "sha256": digest}.items():
        text = re.sub(rf"^  {key}:( [^ \n]+)?", f"  {key}: {value}", text, count=1, flags=re.MULTILINE)
    names = ", ".join(map(class_name, range(classes)))
    task = f"  t01: {{after: t00, source: {SOURCE}, classes: [{names}]}}\n"
    params.write_text(text.replace("tasks: {}\n", f"tasks:\n{task}"), encoding="utf-8")
    subprocess.run(["git", "init", "-q"], cwd=folder, check=True)
    with ProcessPoolExecutor(2) as pool:
        for _ in pool.map(
            partial(paint, folder / SOURCE, images // classes, side, seed), range(classes), chunksize=20
        ):
            pass


def sdlora(folder: Path, *words: str) -> dict[str, float]:
    """Run a command in a project; return its seconds and its peak memory in MiB."""
    program = Path(sys.executable).with_name("sdlora")
    began = time.monotonic()
    with (folder / "last.log").open("wb") as log:
        settings = {"SDLORA_IMAGES_GIB": ROOM, **os.environ}
        process = subprocess.Popen([program, *words], cwd=folder, stdout=log, stderr=log, env=settings)
        total, own = 0, 0
        while process.poll() is None:
            seen = list(_memory(process.pid))
            total = max(total, *(each["VmHWM"] for each in seen), 0)
            own = max(own, *(each["RssAnon"] for each in seen), 0)
            time.sleep(0.02)
    seconds = time.monotonic() - began
    if process.returncode:
        raise SystemExit((folder / "last.log").read_text(errors="replace")[-2000:])
    return {"seconds": round(seconds, 1), "MiB": total // 1024, "own MiB": own // 1024}


def _memory(pid: int) -> Iterator[dict[str, int]]:
    """Yield what a process and those below it hold, in KiB."""
    with contextlib.suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        found = dict(re.findall(r"^(VmHWM|RssAnon):\s+(\d+)", text, re.MULTILINE))
        if len(found) == 2:  # a process that ends has none
            yield {name: int(value) for name, value in found.items()}
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from _memory(int(child))


def threads() -> int:
    """How many threads decode."""
    return int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0)))


def decode_floor(folder: Path, images: int) -> float:
    """Files a second that are read and decoded, and nothing more."""
    files = sorted((folder / SOURCE).glob("*/*.*g"))
    files = files[:: max(1, images // SAMPLE)][:SAMPLE]

    def look(path: Path) -> None:
        with Image.open(io.BytesIO(path.read_bytes())) as image:
            image.load()

    began = time.monotonic()
    with ThreadPoolExecutor(threads()) as pool:
        for _ in pool.map(look, files):
            pass
    return len(files) / (time.monotonic() - began)


def forward_floor(folder: Path) -> float:
    """Packed images a second that are decoded and go through the backbone, and nothing more."""
    torch.set_num_threads(threads())
    base = read_backbone(folder / "artifacts/model/t00")
    preprocessing = Preprocessing.of(base.description)
    table = read_images(folder / "artifacts/train/t01/train.arrow")[:SAMPLE]
    began = time.monotonic()
    pixels = torch.from_numpy(decode(table, preprocessing))
    with torch.inference_mode():
        for part in pixels.split(256):
            base.model(normalise(part, mean=preprocessing.mean, std=preprocessing.std))
    return len(table) / (time.monotonic() - began)


def measure(folder: Path, images: int, classes: int) -> Iterator[dict[str, object]]:
    """Call every stage, and yield a row of each."""
    for command in FIRST:
        sdlora(folder, *command.split())
    decoded = decode_floor(folder, images)
    of = {"doctor": images, "split": images, "evaluate": 0, "fit": 0, "freeze": 0}
    forward = 0.0
    for stage, command in COMMANDS.items():
        found = sdlora(folder, *command.split())
        if stage == "split":
            forward = forward_floor(folder)
            counts = json.loads((folder / "artifacts/split/t01/split.json").read_text())["counts"].values()
            of["fit"] = of["freeze"] = sum(each["train"] for each in counts)
            of["evaluate"] = sum(each["test"] for each in counts)
        row: dict[str, object] = {"stage": stage, "images": images, "classes": classes, **found}
        if stage in of:
            floor = decoded if stage in ("doctor", "split") else forward
            row |= {"images/s": round(of[stage] / found["seconds"]), "floor, images/s": round(floor)}
        yield row


def show(rows: Iterable[Mapping[str, object]]) -> Iterator[Mapping[str, object]]:
    """Print each row when it comes."""
    columns = ("stage", "images", "classes", "seconds", "MiB", "own MiB", "images/s", "floor, images/s")
    print("  ".join(f"{name:>10}" for name in columns), flush=True)
    for row in rows:
        print("  ".join(f"{row.get(name, ''):>{max(10, len(name))}}" for name in columns), flush=True)
        yield row


def main() -> None:
    """Make a project, measure it, print a table, and note the rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=200)
    parser.add_argument("--side", type=int, default=16, help="pixels on a side, a multiple of 4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--folder", type=Path, help="work here, with the images that are there, and leave all"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = arguments.folder or Path(stack.enter_context(TemporaryDirectory(prefix="sdlora-many-")))
        if not (folder / SOURCE).is_dir():
            write_project(folder, arguments.images, arguments.classes, arguments.side, arguments.seed)
        rows = list(show(measure(folder, arguments.images, arguments.classes)))
    machine = {"processor": platform.processor() or platform.machine(), "threads": threads()}
    made = {"at": time.strftime("%Y-%m-%d"), "side": arguments.side}
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"machine": machine, **made, "rows": rows}) + "\n")


if __name__ == "__main__":
    main()
