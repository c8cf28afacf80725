"""Levenberg-Marquardt rule for the damping (Martens & Grosse 2015, section 6.5). Off by default.

A step δ is judged by the reduction ratio

    ρ = (loss(θ + δ) - loss(θ)) / M(δ),  M(δ) = gᵀδ + ½ δᵀ(F + λI)δ,

of the change that happened, on the same batch, to the one that the quadratic model predicted.
Where the model is trusted (ρ > 3/4) the damping is lowered, where not (ρ < 1/4) it is raised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import SMALLEST_DAMPING
from .curvature import factor_of, unitwise_blocks
from .gradients import canonical
from .inverses import Inverse, strength_of
from .statistics import KroneckerPart, Part, Sums, UnitwisePart, statistics_dtype

OMEGA = 19 / 20  # per step between two adaptations
LARGEST_DAMPING = 1 / SMALLEST_DAMPING


@dataclass(frozen=True)
class Trial:
    """Gradients and parameters before a step: per part, in the canonical view."""

    gradients: dict[str, Tensor]
    values: dict[str, Tensor]


def begin_trial(parts: Sequence[Part]) -> Trial:
    """Remembers the plain gradients and the parameters of all parts that have gradients."""
    gradients, values = {}, {}
    for part in parts:
        gradient = canonical(part, [piece.grad for piece in part.slices])
        if gradient is not None:
            gradients[part.name] = gradient.clone()
            values[part.name] = _values(part).clone()
    return Trial(gradients, values)


def predicted_change(
    parts: Sequence[Part],
    averages: Mapping[str, Sums],
    inverses: Mapping[str, Inverse],
    trial: Trial,
    *,
    damping: float,
    relative: bool,
) -> Tensor:
    """M(δ) for the difference δ between the present parameters and those of the trial.

    λ stands beside F itself, however the factors are damped; with `relative` it is in units of the
    mean eigenvalue of the part. F has the corrected eigenvalues where an inverse has them.
    """
    total = torch.zeros((), dtype=torch.float64)
    for part in parts:
        if part.name not in trial.gradients or part.name not in averages:
            continue
        step = (_values(part) - trial.values[part.name]).to(statistics_dtype(_values(part)))
        change = (trial.gradients[part.name] * step).sum()
        own, inverse = averages[part.name], inverses.get(part.name, {})
        curvature = quadratic_form(part, own, inverse, step)
        strength = strength_of(part, own, damping, relative).reshape(-1, *(1,) * (step.dim() - 1))
        change += 0.5 * (curvature + (strength * step.square()).sum())
        total = total.to(change.device) + change.double()
    return total


def quadratic_form(part: Part, averages: Sums, inverse: Inverse, step: Tensor) -> Tensor:
    """δᵀ F δ of one part; `step` in the canonical view."""
    if "corrected" in inverse:
        rotated = inverse["B.eigenvectors"].mT @ step @ inverse["A.eigenvectors"]
        return (inverse["corrected"] * rotated.square()).sum()
    if isinstance(part, KroneckerPart):
        a, b = factor_of(part, averages, "A"), factor_of(part, averages, "B")
        left = b.values.unsqueeze(-1) * step if b.diagonal else b.dense() @ step
        right = step * a.values.unsqueeze(-2) if a.diagonal else step @ a.dense()
        return (left * right).sum()
    f = averages["F"]
    if isinstance(part, UnitwisePart) and f.shape[0] > 1:
        return torch.einsum("iu,uij,ju->", step, unitwise_blocks(f), step)
    return (f * step.square()).sum()


def adapted_damping(damping: float, ratio: float, steps: int) -> float:
    """The next damping; `steps` since the last adaptation. A ratio that is not finite is bad."""
    if ratio > 0.75:
        return max(damping * OMEGA**steps, SMALLEST_DAMPING)
    if ratio < 0.25 or ratio != ratio:
        return min(damping / OMEGA**steps, LARGEST_DAMPING)
    return damping


def _values(part: Part) -> Tensor:
    values = canonical(part, [piece.data for piece in part.slices])
    assert values is not None
    return values
