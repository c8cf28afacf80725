"""Adam in the eigenbasis of K-FAC's factors.

K-FAC's factors say in which directions the curvature of a layer is diagonal: the eigenvectors
Q_B ⊗ Q_A. Adam estimates a diagonal. So the second moment of the gradient G [P_out, P_in] is kept
in that basis, as in SOAP (Vyas et al. 2024), whose basis comes from the gradients themselves:

    M ← β₁ M + (1 - β₁) G                          first moment, not rotated
    V ← β₂ V + (1 - β₂) (Q_Bᵀ G Q_A)²              second moment in the basis
    M' = [β₁ M + (1 - β₁) G] / (1 - β₁ᵗ)           looks one step ahead (Nesterov)
    Δ = Q_B [ Q_Bᵀ M' Q_A / (√(V / (1 - β₂ᵗ)) + ε) ] Q_Aᵀ

When the basis turns by R (old to new), V turns along: entry by entry, squares of R are what the
variances of uncorrelated entries are mixed with. Parts without factors are trained by Adam.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .inverses import Inverse
from .statistics import Part

Moments = dict[str, Tensor]  # first, second: in the part's canonical view


@dataclass(frozen=True)
class AdamStep:
    """What all parts have in common in one step. Nothing here waits for a device.

    Attributes:
        count: number of steps so far, this one included; one that is not finite does not count,
            and enters no moment.
        finite: whether all gradients of this step, and their squares, are finite.
        weights: of the new gradient in either moment, 1 - β, or 0 where they are not finite.
        corrections: 1 - βᵗ of either moment.
        epsilon: ε.
    """

    count: Tensor
    finite: Tensor
    weights: tuple[Tensor, Tensor]
    corrections: tuple[Tensor, Tensor]
    epsilon: float

    @classmethod
    def of(
        cls,
        count: Tensor | None,
        gradients: Sequence[Tensor],
        *,
        betas: tuple[float, float],
        epsilon: float,
    ) -> AdamStep:
        """The step after `count` others (None for the first)."""
        dtype = gradients[0].dtype
        # A square that overflows would stay in the second moment for ever.
        flat = [gradient.reshape(-1) for gradient in gradients]
        finite = torch.stack([torch.dot(g, g) for g in flat]).isfinite().all()
        total = finite.to(torch.float64)
        total = total if count is None else count + total
        weight1, weight2 = ((1 - beta) * finite.to(dtype) for beta in betas)
        correction1, correction2 = (
            (1 - beta**total).clamp(min=1 - beta).to(dtype) for beta in betas
        )
        return cls(total, finite, (weight1, weight2), (correction1, correction2), epsilon)


def direction(
    basis: Mapping[str, Tensor], moments: Moments, gradient: Tensor, step: AdamStep
) -> Tensor:
    """Δ of one part, or of several side by side; the moments change in place.

    Args:
        basis: has "A.eigenvectors" [groups, P_in, P_in] and "B.eigenvectors" [groups, P_out,
            P_out]; a side without stays as it is.
        moments: "first" and "second", in the shape of the gradient; zeros before the first step.
        gradient: in the canonical view (see `gradients`); any shape where there is no basis.
    """
    first, second = moments["first"], moments["second"]
    gradient = torch.where(step.finite, gradient, 0)
    rotated = into_basis(basis, gradient)
    first.lerp_(gradient, step.weights[0])
    second.lerp_(rotated.square(), step.weights[1])
    ahead = into_basis(basis, first.lerp(gradient, step.weights[0]))
    denominator = (second / step.corrections[1]).sqrt_().add_(step.epsilon)
    return out_of_basis(basis, ahead.div_(denominator.mul_(step.corrections[0])))


def into_basis(basis: Mapping[str, Tensor], gradient: Tensor) -> Tensor:
    """Q_Bᵀ G Q_A."""
    q_a, q_b = basis.get("A.eigenvectors"), basis.get("B.eigenvectors")
    rotated = gradient if q_b is None else q_b.mT @ gradient
    return rotated if q_a is None else rotated @ q_a


def out_of_basis(basis: Mapping[str, Tensor], rotated: Tensor) -> Tensor:
    """Q_B G Q_Aᵀ."""
    q_a, q_b = basis.get("A.eigenvectors"), basis.get("B.eigenvectors")
    gradient = rotated if q_b is None else q_b @ rotated
    return gradient if q_a is None else gradient @ q_a.mT


def turn_second_moments(
    moments: Mapping[str, Moments],
    parts: Sequence[Part],
    old: Mapping[str, Inverse],
    new: Mapping[str, Inverse],
) -> None:
    """Takes the second moments of all parts whose basis has changed to the new one."""
    for part in parts:
        before, after = old.get(part.name, {}), new.get(part.name, {})
        if part.name not in moments or before is after:
            continue
        second = moments[part.name]["second"]
        for side in ("A", "B"):
            q_before, q_after = (b.get(f"{side}.eigenvectors") for b in (before, after))
            if q_before is None and q_after is None:
                continue
            if q_before is None or q_after is None:
                turn = q_after if q_before is None else q_before.mT
            else:
                turn = q_before.mT @ q_after
            assert turn is not None
            squares = turn.square()
            second = second @ squares if side == "A" else squares.mT @ second
        moments[part.name]["second"] = second
