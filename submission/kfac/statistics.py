"""What one recording collects: sums over rows, additive over micro-batches and over ranks.

Every part of a model has a `Part` (what is approximated, and how) and, while recording, a
`Collector`: it is told of each call of the module in the forward pass and of each would-be
gradient of an output in a Fisher pass. Its `sums` are the additive statistics; dividing them by
the counts is left to `curvature`, after everything has been added up.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import factors
from .layers import Kind
from .norms import NormKind, example_gradients
from .parameters import ParameterSlice
from .sharing import Sharing, SharingError, check_segments, count_rows, rows_per_example

Sums = dict[str, Tensor]
# Input rows [groups, n, P_in] and gradient rows [groups, n, P_out] that belong together.
RowPairs = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class KroneckerPart:
    """A linear layer with a pair of Kronecker factors per group.

    Args:
        name: the module's name in the model; a map inside a fused module has its name added.
        module: the layer, or a `LinearView` into a fused module.
        slices: the weight, and the bias if there is one.
        also: further modules of the same kind that hold the same parameters.
        embedding: an nn.Embedding that shares the weight with this nn.Linear, see `tied`.
        diagonal_input, diagonal_gradient: only the diagonal of A, or B, is kept.
    """

    name: str
    module: Any
    kind: Kind
    approx: str
    slices: tuple[ParameterSlice, ...]
    joint_bias: bool
    diagonal_input: bool
    diagonal_gradient: bool
    also: tuple[nn.Module, ...] = ()
    embedding: nn.Embedding | None = None

    @property
    def has_bias(self) -> bool:
        """Whether a bias is covered along with the weight."""
        return len(self.slices) > 1

    @property
    def sides(self) -> tuple[int, int]:
        """(P_out, P_in), the column of ones included."""
        out_side, in_side = self.kind.sides(self.module)
        return out_side, in_side + int(self.has_bias)


@dataclass(frozen=True)
class UnitwisePart:
    """Scale and shift of a normalisation layer: one 2×2 (or 1×1) block per unit."""

    name: str
    module: nn.Module
    kind: NormKind
    slices: tuple[ParameterSlice, ...]

    @property
    def has_bias(self) -> bool:
        """Whether there is a shift besides the scale."""
        return len(self.slices) > 1


@dataclass(frozen=True)
class DiagonalPart:
    """A parameter that is in no supported layer: the diagonal of its GGN.

    Args:
        by_row: only its mean over each row (entry of the first dimension) is kept: a table of
            embeddings with millions of rows has no room for more.
        sparse: its gradients are sparse tensors, which are left as they are.
    """

    name: str
    parameter: nn.Parameter
    by_row: bool = False
    sparse: bool = False

    @property
    def slices(self) -> tuple[ParameterSlice, ...]:
        """The parameter, whole."""
        return (ParameterSlice(self.name, self.parameter),)


Part = KroneckerPart | UnitwisePart | DiagonalPart


def statistics_dtype(parameter: Tensor) -> torch.dtype:
    """float64 for float64 parameters, float32 for all others: sums are never kept in half."""
    wide = parameter.dtype in (torch.float64, torch.complex128)
    return torch.float64 if wide else torch.float32


def as_real(tensor: Tensor) -> Tensor:
    """A complex tensor with its real and imaginary parts along a last dimension; a view."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


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

    @abstractmethod
    def gradient(self, call: int, g: Tensor) -> None:
        """Takes a would-be gradient of the output of one call."""

    def end_forward(self) -> None:  # noqa: B027 - most have nothing to finish
        """All calls of the forward pass have been seen."""

    def end_pass(self, single: bool) -> None:  # noqa: B027
        """All gradients of one Fisher pass, of one example or of all, have been seen."""


