"""Embeddings: rows are one-hot, and the weight [V, d] is the transpose of a linear map's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...linalg.moments import SecondMoment
from ...tuning import LARGEST_DENSE_VOCABULARY
from ..handlers import handles
from ..operation import LinearOperation, Rows
from ..pieces import Alias, Matrix
from ..sharing import (
    Positions,
    Segments,
    Sharing,
    flatten_positions,
    without_padding,
    zero_padding,
)
from ..uses import LinearUse

if TYPE_CHECKING:
    from ..record import Recording

LARGEST_BAGS = 1 << 26  # entries of the counts of all bags' words that are made


@dataclass(frozen=True)
class Lookup(LinearOperation):
    """`embedding`, or an index of integers into the rows of a parameter.

    Attributes:
        shape: (1, d, V).
        padding_idx: a row of the weight that gets no gradient, or None.
    """

    shape: tuple[int, int, int]
    padding_idx: int | None = None

    def diagonal_input(self, approx: str) -> bool:
        # The mean of one-hot rows is not one-hot, but V×V numbers are too many.
        return approx == "expand" or self.shape[2] > LARGEST_DENSE_VOCABULARY

    @property
    def _outputs(self) -> Rows:
        return Rows(self.shape)

    def existing_rows(self, x: Tensor, sharing: Positions) -> Tensor | None:
        return None if self.padding_idx is None else self.indices(x, sharing) != self.padding_idx

    def indices(self, x: Tensor, sharing: Sharing) -> Tensor:
        """[N, R] or [rows]; a padding row has an index all the same."""
        if isinstance(sharing, Positions):
            return flatten_positions(x.unsqueeze(-1), sharing).squeeze(-1)
        return x.flatten()

    def leading(self, x: Tensor, sharing: Sharing) -> torch.Size:
        return self.indices(x, sharing).shape

    def weights(self, indices: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        """1 for rows that count, 0 for padding; shape of the indices."""
        ones = torch.ones(indices.shape, dtype=dtype, device=indices.device)
        ones = zero_padding(ones.unsqueeze(-1), sharing).squeeze(-1)
        return ones if self.padding_idx is None else ones * (indices != self.padding_idx)

    def add_second_moment(
        self, moment: SecondMoment, x: Tensor, sharing: Sharing, ones: bool
    ) -> None:
        indices = self.indices(x, sharing)
        weights = self.weights(indices, sharing, moment.dtype)
        matrix = moment.matrix()[0]
        diagonal = matrix if moment.diagonal else matrix.diagonal()
        diagonal.index_add_(0, indices.flatten(), weights.flatten())

    def summed_inputs(self, x: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        indices = self.indices(x, sharing)
        weights = self.weights(indices, sharing, dtype)
        if isinstance(sharing, Positions):
            counts = weights.new_zeros(indices.shape[0], self.shape[2])
            counts.scatter_add_(1, indices.long(), weights)
            return counts.unsqueeze(0)
        counts = weights.new_zeros(sharing.num_segments, self.shape[2])
        counts.index_put_((sharing.ids, indices), weights, accumulate=True)
        return counts.unsqueeze(0)

    def input_rows(self, x: Tensor, sharing: Sharing, ones: bool) -> Tensor:
        indices = self.indices(x, sharing)
        weights = self.weights(indices, sharing, torch.get_default_dtype()).flatten()
        rows = weights.new_zeros(weights.numel(), self.shape[2])
        rows.scatter_(1, indices.flatten().long()[:, None], weights[:, None])
        if isinstance(sharing, Segments):  # as in the rows of gradients
            rows = without_padding(rows, sharing)
        return rows.unsqueeze(0)

    def gradient_rows(self, g: Tensor, sharing: Sharing) -> Tensor:
        return self._outputs.gradient_rows(g, sharing)

    def summed_gradients(self, g: Tensor, sharing: Sharing, dtype: torch.dtype) -> Tensor:
        return self._outputs.summed_gradients(g, sharing, dtype)


@dataclass(frozen=True)
class Bags(Rows):
    """`embedding_bag`: a row is the sum, or the mean, of a bag's one-hot vectors.

    Its input are these rows, [bags, V]. A keeps their diagonal as that of `Lookup` does.
    """

    def diagonal_input(self, approx: str) -> bool:
        return approx == "expand" or self.shape[2] > LARGEST_DENSE_VOCABULARY


def _words(found: Alias) -> Matrix:
    """[1, d, V] of an embedding's weight [V, d]."""
    return found.matrix((), tuple(range(1, found.view.dim())), (0,))


def _lookup(rec: Recording, found: Alias, indices: Tensor, compute: Any, padding: Any) -> Any:
    matrix = _words(found)
    operation = Lookup(matrix.shape, padding)
    return rec.call(_one_hot(matrix, operation), operation, indices, compute)


