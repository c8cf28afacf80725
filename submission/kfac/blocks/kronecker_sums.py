"""The sums behind A and B, and what fills them: K-FAC-expand's and K-FAC-reduce's collectors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg.factor import Factor
from ..linalg.kfac import reduce
from ..linalg.moments import SecondMoment
from ..operations.operation import LinearOperation, own_copy
from ..operations.sharing import SharingError, count_rows, rows_per_example
from .block import Collecting, Collector, HeardCall, Sums
from .factors import Factors

if TYPE_CHECKING:
    from .kronecker import KroneckerBlock


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
