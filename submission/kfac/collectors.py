"""Collects the sums of one module over the calls and Fisher passes of one recording.

One `Collector` per module: it is told of each call of the module in the forward pass and of each
would-be gradient of an output in a Fisher pass. Its `sums` are the additive statistics; dividing
them by the counts is left to `curvature`, after everything has been added up.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from . import factors
from .graph import GraphError, saves_elsewhere
from .low_rank import most_rows
from .norms import Statistics, example_gradients, kept_statistics, row_gradients
from .sharing import Sharing, SharingError, check_segments, count_rows, rows_per_example
from .statistics import (
    KroneckerPart,
    RowPairs,
    Sums,
    UnitwisePart,
    add_rows,
    empty_factor,
    empty_unitwise_sums,
    rescale_gradients,
    statistics_dtype,
)

LARGE = 1 / 4  # an A of more numbers than this share of its input's is formed late
FEW = 8  # with d / 8 rows a pass over a factor of side d costs more than several over them


class Collector(ABC):
    """Collects the sums of one module over the calls and Fisher passes of one recording."""

    part: Any

    def __init__(self) -> None:
        self.sums: Sums = {}
        self.sharings: list[Sharing] = []
        self.positions = "-"
        self.rows: RowPairs = []

    @property
    def calls(self) -> int:
        """How often the module was called in this recording."""
        return len(self.sharings)

    def sharing_in_words(self) -> str:
        """For the report: over what the first call's rows were shared."""
        words = (
            f"{self.positions} positions" if self.positions not in ("1", "-") else self.positions
        )
        if self.sharings[0].is_ragged:
            words = "ragged rows"
        return words if self.calls == 1 else f"{words}, {self.calls} calls"

    def hooked(self) -> Iterator[tuple[nn.Module, Collector]]:
        """The modules whose calls are to be collected, and the collector of each."""
        yield self.part.module, self
        for module in getattr(self.part, "also", ()):
            yield module, self

    @abstractmethod
    def forward(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        """Takes the input of one call; the call's number is the count of calls before it.

        `module` is the part's with what this call may have set otherwise, see `Kind.as_called`.
        """

    def output(self, y: Tensor) -> None:  # noqa: B027
        """Takes the output of the call that `forward` was told of last."""

    @abstractmethod
    def gradient(self, call: int, g: Tensor) -> None:
        """Takes a would-be gradient of the output of one call."""

    def end_forward(self) -> None:  # noqa: B027 - most have nothing to finish
        """All calls of the forward pass have been seen."""

    def forget(self, call: int) -> None:  # noqa: B027
        """No more gradients of the output of this call will come."""

    def end_passes(self) -> None:  # noqa: B027
        """All Fisher passes are over, and the memory that they need is free; or there are none."""

    def end_pass(self, single: bool) -> None:  # noqa: B027
        """All gradients of one Fisher pass, of one example or of all, have been seen."""

    def rescale_gradients(self, factor: Tensor) -> None:
        """All gradients that were seen were to be multiplied by this number."""
        rescale_gradients(self.sums, factor)
        self.rows = [(inputs, gradients * factor) for inputs, gradients in self.rows]


class _Waiting(NamedTuple):
    """A call whose input has yet to be added to A, and the version that the input had."""

    x: Tensor
    version: int
    sharing: Sharing
    module: Any


class ExpandCollector(Collector):
    """Sums of K-FAC-expand: every row counts for itself (eq. 7).

    Args:
        part: the layer.
        uses: how often an inverse will be applied before it is renewed; then a factor that is a sum
            over few rows is kept as these rows, `A_rows` or `B_rows` [1, n, side] in place of A or
            B. None to never do so.
        keep_rows: `rows` has all rows of inputs and gradients, for the eigenvalue correction.
    """

    def __init__(
        self, part: KroneckerPart, uses: int | None = None, keep_rows: bool = False
    ) -> None:
        super().__init__()
        self.part = part
        weight = part.slices[0].data
        self._dtype = statistics_dtype(weight)
        self.sums = {"count": torch.zeros((), dtype=self._dtype, device=weight.device)}
        self._most = most_rows_of(part, uses)
        self._keep_rows = keep_rows
        self._inputs: list[Tensor] = []
        self._waiting: list[_Waiting] = []

    def forward(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        part = self.part
        leading = part.kind.leading(module, x, sharing)
        self.positions = str(leading[-1]) if len(leading) > 1 else "-"
        joint = part.has_ones and not part.is_separate
        if part.kind.has_plain_rows and leading.numel() <= self._most["A"]:
            values = x.to(self._dtype)
            # The ones go in before padding is taken out, which has none.
            values = factors.append_ones(values) if joint else values
            self._add_rows("A", own_copy(part.kind.input_rows(module, values, sharing), x))
        elif self._may_wait(x, module):
            # The module as it is now: the next call may find another dilation.
            self._waiting.append(_Waiting(x, x._version, sharing, copy.copy(module)))
        else:
            self._add_inputs(x, sharing, module)
        count = count_rows(leading, sharing)
        if part.is_separate:
            _corner(self._moment("A")).add_(count)
        self.sums["count"] += count
        self.sharings.append(sharing)
        if self._keep_rows:
            rows = part.kind.input_rows(module, x, sharing).to(self._dtype)
            self._inputs.append(factors.append_ones(rows) if part.has_ones else own_copy(rows, x))

    def _may_wait(self, x: Tensor, module: Any) -> bool:
        """Whether A takes so much memory that it should be formed late.

        The peak of memory is in the Fisher pass. Until then A is represented by the input, where
        the graph holds this very tensor for the loss's backward pass anyway (and nobody may write
        into it, or that pass would fail).
        """
        part = self.part
        if part.diagonal_input or not part.kind.saves_input(module, x):
            return False
        is_large = part.sides[1] ** 2 > LARGE * x.numel()
        return is_large and not part.is_separate and not saves_elsewhere()

    def output(self, y: Tensor) -> None:
        if self._waiting and self._waiting[-1].x.dtype != y.dtype:
            self.end_passes()  # under autocast the graph keeps a copy

    def end_passes(self) -> None:
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if call.x._version != call.version:
                raise GraphError(
                    f"the input of layer '{self.part.name}' was written into between its call and "
                    "the Fisher pass: its factor cannot be had"
                )
            self._add_inputs(call.x, call.sharing, call.module)

    def _add_inputs(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        part, joint = self.part, self.part.has_ones and not self.part.is_separate
        is_first = "A" not in self.sums and "A_rows" not in self.sums
        if part.kind.has_plain_rows and not part.diagonal_input and is_first:
            side = part.sides[1]
            self.sums["A"] = part.kind.second_moment(x, sharing, joint, side, self._dtype)
        else:
            part.kind.add_second_moment(self._moment("A"), module, x, sharing, joint)

    def gradient(self, call: int, g: Tensor) -> None:
        part, sharing = self.part, self.sharings[call]
        if part.kind.has_plain_rows:
            rows = part.kind.gradient_rows(part.module, g, sharing).to(self._dtype)
            self._add_rows("B", rows, part.diagonal_gradient)
        else:
            part.kind.add_gradient_moment(self._moment("B"), part.module, g, sharing)
        if self._keep_rows:
            rows = part.kind.gradient_rows(part.module, g, sharing).to(self._dtype)
            self.rows.append((self._inputs[call], rows))

    def _add_rows(self, side: str, rows: Tensor, diagonal: bool = False) -> None:
        add_rows(self.sums, side, rows, diagonal, most=self._most[side])

    def _moment(self, side: str) -> Tensor:
        """The sum of outer products, made when it is first needed."""
        if side not in self.sums:
            kept = self.sums.pop(f"{side}_rows", None)
            self.sums[side] = empty_factor(self.part, side)
            if kept is not None:
                add_rows(self.sums, side, kept, False, most=0)
        return self.sums[side]


class ReduceCollector(Collector):
    """Sums of K-FAC-reduce: an example's rows over all calls become one (eq. 10, eq. 55).

    With `uses` (see `ExpandCollector`) a factor that is a sum over few rows is kept as these rows:
    `A_rows` [groups, N, P_in], `B_rows` [groups, N · passes, P_out] in place of A or B.
    """

    def __init__(
        self,
        part: KroneckerPart,
        ragged_scaling: str,
        uses: int | None = None,
        keep_rows: bool = False,
    ) -> None:
        super().__init__()
        self.part = part
        self.ragged_scaling = ragged_scaling
        self._most = most_rows_of(part, uses)
        self._keep_rows = keep_rows
        self._kept_inputs: Tensor | None = None
        weight = part.slices[0].data
        self._dtype = statistics_dtype(weight)
        self.sums = {"count": torch.zeros((), dtype=self._dtype, device=weight.device)}
        self._inputs: Tensor | None = None
        self._gradients: Tensor | None = None
        self._rows: Tensor | None = None
        self._gradient_scale: Tensor | None = None

    def forward(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        part = self.part
        leading = part.kind.leading(module, x, sharing)
        self.positions = str(leading[-1]) if len(leading) > 1 else "-"
        inputs = part.kind.summed_inputs(module, x, sharing, self._dtype)
        rows = rows_per_example(leading, sharing, inputs)
        if self._inputs is not None and self._inputs.shape != inputs.shape:
            raise SharingError(
                f"its calls in one forward pass had {self._inputs.shape[1]} and {inputs.shape[1]} "
                "examples; K-FAC-reduce adds them up example by example"
            )
        self._inputs = inputs if self._inputs is None else self._inputs + inputs
        self._rows = rows if self._rows is None else self._rows + rows
        self.sharings.append(sharing)

    def end_forward(self) -> None:
        if self._inputs is None or self._rows is None:
            return
        part = self.part
        self.sums["count"] += (self._rows > 0).sum()
        ragged = any(sharing.is_ragged for sharing in self.sharings)
        scale, self._gradient_scale = factors.reduce_scales(self._rows, ragged, self.ragged_scaling)
        rows = self._inputs * scale
        if part.has_ones:
            rows = factors.append_ones(rows, self._rows.unsqueeze(-1) * scale)
        if self._keep_rows:
            self._kept_inputs = rows
        self._add_rows("A", rows, part.diagonal_input, keep=not part.is_separate)
        if part.is_separate and not part.diagonal_input:
            self.sums["A"][:, :-1, -1] = 0
            self.sums["A"][:, -1, :-1] = 0
        self._inputs = self._rows = None

    def gradient(self, call: int, g: Tensor) -> None:
        part = self.part
        total = part.kind.summed_gradients(part.module, g, self.sharings[call], self._dtype)
        self._gradients = total if self._gradients is None else self._gradients + total

    def end_pass(self, single: bool) -> None:
        if self._gradients is None:
            return
        rows = self._gradients
        if self._gradient_scale is not None:
            rows = rows * self._gradient_scale
        self._add_rows("B", rows, self.part.diagonal_gradient, keep=True)
        if self._kept_inputs is not None:
            self.rows.append((self._kept_inputs, rows))
        self._gradients = None

    def _add_rows(self, side: str, rows: Tensor, diagonal: bool, *, keep: bool) -> None:
        """Adds the outer products of rows [groups, n, d] to a factor, or keeps the rows."""
        add_rows(self.sums, side, rows, diagonal, most=self._most[side] if keep else 0)


class UnitwiseCollector(Collector):
    """Sums of per-example gradient products of scale and shift: [1 or 3, units].

    Rows are (γγ), or (γγ, γβ, ββ).
    """

    def __init__(self, part: UnitwisePart) -> None:
        super().__init__()
        self.part = part
        self.sums = empty_unitwise_sums(part)
        self._inputs: list[Tensor | None] = []
        self._statistics: list[Statistics | None] = []
        self._gradients: Tensor | None = None

    def forward(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        rows = self.part.kind.rows(module, x, sharing)
        check_segments(rows.shape[0], sharing)
        self._inputs.append(x)
        self.sharings.append(sharing)
        self.sums["count"] += 1

    def output(self, y: Tensor) -> None:
        self._statistics.append(kept_statistics(y) if self.part.module.training else None)

    def gradient(self, call: int, g: Tensor) -> None:
        part, x = self.part, self._inputs[call]
        assert x is not None
        dtype, sharing = self.sums["F"].dtype, self.sharings[call]
        if part.by_position:
            self._add(row_gradients(part.kind, part.module, x, g, sharing, dtype))
            return
        statistics = self._statistics[call]
        total = example_gradients(part.kind, part.module, x, g, sharing, dtype, statistics)
        self._gradients = total if self._gradients is None else self._gradients + total

    def forget(self, call: int) -> None:
        self._inputs[call] = self._statistics[call] = None

    def end_pass(self, single: bool) -> None:
        if self._gradients is None:
            return
        grads = self._gradients
        if single:  # BatchNorm carries one example's gradient to the activations of the others
            grads = grads.sum(1, keepdim=True)
        self._add(grads)
        self._gradients = None

    def _add(self, grads: Tensor) -> None:
        """Adds the products of gradients [1 or 2, rows, units]."""
        first = grads[[0, 0, 1]] if self.part.has_bias else grads
        second = grads[[0, 1, 1]] if self.part.has_bias else grads
        self.sums["F"] += (first * second).sum(1)


def _corner(moment: Tensor) -> Tensor:
    """The entries of A that belong to the bias alone, a view: [groups]."""
    return moment[:, -1] if moment.dim() == 2 else moment[:, -1, -1]


def own_copy(rows: Tensor, x: Tensor) -> Tensor:
    """The rows, copied if they are a view of x, which its owner may write into before their use."""
    shared = rows.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    return rows.clone() if shared else rows


def most_rows_of(part: KroneckerPart, uses: int | None) -> dict[str, int]:
    """How many rows A and B are kept as, at most; 0 where never."""
    if uses is None or part.diagonal_input or part.diagonal_gradient:
        return {"A": 0, "B": 0}
    out_side, in_side = part.sides
    if uses == 0:
        return {"A": 0 if part.is_separate else in_side // FEW, "B": out_side // FEW}
    return {
        # A gradient [P_out, P_in] is P_out vectors for A and P_in for B.
        "A": 0 if part.is_separate else most_rows(in_side, uses * out_side),
        "B": most_rows(out_side, uses * in_side),
    }
