"""What users are shown of a block's curvature."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KroneckerFactors:
    """A and B of one linear map.

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
