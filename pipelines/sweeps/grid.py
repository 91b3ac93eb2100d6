"""Which chains a sweep is made of: the product of some values, each with a whole `params.yaml` of its own."""

from __future__ import annotations

import hashlib
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.project.errors import InputError
from pipelines.project.layout import PARAMS
from pipelines.project.params import Params
from pipelines.project.params_text import flow, with_value
from pipelines.project.yaml_text import read_text, read_yaml

MANY_CHAINS = 20
"""More chains than this are trained only by somebody who has seen how many they are."""

_SECTIONS = ("data", "backbone", "adapter", "training", "evaluation")
"""Blocks of params.yaml whose keys change what a chain learns, or how well it does."""

_REFUSED = {
    "tasks": "the order of the classes is not a parameter; plan it, and sweep in a project of its own",
    "fetch": "it brings images; sweep in a project for each way to divide them",
    "gate": "a limit ends a chain and changes nothing that it learns",
    "approvals": "a person approves a step of this project, and of no other chain",
    "workers": "it says where chains run, not what they learn",
    "training.checkpoint_seconds": "it changes nothing that a chain learns",
    "training.checkpoint_store": "it changes nothing that a chain learns",
}
"""Keys of params.yaml that are not swept, and why."""

_NAME = r"[A-Za-z0-9][\w.-]{0,79}"
"""What a sweep, and a chain of one, may be called: it is a folder's name, on other machines too."""


@dataclass(frozen=True)
class Chain:
    """One chain of a sweep."""

    values: Mapping[str, Any]
    """The swept keys and their values here, such as {"adapter.method": "olora", "seed": 1994}."""
    params: str
    """The text of its params.yaml."""

    @property
    def title(self) -> str:
        """Return what it is called in lines and tables."""
        return " ".join(f"{key}={flow(value)}" for key, value in self.values.items())

    @property
    def name(self) -> str:
        """Return what its folder is called: it stays the same when the sweep grows."""
        words = "-".join(
            re.sub(r"[^A-Za-z0-9.]+", "-", flow(value)).strip("-.") for value in self.values.values()
        )
        return f"{words[:40].strip('-.') or 'chain'}-{short_hash(dict(self.values))}"


def short_hash(value: object) -> str:
    """Six hexadecimal digits that stand for a value."""
    return hashlib.sha256(flow(value).encode()).hexdigest()[:6]


def read_axes(arguments: Sequence[str]) -> dict[str, list[Any]]:
    """Read `key=value,value` arguments, values being YAML. An `InputError` says what cannot be swept.

    Keys and values come in an order of their own, `seed` last, so that the same sweep is the same however it was
    typed.
    """
    axes: dict[str, list[Any]] = {}
    for argument in arguments:
        key, equals, text = argument.partition("=")
        if not equals or not key or not text.strip():
            raise InputError(f"sweep: found {argument!r}, expected KEY=VALUE,VALUE, such as seed=1993,1994")
        for refused, why in _REFUSED.items():
            if key == refused or key.startswith(f"{refused}."):
                raise InputError(f"sweep: {key} is not swept: {why}")
        if key != "seed" and key.partition(".")[0] not in _SECTIONS:
            raise InputError(
                f"sweep: {key}: no such parameter; sweep seed or a key of {', '.join(_SECTIONS)}"
            )
        if key in _SECTIONS:
            raise InputError(f"sweep: {key} is a block of parameters; name one of them, such as {key}.KEY")
        if key in axes:
            raise InputError(f"sweep: {key} stands there twice; write all its values behind one")
        values = read_yaml(f"values: [{text}]", origin=f"sweep: {key}")["values"]
        axes[key] = sorted(values, key=_order)
        for one, next_one in itertools.pairwise(axes[key]):
            if _order(one) == _order(next_one):
                raise InputError(f"sweep: {key}: the value {flow(one)} stands there twice; remove one")
    return {key: axes[key] for key in sorted(axes, key=lambda key: (key == "seed", key))}


def _order(value: object) -> tuple[bool, float, str]:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return not is_number, float(value) if is_number else 0.0, flow(value)  # type: ignore[arg-type]


def make_chains(axes: Mapping[str, Sequence[Any]], *, path: Path = PARAMS) -> list[Chain]:
    """Return all combinations of the values. An `InputError` names the first that is not valid as a whole."""
    text = read_text(path)
    present = Params.parse(text, origin=str(path))
    for key, task in present.tasks.items():
        if task.retired:
            raise InputError(
                f"sweep: the images of {key} are deleted, and every chain begins with the first task"
            )
    chains, faults = [], []
    for values in itertools.product(*axes.values()):
        params = text
        for key, value in zip(axes, values, strict=True):
            params = with_value(params, tuple(key.split(".")), value)
        chain = Chain(dict(zip(axes, values, strict=True)), params)
        chains.append(chain)
        try:
            Params.parse(params, origin=chain.title)
        except InputError as fault:
            faults.append(str(fault))
    if faults:
        more = f"; {len(faults)} of {len(chains)} combinations are not valid" if len(faults) > 1 else ""
        raise InputError(f"sweep: {faults[0]}{more}")
    return chains


def default_name(axes: Mapping[str, Sequence[Any]]) -> str:
    """Return a name for a sweep that was given none: its keys, and a hash of all."""
    return f"{'-'.join(key.rpartition('.')[2] for key in axes)[:60]}-{short_hash(dict(axes))}"


def checked_name(name: str) -> str:
    """Return a name that can be a folder's. An `InputError` for any other."""
    if not re.fullmatch(_NAME, name):
        raise InputError(f"sweep: the name {name!r} is not one for a folder; use letters, digits and . _ -")
    return name
