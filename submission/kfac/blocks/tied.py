"""A matrix that is used both as it is and transposed: tied input and output of a language model.

The direct use has the block B_l ⊗ A_l, with B_l on the side of P_out and A_l on that of P_in. Seen
as the same matrix, the transposed use's is A_t ⊗ B_t: its inputs (one-hot for an embedding) are on
the side of P_out, its would-be gradients on that of P_in. The GGN of the shared weight is about the
sum of both (products of one use with the other are left out), and that sum is brought back to one
Kronecker product by partial traces,

    Q ⊗ P / τ,  P = tr(B_l) A_l + tr(A_t) B_t,  Q = tr(A_l) B_l + tr(B_t) A_t,  τ = its trace,

which keeps the trace, and is exact where either use has no curvature.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.factor import Factor
from ..operations.pieces import Piece
from .block import Block, Collecting, Collector, HeardCall, Sums
from .factors import Factors
from .kronecker import KroneckerBlock
from .kronecker_sums import KroneckerSums


@dataclass(eq=False)
class TiedSums(Sums):
    """The sums of both uses."""

    direct: KroneckerSums
    transposed: KroneckerSums

    @property
    def count(self) -> Tensor:  # type: ignore[override]
        """Of both."""
        return self.direct.count + self.transposed.count

    def pad(self, empty: TiedSums) -> None:
        self.direct.pad(empty.direct)
        self.transposed.pad(empty.transposed)

    def tensors(self) -> list[tuple[Tensor, bool]]:
        return [*self.direct.tensors(), *self.transposed.tensors()]

    def merge(self, other: TiedSums) -> None:
        self.direct.merge(other.direct)
        self.transposed.merge(other.transposed)

    def rescale(self, factor: Tensor) -> None:
        self.direct.rescale(factor)
        self.transposed.rescale(factor)

    def where_faults_show(self) -> list[Tensor]:
        return [*self.direct.where_faults_show(), *self.transposed.where_faults_show()]

    def curvature(self, divisors: Sequence[Tensor | None], input_scale: float) -> Factors:
        direct = self.direct.curvature(divisors, input_scale)
        return combine(direct, self.transposed.curvature(divisors, input_scale))


def combine(direct: Factors, transposed: Factors) -> Factors:
    """One pair of factors from those of both uses (see the module's docstring); without groups."""
    a, b = direct.a.dense(), direct.b.dense()
    e_out, e_in = transposed.a.dense(), transposed.b.dense()
    trace_a, trace_b = direct.a.trace(), direct.b.trace()
    trace_out, trace_in = transposed.a.trace(), transposed.b.trace()
    p = trace_b * a
    side = e_in.shape[-1]
    p[:, :side, :side] += trace_out * (torch.diag_embed(e_in) if e_in.dim() == 2 else e_in)
    q = trace_a * b
    if q.dim() == 2:
        q += trace_in * (e_out if e_out.dim() == 2 else e_out.diagonal(dim1=-2, dim2=-1))
    elif e_out.dim() == 2:
        q.diagonal(dim1=-2, dim2=-1).add_(trace_in * e_out)
    else:
        q += trace_in * e_out
    size = trace_b + trace_out
    total = trace_a * trace_b + trace_out * trace_in
    tiny = torch.finfo(a.dtype).tiny
    q = q * size / total.clamp(min=tiny)
    form = "diagonal" if q.dim() == 2 else "dense"
    return Factors(Factor(p / size.clamp(min=tiny), "dense"), Factor(q, form), direct.bias_by_b)


class TiedCollector(Collector):
    """Collects for either use."""

    def __init__(self, block: TiedBlock, collecting: Collecting) -> None:
        plain = Collecting(collecting.like, collecting.ragged_scaling)
        self._direct = block.direct.collector(plain)
        self._transposed = block.transposed.collector(plain)
        self.sums = TiedSums(self._direct.sums, self._transposed.sums)

    def _of(self, call: HeardCall) -> Collector:
        return self._transposed if call.transposed else self._direct

    def input(self, call: HeardCall) -> None:
        self._of(call).input(call)

    def gradient(self, call: HeardCall, g: Tensor) -> None:
        self._of(call).loss = self.loss
        self._of(call).gradient(call, g)

    def end_pass(self, single: bool) -> None:
        for collector in (self._direct, self._transposed):
            collector.loss = self.loss
            collector.end_pass(single)

    def end(self) -> None:
        self._direct.end()
        self._transposed.end()

    def words(self) -> str:
        return self._direct.words()


@dataclass(frozen=True)
class TiedBlock(Block):
    """Both uses of a matrix; canonical views and shapes are those of the direct one."""

    direct: KroneckerBlock
    transposed: KroneckerBlock
    has_factors = True

    @property
    def takes_sums(self) -> bool:
        return self.direct.takes_sums and self.transposed.takes_sums

    @property
    def name(self) -> str:  # type: ignore[override]
        """Of the direct use."""
        return self.direct.name

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return self.direct.pieces

    def collector(self, collecting: Collecting) -> TiedCollector:
        return TiedCollector(self, collecting)

    def empty_sums(self, collecting: Collecting, losses: int) -> TiedSums:
        plain = Collecting(collecting.like, collecting.ragged_scaling)
        direct, transposed = (b.empty_sums(plain, losses) for b in (self.direct, self.transposed))
        return TiedSums(direct, transposed)

    def canonical(self, values: Sequence[Tensor]) -> Tensor:
        return self.direct.canonical(values)

    def separated(self, value: Tensor) -> list[Tensor]:
        return self.direct.separated(value)

    @property
    def layout(self) -> tuple[tuple[int, ...], int]:
        return self.direct.layout

    def row(self, adam: bool, raw: bool) -> tuple[str, str, str, int]:
        _, sides, how, entries = self.direct.row(adam, raw)
        return "matrix, tied", sides, how, entries

    def cost(self) -> float:
        """Of its inverse, in multiplications."""
        return self.direct.cost()

    is_correctable = False