class ExpandCollector(Collector):
    """Sums of K-FAC-expand: every row counts for itself (eq. 7).

    With `keep_rows`, `rows` has all rows of inputs and gradients, for the eigenvalue correction.
    """

    def __init__(self, part: KroneckerPart, keep_rows: bool = False) -> None:
        super().__init__()
        self.part = part
        self.sums = empty_kronecker_sums(part)
        self._keep_rows = keep_rows
        self._inputs: list[Tensor] = []

    def forward(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        part = self.part
        leading = part.kind.leading(module, x, sharing)
        self.positions = str(leading[-1]) if len(leading) > 1 else "-"
        part.kind.add_second_moment(
            self.sums["A"], module, x, sharing, part.has_bias and part.joint_bias
        )
        count = count_rows(leading, sharing)
        if part.has_bias and not part.joint_bias:
            _corner(self.sums["A"]).add_(count)
        self.sums["count"] += count
        self.sharings.append(sharing)
        if self._keep_rows:
            rows = part.kind.input_rows(module, x, sharing).to(self.sums["A"].dtype)
            self._inputs.append(factors.append_ones(rows) if part.has_bias else rows)

    def gradient(self, call: int, g: Tensor) -> None:
        part = self.part
        moment = self.sums["B"]
        rows = part.kind.gradient_rows(part.module, g, self.sharings[call]).to(moment.dtype)
        factors.add_outer_products(moment, rows)
        if self._keep_rows:
            self.rows.append((self._inputs[call], rows))


class ReduceCollector(Collector):
    """Sums of K-FAC-reduce: an example's rows over all calls become one (eq. 10, eq. 55).

    With `low_rank`, a factor that is a sum over few rows is kept as these rows: `A_rows`
    [groups, N, P_in], `B_rows` [groups, N · passes, P_out] in place of A or B.
    """

    def __init__(
        self, part: KroneckerPart, ragged_scaling: str, low_rank: bool, keep_rows: bool = False
    ) -> None:
        super().__init__()
        self.part = part
        self.ragged_scaling = ragged_scaling
        self.low_rank = low_rank
        self._keep_rows = keep_rows
        self._kept_inputs: Tensor | None = None
        self.sums = {"count": _zeros((), part.slices[0].data)}
        self._dtype = statistics_dtype(part.slices[0].data)
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
        if part.has_bias:
            rows = factors.append_ones(rows, self._rows.unsqueeze(-1) * scale)
        if self._keep_rows:
            self._kept_inputs = rows
        separate = part.has_bias and not part.joint_bias
        self._add_rows("A", rows, part.diagonal_input, keep=not separate)
        if separate and not part.diagonal_input:
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
        add_rows(self.sums, side, rows, diagonal, keep=keep and self.low_rank)


class UnitwiseCollector(Collector):
    """Sums of per-example gradient products of scale and shift: [1 or 3, units].

    Rows are (γγ), or (γγ, γβ, ββ).
    """

    def __init__(self, part: UnitwisePart) -> None:
        super().__init__()
        self.part = part
        self.sums = empty_unitwise_sums(part)
        self._inputs: list[Tensor] = []
        self._gradients: Tensor | None = None

    def forward(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        rows = self.part.kind.rows(module, x, sharing)
        check_segments(rows.shape[0], sharing)
        self._inputs.append(x)
        self.sharings.append(sharing)
        self.sums["count"] += 1

    def gradient(self, call: int, g: Tensor) -> None:
        part = self.part
        total = example_gradients(
            part.kind, part.module, self._inputs[call], g, self.sharings[call], self.sums["F"].dtype
        )
        self._gradients = total if self._gradients is None else self._gradients + total

    def end_pass(self, single: bool) -> None:
        if self._gradients is None:
            return
        grads = self._gradients
        if single:  # BatchNorm carries one example's gradient to the activations of the others
            grads = grads.sum(1, keepdim=True)
        first = grads[[0, 0, 1]] if self.part.has_bias else grads
        second = grads[[0, 1, 1]] if self.part.has_bias else grads
        self.sums["F"] += (first * second).sum(1)
        self._gradients = None


def _corner(moment: Tensor) -> Tensor:
    """The entries of A that belong to the bias alone, a view: [groups]."""
    return moment[:, -1] if moment.dim() == 2 else moment[:, -1, -1]


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=statistics_dtype(like), device=like.device)


def empty_kronecker_sums(part: KroneckerPart) -> Sums:
    """Zero sums: A [groups, P_in, P_in] or diagonal [groups, P_in], B likewise, count []."""
    weight = part.slices[0].data
    groups = part.kind.groups(part.module)
    out_side, in_side = part.sides
    a_shape = (groups, in_side) if part.diagonal_input else (groups, in_side, in_side)
    b_shape = (groups, out_side) if part.diagonal_gradient else (groups, out_side, out_side)
    return {"A": _zeros(a_shape, weight), "B": _zeros(b_shape, weight), "count": _zeros((), weight)}


def add_rows(sums: Sums, side: str, rows: Tensor, diagonal: bool, *, keep: bool) -> None:
    """Adds the outer products of rows [groups, n, d] to the factor `side` of the sums, in place.

    With `keep` the rows themselves are kept, as long as they are few: applying a factor of n rows
    costs 2 n d per vector, a dense one d².
    """
    name = f"{side}_rows"
    kept = sums.pop(name, None)
    if kept is not None:
        rows = torch.cat([kept, rows], -2)
    elif side in sums:
        keep = False
    groups, n, d = rows.shape
    if keep and not diagonal and 2 * n <= d:
        sums[name] = rows
        return
    if side not in sums:
        sums[side] = rows.new_zeros((groups, d) if diagonal else (groups, d, d))
    factors.add_outer_products(sums[side], rows)


def empty_unitwise_sums(part: UnitwisePart) -> Sums:
    """Zero sums: F [3, units], or [1, units] without a shift; count [] of calls."""
    weight = part.slices[0].data
    f = _zeros((3 if part.has_bias else 1, weight.numel()), weight)
    return {"F": f, "count": _zeros((), weight)}


def empty_diagonal_sums(part: DiagonalPart) -> Sums:
    """Zero sums: F in the shape of the parameter, count [] of passes that reached it.

    By row, all dimensions of F but the first have size 1.
    """
    shape = tuple(as_real(part.parameter.detach()).shape)
    if part.by_row:
        shape = (shape[0], *(1 for _ in shape[1:]))
    return {"F": _zeros(shape, part.parameter), "count": _zeros((), part.parameter)}


def add_squares(part: DiagonalPart, sums: Sums, gradient: Tensor) -> None:
    """Adds the squares of a would-be gradient of the parameter, in place; of a row their mean."""
    total, gradient = sums["F"], as_real(gradient)
    if part.by_row:
        # Nothing of the parameter's size is made.
        norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=total.dtype)
        total += (norms.square() / gradient[0].numel()).reshape(total.shape)
    else:
        total += gradient.to(total.dtype).square()
    sums["count"] += 1


def empty_sums(part: Part) -> Sums:
    """Zero sums of any part."""
    if isinstance(part, UnitwisePart):
        return empty_unitwise_sums(part)
    if isinstance(part, DiagonalPart):
        return empty_diagonal_sums(part)
    sums = empty_kronecker_sums(part)
    return sums if part.embedding is None else {**sums, **empty_embedding_sums(part)}


def empty_embedding_sums(part: KroneckerPart) -> Sums:
    """Zero sums of a tied embedding (see `tied`): E_V [V], E_d [d, d], E_count []."""
    weight = part.slices[0].data
    vocabulary, features = weight.shape
    return {
        "E_V": _zeros((vocabulary,), weight),
        "E_d": _zeros((features, features), weight),
        "E_count": _zeros((), weight),
    }


def add_sums(total: Sums, extra: Sums) -> None:
    """total += extra, in place; rows that are kept as such are joined as long as they are few."""
    for side in ("A", "B"):
        if f"{side}_rows" in total and side in extra:
            add_rows(total, side, total.pop(f"{side}_rows"), False, keep=False)
    for key, value in extra.items():
        if key.endswith("_rows"):
            add_rows(total, key[0], value, False, keep=True)
        else:
            total[key] += value
