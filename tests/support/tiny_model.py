"""Small real models and fits: timm's own vision transformer at tiny size."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from typing import Any

import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from sdlora.classifier import ModelState
from sdlora.formulations import FORMULATIONS
from sdlora.freezing import freeze
from sdlora.methods import METHODS, FitResult, Settings
from sdlora.process_group import SINGLE, ProcessGroup
from sdlora.training import Fit, Schedule, TaskImages


def tiny_vit(seed: int = 0, *, depth: int = 2) -> nn.Module:
    """A vision transformer of few blocks, width 16, on 8×8 grey images, with random weights."""
    torch.manual_seed(seed)
    model = VisionTransformer(
        img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=depth, num_heads=2, num_classes=0
    )
    return model.eval()


def tiny_task(index: int, *, classes: int = 2, each: int = 12) -> tuple[Tensor, Tensor]:
    """Images (n, 1, 8, 8) uint8 of `classes` patterns with noise, and labels (n,) within the task."""
    generator = torch.Generator().manual_seed(100 + index)
    patterns = torch.randint(0, 200, (classes, 1, 8, 8), generator=generator)
    labels = torch.arange(classes).repeat_interleave(each)
    noise = torch.randint(0, 55, (len(labels), 1, 8, 8), generator=generator)
    return (patterns[labels] + noise).to(torch.uint8), labels


def schedule(**changes: str | float | bool) -> Schedule:
    """A short training schedule."""
    values = {
        "optimizer": "sgd",
        "learning_rate": 0.05,
        "momentum": 0.9,
        "decay": "constant",
        "epochs": 3,
        "batch_size": 7,
        "crop_scale": 1.0,
        "flip": False,
        "precision": "fp32",
        "compile": False,
    }
    return Schedule(**{**values, **changes})


RANKS = {"t01": 3, "t03": 2}


def settings(formulation: str = "continuous", **changes: Any) -> Settings:  # noqa: ANN401 - any field's value
    """Settings of the methods, of rank 3, with fields of the formulation or of the settings changed."""
    of_it = ("magnitude_start", "carried", "trains_earlier", "initial_up")
    own = {key: changes.pop(key) for key in of_it if key in changes}
    return Settings(
        **{
            "formulation": replace(FORMULATIONS[formulation], **own),
            "rank": 3,
            "rank_schedule": RANKS,
            **changes,
        }
    )


def make_fit(
    before: ModelState,
    index: int,
    *,
    method: str = "sdlora",
    chosen: Settings | None = None,
    backbone: nn.Module | None = None,
    targets: tuple[str, ...] | None = None,
    group: ProcessGroup = SINGLE,
    lone: Collection[int] = (),
    **changes: str | float | bool,
) -> Fit:
    """The fit of task `t{index}` on the tiny model; a joint method gets all tasks up to it.

    A task has two classes, and those of `lone` one.
    """
    first = 1 if METHODS[method].joint else index
    return Fit(
        tiny_vit() if backbone is None else backbone,
        before,
        tasks={
            f"t{i:02}": TaskImages(*tiny_task(i, classes=1 if i in lone else 2))
            for i in range(first, index + 1)
        },
        mean=[0.5],
        std=[0.5],
        method=METHODS[method],
        settings=chosen or settings(),
        schedule=schedule(**changes),
        seed=7,
        device=torch.device("cpu"),
        targets=targets,
        group=group,
    )


def finish(fit: Fit) -> FitResult:
    """What a fit has learned at its end."""
    for _ in fit.run():
        pass
    return fit.result()


def learn(
    tasks: int,
    *,
    method: str = "sdlora",
    chosen: Settings | None = None,
    backbone: Callable[[], nn.Module] = tiny_vit,
    lone: Collection[int] = (),
) -> ModelState:
    """What a chain of `tasks` steps has learned."""
    learned = ModelState()
    for index in range(1, tasks + 1):
        fit = make_fit(learned, index, method=method, chosen=chosen, backbone=backbone(), lone=lone)
        for _ in fit.run():
            pass
        step = freeze(learned, fit.result(), method=METHODS[method], settings=chosen or settings())
        learned = step.learned
    return learned


def everything(result: FitResult) -> dict[str, Tensor]:
    tensors = {f"{name}.{i}": t for name, pair in result.factors.items() for i, t in enumerate(pair)}
    rows = {f"{task}.{part}": t for task, block in result.head.items() for part, t in block._asdict().items()}
    return tensors | dict(result.magnitudes) | rows | dict(result.memory)
