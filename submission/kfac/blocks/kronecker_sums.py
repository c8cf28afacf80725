"""The sums behind A and B, and what fills them: K-FAC-expand's and K-FAC-reduce's collectors."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..linalg.factor import Factor
from ..linalg.kfac import reduce
from ..linalg.moments import SecondMoment
from ..operations.operation import own_copy
from ..operations.sharing import SharingError, count_rows, rows_per_example
from .block import Collecting, Collector, HeardCall, Sums
from .factors import Factors

if TYPE_CHECKING:
    from .kronecker import KroneckerBlock


OTHER_EXAMPLES = (
    "its calls in one forward pass had {} and {} examples, and one loss reaches both; K-FAC-reduce "
    "adds calls up example by example: give each part a loss of its own (of means, their weighted "
    "sum is the mean of all), or take kfac_approx='expand'"
)


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


@dataclass
class _Examples:
    """The same examples in some calls: Σ a over their positions, R_n, and, once known, ā."""

    calls: set[int]
    a: Tensor
    rows: Tensor
    inputs: Tensor | None = None

    def join(self, other: _Examples) -> _Examples:
        """With the calls of other sums, example by example."""
        if self.a.shape != other.a.shape:
            raise SharingError(OTHER_EXAMPLES.format(self.a.shape[1], other.a.shape[1]))
        calls = self.calls | other.calls
        return _Examples(calls, self.a + other.a, self.rows + other.rows)


class ReduceCollector(KroneckerCollector):
    """K-FAC-reduce: an example's rows over all calls become one (eq. 10, eq. 55).

    Calls have the same examples if one loss reaches them. Where the losses of a pass reach calls of
    their own (parts of a batch, each with its loss), these have other examples.
    """

    def __init__(self, block: KroneckerBlock, collecting: Collecting) -> None:
        super().__init__(block, collecting)
        self._known: list[_Examples] = []
        self._new: _Examples | None = None  # of calls first heard in the present backward pass
        self._heard: set[int] = set()  # its calls
        self._g: Tensor | None = None

    def input(self, call: HeardCall) -> None:
        assert call.x is not None
        leading = call.operation.leading(call.x, call.sharing)
        a = call.operation.summed_inputs(call.x, call.sharing, self._dtype)
        found = _Examples({id(call)}, a, rows_per_example(leading, call.sharing, a))
        self._new = found if self._new is None else self._new.join(found)
        self._note(leading, call)
        self._is_ragged |= call.sharing.is_ragged

    def gradient(self, call: HeardCall, g: Tensor) -> None:
        total = call.operation.summed_gradients(g, call.sharing, self._dtype)
        if self._g is not None and self._g.shape != total.shape:
            raise SharingError(OTHER_EXAMPLES.format(self._g.shape[1], total.shape[1]))
        self._g = total if self._g is None else self._g + total
        self._heard.add(id(call))

    def end_pass(self, single: bool) -> None:
        if self._g is None:
            return
        reached = [one for one in self._known if one.calls & self._heard]
        self._known = [one for one in self._known if not one.calls & self._heard]
        if self._new is not None:
            reached.append(self._new)
        examples = functools.reduce(_Examples.join, reached)
        examples.inputs, rows = reduce(
            examples.a,
            self._g,
            examples.rows,
            ragged=self._is_ragged,
            scaling=self._collecting.ragged_scaling,
            ones=self._block.has_ones or self._block.has_separate_bias,
        )
        self._known.append(examples)
        self._gradients().add_rows(rows)
        if self._keeps_rows:
            self.sums.rows.append((examples.inputs, rows))
        self._new, self._g, self._heard = None, None, set()

    def end(self) -> None:
        inputs = self.sums.inputs
        for examples in self._known:
            assert examples.inputs is not None
            inputs.add_rows(examples.inputs)
            self.sums.count = self.sums.count + (examples.rows > 0).sum()
            if self._block.has_separate_bias and not inputs.diagonal:
                inputs.matrix()[:, :-1, -1] = 0
                inputs.matrix()[:, -1, :-1] = 0
        self._known = []
