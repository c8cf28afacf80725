"""How damping λ enters a Kronecker product A ⊗ B. Pure functions.

| kind | preconditioner | source |
|---|---|---|
| `both_factors` | (A + λI)⁻¹ ⊗ (B + λI)⁻¹ | Eschenhagen et al. 2023 |
| `pi` | (A + π√λ I)⁻¹ ⊗ (B + √λ/π I)⁻¹, π² = mean eigenvalue of A / of B | Martens & Grosse 2015 |
| `exact` | (A ⊗ B + λI)⁻¹ through the eigenvalues of A and B | George et al. 2018, 2.3 |
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING_KINDS = {
    "both_factors": "λ added to A and to B",
    "pi": "√λ on either factor, split so that both are changed in proportion to their size",
    "exact": "λ added to A ⊗ B",
}


def mean_eigenvalue(factor: Tensor, diagonal: bool) -> Tensor:
    """trace / side, [groups]; factor is [groups, d, d], or [groups, d] where diagonal."""
    values = factor if diagonal else factor.diagonal(dim1=-2, dim2=-1)
    return values.mean(-1)


def split(kind: str, damping: Tensor, mean_a: Tensor, mean_b: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to A and to B, [groups] each, for the kinds that damp the factors.

    A factor of zeros (a dead layer) gives no meaningful π; then the split is even.
    """
    if kind == "both_factors":
        return damping, damping
    ratio = mean_a / mean_b
    usable = torch.isfinite(ratio) & (ratio > 0)
    pi = torch.where(usable, ratio, 1.0).sqrt()
    root = damping.sqrt()
    return root * pi, root / pi
