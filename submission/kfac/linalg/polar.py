"""The polar factor of a matrix: its singular values all become 1."""

from __future__ import annotations

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
MARGIN = 1.01  # keeps rounding from pushing a singular value out of the interval


def polar_factor(matrix: Tensor) -> Tensor:
    """U Vᵀ of M = U S Vᵀ, for singular values of at least 1e-3 of the Frobenius norm.

    Smaller ones end between 0 and 1; a matrix of zeros stays one.

    Args:
        matrix: [..., rows, columns], real.
    """
    wide = matrix if matrix.shape[-2] <= matrix.shape[-1] else matrix.mT
    norm = torch.linalg.matrix_norm(wide, keepdim=True)
    found = wide / (norm * MARGIN).clamp(min=torch.finfo(wide.dtype).tiny)
    for a, b, c in POLYNOMIALS:
        gram = found @ found.mT
        found = a * found + (b * gram + c * (gram @ gram)) @ found
    result: Tensor = found if matrix.shape[-2] <= matrix.shape[-1] else found.mT
    return result


def with_equal_singular_values(matrix: Tensor) -> Tensor:
    """The polar factor of a matrix, with the matrix's Frobenius norm."""
    if min(matrix.shape[-2:]) == 1:
        return matrix
    found = polar_factor(matrix)
    norms = torch.linalg.matrix_norm(found, keepdim=True)
    scale = torch.linalg.matrix_norm(matrix, keepdim=True)
    scaled: Tensor = found * (scale / norms.clamp(min=torch.finfo(matrix.dtype).tiny))
    return scaled
