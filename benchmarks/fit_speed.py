"""How fast a fit is, against the floor that the machine sets and against the authors' released code.

First the machine: what it multiplies in a second in the sizes of the model, and what it copies. Then one training step
of SD-LoRA after --earlier tasks, and one batch of an evaluation: the operations and the bytes that they cannot do
without over these rates, and the time that they take, the step in parts. Then what docs/explanation/performance.md
promises of a fit, each a ratio of two things that are measured in turn in this run, --rounds times, medians being
compared:

* a whole fit from JPEG files, decoding included, against the released code with its own data loader and transforms on
  the same files (--reference: a checkout of WuYichen-97/SD-Lora-CL, which is not part of this project);
* a step from stored images, cropped and flipped, against a step on tensors that lie ready on the device;
* a step and the peak memory of its process after 50 tasks against those after five.

Prints a table; the results go to a JSON-lines file.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from training_cost import CLASSES, RANK, backbone, cpu_name, our_fit, reference_training

from pipelines.__main__ import SPIN
from sdlora.backbones import spell_out_attention
from sdlora.classifier import ModelState, merged_classifier
from sdlora.devices import best_device
from sdlora.evaluation import predict_batches
from sdlora.head import HeadBlock
from sdlora.products import by_onednn

RESULTS = Path("benchmarks/results/fit_speed.jsonl")
PHOTO = (375, 500)
"""Height and width of the files: about what ImageNet's are."""
CROPS = {"crop_scale": 0.05, "flip": True}
"""The released code's augmentation."""


def photographs(folder: Path, count: int) -> list[Path]:
    """JPEG files that take as long to decode as photographs do: smooth shapes with fine noise."""
    paths = []
    for index in range(count):
        random = np.random.default_rng(index)
        coarse = Image.fromarray(random.integers(0, 255, (12, 16, 3), dtype=np.uint8)).resize(PHOTO[::-1], 3)
        noise = random.normal(0, 12, (*PHOTO, 3))
        path = folder / f"{index:04}.jpg"
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path, quality=90)
        paths.append(path)
    return paths


def best(work: Callable[[], object], times: int) -> float:
    """The least seconds of so many calls, after one that does not count."""
    work()
    found = []
    for _ in range(times):
        synchronise()
        started = time.perf_counter()
        work()
        synchronise()
        found.append(time.perf_counter() - started)
    return min(found)


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def rates(width: int, tokens: int, precision: str) -> dict[str, float]:
    """Operations and bytes per second of this machine: the best of the model's products, and of a large copy."""
    device = best_device()
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    found = []
    for columns, rows in ((width, 3 * width), (width, 4 * width), (4 * width, width)):
        left = torch.randn(tokens, columns, device=device).to(dtype)
        right = torch.randn(rows, columns, device=device).to(dtype)
        with by_onednn(device):
            seconds = best(lambda a=left, b=right: torch.nn.functional.linear(a, b), 10)
        found.append(2 * tokens * columns * rows / seconds)
    source = torch.zeros(64 << 20, device=device)
    target = torch.empty_like(source)
    copied = 2 * source.numel() * source.element_size()
    return {"operations": max(found), "bytes": copied / best(lambda: target.copy_(source), 5)}


def floor(name: str, batch: int, precision: str) -> dict[str, float]:
    """What one training step cannot do without: floating-point operations, and bytes to and from memory.

    Operations: forward, as many again for the gradient with respect to the inputs of the blocks, and the gradient of
    the weights of q and v. Bytes: each weight read in forward and in backward, each tensor that the backward pass needs
    (15 of a token's width a block) written once and read once.
    """
    model = backbone(name)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *size))
    forward = batch * counter.get_total_flops()
    width, blocks = model.num_features, len(model.blocks)
    tokens = batch * model.pos_embed.shape[1]
    item = 2 if precision == "bf16" else 4
    weights = sum(parameter.numel() for parameter in model.parameters())
    return {
        "operations": 2 * forward + blocks * 2 * tokens * width * 2 * width,
        "forward": forward,
        "bytes": 2 * item * (weights + blocks * 15 * tokens * width),
        "width": width,
        "tokens": tokens,
    }


