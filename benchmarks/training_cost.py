"""What an optimiser step costs after many tasks, in seconds and in memory, beside the authors' released code.

Each figure is of a process of its own (its peak memory is then its own): a timm vision transformer with random
weights, random images, so many earlier directions of rank 10. The processes of one number of tasks follow each other,
so that a machine that is busy for a while does not favour one of them. All sizes are the same for both sides.

The reference is a checkout of WuYichen-97/SD-Lora-CL, which is not part of this project: clone it anywhere outside
the tree and name it with --reference. Its own layer runs as it is, on earlier factors that are put there in memory
(it would read pickles), without the orthogonality loss that its loop computes and drops, and without its second copy
of the model.

The results go to a JSON-lines file; --write puts a table of all that is there into docs/reference/training_cost.md.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

import sdlora.backbones  # noqa: F401 - registers the packaged glyph_vit
from sdlora.adapters import Factors, inject_adapters
from sdlora.classifier import ModelState
from sdlora.devices import best_device
from sdlora.formulations import FORMULATIONS
from sdlora.head import HeadBlock
from sdlora.methods import METHODS, Settings
from sdlora.training import Fit, Schedule, TaskImages

RANK, CLASSES, WARM_UP = 10, 10, 2
RESULTS = Path("benchmarks/results/training_cost.jsonl")
PAGE = Path("docs/reference/training_cost.md")


def backbone(name: str) -> nn.Module:
    """A timm model with random weights, the same in every process."""
    torch.manual_seed(0)
    return timm.create_model(name, pretrained=False, num_classes=0).eval()


def our_step(model: nn.Module, earlier: int, batch: int, precision: str) -> tuple[Callable[[], object], int]:
    """One optimiser step of ours, and the bytes of the earlier factors."""
    size = timm.data.resolve_model_data_config(model)["input_size"]
    images = torch.randint(
        0, 255, (4 * batch, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2)
    )
    fit, factor_bytes = our_fit(model, earlier, images, batch=batch, precision=precision)
    steps = fit.run()
    return lambda: next(steps), factor_bytes


def our_fit(
    model: nn.Module, earlier: int, images: torch.Tensor, *, batch: int, epochs: int = 1000, **changes: object
) -> tuple[Fit, int]:
    """A fit of ours on these images after so many earlier tasks, and the bytes of the earlier factors."""
    names = {name: (d.rows, d.columns) for name, d in inject_adapters(timm_copy(model)).items()}
    generator = torch.Generator().manual_seed(1)

    def direction() -> dict[str, Factors]:
        return {
            name: Factors(
                0.02 * torch.randn(rows, RANK, generator=generator),
                0.02 * torch.randn(RANK, columns, generator=generator),
            )
            for name, (rows, columns) in names.items()
        }

    tasks = [f"t{i + 1:02}" for i in range(earlier)]
    rows = HeadBlock(torch.zeros(CLASSES, model.num_features), torch.zeros(CLASSES))
    learned = ModelState(
        directions={task: direction() for task in tasks},
        magnitudes={task: torch.ones(len(names)) for task in tasks},
        head=dict.fromkeys(tasks, rows),
    )
    factor_bytes = 4 * sum(
        f.numel() for d in learned.directions.values() for pair in d.values() for f in pair
    )
    values: dict[str, Any] = {
        "crop_scale": 1.0,
        "flip": False,
        "precision": "fp32",
        "compile": False,
        **changes,
    }
    schedule = Schedule(
        optimizer="sgd", learning_rate=1e-4, momentum=0.9, decay="constant", epochs=epochs, batch_size=batch, **values
    )  # fmt: skip
    fit = Fit(
        model,
        learned,
        tasks={f"t{earlier + 1:02}": TaskImages(images, torch.arange(len(images)) % CLASSES)},
        mean=[0.5] * images.shape[1],
        std=[0.5] * images.shape[1],
        method=METHODS["sdlora"],
        settings=Settings(formulation=FORMULATIONS["continuous"], rank=RANK),
        schedule=schedule,
        seed=0,
        device=best_device(),
    )
    return fit, factor_bytes


def timm_copy(model: nn.Module) -> nn.Module:
    """Another model of the same architecture, to read the sizes of the targets from."""
    return timm.create_model(model.default_cfg["architecture"], pretrained=False, num_classes=0)


def reference_step(
    model: nn.Module, earlier: int, batch: int, checkout: Path
) -> tuple[Callable[[], object], int]:
    """One optimiser step of the released code, and the bytes of the earlier factors."""
    size = timm.data.resolve_model_data_config(model)["input_size"]
    train, factor_bytes = reference_training(model, earlier, checkout)
    images = torch.rand(4 * batch, *size, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(len(images)) % CLASSES
    position = [0]

    def step() -> None:
        chosen = [(position[0] + i) % len(images) for i in range(batch)]
        position[0] += batch
        train(images[chosen], labels[chosen])

    return step, factor_bytes


def reference_training(
    model: nn.Module, earlier: int, checkout: Path
) -> tuple[Callable[[torch.Tensor, torch.Tensor], None], int]:
    """What the released code does with a batch of images and labels, and the bytes of the earlier factors."""
    sys.path.insert(0, str(checkout))
    sys.modules["einops"] = types.ModuleType("einops")
    sys.modules["einops"].rearrange = None  # type: ignore[attr-defined] # imported there and not used
    device = best_device()
    if device.type == "cpu":  # it calls .cuda() wherever it goes
        nn.Module.cuda = lambda self, *_: self  # type: ignore[method-assign,assignment]
        torch.Tensor.cuda = lambda self, *_: self  # type: ignore[method-assign,assignment]
    lora = __import__("backbone.lora", fromlist=["LoRA_ViT_timm"])
    adapted = lora.LoRA_ViT_timm(vit_model=model, r=RANK, num_classes=0)
    del adapted.base_vit
    width, blocks = model.num_features, len(model.blocks)
    saved: dict[str, dict[str, list[nn.Linear]]] = {"A": {}, "B": {}}
    for i in range(earlier):
        saved["A"][f"saved_A_{i}"] = [nn.Linear(width, RANK, bias=False) for _ in range(2 * blocks)]
        saved["B"][f"saved_B_{i}"] = [nn.Linear(RANK, width, bias=False) for _ in range(2 * blocks)]
    # The released code stops at 20 earlier tasks for want of magnitudes; more of them cost it nothing else.
    while len(adapted.wrapped_param_prev) < earlier:
        adapted.wrapped_param_prev.append(lora.ParameterWrapper(nn.Parameter(torch.tensor([0.8]))))
    for block in model.blocks:
        layer = block.attn.qkv
        layer.task_id, layer.saved_A, layer.saved_B = earlier, saved["A"], saved["B"]
        layer.scaling_factor_prev = adapted.wrapped_param_prev
    for layer in [*(x for group in saved.values() for part in group.values() for x in part)]:
        layer.weight.requires_grad_(False)
    head = nn.Linear(width, CLASSES * (earlier + 1))
    adapted.to(device)
    head.to(device)
    parameters = [p for p in [*adapted.parameters(), *head.parameters()] if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1e-4, momentum=0.9)

    def train(images: torch.Tensor, labels: torch.Tensor) -> None:
        logits = head(adapted(images.to(device)))[:, CLASSES * earlier :]
        loss = nn.functional.cross_entropy(logits, labels.to(device))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return train, 4 * earlier * 2 * blocks * 2 * RANK * width


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seconds per step (median) and peak memory of this process, the earlier factors' own bytes aside."""
    torch.set_num_threads(arguments.threads)
    device = best_device()
    model = backbone(arguments.backbone)
    if arguments.side == "reference":
        step, factor_bytes = reference_step(model, arguments.earlier, arguments.batch, arguments.reference)
    else:
        step, factor_bytes = our_step(model, arguments.earlier, arguments.batch, arguments.precision)
    seconds = []
    for _ in range(WARM_UP + arguments.steps):
        if device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    if device.type == "cuda":
        peak, name = torch.cuda.max_memory_allocated(), torch.cuda.get_device_name()
    else:
        peak, name = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, cpu_name()
    return {
        "seconds": round(statistics.median(seconds[WARM_UP:]), 4),
        "peak_mib": round((peak - factor_bytes) / 2**20, 1),
        "device": name,
        "torch": torch.__version__,
    }


