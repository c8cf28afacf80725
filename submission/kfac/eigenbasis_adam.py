"""Adam in the eigenbasis of K-FAC's factors.

K-FAC's factors say in which directions the curvature of a layer is diagonal: the eigenvectors
Q_B ⊗ Q_A. Adam estimates a diagonal. So the second moment of the gradient G [P_out, P_in] is kept
in that basis, as in SOAP (Vyas et al. 2024), whose basis comes from the gradients themselves:

    G' = Q_Bᵀ G Q_A                                the gradient in the basis
    M ← β₁ M + (1 - β₁) G'                         first moment
    V ← β₂ V + (1 - β₂) G'²                        second moment
    M' = [β₁ M + (1 - β₁) G'] / (1 - β₁ᵗ)          looks one step ahead (Nesterov)
    Δ = Q_B [ M' / (√(V / (1 - β₂ᵗ)) + ε) ] Q_Aᵀ

When the basis turns by R = Qᵀ_old Q_new, the moments turn along: M to R_Bᵀ M R_A, which is what the
mean of the gradients themselves is in the new basis, and V by the squares of R, which are what the
variances of uncorrelated entries are mixed with. Parts without factors are trained by Adam.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .inverses import Inverse
from .statistics import Part

Moments = dict[str, Tensor]  # first, second: in the part's canonical view
TOGETHER = 1 << 20  # entries that are worked on together; more would only take more memory


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

    def without_faults(self, gradient: Tensor) -> Tensor:
        """The gradient, or zeros where this step's gradients are not finite."""
        if gradient.device.type == "cpu" and self.finite:  # known here without waiting
            return gradient
        return torch.where(self.finite, gradient, 0)


def directions(
    bases: Sequence[Mapping[str, Tensor]],
    moments: Sequence[Moments],
    gradients: Sequence[Tensor],
    step: AdamStep,
) -> list[Tensor]:
    """Δ of parts (or several side by side), each; the moments change in place.

    Args:
        bases: have "A.eigenvectors" [groups, P_in, P_in] and "B.eigenvectors" [groups, P_out,
            P_out]; a side without stays as it is.
        moments: "first" and "second" in the basis, in the shape of the gradient; zeros before the
            first step.
        gradients: in the canonical view (see `gradients`); any shape where there is no basis.
    """
    found: list[Tensor] = []
    for some in _in_pieces([gradient.numel() for gradient in gradients]):
        found += _directions(bases[some], moments[some], gradients[some], step)
    return found


def _in_pieces(sizes: Sequence[int]) -> Iterator[slice]:
    """Neighbours that have no more than TOGETHER entries, or are alone."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > TOGETHER:
            yield slice(first, index)
            first, total = index, 0
        total += size
    if first < len(sizes):
        yield slice(first, len(sizes))


def _directions(
    bases: Sequence[Mapping[str, Tensor]],
    moments: Sequence[Moments],
    gradients: Sequence[Tensor],
    step: AdamStep,
) -> list[Tensor]:
    first, second = ([own[name] for own in moments] for name in ("first", "second"))
    weight1, weight2 = ([weight] * len(first) for weight in step.weights)
    rotated = [
        into_basis(basis, step.without_faults(gradient))
        for basis, gradient in zip(bases, gradients, strict=True)
    ]
    torch._foreach_lerp_(first, rotated, weight1)
    ahead = torch._foreach_lerp(first, rotated, weight1)
    squares = torch._foreach_mul(rotated, rotated)
    del rotated
    torch._foreach_lerp_(second, squares, weight2)
    del squares
    denominators = torch._foreach_div(second, step.corrections[1])
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, step.epsilon)
    torch._foreach_mul_(denominators, step.corrections[0])
    torch._foreach_div_(ahead, denominators)
    return [out_of_basis(basis, value) for basis, value in zip(bases, ahead, strict=True)]


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


def turn_moments(
    moments: Mapping[str, Moments],
    parts: Sequence[Part],
    old: Mapping[str, Inverse],
    new: Mapping[str, Inverse],
) -> None:
    """Takes the moments of all parts whose basis has changed to the new one."""
    for part in parts:
        before, after = old.get(part.name, {}), new.get(part.name, {})
        if part.name not in moments or before is after:
            continue
        first, second = moments[part.name]["first"], moments[part.name]["second"]
        for side in ("A", "B"):
            turn = _turn(before.get(f"{side}.eigenvectors"), after.get(f"{side}.eigenvectors"))
            if turn is None:
                continue
            squares = turn.square()
            if side == "A":
                first, second = first @ turn, second @ squares
            else:
                first, second = turn.mT @ first, squares.mT @ second
        moments[part.name].update(first=first, second=second)


def _turn(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """Qᵀ_old Q_new, where None is the basis of the entries themselves."""
    if before is None:
        return after
    return before.mT if after is None else before.mT @ after
