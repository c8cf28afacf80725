"""Adam in the eigenbasis of K-FAC's factors: pure functions.

K-FAC's eigenbasis Q_B ⊗ Q_A is good (it nearly diagonalises the curvature), its eigenvalues less
so: they come from few samples, and a product of two means is no mean of products. What remains to
be found is a diagonal, and a running mean estimates a diagonal. So the second moment of the
gradient G [P_out, P_in] is kept in that basis, as in SOAP (Vyas et al. 2024), whose basis comes
from the gradients themselves:

    G' = Q_Bᵀ G Q_A                                the gradient in the basis
    M ← β₁ M + (1 - β₁) G'                         first moment
    V ← β₂ V + (1 - β₂) G'²                        second moment
    M' = [β₁ M + (1 - β₁) G'] / (1 - β₁ᵗ)          looks one step ahead (Nesterov)
    Δ = Q_B [ M' / (√(V / (1 - β₂ᵗ)) + ε) ] Q_Aᵀ

When the basis turns by R = Qᵀ_old Q_new, the moments turn along: M to R_Bᵀ M R_A, which is what the
mean of the gradients themselves is in the new basis, and V by the squares of R, which are what the
variances of uncorrelated entries are mixed with. Blocks without factors are trained by Adam.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..tuning import ELEMENTWISE_ENTRIES


@dataclass
class Basis:
    """Eigenvectors as columns, `a` [groups, P_in, P_in] and `b` [groups, P_out, P_out].

    None is the basis of the entries themselves.
    """

    a: Tensor | None = None
    b: Tensor | None = None

    @property
    def is_trivial(self) -> bool:
        """Whether it is that of the entries themselves."""
        return self.a is None and self.b is None

    def into(self, gradient: Tensor) -> Tensor:
        """Q_Bᵀ G Q_A; gradient [groups, P_out, P_in], or any shape where there is no basis."""
        rotated = gradient if self.b is None else self.b.mT @ gradient
        return rotated if self.a is None else rotated @ self.a

    def out_of(self, rotated: Tensor) -> Tensor:
        """Q_B G Q_Aᵀ."""
        gradient = rotated if self.b is None else self.b @ rotated
        return gradient if self.a is None else gradient @ self.a.mT


@dataclass
class Moments:
    """First and second moments, in the basis, in the shape of the gradient."""

    first: Tensor
    second: Tensor

    @classmethod
    def zeros_like(cls, gradient: Tensor) -> Moments:
        """Before the first step."""
        return cls(torch.zeros_like(gradient), torch.zeros_like(gradient))

    def turned(self, old: Basis, new: Basis) -> Moments:
        """The moments in another basis."""
        first, second = self.first, self.second
        turn = _turn(old.a, new.a)
        if turn is not None:
            first, second = first @ turn, second @ turn.square()
        turn = _turn(old.b, new.b)
        if turn is not None:
            first, second = turn.mT @ first, turn.square().mT @ second
        return Moments(first, second)


def _turn(before: Tensor | None, after: Tensor | None) -> Tensor | None:
    """Qᵀ_old Q_new."""
    if before is None:
        return after
    return before.mT if after is None else before.mT @ after


@dataclass(frozen=True)
class AdamStep:
    """What all blocks have in common in one step. Nothing here waits for a device.

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
    bases: Sequence[Basis],
    moments: Sequence[Moments],
    gradients: Sequence[Tensor],
    step: AdamStep,
) -> list[Tensor]:
    """Δ of blocks (or several side by side), each; the moments change in place.

    Args:
        bases: of each block.
        moments: likewise, in the shapes of the gradients.
        gradients: in the canonical view [groups, P_out, P_in]; any shape where there is no basis.
    """
    found: list[Tensor] = []
    for some in _in_pieces([gradient.numel() for gradient in gradients]):
        found += _directions(bases[some], moments[some], gradients[some], step)
    return found


def _in_pieces(sizes: Sequence[int]) -> Iterator[slice]:
    """Neighbours that have no more than ELEMENTWISE_ENTRIES entries, or are alone."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if total and total + size > ELEMENTWISE_ENTRIES:
            yield slice(first, index)
            first, total = index, 0
        total += size
    if first < len(sizes):
        yield slice(first, len(sizes))


def _directions(
    bases: Sequence[Basis],
    moments: Sequence[Moments],
    gradients: Sequence[Tensor],
    step: AdamStep,
) -> list[Tensor]:
    first, second = [own.first for own in moments], [own.second for own in moments]
    weight1, weight2 = ([weight] * len(first) for weight in step.weights)
    rotated = [
        basis.into(step.without_faults(gradient))
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
    return [basis.out_of(value) for basis, value in zip(bases, ahead, strict=True)]
