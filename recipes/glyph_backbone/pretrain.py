"""Pre-train a small vision transformer on rendered glyphs, and write its features as the shipped weights."""

import argparse
import copy
import hashlib
import json
import math
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

ARCHITECTURE: dict[str, int] = {
    "img_size": 32,
    "patch_size": 8,
    "in_chans": 1,
    "embed_dim": 192,
    "depth": 6,
    "num_heads": 3,
}
PRETRAINED_CFG: dict[str, Any] = {
    "input_size": [1, 32, 32],
    "mean": [0.5],
    "std": [0.5],
    "interpolation": "bicubic",
    "crop_pct": 1.0,
    "crop_mode": "center",
    "num_classes": 0,
    "first_conv": "patch_embed.proj",
    "classifier": "head",
    "license": "apache-2.0",
}
BATCH = 64
LEARNING_RATE = 1e-3
WEIGHT_DECAY = 0.05
WARM_UP = 0.04
SMOOTHING = 0.1
AUGMENTED = 0.8
EMA_DECAY = 0.999
CHECKPOINT_SECONDS = 180


@dataclass(frozen=True)
class Data:
    """Glyphs of the pre-training fonts and of the unseen fonts, with the chance to draw each former one."""

    images: Tensor
    labels: Tensor
    unseen_images: Tensor
    unseen_labels: Tensor
    cumulative: Tensor
    classes: int


def read_data(folder: Path) -> Data:
    """Read what render.py wrote."""
    images = torch.from_numpy(np.load(folder / "images.npy")).unsqueeze(1)
    labels = torch.from_numpy(np.load(folder / "labels.npy"))
    unseen = torch.from_numpy(np.load(folder / "unseen.npy"))
    classes = len(json.loads((folder / "summary.json").read_text(encoding="utf-8"))["classes"])
    counts = torch.bincount(labels[~unseen], minlength=classes).double()
    # Latin letters occur in every font; the square root keeps them from crowding out the other scripts.
    weights = counts[labels[~unseen]].rsqrt()
    return Data(
        images[~unseen],
        labels[~unseen],
        images[unseen],
        labels[unseen],
        (weights / weights.sum()).cumsum(0),
        classes,
    )


