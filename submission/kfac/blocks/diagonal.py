"""Blocks without factors: scales and shifts by units, and the diagonal of everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..linalg.inverses import FactorInverse
from ..operations.operation import UnitOperation
from ..operations.pieces import Piece
from .block import (
    Block,
    BlockCurvature,
    Collecting,
    Collector,
    HeardCall,
    Inverse,
    InverseSettings,
    Sums,
    as_real,
)
from .public import DiagonalCurvature, UnitwiseCurvature

NORM_ROWS = {
    "examples": "the gradient of an example, summed over its positions: exact blocks",
    "positions": "the gradient at every position by itself, as in ASDL",
}


@dataclass(eq=False)
class SquareSums(Sums):
    """Sums F of products of would-be gradients, one tensor for each loss."""

    f: list[Tensor]
    count: Tensor
    is_unitwise: bool

    def pad(self, empty: SquareSums) -> None:
        self.f += empty.f[len(self.f) :]

    def tensors(self) -> list[tuple[Tensor, bool]]:
        return [*((f, False) for f in self.f), (self.count, False)]

    def merge(self, other: SquareSums) -> None:
        for own, more in zip(self.f, other.f, strict=True):
            own += more
        self.count = self.count + other.count

    def rescale(self, factor: Tensor) -> None:
        for f in self.f:
            f *= factor.to(f.dtype) ** 2

    def where_faults_show(self) -> list[Tensor]:
        return self.f

    def curvature(self, divisors: Sequence[Tensor | None], input_scale: float) -> BlockCurvature:
        parts = [
            f if divisor is None else f.div_(divisor.to(f.dtype))
            for f, divisor in zip(self.f, divisors, strict=True)
        ]
        total = parts[0]
        for part in parts[1:]:
            total += part
        return Unitwise(total) if self.is_unitwise else Diagonal(total)


@dataclass
class Reciprocal(Inverse):
    """Entries are multiplied by `reciprocal`, in the shape of a gradient or in one row."""

    reciprocal: Tensor

    def apply(self, gradient: Tensor) -> Tensor:
        reciprocal = self.reciprocal
        if reciprocal.numel() == gradient.numel():
            reciprocal = reciprocal.reshape(gradient.shape)
        return reciprocal * gradient


@dataclass
class UnitInverse(Inverse):
    """2×2 inverses of each unit: `blocks` [3, units] (γγ, γβ, ββ), in float64."""

    blocks: Tensor

    def apply(self, gradient: Tensor) -> Tensor:
        (aa, ab, bb), (first, second) = self.blocks, gradient
        return torch.stack([aa * first + ab * second, ab * first + bb * second])


def _reciprocal(f: Tensor, strength: Tensor, *, keeps_shape: bool) -> Reciprocal:
    reciprocal = (f + strength).reciprocal()
    # One row, so that blocks can lie side by side.
    return Reciprocal(reciprocal if keeps_shape else reciprocal.reshape(1, -1))


@dataclass
class Unitwise(BlockCurvature):
    """`f` [3, units] (γγ, γβ, ββ), or [1, units] of a scale or shift alone."""

    f: Tensor

    def mean_eigenvalue(self) -> Tensor:
        # Not by an index [0, -1]: it comes from the CPU, which waits for a GPU.
        return torch.stack([self.f[0], self.f[-1]]).mean().reshape(1)

    def moved_towards(self, new: Unitwise, weight: float) -> Unitwise:
        self.f.lerp_(new.f, weight)
        return self

    def inverse(
        self,
        settings: InverseSettings,
        found: Sequence[FactorInverse | None],
        before: Inverse | None = None,
    ) -> Inverse | None:
        strength = self.strength(settings)
        if len(self.f) == 1:
            return _reciprocal(self.f, strength, keeps_shape=False)
        # In float64, and damped by no less than F is accurate to: blocks of few examples have
        # nearly rank one, where the two products below cancel.
        a, b, d = self.f.double()
        s = torch.maximum(strength.double(), torch.finfo(self.f.dtype).eps * (a + d))
        determinant = (a + s) * (d + s) - b * b
        return UnitInverse(torch.stack([d + s, -b, a + s]) / determinant)

    def quadratic_form(self, step: Tensor) -> Tensor:
        return torch.einsum("iu,uij,ju->", step, self._blocks(), step)

    def _blocks(self) -> Tensor:
        """[units, 2, 2] or [units, 1, 1]."""
        if len(self.f) == 1:
            return self.f.reshape(-1, 1, 1)
        return torch.stack([self.f[0], self.f[1], self.f[1], self.f[2]], -1).reshape(-1, 2, 2)

    def public(self) -> UnitwiseCurvature:
        return UnitwiseCurvature(self._blocks().clone())


@dataclass
class Diagonal(BlockCurvature):
    """`f` in the shape of the entries, or with size 1 in all dimensions but the first."""

    f: Tensor

    def mean_eigenvalue(self) -> Tensor:
        return self.f.mean().reshape(1)

    def moved_towards(self, new: Diagonal, weight: float) -> Diagonal:
        self.f.lerp_(new.f, weight)
        return self

    def inverse(
        self,
        settings: InverseSettings,
        found: Sequence[FactorInverse | None],
        before: Inverse | None = None,
    ) -> Inverse | None:
        by_row = self.f.dim() > 1 and self.f[0].numel() == 1
        return _reciprocal(self.f, self.strength(settings), keeps_shape=by_row)

    def quadratic_form(self, step: Tensor) -> Tensor:
        return (self.f * step.square()).sum()

    def public(self) -> DiagonalCurvature:
        return DiagonalCurvature(self.f.clone())


class UnitCollector(Collector):
    """Sums per-example gradient products of scale and shift."""

    sums: SquareSums

    def __init__(self, block: UnitBlock, collecting: Collecting) -> None:
        self._block, self._like = block, collecting.like
        self.sums = block.empty_sums(collecting, 0)
        self._scale: Tensor | None = None
        self._shift: Tensor | None = None

    def input(self, call: HeardCall) -> None:
        self.sums.count = self.sums.count + 1
        operation: UnitOperation = call.operation
        if call.x is not None:
            operation.check(call.x, call.sharing)

    def gradient(self, call: HeardCall, g: Tensor) -> None:
        if self._block.by_position:
            self._add(*call.operation.row_gradients(call.x, g, call.sharing, self._like.dtype))
            return
        scale, shift = call.operation.gradients(call.x, g, call.sharing, self._like.dtype)
        if self._block.scale is not None:
            self._scale = scale if self._scale is None else self._scale + scale
        if self._block.shift is not None:
            self._shift = shift if self._shift is None else self._shift + shift

    def end_pass(self, single: bool) -> None:
        scale, shift = self._scale, self._shift
        if single:  # BatchNorm carries one example's gradient to the activations of the others
            scale, shift = (None if g is None else g.sum(0, keepdim=True) for g in (scale, shift))
        self._add(scale, shift)
        self._scale = self._shift = None

    def _add(self, scale: Tensor | None, shift: Tensor | None) -> None:
        """Adds the products of gradients [rows, units] of the parts that the block has."""
        parts = ((self._block.scale, scale), (self._block.shift, shift))
        grads = [g for piece, g in parts if piece is not None and g is not None]
        if not grads:
            return
        pairs = [(0, 0), (0, 1), (1, 1)] if len(grads) == 2 else [(0, 0)]
        while len(self.sums.f) <= self.loss:
            self.sums.f.append(self._like.new_zeros(len(pairs), grads[0].shape[-1]))
        self.sums.f[self.loss] += torch.stack([(grads[i] * grads[j]).sum(0) for i, j in pairs])


@dataclass(frozen=True)
class UnitBlock(Block):
    """Scale and shift, or one of them: an exact 2×2 (or 1×1) block for each unit.

    Attributes:
        by_position: every position's gradient counts by itself, see NORM_ROWS.
    """

    name: str
    scale: Piece | None
    shift: Piece | None
    by_position: bool = False

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return tuple(piece for piece in (self.scale, self.shift) if piece is not None)

    def collector(self, collecting: Collecting) -> UnitCollector:
        return UnitCollector(self, collecting)

    def empty_sums(self, collecting: Collecting, losses: int) -> SquareSums:
        like, rows = collecting.like, 3 if len(self.pieces) == 2 else 1
        f = [like.new_zeros(rows, self.pieces[0].numel) for _ in range(losses)]
        return SquareSums(f, like.new_zeros(()), True)

    def canonical(self, values: Sequence[Tensor]) -> Tensor:
        """[1 or 2, units]."""
        return torch.stack([value.flatten() for value in values])

    def separated(self, value: Tensor) -> list[Tensor]:
        return [row.reshape(piece.size) for row, piece in zip(value, self.pieces, strict=True)]

    @property
    def layout(self) -> tuple[tuple[int, ...], int]:
        return (len(self.pieces), -1), 1

    def row(self, adam: bool, raw: bool) -> tuple[str, str, str, int]:
        kind = " and ".join(
            word for word, piece in (("scale", self.scale), ("shift", self.shift)) if piece
        )
        units = self.pieces[0].numel
        if adam or raw:
            return kind, str(units), "Adam" if adam else "raw gradient", 2 * units * int(adam)
        return kind, str(units), "unit-wise", (3 if len(self.pieces) == 2 else 1) * units


class DiagonalCollector(Collector):
    """Sums squares of the gradients of the parameter itself."""

    sums: SquareSums

    def __init__(self, block: DiagonalBlock, collecting: Collecting) -> None:
        self._block, self._collecting = block, collecting
        self.sums = block.empty_sums(collecting, 0)

    @property
    def is_reached(self) -> bool:
        return bool(self.sums.f)

    def input(self, call: HeardCall) -> None:
        """Has no calls."""

    def gradient(self, call: HeardCall, g: Tensor) -> None:
        """Has no calls."""

    def add_gradient(self, gradient: Tensor) -> None:
        """Adds the squares of a would-be gradient of the whole parameter; of a row their mean.

        Nothing of a sparse gradient, which is left as it is.
        """
        if gradient.layout != torch.strided:
            return
        while len(self.sums.f) <= self.loss:
            self.sums.f += self._block.empty_sums(self._collecting, 1).f
        total, gradient = self.sums.f[self.loss], as_real(self._block.piece.of(gradient))
        if self._block.by_row:
            # Nothing of the parameter's size is made.
            norms = torch.linalg.vector_norm(gradient.flatten(1), dim=1, dtype=total.dtype)
            total += (norms.square() / gradient[0].numel()).reshape(total.shape)
        else:
            total += gradient.to(total.dtype).square()
        self.sums.count = self.sums.count + 1


@dataclass(frozen=True)
class DiagonalBlock(Block):
    """A parameter, or what other blocks leave of it: the diagonal of its GGN.

    Attributes:
        by_row: only its mean over each row (entry of the first dimension) is kept: a table of
            embeddings with millions of rows has no room for more.
        is_complex: pairs of real numbers.
    """

    name: str
    piece: Piece
    by_row: bool = False
    is_complex: bool = False
    needs_own_gradients = True

    @property
    def pieces(self) -> tuple[Piece, ...]:
        return (self.piece,)

    @property
    def _shape(self) -> tuple[int, ...]:
        return (*self.piece.size, 2) if self.is_complex else self.piece.size

    def collector(self, collecting: Collecting) -> DiagonalCollector:
        return DiagonalCollector(self, collecting)

    def empty_sums(self, collecting: Collecting, losses: int) -> SquareSums:
        shape, like = self._shape, collecting.like
        if self.by_row:
            shape = (shape[0], *(1 for _ in shape[1:]))
        return SquareSums([like.new_zeros(shape) for _ in range(losses)], like.new_zeros(()), False)

    def canonical(self, values: Sequence[Tensor]) -> Tensor:
        """In the shape of the entries; complex ones as pairs of real numbers."""
        return as_real(values[0])

    def separated(self, value: Tensor) -> list[Tensor]:
        return [value]

    @property
    def layout(self) -> tuple[tuple[int, ...], int]:
        return (1, -1), 1

    def public(self, curvature: BlockCurvature) -> DiagonalCurvature:
        shown: DiagonalCurvature = curvature.public()
        return DiagonalCurvature(shown.diagonal.expand(self._shape))

    def row(self, adam: bool, raw: bool) -> tuple[str, str, str, int]:
        shape = " x ".join(str(size) for size in self.piece.size) or "1"
        if adam or raw:
            entries = 2 * self.piece.numel * int(adam)
            return "parameter", shape, "Adam" if adam else "raw gradient", entries
        if self.by_row:
            return "parameter", shape, "diagonal, by row", self.piece.size[0]
        return "parameter", shape, "diagonal", self.piece.numel
