"""How damping λ enters a Kronecker product A ⊗ B. Pure functions.

| kind | preconditioner | source |
|---|---|---|
| `both_factors` | (A + λI)⁻¹ ⊗ (B + λI)⁻¹ | Eschenhagen et al. 2023 |
| `pi` | (A + π√λ I)⁻¹ ⊗ (B + √λ/π I)⁻¹, π² = mean eigenvalue of A / of B | Martens & Grosse 2015 |
| `asdl` | as `pi`; at least 1e-7 on a factor, λ on both where π is 0 or ∞ | package asdfghjkl |
| `exact` | (A ⊗ B + λI)⁻¹ through the eigenvalues of A and B | George et al. 2018, 2.3 |
"""

from __future__ import annotations

import torch
from torch import Tensor

DAMPING_KINDS = {
    "both_factors": "λ added to A and to B",
    "pi": "√λ on either factor, split so that both are changed in proportion to their size",
    "asdl": "as pi, with the limits of the library ASDL",
    "exact": "λ added to A ⊗ B",
}
ASDL_FLOOR = 1e-7


def split(kind: str, damping: Tensor, mean_a: Tensor, mean_b: Tensor) -> tuple[Tensor, Tensor]:
    """What is added to A and to B, [groups] each, for the kinds that damp the factors.

    A factor of zeros (a dead layer) gives no meaningful π; then the split is even, or as ASDL has
    it.
    """
    if kind == "both_factors":
        return damping, damping
    ratio = mean_a / mean_b
    usable = torch.isfinite(ratio) & (ratio > 0)
    pi = torch.where(usable, ratio, 1.0).sqrt()
    root = damping.sqrt()
    if kind == "asdl":
        parts = ((root * pi).clamp(min=ASDL_FLOOR), (root / pi).clamp(min=ASDL_FLOOR))
        first, second = (torch.where(usable, part, damping) for part in parts)
        return first, second
    return root * pi, root / pi