def draw_batch(data: Data, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw images (batch, 1, 32, 32) in [0, 1] and their labels, with replacement."""
    chances = torch.rand(BATCH, dtype=torch.float64, generator=generator)
    picked = torch.searchsorted(data.cumulative, chances).clamp_(max=len(data.labels) - 1)
    return data.images[picked].float().div_(255), data.labels[picked]


def vary_strokes(images: Tensor, generator: torch.Generator) -> Tensor:
    """Thicken a third of the images and thin a third, each by a random amount."""
    third = len(images) // 3
    amount = torch.rand(len(images), 1, 1, 1, generator=generator)
    thick, thin, rest = images[:third], images[third : 2 * third], images[2 * third :]
    thick = torch.lerp(thick, F.max_pool2d(thick, 3, 1, 1), amount[:third])
    thin = torch.lerp(thin, -F.max_pool2d(-thin, 3, 1, 1), 0.5 * amount[third : 2 * third])
    return torch.cat([thick, thin, rest])


def warp(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate, shear, scale, shift and bend every image at random."""
    number = len(images)

    def spread(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(number, generator=generator)

    angle, shear = spread(-0.26, 0.26), spread(-0.3, 0.3)
    size, aspect = spread(0.8, 1.25), spread(-0.18, 0.18).exp()
    cosine, sine = angle.cos(), angle.sin()
    rows = [
        size * aspect * cosine,
        size * (aspect * shear * cosine - sine),
        spread(-0.15, 0.15),
        size / aspect * sine,
        size / aspect * (shear * sine + cosine),
        spread(-0.15, 0.15),
    ]
    grid = F.affine_grid(torch.stack(rows, 1).view(number, 2, 3), list(images.shape), align_corners=False)
    knots = torch.randn(number, 2, 5, 5, generator=generator)
    bends = F.interpolate(knots, size=images.shape[-2:], mode="bicubic", align_corners=True)
    strength = spread(0.0, 0.09).view(number, 1, 1, 1)
    return F.grid_sample(images, grid + strength * bends.permute(0, 2, 3, 1), align_corners=False)


def coarsen(images: Tensor, generator: torch.Generator) -> Tensor:
    """Reduce half of the images to 8 to 16 pixels a side, and enlarge them again."""
    parts = list(images.chunk(8))
    sides = torch.randint(8, 17, (4,), generator=generator).tolist()
    for i, side in enumerate(sides):
        small = F.interpolate(parts[i], size=(side, side), mode="area")
        mode = "bicubic" if i % 2 else "bilinear"
        parts[i] = F.interpolate(small, size=images.shape[-2:], mode=mode, align_corners=False)
    return torch.cat(parts)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Change images (batch, 1, 32, 32) in [0, 1] at random, in everything but the character they show."""
    number = len(images)
    images = warp(vary_strokes(images, generator), generator)
    # Each step treats a share of the batch by position, so the positions change in between.
    order = torch.randperm(number, generator=generator)
    restore = order.argsort()
    images = coarsen(images[order], generator)[restore]
    eighth = number // 8
    images[order[:eighth]] = F.avg_pool2d(images[order[:eighth]], 3, 1, 1)
    gamma = torch.randn(number, 1, 1, 1, generator=generator).mul_(0.2).exp_()
    images = images.clamp_(0, 1).add_(1e-6).pow_(gamma)
    contrast = 0.7 + 0.3 * torch.rand(number, 1, 1, 1, generator=generator)
    ground = (1 - contrast) * torch.rand(number, 1, 1, 1, generator=generator)
    images = images * contrast + ground
    inverted = torch.rand(number, 1, 1, 1, generator=generator) < 0.25
    images = torch.where(inverted, 1 - images, images)
    noise = 0.08 * torch.rand(number, 1, 1, 1, generator=generator)
    noise = noise * (torch.rand(number, 1, 1, 1, generator=generator) < 0.5)
    return (images + noise * torch.randn(images.shape, generator=generator)).clamp_(0, 1)


def normalise(images: Tensor) -> Tensor:
    """Map pixels from [0, 1] to what the model expects."""
    return (images - PRETRAINED_CFG["mean"][0]) / PRETRAINED_CFG["std"][0]


def schedule(step: int, steps: int) -> float:
    """Return the share of the learning rate at a step: linear warm-up, then a cosine to zero."""
    warm = max(1, round(WARM_UP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def augmented_share(step: int, steps: int) -> float:
    """Return the share of augmented images at a step: none at first, rising to most of them half-way.

    Measured after 46,000 images: 56 % of the glyphs of unseen fonts are named, 6 % where all were augmented.
    """
    return AUGMENTED * min(1.0, step / (steps / 2))


def make_optimizer(model: nn.Module) -> torch.optim.AdamW:
    """Make AdamW with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    others = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, fused=True)


def take_step(
    model: nn.Module,
    optimizer: torch.optim.AdamW,
    data: Data,
    *,
    rate: float,
    augmented: float,
    generator: torch.Generator,
) -> float:
    """Take one optimiser step on a fresh batch, of which a share is augmented, and return its loss."""
    for group in optimizer.param_groups:
        group["lr"] = rate
    images, labels = draw_batch(data, generator)
    chosen = torch.rand(len(images), 1, 1, 1, generator=generator) < augmented
    images = torch.where(chosen, augment(images, generator), images)
    loss = F.cross_entropy(model(normalise(images)), labels, label_smoothing=SMOOTHING)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def count_steps(model: nn.Module, data: Data, seconds: float) -> int:
    """Estimate from a few steps of a throw-away copy how many steps fit into a number of seconds."""
    trial = copy.deepcopy(model)
    optimizer = make_optimizer(trial)
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        take_step(trial, optimizer, data, rate=1e-5, augmented=1.0, generator=generator)
    start = time.perf_counter()
    for _ in range(40):
        take_step(trial, optimizer, data, rate=1e-5, augmented=1.0, generator=generator)
    return max(1, int(seconds / (time.perf_counter() - start) * 40))


@torch.inference_mode()
def measure_accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Measure the share of images that the model classifies correctly."""
    model.eval()
    pairs = zip(images.split(512), labels.split(512), strict=True)
    right = sum(int((model(normalise(x.float() / 255)).argmax(1) == y).sum()) for x, y in pairs)
    model.train()
    return right / len(labels)


def replace_file(tensors: dict[str, Tensor], path: Path) -> None:
    """Write tensors so that a reader sees the old file or the new one, never a part."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    # One entry only: safetensors writes several in an order that changes from run to run.
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial, {"format": "pt"})
    # safetensors writes for the owner's eyes only; what the package ships is for everybody's.
    partial.chmod(0o644)
    os.replace(partial, path)


def save_checkpoint(
    folder: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.AdamW, progress: dict[str, int]
) -> None:
    """Save everything that a resumed run needs."""
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state[parameter]
        tensors |= {f"optimizer.{key}.{name}": tensor for key, tensor in state.items()}
    replace_file(tensors, folder / f"step{progress['step']:06d}.safetensors")
    (folder / "progress.json").write_text(json.dumps(progress, sort_keys=True) + "\n", encoding="utf-8")
    for old in sorted(folder.glob("step*.safetensors"))[:-2]:
        old.unlink()