def _one_hot(matrix: Matrix, operation: Any) -> LinearUse:
    diagonal = tuple(a for a in ("expand", "reduce") if operation.diagonal_input(a))
    return LinearUse(matrix, one_hot=True, diagonal_input=diagonal)


@handles("embedding", spaces=(F,))
def embedding(
    rec: Recording, func: Any, input: Tensor, weight: Tensor, padding_idx: Any = None,
    max_norm: Any = None, norm_type: Any = 2.0, scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:  # fmt: skip
    """Rows are one-hot."""
    found = rec.alias(weight)
    if found is None:
        return NotImplemented

    def compute(x: Tensor) -> Tensor:
        y: Tensor = func(x, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return y

    reason = _unsupported_lookup(max_norm, scale_grad_by_freq, sparse)
    if reason is not None:
        rec.others.setdefault(found.name, reason)
        return compute(input)
    padding = None if padding_idx is None else padding_idx % weight.shape[0]
    return _lookup(rec, found, input, compute, padding)


def _unsupported_lookup(max_norm: Any, scale_grad_by_freq: bool, sparse: bool) -> str | None:
    if max_norm is not None:
        return "an embedding whose max_norm renormalises the weight in every forward pass"
    if scale_grad_by_freq:
        return "an embedding whose scale_grad_by_freq changes the gradient"
    return "an embedding with sparse gradients" if sparse else None


@handles("embedding_bag", spaces=(F,))
def embedding_bag(
    rec: Recording, func: Any, input: Tensor, weight: Tensor, offsets: Any = None,
    max_norm: Any = None, norm_type: Any = 2.0, scale_grad_by_freq: bool = False,
    mode: str = "mean", sparse: bool = False, per_sample_weights: Any = None,
    include_last_offset: bool = False, padding_idx: Any = None,
) -> Any:  # fmt: skip
    """Rows are sums or means of one-hot vectors."""
    found = rec.alias(weight)
    if found is None:
        return NotImplemented

    def compute(x: Tensor) -> Tensor:
        y: Tensor = func(
            x, weight, offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse,
            per_sample_weights, include_last_offset, padding_idx,
        )  # fmt: skip
        return y

    reason = _unsupported_lookup(max_norm, scale_grad_by_freq, sparse)
    if mode == "max" or (per_sample_weights is not None and per_sample_weights.requires_grad):
        reason = reason or "an embedding_bag of maxima, or with trained weights"
    y = compute(input)
    if reason is None and len(y) * weight.shape[0] > LARGEST_BAGS:
        reason = "an embedding_bag of too many words"
    if reason is not None:
        rec.others.setdefault(found.name, reason)
        return y
    rows = _bag_rows(input, y, weight, offsets, mode, per_sample_weights, padding_idx)
    matrix = _words(found)
    operation = Bags(matrix.shape)
    if y.requires_grad:
        rec.add(_one_hot(matrix, operation), operation, rows, y)
    return y


def _bag_rows(
    words: Tensor, y: Tensor, weight: Tensor, offsets: Any, mode: str, weights: Any, padding: Any
) -> Tensor:
    """[bags, V]."""
    if words.dim() == 2:
        bags = torch.arange(len(words), device=words.device).unsqueeze(1).expand_as(words)
    else:
        position = torch.arange(len(words), device=words.device)
        bags = torch.searchsorted(offsets[: len(y)].contiguous(), position, right=True) - 1
    flat, bags = words.flatten().long(), bags.flatten()
    share = torch.ones_like(flat, dtype=y.dtype) if weights is None else weights.detach().flatten()
    if padding is not None:
        share = share * (flat != padding % len(weight))
    rows = y.new_zeros(len(y), len(weight))
    rows.index_put_((bags, flat), share.to(rows.dtype), accumulate=True)
    return rows / rows.sum(1, keepdim=True).clamp(min=1) if mode == "mean" else rows


@handles("__getitem__", "index_select")
def index(rec: Recording, func: Any, input: Any, *args: Any, **kwargs: Any) -> Any:
    """Rows of a parameter, by integers."""
    found = rec.alias(input)
    if found is None or kwargs or found.view.dim() < 2:
        return NotImplemented
    if getattr(func, "__name__", "") == "index_select" and (len(args) != 2 or args[0] != 0):
        return NotImplemented
    indices = args[-1]
    integers = (torch.int64, torch.int32)
    if not isinstance(indices, Tensor) or indices.dtype not in integers or not indices.dim():
        return NotImplemented

    def compute(x: Tensor) -> Tensor:
        y: Tensor = func(input, *args[:-1], x)
        return y

    if found.view.dim() > 2:
        return NotImplemented
    return _lookup(rec, found, torch.remainder(indices, len(input)), compute, None)
