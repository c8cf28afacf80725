"""A ⊗ B as the curvature of a linear map, and its damped inverses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg import damping as damping_rules
from ..linalg.eigenbasis import Basis
from ..linalg.factor import Factor
from ..linalg.inverses import FactorInverse, Request, eigendecomposition, followed_eigenvectors
from .block import BlockCurvature, Inverse, InverseSettings
from .public import KroneckerFactors


@dataclass
class Factors(BlockCurvature):
    """A ⊗ B.

    Attributes:
        a, b: of each group.
        bias_by_b: whether a bias, the last column of a gradient, is not in A.
    """

    a: Factor
    b: Factor
    bias_by_b: bool = False

    def mean_eigenvalue(self) -> Tensor:
        return self.a.mean_eigenvalue() * self.b.mean_eigenvalue()

    def moved_towards(self, new: Factors, weight: float) -> Factors:
        a, b = self.a.move_towards(new.a, weight), self.b.move_towards(new.b, weight)
        return Factors(a, b, self.bias_by_b)

    def requests(self, settings: InverseSettings) -> list[Request]:
        if settings.kind == "exact":
            return []
        strength = self.strength(settings)
        means = self.a.mean_eigenvalue(), self.b.mean_eigenvalue()
        added = damping_rules.split(settings.kind, strength, *means)
        # A gradient [P_out, P_in] is P_out vectors for A and P_in for B.
        vectors = settings.uses * self.b.side, settings.uses * self.a.side
        return [Request(*one) for one in zip((self.a, self.b), added, vectors, strict=True)]

    def inverse(
        self,
        settings: InverseSettings,
        found: Sequence[FactorInverse | None],
        before: Inverse | None = None,
    ) -> Inverse | None:
        if settings.kind == "exact":
            basis = Basis() if before is None else before.eigenbasis()
            return self._exact(settings, basis)
        a, b = found
        return None if a is None or b is None else KroneckerInverse(a, b, self.bias_by_b)

    def _exact(self, settings: InverseSettings, before: Basis) -> Inverse | None:
        a, b = _eigenvectors(self.a, before.a), _eigenvectors(self.b, before.b)
        if a is None or b is None:
            return None
        return EigenInverse(a[0], b[0], Basis(a[1], b[1]), self.strength(settings))

    def quadratic_form(self, step: Tensor) -> Tensor:
        """stepᵀ (A ⊗ B) step."""
        left = self.b.left_times(step)
        if self.bias_by_b:
            right = torch.cat([self.a.right_times(step[..., :-1]), step[..., -1:]], -1)
        else:
            right = self.a.right_times(step)
        return (left * right).sum()

    def public(self) -> KroneckerFactors:
        a, b = self.a.dense().clone(), self.b.dense().clone()
        if len(a) == 1:
            a, b = a[0], b[0]
        return KroneckerFactors(a, b, self.a.is_diagonal, self.b.is_diagonal)


def _eigenvectors(factor: Factor, before: Tensor | None) -> tuple[Tensor, Tensor | None] | None:
    return eigendecomposition(factor) if before is None else followed_eigenvectors(factor, before)


@dataclass
class KroneckerInverse(Inverse):
    """A⁻¹ ⊗ B⁻¹ of damped factors."""

    a: FactorInverse
    b: FactorInverse
    bias_by_b: bool = False

    def apply(self, gradient: Tensor) -> Tensor:
        """B⁻¹ G A⁻¹; gradient [groups, P_out, P_in]."""
        result = self.b.left_times(gradient)
        scales = [side.scale for side in (self.b, self.a) if side.scale is not None]
        if self.bias_by_b:
            weight, bias = self.a.right_times(result[..., :-1]), result[..., -1:]
            if self.a.scale is not None:
                weight = weight * self.a.scale.reshape(-1, 1, 1)
                scales.pop()
            result = torch.cat([weight, bias], -1)
        else:
            result = self.a.right_times(result)
        if scales:
            result = result * math.prod(scales[1:], start=scales[0]).reshape(-1, 1, 1)
        return result


@dataclass
class EigenInverse(Inverse):
    """(A ⊗ B + λ)⁻¹ by the eigenvectors of A and B.

    Attributes:
        a, b: eigenvalues [groups, P_in] and [groups, P_out].
        basis: eigenvectors.
        damping: λ, [groups].
        corrected: eigenvalues of A ⊗ B, [groups, P_out, P_in], in place of the products of those of
            A and B (EKFAC; George et al. 2018); None for these.
    """

    a: Tensor
    b: Tensor
    basis: Basis
    damping: Tensor
    corrected: Tensor | None = None

    def eigenbasis(self) -> Basis:
        return self.basis

    def apply(self, gradient: Tensor) -> Tensor:
        """Q_B [Q_Bᵀ G Q_A / (eigenvalues + λ)] Q_Aᵀ."""
        eigenvalues = self.corrected
        if eigenvalues is None:
            eigenvalues = self.b.unsqueeze(-1) * self.a.unsqueeze(-2)
        rotated = self.basis.into(gradient)
        return self.basis.out_of(rotated / (eigenvalues + self.damping.reshape(-1, 1, 1)))

    def with_damping(self, strength: Tensor) -> EigenInverse:
        return EigenInverse(self.a, self.b, self.basis, strength, self.corrected)

    def second_moments(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Σ (Q_Bᵀ g)² [(Q_Aᵀ a)²]ᵀ over rows (a, g): [groups, P_out, P_in].

        Of all diagonals in this basis the nearest to Σ (aaᵀ) ⊗ (ggᵀ) (George et al. 2018).
        """
        total = self.damping.new_zeros(len(self.a), self.b.shape[-1], self.a.shape[-1])
        for a, g in pairs:
            a = a if self.basis.a is None else a @ self.basis.a
            g = g if self.basis.b is None else g @ self.basis.b
            total += g.square().mT @ a.square()
        return total