def load_checkpoint(
    folder: Path, model: nn.Module, average: nn.Module, optimizer: torch.optim.AdamW
) -> dict[str, int]:
    """Load the last checkpoint and return the progress that it stood at."""
    progress: dict[str, int] = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / f"step{progress['step']:06d}.safetensors")
    for prefix, module in (("model.", model), ("average.", average)):
        module.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
    for name, parameter in model.named_parameters():
        keys = ("step", "exp_avg", "exp_avg_sq")
        optimizer.state[parameter] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
    return progress


def export(average: nn.Module, accuracy: float, classes: int, path: Path) -> None:
    """Write the features without the classifier, and their description beside them."""
    state = average.state_dict()
    replace_file({name: v.half() for name, v in state.items() if not name.startswith("head.")}, path)
    description = {
        "name": path.stem,
        "architecture": ARCHITECTURE,
        "pretrained_cfg": PRETRAINED_CFG,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "accuracy_unseen_fonts": round(accuracy, 4),
        "classes": classes,
        "recipe": "recipes/glyph_backbone",
    }
    text = json.dumps(description, indent=2, sort_keys=True) + "\n"
    path.with_suffix(".json").write_text(text, encoding="utf-8")


def pretrain(
    data: Data, checkpoints: Path, weights: Path, *, seed: int, minutes: float, steps: int, resume: bool
) -> None:
    """Train for a budget with checkpoints, and export the averaged weights at the first and at the end."""
    torch.manual_seed(seed)
    model = VisionTransformer(**ARCHITECTURE, num_classes=data.classes)
    average = copy.deepcopy(model).requires_grad_(False)
    optimizer = make_optimizer(model)
    checkpoints.mkdir(parents=True, exist_ok=True)
    step = 0
    if resume:
        progress = load_checkpoint(checkpoints, model, average, optimizer)
        step, steps = progress["step"], steps or progress["steps"]
    steps = steps or count_steps(model, data, 60 * minutes)
    print(f"{len(data.labels)} images, {data.classes} classes, {steps} steps, from step {step}", flush=True)

    start, saved, since, losses = time.monotonic(), time.monotonic(), step, []
    picked = torch.randperm(len(data.unseen_labels), generator=torch.Generator().manual_seed(seed))[:4000]
    while step < steps:
        # A generator per step makes a resumed run repeat exactly what an uninterrupted one does.
        generator = torch.Generator().manual_seed(seed * 10_000_000 + step)
        rate, augmented = LEARNING_RATE * schedule(step, steps), augmented_share(step, steps)
        losses.append(take_step(model, optimizer, data, rate=rate, augmented=augmented, generator=generator))
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
        step += 1
        if step % 100 == 0:
            speed = (step - since) * BATCH / (time.monotonic() - start)
            print(f"step {step} loss {np.mean(losses[-100:]):.3f} images/s {speed:.0f}", flush=True)
        if time.monotonic() - saved > CHECKPOINT_SECONDS or step == steps:
            saved = time.monotonic()
            save_checkpoint(checkpoints, model, average, optimizer, {"step": step, "steps": steps})
            accuracy = measure_accuracy(average, data.unseen_images[picked], data.unseen_labels[picked])
            print(f"step {step} accuracy on unseen fonts {accuracy:.4f}", flush=True)
            if not weights.exists():
                export(average, accuracy, data.classes, weights)
    accuracy = measure_accuracy(average, data.unseen_images, data.unseen_labels)
    export(average, accuracy, data.classes, weights)
    print(f"done: accuracy on {len(data.unseen_labels)} images of unseen fonts {accuracy:.4f}", flush=True)


def main() -> None:
    """Read the command line and train."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="folder that render.py wrote")
    parser.add_argument("--checkpoints", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument(
        "--weights",
        type=Path,
        default=Path("sdlora/weights/glyph_vit.safetensors"),
        help="file for the weights; a .json of the same name describes them",
    )
    parser.add_argument("--minutes", type=float, default=50, help="budget from which the steps are estimated")
    parser.add_argument("--steps", type=int, default=0, help="number of steps; 0 estimates it, or resumes it")
    parser.add_argument("--seed", type=int, default=0, help="seed of every random choice")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint")
    arguments = parser.parse_args()
    pretrain(
        read_data(arguments.data),
        arguments.checkpoints,
        arguments.weights,
        seed=arguments.seed,
        minutes=arguments.minutes,
        steps=arguments.steps,
        resume=arguments.resume,
    )


if __name__ == "__main__":
    main()
