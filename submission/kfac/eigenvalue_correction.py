"""EKFAC: the best diagonal in the eigenbasis of A and B (George et al. 2018).

In the basis Q_B ⊗ Q_A of the factors' eigenvectors K-FAC takes λ_B λ_Aᵀ as the eigenvalues. The
second moments of the gradients in that basis,

    S = 1/terms Σ (Q_Bᵀ g)² [(Q_Aᵀ a)²]ᵀ   over the rows (a, g) of expand, or of reduce,

are never a worse choice: of all diagonals S is the nearest to Σ (aaᵀ) ⊗ (ggᵀ) / terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .statistics import KroneckerPart, Part, RowPairs


def is_correctable(part: Part) -> bool:
    """Whether a part has a dense pair of factors, and so a basis to correct the eigenvalues in."""
    return (
        isinstance(part, KroneckerPart)
        and part.embedding is None
        and not part.diagonal_input
        and not part.diagonal_gradient
    )


def summed_eigenvalues(pairs: RowPairs, basis_a: Tensor, basis_b: Tensor) -> Tensor:
    """Σ (Q_Bᵀ g)² [(Q_Aᵀ a)²]ᵀ over all rows: [groups, P_out, P_in].

    basis_a [groups, P_in, P_in] and basis_b [groups, P_out, P_out] have eigenvectors as columns.
    """
    total: Tensor | None = None
    for inputs, gradients in pairs:
        squares = ((gradients @ basis_b).square().mT) @ ((inputs @ basis_a).square())
        total = squares if total is None else total + squares
    assert total is not None
    return total


@dataclass(frozen=True)
class EigenvalueCorrectedFactors:
    """EKFAC of one linear layer; a leading dimension of groups where the layer has groups.

    Attributes:
        input_basis: Q_A, eigenvectors as columns, [P_in, P_in].
        gradient_basis: Q_B, [P_out, P_out].
        eigenvalues: S, [P_out, P_in].
    """

    input_basis: Tensor
    gradient_basis: Tensor
    eigenvalues: Tensor

    def to_dense(self) -> Tensor:
        """The GGN block, ordered as the flattened matrix [P_out, P_in]."""
        q_a, q_b, s = self.input_basis, self.gradient_basis, self.eigenvalues
        basis = torch.einsum("...oq,...ip->...oiqp", q_b, q_a)
        side = q_b.shape[-1] * q_a.shape[-1]
        basis = basis.reshape(*basis.shape[:-4], side, side)
        return (basis * s.flatten(-2).unsqueeze(-2)) @ basis.mT
