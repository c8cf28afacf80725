"""Which modules are linear weight-sharing layers, and how they look as rows times a matrix.

One `Kind` per module type translates between a module and the canonical view: inputs and output
gradients as rows, parameters as a matrix [groups, P_out, P_in (+1 for a joint bias)]. Kinds hold
no state. To support another module type, write a Kind and add it to `KINDS`: nothing else changes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from . import convolution, factors, shifted_products
from .sharing import (
    Positions,
    Segments,
    Sharing,
    SharingError,
    count_rows,
    flatten_positions,
    sum_rows,
    without_padding,
    zero_padding,
)

LARGEST_DENSE_VOCABULARY = 2048  # of an embedding whose A is not diagonal by itself
POSITIONS_PER_CHANNEL = 4  # of an image, from which on products image by image are faster
MIN_CHANNELS = 8  # per group; below, materialised patches are faster than shifted products


class Kind(ABC):
    """The canonical view of one type of linear layer (see the module's docstring)."""

    module_types: tuple[type[nn.Module], ...]
    has_plain_rows = False  # rows of inputs are views of them, free to have; see `LinearKind`

    def keeps_diagonal_input(self, module: Any, approx: str) -> bool:
        """Whether A is diagonal, or too large to be kept as anything else."""
        del module, approx
        return False

    def is_alike(self, module: Any, other: Any) -> bool:
        """Whether the same parameters are the same matrix in another module of this kind."""
        return self.sides(module) == self.sides(other)

    def unsupported(self, module: Any) -> str | None:
        """Why this particular module cannot be handled, or None."""
        del module
        return None

    def groups(self, module: Any) -> int:
        """Number of independent factor pairs of the weight."""
        del module
        return 1

    def as_called(self, module: Any, x: Tensor, y: Tensor) -> Any:
        """The module with what one call, from x to y, may have set otherwise."""
        del x, y
        return module

    def saves_input(self, module: Any, x: Tensor) -> bool:
        """Whether autograd keeps this very input, and no copy, for the gradient of the weight.

        Where it does, a large A may be formed after the Fisher pass. Off autocast.
        """
        del module, x
        return False

    @abstractmethod
    def sides(self, module: Any) -> tuple[int, int]:
        """(P_out, P_in) of one group, without the bias column."""

    @abstractmethod
    def leading(self, module: Any, x: Tensor, sharing: Sharing) -> torch.Size:
        """[N, R] of the rows of an input for Positions, [rows] for Segments."""

    @abstractmethod
    def add_second_moment(
        self, moment: Tensor, module: Any, x: Tensor, sharing: Sharing, ones: bool
    ) -> None:
        """moment [groups, P_in(+1), P_in(+1)] += Σ over all rows of a aᵀ (eq. 7), in place."""

    @abstractmethod
    def input_rows(self, module: Any, x: Tensor, sharing: Sharing) -> Tensor:
        """All rows of an input, materialised, in the order of `gradient_rows`.

        [groups, rows, P_in], without the column of ones; padding is zero or left out.
        """

    @abstractmethod
    def summed_inputs(self, module: Any, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        """Σ over the positions of each example: [groups, N, P_in]."""

    @abstractmethod
    def gradient_rows(self, module: Any, g: Tensor, sharing: Sharing) -> Tensor:
        """Gradients of the outputs as rows: [groups, rows, P_out]; padding is zero or left out."""

    def add_gradient_moment(self, moment: Tensor, module: Any, g: Tensor, sharing: Sharing) -> None:
        """moment [groups, P_out, P_out], or its diagonals, += Σ over all rows of g gᵀ, in place."""
        rows = self.gradient_rows(module, g, sharing).to(moment.dtype)
        factors.add_outer_products(moment, rows)

    @abstractmethod
    def summed_gradients(
        self, module: Any, g: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> Tensor:
        """Σ over the positions of each example: [groups, N, P_out]."""

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        """A tensor of the weight's shape as matrices [groups, P_out, P_in]."""
        out_side, in_side = self.sides(module)
        return weight.reshape(self.groups(module), out_side, in_side)

    def from_matrix(self, module: Any, matrix: Tensor, like: Tensor) -> Tensor:
        """The inverse of `to_matrix`."""
        del module
        return matrix.reshape(like.shape)


class LinearKind(Kind):
    """nn.Linear: rows are the vectors of the last dimension, any number of shared dimensions."""

    module_types = (nn.Linear,)
    has_plain_rows = True

    def sides(self, module: Any) -> tuple[int, int]:
        out_side, in_side = module.weight.shape
        return int(out_side), int(in_side)

    def leading(self, module: Any, x: Tensor, sharing: Sharing) -> torch.Size:
        rows = self._rows(x, sharing)
        return rows.shape[:-1]

    @staticmethod
    def _rows(x: Tensor, sharing: Sharing) -> Tensor:
        if x.dim() < 2:
            raise SharingError(
                f"the input has shape {list(x.shape)}, without a dimension of examples: give it "
                "one, or exclude the layer (KFACConfig(exclude=...))"
            )
        if isinstance(sharing, Positions):
            return flatten_positions(x, sharing)
        return x.flatten(0, -2)

    def add_second_moment(
        self, moment: Tensor, module: Any, x: Tensor, sharing: Sharing, ones: bool
    ) -> None:
        rows = self._rows(x, sharing)
        count = count_rows(rows.shape[:-1], sharing)
        rows = without_padding(rows, sharing).to(moment.dtype).flatten(0, -2)
        d = rows.shape[-1]
        if moment.dim() == 2:  # diagonal
            factors.add_outer_products(moment[:, :d], rows.unsqueeze(0))
        else:
            factors.add_outer_products(moment[0, :d, :d], rows)
        if ones:
            factors.border_with_ones(moment[0], rows.sum(0), count)

    def second_moment(
        self, x: Tensor, sharing: Sharing, ones: bool, side: int, dtype: torch.dtype
    ) -> Tensor:
        """Σ over all rows of a aᵀ, [1, side, side], written once in place of added to zeros.

        side: P_in, or one more: for the ones, or zeros where there are to be none.
        """
        rows = self._rows(x, sharing)
        count = count_rows(rows.shape[:-1], sharing)
        rows = without_padding(rows, sharing).to(dtype).flatten(0, -2)
        d = rows.shape[-1]
        moment = rows.new_empty(1, side, side)
        factors.write_outer_products(moment[0, :d, :d], rows)
        if side > d:
            moment[0, -1] = 0
            moment[0, :, -1] = 0
        if ones:
            factors.border_with_ones(moment[0], rows.sum(0), count)
        return moment

    def summed_inputs(self, module: Any, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        return sum_rows(self._rows(x, sharing).to(dtype), sharing).unsqueeze(0)

    def input_rows(self, module: Any, x: Tensor, sharing: Sharing) -> Tensor:
        return self.gradient_rows(module, x, sharing)

    def gradient_rows(self, module: Any, g: Tensor, sharing: Sharing) -> Tensor:
        rows = without_padding(self._rows(g, sharing), sharing)
        return rows.flatten(0, -2).unsqueeze(0)

    def summed_gradients(
        self, module: Any, g: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> Tensor:
        return sum_rows(self._rows(g, sharing).to(dtype), sharing).unsqueeze(0)


class ConvKind(Kind):
    """Convolutions of 1 to 3 dimensions, transposed ones too: rows are patches."""

    module_types = (
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
    )

    def groups(self, module: Any) -> int:
        return int(module.groups)

    def is_alike(self, module: Any, other: Any) -> bool:
        same_kernel = module.transposed == other.transposed and module.groups == other.groups
        return same_kernel and super().is_alike(module, other)

    def as_called(self, module: Any, x: Tensor, y: Tensor) -> Any:
        return convolution.as_called(module, x, y) if x.dim() == y.dim() else module

    def saves_input(self, module: Any, x: Tensor) -> bool:
        plain = x.is_contiguous() and x.dtype == module.weight.dtype
        return plain and bool(module.padding_mode == "zeros")

    def sides(self, module: Any) -> tuple[int, int]:
        kernel = math.prod(module.kernel_size)
        return module.out_channels // module.groups, module.in_channels // module.groups * kernel

    @staticmethod
    def _check(module: Any, x: Tensor, sharing: Sharing) -> None:
        if x.dim() != len(module.kernel_size) + 2:
            raise SharingError(
                f"the input has shape {list(x.shape)}, without a dimension of examples: give it "
                "one, or exclude the layer (KFACConfig(exclude=...))"
            )
        if not isinstance(sharing, Positions) or sharing.batch_dim or sharing.mask is not None:
            raise SharingError("a convolution shares its weight over all its output positions")

    def leading(self, module: Any, x: Tensor, sharing: Sharing) -> torch.Size:
        self._check(module, x, sharing)
        positions = convolution.output_positions(convolution.geometry_of(module), x.shape[2:])
        return torch.Size((x.shape[0], positions))

    def add_second_moment(
        self, moment: Tensor, module: Any, x: Tensor, sharing: Sharing, ones: bool
    ) -> None:
        geometry, groups = convolution.geometry_of(module), self.groups(module)
        x = x.to(moment.dtype)
        d = self.sides(module)[1]
        diagonal = moment.dim() == 2
        if not shifted_products.is_applicable(geometry) or x.shape[1] // groups < MIN_CHANNELS:
            full = convolution.patch_second_moment(x, geometry, groups)
        elif diagonal:
            full = shifted_products.second_moment(x, geometry, groups)
        else:
            full = None
            shifted_products.add_second_moment(moment[:, :d, :d], x, geometry)
        if full is not None and diagonal:
            moment[:, :d] += full.diagonal(dim1=-2, dim2=-1)
        elif full is not None:
            moment[:, :d, :d] += full
        if ones:
            count = self.leading(module, x, sharing).numel()
            row_sum = convolution.patch_sum(x, geometry, groups).sum(1)
            factors.border_with_ones(moment, row_sum, count)

    def summed_inputs(self, module: Any, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        geometry = convolution.geometry_of(module)
        return convolution.patch_sum(x.to(dtype), geometry, self.groups(module))

    def input_rows(self, module: Any, x: Tensor, sharing: Sharing) -> Tensor:
        groups = self.groups(module)
        rows = convolution.patches(x, convolution.geometry_of(module))
        rows = rows.reshape(rows.shape[0], groups, self.sides(module)[1], rows.shape[-1])
        return rows.permute(1, 0, 3, 2).flatten(1, 2)

    def add_gradient_moment(self, moment: Tensor, module: Any, g: Tensor, sharing: Sharing) -> None:
        side, positions = moment.shape[-1], math.prod(g.shape[2:])
        if moment.dim() == 2 or positions < POSITIONS_PER_CHANNEL * side:
            super().add_gradient_moment(moment, module, g, sharing)
            return
        # Image by image: the gradients need not be brought into another order first.
        rows = g.to(moment.dtype).reshape(len(g) * self.groups(module), side, positions)
        products = torch.bmm(rows, rows.mT)
        moment += products.view(len(g), *moment.shape).sum(0)

    def gradient_rows(self, module: Any, g: Tensor, sharing: Sharing) -> Tensor:
        rows = g.flatten(2).movedim(1, 0).flatten(1)
        return rows.reshape(self.groups(module), self.sides(module)[0], rows.shape[-1]).mT

    def summed_gradients(
        self, module: Any, g: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> Tensor:
        total = g.flatten(2).sum(-1, dtype=dtype)
        shape = (g.shape[0], self.groups(module), self.sides(module)[0])
        return total.reshape(shape).movedim(1, 0)

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        if module.transposed:  # [C_in, C_out / groups, *kernel]
            g = self.groups(module)
            weight = weight.reshape(g, weight.shape[0] // g, weight.shape[1], -1).transpose(1, 2)
        return super().to_matrix(module, weight)

    def from_matrix(self, module: Any, matrix: Tensor, like: Tensor) -> Tensor:
        if module.transposed:
            groups, out_side, _ = matrix.shape
            matrix = matrix.reshape(groups, out_side, like.shape[0] // groups, -1).transpose(1, 2)
        return super().from_matrix(module, matrix, like)


class EmbeddingKind(Kind):
    """nn.Embedding: rows are one-hot vectors; the weight is the transpose of a linear layer's."""

    module_types = (nn.Embedding,)

    def keeps_diagonal_input(self, module: Any, approx: str) -> bool:
        # The mean of one-hot rows is not one-hot, but V×V numbers are too many.
        return approx == "expand" or int(module.num_embeddings) > LARGEST_DENSE_VOCABULARY

    def unsupported(self, module: Any) -> str | None:
        if module.max_norm is not None:
            return "max_norm renormalises the weight in every forward pass"
        if module.scale_grad_by_freq:
            return "scale_grad_by_freq changes the gradient"
        return "sparse gradients" if module.sparse else None

    def sides(self, module: Any) -> tuple[int, int]:
        return module.embedding_dim, module.num_embeddings

    @staticmethod
    def _indices(x: Tensor, sharing: Sharing) -> Tensor:
        """[N, R] or [rows]; a padding row has an index all the same."""
        if isinstance(sharing, Positions):
            return flatten_positions(x.unsqueeze(-1), sharing).squeeze(-1)
        return x.flatten()

    def leading(self, module: Any, x: Tensor, sharing: Sharing) -> torch.Size:
        return self._indices(x, sharing).shape

    def _weights(
        self, module: Any, indices: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> Tensor:
        """1 for rows that count, 0 for padding; shape of the indices."""
        ones = torch.ones(indices.shape, dtype=dtype, device=indices.device)
        ones = zero_padding(ones.unsqueeze(-1), sharing).squeeze(-1)
        if module.padding_idx is not None:
            ones = ones * (indices != module.padding_idx)
        return ones

    def add_second_moment(
        self, moment: Tensor, module: Any, x: Tensor, sharing: Sharing, ones: bool
    ) -> None:
        indices = self._indices(x, sharing)
        weights = self._weights(module, indices, sharing, moment.dtype)
        diagonal = moment[0] if moment.dim() == 2 else moment[0].diagonal()
        diagonal.index_add_(0, indices.flatten(), weights.flatten())

    def summed_inputs(self, module: Any, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        indices = self._indices(x, sharing)
        weights = self._weights(module, indices, sharing, dtype)
        if isinstance(sharing, Positions):
            counts = weights.new_zeros(indices.shape[0], module.num_embeddings)
            counts.scatter_add_(1, indices, weights)
            return counts.unsqueeze(0)
        counts = weights.new_zeros(sharing.num_segments, module.num_embeddings)
        counts.index_put_((sharing.ids, indices), weights, accumulate=True)
        return counts.unsqueeze(0)

    def input_rows(self, module: Any, x: Tensor, sharing: Sharing) -> Tensor:
        indices = self._indices(x, sharing)
        weights = self._weights(module, indices, sharing, module.weight.dtype).flatten()
        rows = torch.zeros(
            weights.numel(), module.num_embeddings, dtype=weights.dtype, device=weights.device
        )
        rows.scatter_(1, indices.flatten()[:, None], weights[:, None])
        if isinstance(sharing, Segments):  # as in the rows of gradients
            rows = without_padding(rows, sharing)
        return rows.unsqueeze(0)

    def gradient_rows(self, module: Any, g: Tensor, sharing: Sharing) -> Tensor:
        return LinearKind().gradient_rows(module, g, sharing)

    def summed_gradients(
        self, module: Any, g: Tensor, sharing: Sharing, dtype: torch.dtype
    ) -> Tensor:
        return LinearKind().summed_gradients(module, g, sharing, dtype)

    def to_matrix(self, module: Any, weight: Tensor) -> Tensor:
        return weight.mT.unsqueeze(0)

    def from_matrix(self, module: Any, matrix: Tensor, like: Tensor) -> Tensor:
        return matrix.squeeze(0).mT.reshape(like.shape)


KINDS: list[Kind] = [LinearKind(), ConvKind(), EmbeddingKind()]


def kind_of(module: nn.Module) -> Kind | None:
    """The Kind of a module, or None; subclasses count unless they change the forward pass."""
    for kind in KINDS:
        for module_type in kind.module_types:
            if isinstance(module, module_type) and type(module).forward is module_type.forward:
                return kind
    return None
