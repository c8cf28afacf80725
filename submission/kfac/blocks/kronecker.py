"""Kronecker blocks: a matrix (and a bias) whose curvature is A ⊗ B, for each group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import tuning
from ..linalg.low_rank import most_rows
from ..linalg.moments import SecondMoment
from ..operations.pieces import Matrix, Piece
from .block import Block, Collecting
from .kronecker_sums import ExpandCollector, KroneckerCollector, KroneckerSums, ReduceCollector

BIASES = {
    "joint": "a column of ones in the inputs: weight and bias are one matrix",
    "separate": "a block of its own, beside the weight's, with the same B",
    "output": "preconditioned by B alone, as ASDL does",
}


@dataclass(frozen=True)
class KroneckerBlock(Block):
    """A linear map with a pair of factors for each group.

    Attributes:
        matrix: the weight.
        bias: P_out entries of each group, or None.
        bias_kind: a key of BIASES.
        approx: "expand" or "reduce".
        diagonal_input, diagonal_gradient: only the diagonal of A, or B, is kept.
    """

    name: str
    matrix: Matrix
    bias: Piece | None
    bias_kind: str
    approx: str
    diagonal_input: bool = False
    diagonal_gradient: bool = False
    has_factors = True

    @property
    def takes_sums(self) -> bool:
        return self.approx == "reduce"

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (self.matrix.piece,) if self.bias is None else (self.matrix.piece, self.bias)

    @property
    def has_ones(self) -> bool:
        """Whether the rows of inputs end in a one."""
        return self.bias is not None and self.bias_kind == "joint"

    @property
    def has_separate_bias(self) -> bool:
        """Whether A has an entry for a bias that the rows have no part in."""
        return self.bias is not None and self.bias_kind == "separate"

    @property
    def input_shape(self) -> tuple[int, int]:
        """(groups, side of A)."""
        groups, _, side = self.matrix.shape
        return groups, side + int(self.has_ones or self.has_separate_bias)

    @property
    def gradient_shape(self) -> tuple[int, int]:
        """(groups, side of B)."""
        return self.matrix.shape[0], self.matrix.shape[1]

    def most_rows(self, uses: int | None) -> tuple[int, int]:
        """How many rows A and B are kept as, at most; 0 where never. See `Collecting.uses`."""
        if uses is None or self.diagonal_input or self.diagonal_gradient:
            return 0, 0
        in_side, out_side = self.input_shape[1], self.gradient_shape[1]
        if uses == 0:
            a, b = in_side // tuning.FEW_ROWS, out_side // tuning.FEW_ROWS
        else:
            # A gradient [P_out, P_in] is P_out vectors for A and P_in for B.
            a, b = most_rows(in_side, uses * out_side), most_rows(out_side, uses * in_side)
        return (0 if self.has_separate_bias else a), b

    def collector(self, collecting: Collecting) -> KroneckerCollector:
        return (ExpandCollector if self.approx == "expand" else ReduceCollector)(self, collecting)

    def empty_sums(self, collecting: Collecting, losses: int) -> KroneckerSums:
        like, most = collecting.like, self.most_rows(collecting.uses)
        inputs = SecondMoment(
            self.input_shape, like, diagonal=self.diagonal_input, most_rows=most[0]
        )
        gradients = [
            SecondMoment(self.gradient_shape, like, diagonal=self.diagonal_gradient)
            for _ in range(losses)
        ]
        bias_by_b = self.bias is not None and self.bias_kind == "output"
        return KroneckerSums(inputs, gradients, like.new_zeros(()), bias_by_b)

    def canonical(self, values: Sequence[Tensor]) -> Tensor:
        """[groups, P_out, P_in (+ 1)]."""
        matrix = values[0].reshape(self.matrix.shape)
        if self.bias is None:
            return matrix
        return torch.cat([matrix, values[1].reshape(*matrix.shape[:2], 1)], -1)

    def separated(self, value: Tensor) -> list[Tensor]:
        if self.bias is None:
            return [value.reshape(self.matrix.piece.size)]
        matrix = value[..., :-1].reshape(self.matrix.piece.size)
        return [matrix, value[..., -1].reshape(self.bias.size)]

    @property
    def layout(self) -> tuple[tuple[int, ...], int]:
        groups, out_side, in_side = self.matrix.shape
        return (groups, out_side, in_side + int(self.bias is not None)), 0

    def row(self, adam: bool, raw: bool) -> tuple[str, str, str, int]:
        groups, in_side = self.input_shape
        out_side = self.gradient_shape[1]
        entries = in_side if self.diagonal_input else in_side**2
        entries += out_side if self.diagonal_gradient else out_side**2
        a, b = ("diag " * diag for diag in (self.diagonal_input, self.diagonal_gradient))
        sides = f"{a}{in_side} x {b}{out_side}"
        sides = f"{groups} x ({sides})" if groups > 1 else sides
        return "matrix", sides, f"K-FAC-{self.approx}", groups * entries

    def cost(self) -> float:
        """Of its inverse, in multiplications."""
        (groups, in_side), out_side = self.input_shape, self.gradient_shape[1]
        a = in_side if self.diagonal_input else in_side**3
        b = out_side if self.diagonal_gradient else out_side**3
        return float(groups * (a + b))

    @property
    def is_correctable(self) -> bool:
        """Whether it has a dense pair of factors, and so a basis to correct the eigenvalues in."""
        return not self.diagonal_input and not self.diagonal_gradient
