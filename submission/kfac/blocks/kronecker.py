"""Kronecker blocks: a matrix (and a bias) whose curvature is A ⊗ B, for each group."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .. import tuning
from ..linalg import damping as damping_rules
from ..linalg.eigenbasis import Basis
from ..linalg.factor import Factor
from ..linalg.inverses import FactorInverse, Request, eigendecomposition
from ..linalg.kfac import reduce
from ..linalg.low_rank import most_rows
from ..linalg.moments import SecondMoment
from ..operations.operation import LinearOperation, own_copy
from ..operations.pieces import Matrix, Piece
from ..operations.sharing import SharingError, count_rows, rows_per_example
from .block import (
    Block,
    BlockCurvature,
    Collecting,
    Collector,
    HeardCall,
    Inverse,
    InverseSettings,
    Sums,
)
from .public import KroneckerFactors

BIASES = {
    "joint": "a column of ones in the inputs: weight and bias are one matrix",
    "separate": "a block of its own, beside the weight's, with the same B",
    "output": "preconditioned by B alone, as ASDL does",
}


# ---- curvature and inverse -------------------------------------------------------------------


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
        self, settings: InverseSettings, found: Sequence[FactorInverse | None]
    ) -> Inverse | None:
        if settings.kind == "exact":
            return self._exact(settings)
        a, b = found
        return None if a is None or b is None else KroneckerInverse(a, b, self.bias_by_b)

    def _exact(self, settings: InverseSettings) -> Inverse | None:
        a, b = eigendecomposition(self.a), eigendecomposition(self.b)
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


# ---- sums and collectors ---------------------------------------------------------------------


@dataclass(eq=False)
class KroneckerSums(Sums):
    """Sums behind A and, for each loss, behind B.

    Attributes:
        inputs: Σ a aᵀ.
        gradients: Σ g gᵀ of each loss.
        count: rows (expand) or examples (reduce).
        rows: pairs of rows (a, g), for the eigenvalue correction.
    """

    inputs: SecondMoment
    gradients: list[SecondMoment]
    count: Tensor
    bias_by_b: bool = False
    rows: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def pad(self, empty: KroneckerSums) -> None:
        self.gradients += empty.gradients[len(self.gradients) :]

    def tensors(self) -> list[tuple[Tensor, bool]]:
        moments = [self.inputs, *self.gradients]
        found = [(moment.matrix(), not moment.diagonal) for moment in moments]
        return [*found, (self.count, False)]

    def merge(self, other: KroneckerSums) -> None:
        self.inputs.merge(other.inputs)
        for own, more in zip(self.gradients, other.gradients, strict=True):
            own.merge(more)
        self.count = self.count + other.count
        self.rows += other.rows

    def rescale(self, factor: Tensor) -> None:
        for moment in self.gradients:
            moment.rescale(factor)
        self.rows = [(a, g * factor.to(g.dtype)) for a, g in self.rows]

    def where_faults_show(self) -> list[Tensor]:
        return [m.where_faults_show() for m in (self.inputs, *self.gradients) if not m.is_empty]

    def curvature(self, divisors: Sequence[Tensor | None], input_scale: float) -> Factors:
        a = self.inputs.factor(self.count.clamp(min=1) / input_scale)
        return Factors(a, mean_of(self.gradients, divisors), self.bias_by_b)


def mean_of(moments: Sequence[SecondMoment], divisors: Sequence[Tensor | None]) -> Factor:
    """Σ over losses of Σ g gᵀ / terms."""
    first, *others = (
        moment.factor(divisor) for moment, divisor in zip(moments, divisors, strict=True)
    )
    if not others:
        return first
    total = first if first.is_diagonal else Factor(first.dense(), "dense")
    for other in others:
        total.values += other.dense()
    return total


class KroneckerCollector(Collector):
    """What expand and reduce have in common."""

    sums: KroneckerSums

    def __init__(self, block: KroneckerBlock, collecting: Collecting) -> None:
        self._block, self._collecting = block, collecting
        self._keeps_rows = collecting.keeps_rows and block.is_correctable
        self._most = block.most_rows(collecting.uses)
        self.sums = block.empty_sums(collecting, 0)
        self._dtype = collecting.like.dtype
        self._positions, self._calls, self._is_ragged = "-", 0, False

    def _gradients(self) -> SecondMoment:
        """The sum of the present loss."""
        while len(self.sums.gradients) <= self.loss:
            shape, like = self._block.gradient_shape, self._collecting.like
            diagonal = self._block.diagonal_gradient
            moment = SecondMoment(shape, like, diagonal=diagonal, most_rows=self._most[1])
            self.sums.gradients.append(moment)
        return self.sums.gradients[self.loss]

    def _note(self, leading: torch.Size, call: HeardCall) -> None:
        if not self._calls:
            self._positions = str(leading[-1]) if len(leading) > 1 else "-"
            self._is_ragged = call.sharing.is_ragged
        self._calls += 1

    def words(self) -> str:
        positions = self._positions
        words = f"{positions} positions" if positions not in ("1", "-") else positions
        words = "ragged rows" if self._is_ragged else words
        return words if self._calls <= 1 else f"{words}, {self._calls} calls"


class ExpandCollector(KroneckerCollector):
    """K-FAC-expand: every row counts for itself (eq. 7)."""

    takes_inputs_late = True

    def __init__(self, block: KroneckerBlock, collecting: Collecting) -> None:
        super().__init__(block, collecting)
        self._inputs: dict[int, Tensor] = {}

    def input(self, call: HeardCall) -> None:
        block, operation, inputs = self._block, call.operation, self.sums.inputs
        assert call.x is not None
        leading = operation.leading(call.x, call.sharing)
        count = count_rows(leading, call.sharing)
        ones = block.has_ones
        operation.add_second_moment(inputs, call.x, call.sharing, ones)
        if block.has_separate_bias:
            matrix = inputs.matrix()
            (matrix[:, -1] if inputs.diagonal else matrix[:, -1, -1]).add_(count)
        self.sums.count = self.sums.count + count
        self._note(leading, call)
        if self._keeps_rows:
            rows = operation.input_rows(call.x, call.sharing, block.bias is not None)
            self._inputs[id(call)] = own_copy(rows.to(self._dtype), call.x)

    def gradient(self, call: HeardCall, g: Tensor) -> None:
        call.operation.add_gradient_moment(self._gradients(), g, call.sharing)
        if self._keeps_rows:
            rows = call.operation.gradient_rows(g, call.sharing).to(self._dtype)
            self.sums.rows.append((self._inputs[id(call)], rows))


class ReduceCollector(KroneckerCollector):
    """K-FAC-reduce: an example's rows over all calls become one (eq. 10, eq. 55)."""

    def __init__(self, block: KroneckerBlock, collecting: Collecting) -> None:
        super().__init__(block, collecting)
        self._a: Tensor | None = None  # Σ a over the positions of each example
        self._g: Tensor | None = None
        self._rows: Tensor | None = None  # R_n
        self._inputs: Tensor | None = None  # ā

    def input(self, call: HeardCall) -> None:
        assert call.x is not None
        operation: LinearOperation = call.operation
        leading = operation.leading(call.x, call.sharing)
        a = operation.summed_inputs(call.x, call.sharing, self._dtype)
        rows = rows_per_example(leading, call.sharing, a)
        if self._a is not None and self._a.shape != a.shape:
            raise SharingError(
                f"its calls in one forward pass had {self._a.shape[1]} and {a.shape[1]} "
                "examples; K-FAC-reduce adds them up example by example"
            )
        self._a = a if self._a is None else self._a + a
        self._rows = rows if self._rows is None else self._rows + rows
        self._note(leading, call)
        self._is_ragged |= call.sharing.is_ragged

    def gradient(self, call: HeardCall, g: Tensor) -> None:
        total = call.operation.summed_gradients(g, call.sharing, self._dtype)
        self._g = total if self._g is None else self._g + total

    def end_pass(self, single: bool) -> None:
        if self._g is None:
            return
        assert self._a is not None
        assert self._rows is not None
        self._inputs, rows = reduce(
            self._a,
            self._g,
            self._rows,
            ragged=self._is_ragged,
            scaling=self._collecting.ragged_scaling,
            ones=self._block.has_ones or self._block.has_separate_bias,
        )
        self._gradients().add_rows(rows)
        if self._keeps_rows:
            self.sums.rows.append((self._inputs, rows))
        self._g = None

    def end(self) -> None:
        if self._inputs is None:
            return
        assert self._rows is not None
        inputs = self.sums.inputs
        inputs.add_rows(self._inputs)
        self.sums.count = self.sums.count + (self._rows > 0).sum()
        if self._block.has_separate_bias and not inputs.diagonal:
            inputs.matrix()[:, :-1, -1] = 0
            inputs.matrix()[:, -1, :-1] = 0
        self._inputs = self._a = self._rows = None


# ---- the block -------------------------------------------------------------------------------


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
