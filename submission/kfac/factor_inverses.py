"""The damped inverse (factor + ε I)⁻¹ of one Kronecker factor, in the form that is cheapest.

| form | tensors | used for |
|---|---|---|
| explicit | `inverse` [groups, d, d] | a dense factor whose inverse is applied to many vectors |
| Cholesky | `cholesky` [groups, d, d] | a dense factor whose inverse is applied to few vectors |
| low rank | `rows` [groups, n, d], `scale` [groups] | a factor that is a sum over n < d rows |
| diagonal | `reciprocal` [groups, d] | a diagonal factor |

A factor of n rows, RᵀR, is never formed: by Woodbury, (RᵀR + εI)⁻¹ = (I - WᵀW) / ε with
W = L⁻¹R and LLᵀ = RRᵀ + εI, an n×n matrix.

When a factorisation fails, it is repeated in float64, then with the damping raised to the accuracy
to which the factor is known at all; if that fails too, the result is None.
"""

from __future__ import annotations

import torch
from torch import Tensor

FactorInverse = dict[str, Tensor]

# An explicit inverse pays from about this many vectors per row of the factor on: 1.1 at side 384,
# 1.3 at 1,152, 1.9 at 1,537 (measured on a CPU with two threads).
VECTORS_FOR_EXPLICIT_INVERSE = 1.5


def invert_factor(
    factor: Tensor, added: Tensor, *, diagonal: bool, low_rank: bool, vectors: int
) -> FactorInverse | None:
    """(factor + added·I)⁻¹.

    Args:
        factor: [groups, d, d]; [groups, d] where `diagonal`; rows R [groups, n, d] where
            `low_rank`.
        added: ε, [groups].
        vectors: how many it will be applied to, over all steps until it is renewed.
    """
    if diagonal:
        return {"reciprocal": (factor + added.unsqueeze(-1)).reciprocal()}
    if low_rank:
        return _invert_low_rank(factor, added)
    lower = _damped_cholesky(factor, added)
    if lower is None:
        return None
    few = vectors < VECTORS_FOR_EXPLICIT_INVERSE * factor.shape[-1]
    if few and lower.dtype == factor.dtype:
        return {"cholesky": lower}
    inverse = torch.cholesky_inverse(lower)
    return {"inverse": inverse.to(factor.dtype)} if bool(inverse.isfinite().all()) else None


def _damped_cholesky(factor: Tensor, added: Tensor) -> Tensor | None:
    # Rounding moves eigenvalues of a sum of outer products by about this much.
    largest = factor.diagonal(dim1=-2, dim2=-1).amax(-1)
    resolution = torch.finfo(factor.dtype).eps * factor.shape[-1] * largest
    attempts = (
        (factor.dtype, added),
        (torch.float64, added),
        (torch.float64, torch.maximum(added, resolution)),
    )
    for dtype, extra in attempts:
        damped = factor.to(dtype, copy=True)
        damped.diagonal(dim1=-2, dim2=-1).add_(extra.to(dtype).unsqueeze(-1))
        lower: Tensor
        lower, info = torch.linalg.cholesky_ex(damped)
        # What is not finite in a row reaches the row's end, on the diagonal.
        finite = lower.diagonal(dim1=-2, dim2=-1).isfinite()
        if bool((info == 0).all() & finite.all()):
            return lower
    return None


def _invert_low_rank(rows: Tensor, added: Tensor) -> FactorInverse | None:
    # The Gram matrix is small: float64 costs nothing and keeps I - WᵀW accurate.
    wide = rows.double()
    lower = _damped_cholesky(wide @ wide.mT, added.double())
    if lower is None:
        return None
    w = torch.linalg.solve_triangular(lower, wide, upper=False)
    return {"rows": w.to(rows.dtype), "scale": added.reciprocal()}


def apply_left(inverse: FactorInverse, gradient: Tensor) -> Tensor:
    """(factor + εI)⁻¹ · gradient; gradient [groups, d, k]."""
    if "inverse" in inverse:
        return inverse["inverse"] @ gradient
    if "cholesky" in inverse:
        return torch.cholesky_solve(gradient, inverse["cholesky"])
    if "reciprocal" in inverse:
        return inverse["reciprocal"].unsqueeze(-1) * gradient
    w = inverse["rows"]
    return (gradient - w.mT @ (w @ gradient)) * inverse["scale"].reshape(-1, 1, 1)


def apply_right(gradient: Tensor, inverse: FactorInverse) -> Tensor:
    """gradient · (factor + εI)⁻¹; gradient [groups, k, d]. The inverse is symmetric."""
    return apply_left(inverse, gradient.mT).mT


def eigendecomposition(factor: Tensor, diagonal: bool) -> tuple[Tensor, Tensor | None] | None:
    """(eigenvalues [groups, d], clamped at 0; eigenvectors [groups, d, d], None if diagonal)."""
    if diagonal:
        return factor.clone(), None
    for dtype in (factor.dtype, torch.float64):
        try:
            values, vectors = torch.linalg.eigh(factor.to(dtype))
        except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
            continue
        if bool(values.isfinite().all()) and bool(vectors.isfinite().all()):
            return values.clamp(min=0).to(factor.dtype), vectors.to(factor.dtype)
    return None
