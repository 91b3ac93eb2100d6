"""The formulations of SD-LoRA: where paper, released code and this project differ, each choice by name."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from sdlora.adapters import Factors, factor_norms, product_norm


@dataclass(frozen=True, kw_only=True)
class Formulation:
    """What a formulation decides. The adapters, the loop and the files are the same for all of them.

    A frozen direction is D = BA / norm(B, A). Where paper and code are silent or disagree the choice is a field,
    and `dataclasses.replace` makes the variant.
    """

    norm: Callable[[Factors], Tensor]
    """The number by which a direction is divided when it is frozen."""
    normalise_current: bool
    """Whether the direction in training is divided by its norm too, in every forward pass."""
    per_target: bool
    """One magnitude for each task and target; otherwise one for each task, shared by the whole network."""
    carried: bool
    """Magnitudes go on from step to step; otherwise all of them start anew at every step."""
    trains_earlier: bool
    """The magnitudes of earlier directions are trained in every step; otherwise only that of the new one is."""
    magnitude_start: float
    """The value at which a magnitude starts."""
    initial_up: str
    """How B starts: `zero`, or `uniform` (see `initial_factors`)."""

    def __post_init__(self) -> None:
        """Refuse what cannot be computed."""
        if self.normalise_current and self.initial_up == "zero":
            raise ValueError(
                "adapter.initial_up: zero gives a direction without a norm, which this formulation divides by; "
                "choose uniform"
            )


_PAPER = Formulation(
    norm=product_norm,
    normalise_current=True,
    per_target=False,
    carried=False,
    trains_earlier=True,
    magnitude_start=1.0,
    initial_up="uniform",
)
"""The paper, to the letter (Wu et al., ICLR 2025, Eq. 3, Eq. 4 and Algorithm 1).

h = (W₀ + Σ_{k≤t} αₖ BₖAₖ / ‖BₖAₖ‖_F) x, the current direction included, one αₖ per task for the whole network, all of
them 1 at the start (Sec. 3.3). The paper does not say how a direction with a norm starts (here: B uniform, with
the bound of A) nor whether αₖ of earlier tasks is carried (line 1 of Algorithm 1 initialises all of them, so here
they start anew): `initial_up` and `carried` choose. Freezing changes no output.
"""

_REFERENCE = Formulation(
    norm=factor_norms,
    normalise_current=False,
    per_target=False,
    carried=False,
    trains_earlier=True,
    magnitude_start=0.8,
    initial_up="zero",
)
"""The authors' released code (WuYichen-97/SD-Lora-CL@8bacded, backbone/lora.py:153-195, 326-328).

h = (W₀ + Σ_{k<t} αₖ BₖAₖ / (‖Bₖ‖_F‖Aₖ‖_F) + α_t B_tA_t) x, one αₖ per task for the whole network, all of them 0.8
at the start of every step: what earlier steps learned of them is lost, and the function jumps at the
boundary of two steps. Within a step, and in its evaluation, the function is the one that was trained: a model
folder therefore holds the magnitudes that reproduce it (α_t‖B_t‖‖A_t‖ at each target for the newest).
"""

_CONTINUOUS = Formulation(
    norm=product_norm,
    normalise_current=False,
    per_target=True,
    carried=True,
    trains_earlier=True,
    magnitude_start=1.0,
    initial_up="zero",
)
"""Ours: freezing changes no output, and nothing that was learned is lost.

h = (W₀ + Σ_{k<t} αₖ BₖAₖ / ‖BₖAₖ‖_F + α_t B_tA_t) x (the paper's Eq. 4 but for the current direction, which for
B = 0 could not be normalised), one αₖ per task and target. At freezing the newest magnitude takes over its
direction's norm, α ← α‖BA‖_F, and all of them are carried into the next step.
"""

FORMULATIONS = {"paper": _PAPER, "reference": _REFERENCE, "continuous": _CONTINUOUS}
