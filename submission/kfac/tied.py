"""A weight that an nn.Embedding and an nn.Linear share: tied input and output of a language model.

The linear layer's block is B_l ⊗ A_l, with B_l on the side of the vocabulary V and A_l on that of
the features d. Seen as the same matrix [V, d], the embedding's is E_V ⊗ E_d: its one-hot inputs
are on the side of V, its would-be gradients on that of d. The GGN of the shared weight is about
the sum of both (products of one use with the other are left out), and that sum is brought back to
one Kronecker product by partial traces,

    Q ⊗ P / τ,  P = tr(B_l) A_l + tr(E_V) E_d,  Q = tr(A_l) B_l + tr(E_d) E_V,  τ = its trace,

which keeps the trace, and is exact where either use has no curvature.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .collectors import Collector, ExpandCollector, ReduceCollector
from .layers import EmbeddingKind
from .sharing import Sharing, count_rows, rows_per_example
from .statistics import KroneckerPart, Sums, empty_embedding_sums

_KIND = EmbeddingKind()


class _EmbeddingCollector(Collector):
    """E_V (diagonal, [V]) and E_d ([d, d]) of the embedding's calls, as sums in the tied part's."""

    def __init__(self, part: KroneckerPart, sums: Sums, scaled: bool) -> None:
        super().__init__()
        assert part.embedding is not None
        self.part, self._embedding, self._reduce = part, part.embedding, scaled
        self.sums = sums
        sums.update(empty_embedding_sums(part))
        self._gradients: Tensor | None = None

    def forward(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        del module
        if self._reduce:
            counts = _KIND.summed_inputs(self._embedding, x, sharing, self.sums["E_V"].dtype)[0]
            leading = _KIND.leading(self._embedding, x, sharing)
            rows = rows_per_example(leading, sharing, counts)
            self.sums["E_V"] += (counts / rows.clamp(min=1).unsqueeze(-1)).square().sum(0)
            self.sums["E_count"] += (rows > 0).sum()
        else:
            diagonal = torch.zeros_like(self.sums["E_V"]).unsqueeze(0)
            _KIND.add_second_moment(diagonal, self._embedding, x, sharing, False)
            self.sums["E_V"] += diagonal[0]
            self.sums["E_count"] += count_rows(_KIND.leading(self._embedding, x, sharing), sharing)
        self.sharings.append(sharing)

    def gradient(self, call: int, g: Tensor) -> None:
        sharing, dtype = self.sharings[call], self.sums["E_d"].dtype
        if self._reduce:
            total = _KIND.summed_gradients(self._embedding, g, sharing, dtype)[0]
            self._gradients = total if self._gradients is None else self._gradients + total
        else:
            rows = _KIND.gradient_rows(self._embedding, g, sharing)[0].to(dtype)
            self.sums["E_d"].addmm_(rows.mT, rows)

    def end_pass(self, single: bool) -> None:
        if self._gradients is not None:
            self.sums["E_d"].addmm_(self._gradients.mT, self._gradients)
            self._gradients = None


class TiedCollector(Collector):
    """The sums of both uses of a tied weight: A, B, count of the linear, E_V, E_d, E_count."""

    def __init__(self, part: KroneckerPart, ragged_scaling: str) -> None:
        super().__init__()
        self.part = part
        reduce = part.approx == "reduce"
        self._linear: Collector = (
            ReduceCollector(part, ragged_scaling) if reduce else ExpandCollector(part)
        )
        self.sums = self._linear.sums
        self._embedding = _EmbeddingCollector(part, self.sums, reduce)
        self.sharings = self._linear.sharings

    def hooked(self) -> Iterator[tuple[nn.Module, Collector]]:
        yield from self._linear.hooked()
        assert self.part.embedding is not None
        yield self.part.embedding, self._embedding

    def forward(self, x: Tensor, sharing: Sharing, module: Any) -> None:
        self._linear.forward(x, sharing, module)

    def gradient(self, call: int, g: Tensor) -> None:
        self._linear.gradient(call, g)

    def end_forward(self) -> None:
        self._linear.end_forward()
        self.positions = self._linear.positions

    def end_passes(self) -> None:
        self._linear.end_passes()

    def end_pass(self, single: bool) -> None:
        self._linear.end_pass(single)
        self._embedding.end_pass(single)


def combine(averages: Sums) -> Sums:
    """One pair of factors from those of both uses (see the module's docstring).

    averages: A [1, d (+1), d (+1)], B [1, V, V] or diagonal [1, V], E_V [V], E_d [d, d].
    """
    a, b, e_v, e_d = (averages[key] for key in ("A", "B", "E_V", "E_d"))
    diagonal_b = b.dim() == 2
    trace_a = a.diagonal(dim1=-2, dim2=-1).sum()
    trace_b = b.sum() if diagonal_b else b.diagonal(dim1=-2, dim2=-1).sum()
    trace_v, trace_d = e_v.sum(), e_d.trace()
    p = trace_b * a
    features = e_d.shape[0]
    p[:, :features, :features] += trace_v * e_d
    q = trace_a * b
    (q[0] if diagonal_b else q[0].diagonal()).add_(trace_d * e_v)
    size = trace_b + trace_v
    total = trace_a * trace_b + trace_v * trace_d
    tiny = torch.finfo(a.dtype).tiny
    return {"A": p / size.clamp(min=tiny), "B": q * size / total.clamp(min=tiny)}
