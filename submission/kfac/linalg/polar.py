"""The polar factor of a matrix: its singular values all become 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Odd polynomials a x + b x³ + c x⁵, each the best for what the one before has left of the singular
# values in [1e-3, 1] (Polar Express, Amsel et al. 2025, arXiv 2505.16932). After six of them all
# are within 0.2 % of 1.
POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
)
TOGETHER = 3  # polynomials between two Gram matrices
MARGIN = 1.01  # keeps rounding from pushing a singular value out of the interval


def polar_factor(matrix: Tensor) -> Tensor:
    """U Vᵀ of M = U S Vᵀ, for singular values of at least 1e-3 of the Frobenius norm.

    Smaller ones end between 0 and 1; a matrix of zeros stays one. The polynomials are multiplied on
    the shorter side, x p₁(x xᵀ) … = (… p₂ p₁) x, three at a time: the Gram matrix x xᵀ squares the
    singular values, and of six in one go small ones would be lost in float32.

    Args:
        matrix: [..., rows, columns], real.
    """
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    found = wide / (norm * MARGIN).clamp(min=torch.finfo(wide.dtype).tiny)
    found = found.reshape(-1, *wide.shape[-2:])
    for start in range(0, len(POLYNOMIALS), TOGETHER):
        found = _multiplied(found, POLYNOMIALS[start : start + TOGETHER])
    found = found.view(wide.shape)
    result: Tensor = found if matrix.shape[-2] <= matrix.shape[-1] else found.mT
    return result


def _multiplied(x: Tensor, polynomials: Sequence[tuple[float, float, float]]) -> Tensor:
    """The odd polynomials, one after the other, of the singular values of x [batch, n, m]."""
    gram, product = x @ x.mT, None
    for number, (a, b, c) in enumerate(polynomials):
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        factor.diagonal(dim1=-2, dim2=-1).add_(a)
        product = factor if product is None else factor @ product
        if number + 1 < len(polynomials):
            gram = factor @ gram @ factor
    return x if product is None else product @ x


def with_equal_singular_values(matrix: Tensor) -> Tensor:
    """The polar factor of a matrix, with the matrix's Frobenius norm."""
    if min(matrix.shape[-2:]) <= 1 or not matrix.numel():
        return matrix
    tiny = torch.finfo(matrix.dtype).tiny
    largest = matrix.abs().amax((-2, -1), keepdim=True)  # squares of entries may underflow
    unit = matrix / largest.clamp(min=tiny)
    found = polar_factor(unit)
    norms = torch.linalg.matrix_norm(found, keepdim=True)
    scale = torch.linalg.matrix_norm(unit, keepdim=True) * largest
    scaled: Tensor = found * (scale / norms.clamp(min=tiny))
    return scaled