def parts(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of the parts of a step, and of whole steps: from stored images, and on tensors that lie ready."""
    fits = {}
    model_size = timm.data.resolve_model_data_config(backbone(arguments.backbone))["input_size"]
    images = torch.randint(0, 255, (4 * arguments.batch, *model_size), dtype=torch.uint8)
    options = {
        "batch": arguments.batch,
        "precision": arguments.precision,
        "compile": arguments.compile,
        **CROPS,
    }
    for name in ("stored", "ready"):
        fits[name], _ = our_fit(backbone(arguments.backbone), arguments.earlier, images, **options)
    ready = fits["stored"]._augmented(torch.arange(arguments.batch), torch.arange(arguments.batch))
    fits["ready"]._augmented = lambda chosen, places: ready  # type: ignore[method-assign]
    runs = {name: fit.run() for name, fit in fits.items()}
    seconds: dict[str, list[float]] = {
        name: [] for name in (*runs, "augment", "forward", "backward", "update")
    }
    fit = fits["stored"]
    chosen = torch.arange(arguments.batch, device=best_device())
    for count in range(arguments.steps + 2):
        for name, run in runs.items():
            measured(lambda run=run: next(run), seconds[name] if count > 1 else [])
        kept = {key: times if count > 1 else [] for key, times in seconds.items()}
        inputs = measured(lambda: fit._augmented(chosen, chosen.cpu()), kept["augment"])
        features = measured(lambda batch=inputs: fit._features(batch), kept["forward"])
        loss = torch.nn.functional.cross_entropy(
            fit.model.head.newest(features, blocks=1), fit._labels[chosen]
        )
        measured(loss.backward, kept["backward"])
        assert fit._optimizer is not None
        measured(fit._optimizer.step, kept["update"])
    return {name: statistics.median(times) for name, times in seconds.items()}


def evaluation(arguments: argparse.Namespace) -> dict[str, float]:
    """Seconds of a batch in a pass of the merged model over decoded test images, as the stage `evaluate` makes it."""
    model, device, bf16 = backbone(arguments.backbone), best_device(), arguments.precision == "bf16"
    size = timm.data.resolve_model_data_config(model)["input_size"]
    rows = HeadBlock(torch.zeros(CLASSES, model.num_features), torch.zeros(CLASSES))
    classifier = merged_classifier(model, ModelState(head={"t01": rows})).to(device)
    if bf16 and device.type == "cpu":
        spell_out_attention(model)
    images = torch.randint(0, 255, (arguments.batch, *size), dtype=torch.uint8)
    batches = [images.pin_memory() if device.type == "cuda" else images] * arguments.steps

    def whole_pass() -> None:
        for _ in predict_batches(
            classifier, batches, mean=[0.5] * size[0], std=[0.5] * size[0], device=device, bf16=bf16
        ):
            pass

    return {"seconds": best(whole_pass, 2) / len(batches)}


def measured(work: Callable[[], Any], times: list[float]) -> Any:  # noqa: ANN401 - what the work returns
    synchronise()
    started = time.perf_counter()
    result = work()
    synchronise()
    times.append(time.perf_counter() - started)
    return result


def ours(arguments: argparse.Namespace) -> dict[str, float]:
    """A whole fit of ours from the bytes of the files, as the stage `fit` does it."""
    import pyarrow as pa

    from pipelines.data.decoding import decode
    from sdlora.preprocessing import Preprocessing

    model = backbone(arguments.backbone)
    config = timm.data.resolve_model_data_config(model)
    before = used()
    data = [path.read_bytes() for path in sorted(arguments.files.iterdir())]
    table = pa.table({"id": [str(i) for i in range(len(data))], "image": pa.array(data, pa.large_binary())})
    started = time.perf_counter()
    pixels = torch.from_numpy(decode(table, Preprocessing.of({"pretrained_cfg": config})))
    decoded = time.perf_counter() - started
    fit, _ = our_fit(
        model, arguments.earlier, pixels, batch=arguments.batch, epochs=arguments.epochs,
        precision=arguments.precision, compile=arguments.compile, **CROPS,
    )  # fmt: skip
    for _ in fit.run():
        pass
    synchronise()
    seconds = time.perf_counter() - started
    return {**speed(arguments.epochs * len(data), seconds, used() - before), "decoding": decoded}


def reference(arguments: argparse.Namespace) -> dict[str, float]:
    """The same by the released code: its transforms, its data loader with its eight processes, its model."""
    from torchvision import transforms

    train, _ = reference_training(backbone(arguments.backbone), arguments.earlier, arguments.reference)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(224, scale=(0.05, 1.0), ratio=(3 / 4, 4 / 3)),
            transforms.RandomHorizontalFlip(p=0.5),
            transforms.ToTensor(),
        ]
    )

    class Files(torch.utils.data.Dataset):  # type: ignore[type-arg]
        paths = sorted(arguments.files.iterdir())

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            picture = Image.open(io.BytesIO(self.paths[index].read_bytes())).convert("RGB")
            return transform(picture), index % CLASSES

    loader = torch.utils.data.DataLoader(Files(), batch_size=arguments.batch, shuffle=True, num_workers=8)
    started, before = time.perf_counter(), used()
    for _ in range(arguments.epochs):
        for images, labels in loader:
            train(images, labels)
    synchronise()
    seconds = time.perf_counter() - started
    return speed(arguments.epochs * len(Files()), seconds, used() - before)


def used() -> float:
    """Seconds of CPU that this process has used, and those of its processes that have ended."""
    both = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def speed(images: int, seconds: float, cpu: float) -> dict[str, float]:
    """Images per second of the clock and of the CPU."""
    return {"images per second": images / seconds, "images per CPU second": images / cpu, "seconds": seconds}


def memory(arguments: argparse.Namespace) -> dict[str, float]:
    """Median seconds of a step after --earlier tasks, and the peak of this process beside the earlier factors."""
    model = backbone(arguments.backbone)
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.zeros((4 * arguments.batch, *size), dtype=torch.uint8)
    options = {"batch": arguments.batch, "precision": arguments.precision, "compile": arguments.compile}
    fit, factor_bytes = our_fit(model, arguments.earlier, images, **options)
    run, seconds = fit.run(), list[float]()
    for count in range(arguments.steps + 2):
        measured(lambda: next(run), seconds if count > 1 else [])
    cuda = torch.cuda.is_available()
    peak = (
        torch.cuda.max_memory_allocated()
        if cuda
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10
    )
    return {"seconds": statistics.median(seconds), "bytes": peak - factor_bytes}


def machine(arguments: argparse.Namespace) -> dict[str, float]:
    """The rates of this machine."""
    least = floor(arguments.backbone, arguments.batch, arguments.precision)
    return rates(int(least["width"]), int(least["tokens"]), arguments.precision)


SIDES = {
    "machine": machine,
    "ours": ours,
    "reference": reference,
    "parts": parts,
    "evaluation": evaluation,
    "memory": memory,
}


def child(arguments: argparse.Namespace, side: str, **changes: object) -> dict[str, float]:
    """Measure one side in a process of its own."""
    values = {**vars(arguments), "side": side, **changes}
    command = [sys.executable, __file__]
    for name, value in values.items():
        if isinstance(value, bool):
            command += [f"--{name}"] if value else []
        elif value is not None:
            command += [f"--{name}", str(value)]
    # As the command line sets it: threads that spin stand in each other's way where another program has a core.
    settings = {"GOMP_SPINCOUNT": SPIN, **os.environ}
    done = subprocess.run(command, capture_output=True, text=True, env=settings)
    if done.returncode:
        killed = "; it was killed, as where memory is short (try a smaller --batch)"
        sys.exit(f"{done.stderr}{side} failed: status {done.returncode}{killed * (done.returncode == -9)}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def in_turn(
    arguments: argparse.Namespace, sides: dict[str, dict[str, object]]
) -> dict[str, dict[str, float]]:
    """Measure several sides in turn, --rounds times; the medians."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
    for _ in range(arguments.rounds):
        for name, changes in sides.items():
            found[name].append(child(arguments, **changes))  # type: ignore[arg-type]
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in found.items()
    }


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All measurements; prints the tables."""
    least = floor(arguments.backbone, arguments.batch, arguments.precision)
    rate = child(arguments, "machine")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    print(
        f"{device}, {arguments.threads} threads; {arguments.backbone}, batch {arguments.batch}, {arguments.precision}"
    )
    print(f"matrix rate {rate['operations'] / 1e9:.0f} GFLOP/s, copies {rate['bytes'] / 1e9:.1f} GB/s")
    compute, traffic = least["operations"] / rate["operations"], least["bytes"] / rate["bytes"]
    print(f"floor of a step: {compute:.3f} s of operations, {traffic:.3f} s of memory traffic")
    step = in_turn(arguments, {"parts": {"side": "parts"}})["parts"]
    rest = step["stored"] - sum(step[name] for name in ("augment", "forward", "backward", "update"))
    print("\n| part of a step | seconds | over the floor |\n| --- | --- | --- |")
    shares = {"forward": least["forward"] / rate["operations"]}
    shares["backward"] = compute - shares["forward"]
    for name in ("augment", "forward", "backward", "update"):
        ratio = f"{step[name] / shares[name]:.2f}" if name in shares else ""
        print(f"| {name} | {step[name]:.3f} | {ratio} |")
    print(f"| the rest | {rest:.3f} | |\n| all | {step['stored']:.3f} | {step['stored'] / compute:.2f} |")
    tested = in_turn(arguments, {"": {"side": "evaluation"}})[""]["seconds"]
    print(f"| a batch of an evaluation | {tested:.3f} | {tested / shares['forward']:.2f} |")
    bars = {
        "share of the matrix rate in a step": compute / step["stored"],
        "share of the matrix rate in evaluation": shares["forward"] / tested,
        "stored images over ready tensors (at most 1.10)": step["stored"] / step["ready"],
    }
    flat = in_turn(arguments, {str(n): {"side": "memory", "earlier": n} for n in (5, 50)})
    bars["seconds after 50 tasks over 5"] = flat["50"]["seconds"] / flat["5"]["seconds"]
    bars["memory after 50 tasks over 5"] = flat["50"]["bytes"] / flat["5"]["bytes"]
    result: dict[str, Any] = {
        "device": device,
        "torch": torch.__version__,
        "step": step,
        "evaluation": tested,
        "floor": compute,
        "rate": rate,
    }
    if arguments.reference:
        with TemporaryDirectory() as folder:
            photographs(Path(folder), arguments.images)
            whole = in_turn(
                arguments, {side: {"side": side, "files": folder} for side in ("ours", "reference")}
            )
        for side, facts in whole.items():
            print(f"{side}: {facts['images per second']:.2f} images/s in {arguments.epochs} epochs")
        name = (
            f"images per second over the released code's at {arguments.earlier} earlier tasks (at least 3.5)"
        )
        bars[name] = whole["ours"]["images per second"] / whole["reference"]["images per second"]
        per_cpu = [whole[side]["images per CPU second"] for side in ("ours", "reference")]
        bars["the same per second of CPU, which other work on the machine disturbs less"] = (
            per_cpu[0] / per_cpu[1]
        )
        result["whole"] = whole
    print("\n| ratio | measured |\n| --- | --- |")
    for name, value in bars.items():
        print(f"| {name} | {value:.2f} |")
    settings = (
        "backbone",
        "batch",
        "precision",
        "compile",
        "earlier",
        "threads",
        "images",
        "epochs",
        "rounds",
    )
    return {**result, "bars": bars, **{name: getattr(arguments, name) for name in settings}, "rank": RANK}


def main() -> None:
    """Measure all and print it; or, as a process of its own, one side."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_base_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="bf16", help="of ours")
    parser.add_argument("--compile", action="store_true", help="ours through torch.compile")
    parser.add_argument("--earlier", type=int, default=20, help="tasks before")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=64, help="of the whole fit")
    parser.add_argument(
        "--epochs", type=int, default=2, help="of the whole fit; more favour ours, which decodes once"
    )
    parser.add_argument("--reference", type=Path, help="a checkout of WuYichen-97/SD-Lora-CL")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    parser.add_argument("--files", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.side:
        print(json.dumps(SIDES[arguments.side](arguments)))
        return
    result = run(arguments)
    arguments.results.parent.mkdir(parents=True, exist_ok=True)
    with arguments.results.open("a") as file:
        file.write(json.dumps(result, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
