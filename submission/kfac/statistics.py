"""The parts of a model, and the additive statistics ("sums") that are kept of each.

`collectors` fills the sums; `curvature` divides them by their counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import factors
from .layers import Kind
from .norms import NormKind
from .parameters import ParameterSlice

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
        bias: see `config.BIASES`.
        also: further modules of the same kind that hold the same parameters.
        embedding: an nn.Embedding that shares the weight with this nn.Linear, see `tied`.
        diagonal_input, diagonal_gradient: only the diagonal of A, or B, is kept.
    """

    name: str
    module: Any
    kind: Kind
    approx: str
    slices: tuple[ParameterSlice, ...]
    bias: str
    diagonal_input: bool
    diagonal_gradient: bool
    also: tuple[nn.Module, ...] = ()
    embedding: nn.Embedding | None = None

    @property
    def has_bias(self) -> bool:
        """Whether a bias is covered along with the weight."""
        return len(self.slices) > 1

    @property
    def has_ones(self) -> bool:
        """Whether A has a row and a column for a bias."""
        return self.has_bias and self.bias != "output"

    @property
    def is_separate(self) -> bool:
        """Whether that row and column are zero but for the corner."""
        return self.has_bias and self.bias == "separate"

    @property
    def sides(self) -> tuple[int, int]:
        """(P_out, P_in) of the factors, the column of ones included."""
        out_side, in_side = self.kind.sides(self.module)
        return out_side, in_side + int(self.has_ones)

    @property
    def gradient_sides(self) -> tuple[int, int]:
        """(P_out, P_in) of the gradient in its canonical view, the column of a bias included."""
        out_side, in_side = self.kind.sides(self.module)
        return out_side, in_side + int(self.has_bias)


@dataclass(frozen=True)
class UnitwisePart:
    """Scale and shift of a normalisation layer: one 2×2 (or 1×1) block per unit.

    Args:
        by_position: every position's gradient counts by itself, see `config.NORM_ROWS`.
    """

    name: str
    module: nn.Module
    kind: NormKind
    slices: tuple[ParameterSlice, ...]
    by_position: bool = False

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


def _zeros(shape: tuple[int, ...], like: Tensor) -> Tensor:
    return torch.zeros(shape, dtype=statistics_dtype(like), device=like.device)


def empty_factor(part: KroneckerPart, side: str) -> Tensor:
    """Zeros for the factor "A" [groups, P_in, P_in] or "B"; [groups, P_in] where diagonal."""
    weight = part.slices[0].data
    groups, (out_side, in_side) = part.kind.groups(part.module), part.sides
    length = in_side if side == "A" else out_side
    diagonal = part.diagonal_input if side == "A" else part.diagonal_gradient
    return _zeros((groups, length) if diagonal else (groups, length, length), weight)


def empty_kronecker_sums(part: KroneckerPart) -> Sums:
    """Zero sums: A, B (see `empty_factor`), count []."""
    factors = {side: empty_factor(part, side) for side in ("A", "B")}
    return {**factors, "count": _zeros((), part.slices[0].data)}


def add_rows(sums: Sums, side: str, rows: Tensor, diagonal: bool, *, most: int) -> None:
    """Adds the outer products of rows [groups, n, d] to the factor `side` of the sums, in place.

    As long as there are no more than `most`, the rows themselves are kept (see `low_rank`).
    """
    name = f"{side}_rows"
    kept = sums.pop(name, None)
    if kept is not None:
        rows = torch.cat([kept, rows], -2)
    elif side in sums:
        most = 0
    if rows.shape[-2] <= most and not diagonal:
        sums[name] = rows
    elif side not in sums:
        sums[side] = factors.outer_products(rows, diagonal)
    else:
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


# How the sums depend on the would-be gradients: squares of them, or (rows) themselves.
_SQUARES_OF_GRADIENTS = ("B", "E_d", "F")
_GRADIENTS = ("B_rows",)


def rescale_gradients(sums: Sums, factor: Tensor) -> None:
    """Makes sums of would-be gradients those of `factor` times the gradients, in place."""
    for key, value in sums.items():
        if key in _SQUARES_OF_GRADIENTS:
            value *= factor.to(value.dtype) ** 2
        elif key in _GRADIENTS:
            sums[key] = value * factor.to(value.dtype)  # may be the gradients' own memory


def add_sums(total: Sums, extra: Sums) -> None:
    """total += extra, in place; rows that are kept as such are joined as long as they are few."""
    for side in ("A", "B"):
        if f"{side}_rows" in total and side in extra:
            add_rows(total, side, total.pop(f"{side}_rows"), False, most=0)
    for key, value in extra.items():
        if key.endswith("_rows"):
            add_rows(total, key[0], value, False, most=value.shape[-1] // 2)
        elif key in total:
            total[key] += value
        else:
            total[key] = value  # of a layer that an earlier micro-batch did not call
