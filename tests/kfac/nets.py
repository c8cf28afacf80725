"""Small modules for the tests."""

import torch
import torch.nn.functional as F
from torch import nn

from submission.kfac.operations.functions.convolution import Convolution


class Mean(nn.Module):
    """Mean over all sharing dimensions [N, ..., d] -> [N, d]: the reduce setting."""

    def forward(self, x):
        return x.flatten(1, -2).mean(1)


class SpatialMean(nn.Module):
    """Mean over all spatial positions [N, C, ...] -> [N, C]."""

    def forward(self, x):
        return x.flatten(2).mean(-1)


class Pool(nn.Module):
    """Linear, then a sum or mean over the rows of each segment, then linear."""

    def __init__(self, ids, segments, how):
        super().__init__()
        self.ids, self.segments, self.how = ids, segments, how
        self.inner = nn.Linear(4, 3)
        self.outer = nn.Linear(3, 2)

    def forward(self, x):
        rows = self.inner(x)
        total = rows.new_zeros(self.segments, rows.shape[-1]).index_add_(0, self.ids, rows)
        if self.how == "mean":
            total = total / torch.bincount(self.ids, minlength=self.segments).clamp(min=1)[:, None]
        return self.outer(total)


class Twice(nn.Module):
    """The same linear layer applied at two places; linear, mean over positions."""

    def __init__(self):
        super().__init__()
        self.shared = nn.Linear(3, 3)
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        first, second = x.unbind(1)
        return self.last(0.5 * (self.shared(first) + self.shared(second)))


class Tokens(nn.Module):
    """Embedding, linear, optionally a mean over positions."""

    def __init__(self, pool, vocabulary=6):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 3)
        self.linear = nn.Linear(3, 2)
        self.pool = pool

    def forward(self, x):
        h = self.linear(self.embedding(x))
        return h.mean(1) if self.pool else h


def geometry_of(module):
    """Of the convolution that a module calls: padding that is not zeros is made in front of it."""
    padding = module.padding if module.padding_mode == "zeros" else 0
    return Convolution.of(
        module.weight.shape, stride=module.stride, padding=padding, dilation=module.dilation,
        groups=module.groups, output_padding=module.output_padding, transposed=module.transposed,
    ).geometry  # fmt: skip


def padded(module, x):
    """What a convolution module calls the convolution with."""
    if module.padding_mode == "zeros":
        return x
    return F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
