"""What it costs to bring images from their files to the model, and what a merged model costs beside the plain one.

Four parts, each with its ratios side by side in one run, because machines are rarely idle:

1. decoders: milliseconds of one image by each library that is installed, and whether its pixels are Pillow's;
2. split: milliseconds of an image in the parts of the stage, and the stage;
3. evaluate: the data path alone and the whole stage at the last step of a chain, with nothing kept and with the images
   of earlier tasks kept; and how many images the chain decodes;
4. inference of a merged model against timm's own: time (in turn, in one process) and memory (a process each).

Photographs are drawn (several scales of noise, 500×375, JPEG of qualities 75 and 90), weights are random: neither
changes the time. A table is printed, and one JSON line with all numbers. It takes 2 to 5 minutes, with --quick one.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines.data import decoding, duplicates, pixel_cache
from pipelines.data.decoding import decoding_threads, open_picture, picture_hash
from pipelines.data.pixel_cache import PackedImages, pixel_batches
from pipelines.project.environment import DECODED_GIB
from pipelines.project.layout import DECODED
from pipelines.stages.split import split
from pipelines.stages.start import start
from sdlora import load
from sdlora.adapters import Factors, inject_adapters
from sdlora.backbones import create_backbone, write_backbone
from sdlora.classifier import ModelState
from sdlora.head import HeadBlock
from sdlora.ledger import record_hash
from sdlora.model_folder import write_model
from sdlora.preprocessing import Preprocessing
from sdlora.tensors import write_tensors

REPOSITORY = Path(__file__).resolve().parents[1]
WIDTH, HEIGHT, CLASSES, RANK = 500, 375, 2, 10
MODEL, TAG = "vit_tiny_patch16_224", "augreg_in21k"
Row = tuple[str, str, str, str]


def photograph(seed: int) -> bytes:
    """A JPEG of noise at many scales: its spectrum, and so its size and cost, are those of a photograph."""
    random = np.random.default_rng(seed)
    picture = np.zeros((HEIGHT, WIDTH, 3))
    for scale in (4, 8, 16, 32, 64, 128):
        coarse = random.normal(size=(HEIGHT * scale // 256 + 2, WIDTH * scale // 256 + 2, 3)).astype(
            np.float32
        )
        fine = [
            Image.fromarray(coarse[..., c]).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)
            for c in range(3)
        ]
        picture += np.stack([np.asarray(channel) for channel in fine], axis=2) / scale**0.6
    picture = (picture - picture.mean()) / picture.std() * 55 + 120 + random.normal(size=picture.shape) * 4
    file = io.BytesIO()
    image = Image.fromarray(picture.clip(0, 255).astype(np.uint8))
    image.save(file, "JPEG", quality=90 if seed % 2 else 75, subsampling=0 if seed % 4 == 3 else 2)
    return file.getvalue()


def in_turn(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, tuple[float, float]]:
    """Median wall and CPU seconds of each work, done in turn so that a busy machine favours none."""
    wall: dict[str, list[float]] = {name: [] for name in works}
    processor: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(rounds):
        for name, work in works.items():
            began, used = time.perf_counter(), time.process_time()
            work()
            wall[name].append(time.perf_counter() - began)
            processor[name].append(time.process_time() - used)
    return {name: (statistics.median(wall[name]), statistics.median(processor[name])) for name in works}


# ---- 1. decoders


def by_pillow(data: bytes) -> np.ndarray:
    """Pixels (height, width, 3)."""
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoders() -> dict[str, Callable[[bytes], np.ndarray]]:
    """Every library here that decodes a JPEG to (height, width, 3)."""
    found = {"Pillow": by_pillow}
    with contextlib.suppress(ImportError):
        from torchvision.io import ImageReadMode, decode_jpeg

        found["torchvision.io"] = lambda data: (
            decode_jpeg(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
            .permute(1, 2, 0)
            .numpy()
        )
    with contextlib.suppress(ImportError):
        import simplejpeg

        found["simplejpeg"] = simplejpeg.decode_jpeg
        found["simplejpeg, fast DCT"] = lambda data: simplejpeg.decode_jpeg(
            data, fastdct=True, fastupsample=True
        )
    with contextlib.suppress(ImportError):
        import cv2

        found["OpenCV"] = lambda data: cv2.cvtColor(
            cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR), cv2.COLOR_BGR2RGB
        )
    with contextlib.suppress(ImportError, OSError):
        import pyvips

        found["pyvips"] = lambda data: pyvips.Image.new_from_buffer(data, "").numpy()
    return found


def resizers(height: int, width: int) -> dict[str, Callable[[np.ndarray], np.ndarray]]:
    """Bicubic with antialiasing by Pillow, and by torch on uint8, which has vector instructions."""

    def by_torch(pixels: np.ndarray) -> np.ndarray:
        tensor = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None]
        scaled = torch.nn.functional.interpolate(tensor, size=(height, width), mode="bicubic", antialias=True)
        return scaled[0].permute(1, 2, 0).numpy()

    def by_pillow(pixels: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC))

    return {"Pillow": by_pillow, "torch, uint8": by_torch}


def measure_decoders(photographs: Sequence[bytes], rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """CPU milliseconds of an image, and the share of images with just Pillow's pixels."""
    rows, facts = [], {}
    pixels = [by_pillow(data) for data in photographs]
    for title, works, inputs in (
        ("decode", decoders(), photographs),
        ("resize", resizers(248, 331), pixels),
    ):
        first = next(iter(works.values()))
        expected = [first(one) for one in inputs]
        times = in_turn(
            {
                name: (lambda work=work, inputs=inputs: [work(one) for one in inputs])
                for name, work in works.items()
            },
            rounds,
        )
        for name, work in works.items():
            found = [work(one) for one in inputs]
            equal = sum(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
            worst = max(int(np.abs(a.astype(int) - b).max()) for a, b in zip(found, expected, strict=True))
            milliseconds = 1000 * times[name][1] / len(inputs)
            ratio = times[name][1] / times[next(iter(works))][1]
            rows.append(
                (
                    f"{title}: {name}",
                    f"{milliseconds:.2f} ms",
                    f"{ratio:.2f}",
                    f"{equal}/{len(inputs)} equal, max |Δ| {worst}",
                )
            )
            facts[f"{title}, {name}"] = {"ms": milliseconds, "equal": equal / len(inputs), "worst": worst}
    return rows, facts


# ---- a chain, without training


def project(folder: Path, photographs: Sequence[bytes], tasks: int, test: int) -> list[str]:
    """Pictures and parameters of a project with so many tasks, in `folder`, as the working directory."""
    os.chdir(folder)
    names = [f"t{index:02}" for index in range(1, tasks + 1)]
    lines = []
    for index, (before, task) in enumerate(zip(["t00", *names], names, strict=False)):
        classes = [f"{task}-{letter}" for letter in range(CLASSES)]
        lines.append(f"  {task}: {{after: {before}, source: raw/{task}, classes: {json.dumps(classes)}}}")
        for place, name in enumerate(classes):
            for part, count in (("train", 1), ("test", test // CLASSES)):
                home = Path("raw") / task / part / name
                home.mkdir(parents=True)
                for number in range(count):
                    # The last picture is the one to train on; among tests they repeat, each decoded anew all the same.
                    position = (index * test + place * count + number) % (len(photographs) - 1)
                    data = photographs[-1 if part == "train" else position]
                    (home / f"{number}.jpg").write_bytes(data)
    text = (REPOSITORY / "params.yaml").read_text(encoding="utf-8").split("\ntasks:\n")[0]
    text = text.replace("  digits: {test_fraction: 0.2, seed: 0}", "  {}")
    text = text.replace("duplicates: refuse", "duplicates: allow")
    Path("params.yaml").write_text(text + "\ntasks:\n" + "\n".join(lines) + "\n", encoding="utf-8")
    return names


def chain(names: Sequence[str], model: str, tag: str) -> None:
    """Splits by the stage itself; a backbone and models of random weights."""
    artifacts = Path("artifacts")
    start(out=artifacts / "split/t00", evaluation=artifacts / "evaluation/t00", gate=artifacts / "gate/t00")
    torch.manual_seed(0)
    write_tensors(Path("random.safetensors"), timm.create_model(model).state_dict())
    backbone = create_backbone(f"{model}.{tag}", weights=Path("random.safetensors"))
    (artifacts / "model/t00").mkdir(parents=True)
    digest = write_backbone(artifacts / "model/t00", backbone)["backbone"]
    targets = {name: (at.rows, at.columns) for name, at in inject_adapters(backbone.model).items()}
    features = backbone.description["features"]
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return 0.02 * torch.randn(*shape, generator=generator)

    learned, classes = ModelState(), []
    for before, task in zip(["t00", *names], names, strict=False):
        split(
            task, source=Path("raw") / task, before=artifacts / "split" / before, out=artifacts / "split" / task,
            images=artifacts / "train" / task,
        )  # fmt: skip
        classes = json.loads((artifacts / "split" / task / "classes.json").read_bytes())["classes"]
        earlier = learned
        learned = ModelState(
            directions={
                **learned.directions,
                task: {
                    n: Factors(draw(rows, RANK), draw(RANK, columns))
                    for n, (rows, columns) in targets.items()
                },
            },
            magnitudes={**learned.magnitudes, task: 1 + draw(len(targets))},
            head={**learned.head, task: HeadBlock(draw(CLASSES, features), draw(CLASSES))},
        )
        (artifacts / "model" / task).mkdir()
        record = {
            "step": task,
            "previous": record_hash(artifacts / "model" / before),
            "backbone": digest,
            "after": before,
            "classes": [entry for entry in classes if entry["task"] == task],
            "directions": list(learned.directions),
            "targets": list(targets),
            "method": "sdlora",
        }
        write_model(artifacts / "model" / task, learned, record, before=earlier)


# ---- 2. split


def measure_split(photographs: Sequence[bytes], rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """CPU milliseconds of an image in the parts of split, and wall milliseconds of all parts in threads."""
    opened = [open_picture(data) for data in photographs]

    def whole(data: bytes) -> None:
        picture = open_picture(data)
        picture_hash(picture)
        duplicates.perceptual_hash(picture)

    def threaded() -> None:
        for _ in decoding.in_parallel(lambda index: whole(photographs[index]), range(len(photographs))):
            pass

    times = in_turn(
        {
            "decode": lambda: [open_picture(data) for data in photographs],
            "hash of the pixels": lambda: [picture_hash(picture) for picture in opened],
            "perceptual hash": lambda: [duplicates.perceptual_hash(picture) for picture in opened],
            "all, one thread": lambda: [whole(data) for data in photographs],
            f"all, {decoding_threads()} threads": threaded,
        },
        rounds,
    )
    rows, facts = [], {}
    for name, (wall, processor) in times.items():
        milliseconds = [1000 * seconds / len(photographs) for seconds in (wall, processor)]
        shown = (
            f"{milliseconds[0]:.2f} ms wall, {1000 / milliseconds[0]:.0f} images/s" if "all" in name else ""
        )
        rows.append((f"split: {name}", f"{milliseconds[1]:.2f} ms CPU", "", shown))
        facts[name] = {"wall_ms": milliseconds[0], "cpu_ms": milliseconds[1]}
    return rows, facts


# ---- 3. evaluate


@contextlib.contextmanager
def counted() -> Iterator[list[int]]:
    """The positions of the images that are decoded meanwhile."""
    found: list[int] = []
    original = pixel_cache.decode_one

    def decode_one(table: Any, index: int, preprocessing: Preprocessing) -> np.ndarray:  # noqa: ANN401
        found.append(index)
        return original(table, index, preprocessing)

    pixel_cache.decode_one = decode_one
    try:
        yield found
    finally:
        pixel_cache.decode_one = original


def drain(names: Sequence[str], batch: int) -> None:
    """Bring all test images of the last step to the CPU's memory, batch by batch, and do nothing with them."""
    description = json.loads(Path("artifacts/model/t00/backbone.json").read_bytes())
    preprocessing = Preprocessing.of(description)
    files = [PackedImages(Path(f"artifacts/split/{name}/test/{name}.arrow"), preprocessing) for name in names]
    for _ in pixel_batches(files, batch_size=batch, device=torch.device("cpu")):
        pass


def run_evaluate(task: str) -> dict[str, float]:
    """The whole stage in a process of its own: wall and CPU seconds, and its largest memory in MiB."""
    command = [sys.executable, __file__, "--child", "evaluate", task]
    return json.loads(
        subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
    )


def measure_evaluation(names: Sequence[str], test: int, rounds: int) -> tuple[list[Row], dict[str, Any]]:
    """The data path and the stage at the last step: cold, as after the step before, and with everything kept."""
    total = len(names) * (test // CLASSES) * CLASSES

    def cold() -> None:
        shutil.rmtree(DECODED, ignore_errors=True)
        drain(names, 256)

    def off() -> None:
        os.environ[DECODED_GIB] = "0"
        drain(names, 256)
        del os.environ[DECODED_GIB]

    times = in_turn({"nothing is kept": off, "keeping it": cold, "kept": lambda: drain(names, 256)}, rounds)
    rows, facts = [], {}
    for name, (wall, processor) in times.items():
        ratio = processor / times["nothing is kept"][1]
        rows.append(
            (
                f"data path: {name}",
                f"{1000 * processor / total:.3f} ms CPU",
                f"{ratio:.3f}",
                f"{1000 * wall / total:.3f} ms wall",
            )
        )
        facts[name] = {"wall_ms": 1000 * wall / total, "cpu_ms": 1000 * processor / total}
    shutil.rmtree(DECODED, ignore_errors=True)
    with counted() as found:
        for index in range(len(names)):
            drain_step(names[: index + 1])
    before = sum(range(1, len(names) + 1)) * total // len(names)
    rows.append(
        (
            f"images decoded by {len(names)} steps",
            f"{len(found)}",
            f"{len(found) / before:.3f}",
            f"{before} where nothing is kept",
        )
    )
    facts["decoded"] = {"kept": len(found), "nothing kept": before}
    stage: dict[str, list[dict[str, float]]] = {"nothing kept": [], "kept": []}
    for _ in range(max(1, rounds // 3)):
        for name, runs in stage.items():
            if name == "nothing kept":
                shutil.rmtree(DECODED, ignore_errors=True)
            runs.append(run_evaluate(names[-1]))
    for name, runs in stage.items():
        chosen = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        first = statistics.median(run["cpu"] for run in stage["nothing kept"])
        rows.append(
            (
                f"stage evaluate, {name}",
                f"{chosen['cpu']:.1f} s CPU",
                f"{chosen['cpu'] / first:.2f}",
                f"{chosen['wall']:.1f} s wall, {chosen['mib']:.0f} MiB",
            )
        )
        facts[f"stage, {name}"] = chosen
    return rows, facts


def drain_step(names: Sequence[str]) -> None:
    """What the step of the last of these tasks reads."""
    drain(names, 256)


# ---- 4. a merged model


def plain(model: str, tag: str, classes: int) -> torch.nn.Module:
    """timm's own model with its own classifier and the backbone's weights."""
    module = timm.create_model(f"{model}.{tag}", pretrained=False, num_classes=classes)
    module.load_state_dict(load_file("artifacts/model/t00/backbone.safetensors"), strict=False)
    return module.eval().requires_grad_(False)


def measure_merged(
    names: Sequence[str], model: str, tag: str, batch: int, rounds: int
) -> tuple[list[Row], dict[str, Any]]:
    """Time of a batch, in turn, and memory of a process each, of the merged model beside the plain one."""
    modules = {
        "timm": plain(model, tag, CLASSES * len(names)),
        "merged": load(f"artifacts/model/{names[-1]}", device="cpu").module,
    }
    inputs = torch.randn(batch, 3, 224, 224)

    def forward(module: torch.nn.Module) -> None:
        with torch.inference_mode():
            module(inputs)

    forward(modules["timm"])
    times = in_turn({name: (lambda m=module: forward(m)) for name, module in modules.items()}, rounds)
    memory: dict[str, list[dict[str, float]]] = {"timm": [], "merged": []}
    for _ in range(3):
        for name, runs in memory.items():
            command = [sys.executable, __file__, "--child", name, names[-1], "--model", model, "--tag", tag]
            command += ["--classes", str(CLASSES * len(names)), "--batch", str(batch)]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    rows: list[Row] = []
    facts: dict[str, Any] = {}
    first = {key: statistics.median(run[key] for run in memory["timm"]) for key in ("peak", "held")}
    for name in modules:
        held = {key: statistics.median(run[key] for run in memory[name]) for key in ("peak", "held")}
        wall, processor = times[name]
        ratio = processor / times["timm"][1]
        rows.append(
            (
                f"{model}, batch {batch}: {name}",
                f"{processor:.3f} s CPU",
                f"{ratio:.3f}",
                f"{wall:.3f} s wall",
            )
        )
        for key, title in (("peak", "peak memory"), ("held", "held between batches")):
            rows.append((f"  {title}: {name}", f"{held[key]:.0f} MiB", f"{held[key] / first[key]:.3f}", ""))
        facts[name] = {"wall": wall, "cpu": processor, **held}
    return rows, facts


def child(arguments: argparse.Namespace) -> dict[str, float]:
    """What a process of its own measures of itself."""
    began = time.perf_counter()
    what, task = arguments.child
    if what == "evaluate":
        from pipelines.stages.evaluate import evaluate

        models = Path("artifacts/model")
        evaluate(
            task, model=models / task, backbone=models / "t00", split=Path("artifacts/split") / task,
            out=Path("artifacts/evaluation") / task,
        )  # fmt: skip
    else:
        module = (
            plain(arguments.model, arguments.tag, arguments.classes)
            if what == "timm"
            else load(f"artifacts/model/{task}", device="cpu").module
        )
        with torch.inference_mode():
            for _ in range(3):
                module(torch.zeros(arguments.batch, 3, 224, 224))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "wall": time.perf_counter() - began,
        "cpu": time.process_time(),
        "mib": int(status["VmHWM"].split()[0]) / 1024,
        "peak": int(status["VmHWM"].split()[0]) / 1024,
        "held": int(status["VmRSS"].split()[0]) / 1024,
    }


def main() -> None:
    """Measure all, print a table and a JSON line; or, as a process of its own, one thing."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer images, tasks and rounds")
    parser.add_argument("--model", default=MODEL, help="of timm, for evaluate and inference")
    parser.add_argument("--tag", default=TAG, help="of its weights; random ones are used")
    parser.add_argument("--tasks", type=int, help="of the chain (default 20, quick 5)")
    parser.add_argument("--test", type=int, help="test images of a task (default 40, quick 20)")
    parser.add_argument("--batch", type=int, default=8, help="of the merged model's inference")
    parser.add_argument(
        "--rounds", type=int, help="of each measurement; the median counts (default 9, quick 3)"
    )
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--classes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(child(arguments)))
        return
    quick = arguments.quick
    tasks, test = arguments.tasks or (5 if quick else 20), arguments.test or (20 if quick else 40)
    rounds = arguments.rounds or (3 if quick else 9)
    with ThreadPoolExecutor() as pool:
        photographs = list(pool.map(photograph, range(20 if quick else 60)))
    with TemporaryDirectory() as folder:
        names = project(Path(folder), photographs, tasks, test)
        chain(names, arguments.model, arguments.tag)
        parts = {
            "decoders": measure_decoders(photographs, rounds),
            "split": measure_split(photographs, rounds),
            "evaluate": measure_evaluation(names, test, rounds),
            "merged": measure_merged(names, arguments.model, arguments.tag, arguments.batch, rounds),
        }
        os.chdir(REPOSITORY)
    table = [("", "found", "ratio", ""), *(row for rows, _ in parts.values() for row in rows)]
    widths = [max(len(row[column]) for row in table) for column in range(3)]
    for row in table:
        print(f"{row[0]:{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip())
    facts: dict[str, Any] = {name: found for name, (_, found) in parts.items()}
    machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    photo = {"width": WIDTH, "height": HEIGHT, "bytes": round(statistics.mean(map(len, photographs)))}
    print(json.dumps({"machine": machine, "photograph": photo, "tasks": tasks, "test": test, **facts}))


if __name__ == "__main__":
    main()
