"""The curvature of one part of a model, as averages: what the statistics' sums become.

Scale (the convention of the whole project): these are blocks of the GGN of the *mean* loss over
its terms. A ⊗ B, `unitwise` and `diagonal` below need no further factor of N, R or S.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .damping import mean_eigenvalue
from .factors import outer_products
from .statistics import DiagonalPart, KroneckerPart, Part, Sums, UnitwisePart, as_real
from .tied import combine


@dataclass(frozen=True)
class KroneckerFactors:
    """A and B of one linear layer.

    Attributes:
        input_covariance: A, [P_in, P_in]; with groups [groups, P_in, P_in]; the column of a joint
            bias comes last. Only the diagonal, [P_in] or [groups, P_in], where `diagonal_input`.
        gradient_covariance: B, likewise of side P_out.
    """

    input_covariance: Tensor
    gradient_covariance: Tensor
    diagonal_input: bool = False
    diagonal_gradient: bool = False

    def to_dense(self) -> Tensor:
        """The GGN block: [groups, P_out·P_in, P_out·P_in], or without groups two dimensions.

        Ordered as the flattened matrix [P_out, P_in] of weight and (joint) bias: B ⊗ A.
        """
        a, b = self.input_covariance, self.gradient_covariance
        a = torch.diag_embed(a) if self.diagonal_input else a
        b = torch.diag_embed(b) if self.diagonal_gradient else b
        block = torch.einsum("...oq,...ip->...oiqp", b, a)
        side = b.shape[-1] * a.shape[-1]
        return block.reshape(*block.shape[:-4], side, side)


@dataclass(frozen=True)
class UnitwiseCurvature:
    """2×2 blocks of (scale, shift) of each unit: `blocks` [units, 2, 2] (or [units, 1, 1])."""

    blocks: Tensor


@dataclass(frozen=True)
class DiagonalCurvature:
    """Diagonal of the GGN of a parameter, in its shape; in each row the mean, where kept by row.

    Of a complex parameter that of its real and imaginary parts, along a last dimension.
    """

    diagonal: Tensor


Curvature = KroneckerFactors | UnitwiseCurvature | DiagonalCurvature


def average_sums(part: Part, sums: Sums, terms: Tensor | None, input_scale: float = 1.0) -> Sums:
    """Divides sums by their counts: A by rows or examples, everything of gradients by the terms.

    The sums are changed in place and must not be used again: hardly any memory is asked for.

    Rows of a low-rank factor (`A_rows`, `B_rows`) are divided by the root of the count.

    Args:
        terms: None where sums of gradients are to stay as they are.
        input_scale: A is multiplied by it.
    """
    if not isinstance(part, KroneckerPart):
        f = sums["F"]
        return {"F": f if terms is None else f.div_(terms.to(f.dtype))}
    count = sums["count"]
    terms = None if terms is None else terms.to(count.dtype)
    counts = {
        "A": count.clamp(min=1) / input_scale,
        "B": terms,
        "E_V": sums.get("E_count", count).clamp(min=1) / input_scale,
        "E_d": terms,
    }
    averages = {}
    for key, value in sums.items():
        if not key.endswith("count"):
            divisor = counts[key.removesuffix("_rows")]
            averages[key] = value if divisor is None else _divided(key, value, divisor)
    return combine(averages) if part.embedding is not None else averages


def _divided(key: str, value: Tensor, count: Tensor) -> Tensor:
    # Rows may be those of an activation that the backward pass still needs.
    return value / count.sqrt() if key.endswith("_rows") else value.div_(count)


@dataclass(frozen=True)
class FactorForm:
    """A or B of a layer as it is kept.

    Attributes:
        values: [groups, d, d]; [groups, d] where diagonal; rows [groups, n, d] where low_rank,
            standing for the sum of their outer products.
    """

    values: Tensor
    diagonal: bool
    low_rank: bool

    def mean_eigenvalue(self) -> Tensor:
        """trace / d, [groups]."""
        if self.low_rank:
            return self.values.square().sum((-2, -1)) / self.values.shape[-1]
        return mean_eigenvalue(self.values, self.diagonal)

    def dense(self) -> Tensor:
        """[groups, d, d]; diagonal factors stay as they are."""
        return outer_products(self.values, False) if self.low_rank else self.values


def factor_of(part: KroneckerPart, averages: Sums, side: str) -> FactorForm:
    """The factor "A" or "B" out of a part's averages."""
    rows = averages.get(f"{side}_rows")
    if rows is not None:
        return FactorForm(rows, False, True)
    diagonal = part.diagonal_input if side == "A" else part.diagonal_gradient
    return FactorForm(averages[side], diagonal, False)


def as_curvature(part: Part, averages: Sums) -> Curvature:
    """The public view of a part's averages; single groups lose their dimension."""
    if isinstance(part, KroneckerPart):
        a, b = (factor_of(part, averages, side).dense() for side in ("A", "B"))
        if a.shape[0] == 1:
            a, b = a[0], b[0]
        return KroneckerFactors(a, b, part.diagonal_input, part.diagonal_gradient)
    if isinstance(part, UnitwisePart):
        return UnitwiseCurvature(unitwise_blocks(averages["F"]))
    assert isinstance(part, DiagonalPart)
    return DiagonalCurvature(averages["F"].expand(as_real(part.parameter.detach()).shape))


def unitwise_blocks(f: Tensor) -> Tensor:
    """[3, units] (γγ, γβ, ββ) -> [units, 2, 2]; [1, units] -> [units, 1, 1]."""
    if f.shape[0] == 1:
        return f.reshape(-1, 1, 1)
    return f[[0, 1, 1, 2]].T.reshape(-1, 2, 2)
