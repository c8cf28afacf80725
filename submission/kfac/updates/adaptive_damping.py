"""Levenberg-Marquardt rule for the damping (Martens & Grosse 2015, section 6.5). Off by default.

A step δ is judged by the reduction ratio

    ρ = (loss(θ + δ) - loss(θ)) / M(δ),  M(δ) = gᵀδ + ½ δᵀ(F + λI)δ,

of the change that happened, on the same batch, to the one that the quadratic model predicted.
Where the model is trusted (ρ > 3/4) the damping is lowered, where not (ρ < 1/4) it is raised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..blocks.block import statistics_dtype
from ..blocks.factors import EigenInverse
from ..config import SMALLEST_DAMPING
from ..ranks.sharded import whole, whole_gradients
from .inverses import settings_of

if TYPE_CHECKING:
    from ..preconditioner import Preconditioner

OMEGA = 19 / 20  # per step between two adaptations
LARGEST_DAMPING = 1 / SMALLEST_DAMPING


@dataclass(frozen=True)
class Trial:
    """Gradients and parameters before a step: name of a block -> in its canonical view."""

    gradients: dict[str, Tensor]
    values: dict[str, Tensor]


@torch.no_grad()
def begin_trial(kfac: Preconditioner) -> Trial:
    """Remembers the plain gradients and the parameters of all blocks that have gradients.

    Call it after the backward pass and before `precondition`.
    """
    gradients, values = {}, {}
    all_gradients, all_values = whole_gradients(kfac.parameters), _values(kfac)
    for block in kfac.structure.blocks:
        gradient, value = block.read(all_gradients), block.read(all_values)
        if gradient is not None and value is not None:
            gradients[block.name], values[block.name] = gradient.clone(), value.clone()
    return Trial(gradients, values)


@torch.no_grad()
def end_trial(kfac: Preconditioner, trial: Trial, loss_before: float, loss_after: float) -> float:
    """Adapts the damping to how well the step went.

    Args:
        trial: of `begin_trial`, before the parameters were changed.
        loss_before, loss_after: the mean loss of the same batch (same dropout) around the step.

    Returns:
        ρ; minus infinity where no decrease was predicted, NaN for a step that changed nothing,
        which leaves the damping.
    """
    predicted, change = _predicted_change(kfac, trial), loss_after - loss_before
    if predicted == 0 and change == 0:
        return float("nan")
    ratio = change / predicted if predicted < 0 else float("-inf")
    kfac.damping = adapted_damping(kfac.damping, ratio, kfac.config.inverse_update_steps)
    return ratio


def adapted_damping(damping: float, ratio: float, steps: int) -> float:
    """The next damping; `steps` since the last adaptation. A ratio that is not finite is bad."""
    if ratio > 0.75:
        return max(damping * OMEGA**steps, SMALLEST_DAMPING)
    if ratio < 0.25 or ratio != ratio:
        return min(damping / OMEGA**steps, LARGEST_DAMPING)
    return damping


def _predicted_change(kfac: Preconditioner, trial: Trial) -> float:
    """M(δ) for the difference δ between the present parameters and those of the trial.

    λ stands beside F itself, however the factors are damped; where it is relative, in units of the
    mean eigenvalue of the block. F has the corrected eigenvalues where an inverse has them.
    """
    total = torch.zeros((), dtype=torch.float64)
    settings, all_values = settings_of(kfac.state, kfac.config, 1), _values(kfac)
    for block in kfac.structure.blocks:
        own, values = kfac.state.of(block), block.read(all_values)
        if block.name not in trial.gradients or own.curvature is None or values is None:
            continue
        step = (values - trial.values[block.name]).to(statistics_dtype(values))
        change = (trial.gradients[block.name] * step).sum()
        if isinstance(own.inverse, EigenInverse) and own.inverse.corrected is not None:
            curvature = (own.inverse.corrected * own.inverse.basis.into(step).square()).sum()
        else:
            curvature = own.curvature.quadratic_form(step)
        strength = own.curvature.strength(settings).reshape(-1, *(1,) * (step.dim() - 1))
        change += 0.5 * (curvature + (strength * step.square()).sum())
        total = total.to(change.device) + change.double()
    return float(total)


def _values(kfac: Preconditioner) -> dict[str, Tensor]:
    return {name: whole(parameter.detach()) for name, parameter in kfac.parameters.items()}