def cpu_name() -> str:
    """The processor's own name for itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").is_file() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine()
    )


def stored(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def page(results: list[dict[str, Any]]) -> str:
    """docs/reference/training_cost.md."""
    lines = [
        "# What a training step costs after many tasks",
        "",
        "Written by `python benchmarks/training_cost.py --write`: do not edit. Median seconds of an optimiser step",
        "(data path, forward, backward, update), and the peak memory of the process without the earlier factors",
        "themselves.",
        "",
        "- *growth*: against no earlier task.",
        "- *reference*: the authors' released code on the same backbone, batch, threads and images, measured in turn.",
        "- *ratio*: ours over the reference's time.",
    ]
    groups: dict[tuple[Any, ...], dict[tuple[str, int], dict[str, Any]]] = {}
    for result in results:
        key = tuple(result[k] for k in ("device", "backbone", "batch", "threads", "precision"))
        groups.setdefault(key, {})[result["side"], result["earlier"]] = result
    for (device, name, batch, threads, precision), found in groups.items():
        lines += [
            "",
            f"## {name}, batch {batch}, {precision}, {device}, {threads} threads",
            "",
            "| earlier tasks | seconds | growth | MiB | growth | reference: seconds | MiB | ratio |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        first = found.get(("ours", 0))
        for earlier in sorted({number for _, number in found}):
            ours, other = found.get(("ours", earlier)), found.get(("reference", earlier))
            if ours is None:
                continue
            cells = [str(earlier), f"{ours['seconds']:.3f}"]
            cells += [
                f"{ours['seconds'] / first['seconds']:.2f}" if first else "–",
                f"{ours['peak_mib']:.0f}",
            ]
            cells += [f"{ours['peak_mib'] / first['peak_mib']:.2f}" if first else "–"]
            cells += [f"{other['seconds']:.3f}", f"{other['peak_mib']:.0f}"] if other else ["–", "–"]
            cells += [f"{ours['seconds'] / other['seconds']:.2f}" if other else "–"]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure in processes of their own, in turn; or, as such a process, measure once and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--backbone", default="vit_tiny_patch16_224")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of ours")
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--tasks", type=int, nargs="+", default=[0, 1, 5, 10, 20, 50])
    parser.add_argument("--reference", type=Path, help="a checkout of WuYichen-97/SD-Lora-CL")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE} at the end")
    parser.add_argument("--side", choices=("ours", "reference"), help=argparse.SUPPRESS)
    parser.add_argument("--earlier", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    keys = ("backbone", "batch", "threads", "precision")
    for earlier in arguments.tasks:
        for side in ("ours", "reference") if arguments.reference else ("ours",):
            command = [sys.executable, __file__, "--side", side, "--earlier", str(earlier)]
            for name in (*keys, "steps"):
                command += [f"--{name}", str(getattr(arguments, name))]
            if arguments.reference:
                command += ["--reference", str(arguments.reference.resolve())]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{side} with {earlier} earlier tasks failed:\n{done.stderr}")
            result = {
                "side": side,
                "earlier": earlier,
                **{name: getattr(arguments, name) for name in keys},
                **json.loads(done.stdout.splitlines()[-1]),
            }
            print(f"{earlier:3} earlier, {side}: {result['seconds']} s, {result['peak_mib']} MiB", flush=True)
            arguments.results.parent.mkdir(parents=True, exist_ok=True)
            with arguments.results.open("a") as file:
                file.write(json.dumps(result, sort_keys=True) + "\n")
    if arguments.write:
        PAGE.write_text(page(stored(arguments.results)), encoding="utf-8")


if __name__ == "__main__":
    main()
