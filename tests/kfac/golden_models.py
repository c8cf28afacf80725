"""Small models whose training is recorded in golden.pt, and their batches."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor, nn

from submission.kfac import Positions, RaggedBatch, Segments

N, T = 6, 4  # examples of a batch, and positions of an example


@dataclass(frozen=True)
class Batch:
    """What one step sees; `mask` is that of the loss terms."""

    inputs: tuple[Tensor, ...]
    targets: Tensor
    mask: Tensor | None = None
    sharing: Any = None


def normal(generator: Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def labels(generator: Generator, classes: int, *shape: int) -> Tensor:
    return torch.randint(classes, shape, generator=generator)


def perceptron() -> nn.Module:
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.Tanh(), nn.Linear(5, 3)
    )


def vectors(generator: Generator) -> Batch:
    return Batch((normal(generator, 16, 4),), labels(generator, 3, 16))


def few_vectors(generator: Generator) -> Batch:
    return Batch((normal(generator, 3, 4),), labels(generator, 3, 3))


def convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.Tanh(), nn.Conv2d(4, 4, 3, stride=2, groups=2), nn.Tanh(),
        nn.Conv2d(4, 3, 2, padding=1, dilation=2, bias=False), nn.Tanh(), nn.Flatten(),
        nn.Linear(27, 3),
    )  # fmt: skip


def normalised_convolutions() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Tanh(), nn.Conv2d(4, 4, 3),
        nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(36, 5), nn.BatchNorm1d(5), nn.Tanh(),
        nn.Linear(5, 3),
    )  # fmt: skip


def images(generator: Generator) -> Batch:
    return Batch((normal(generator, N, 2, 7, 7),), labels(generator, 3, N))


class Upsampled(nn.Module):
    """Down by a strided convolution, up by a transposed one."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv1d(2, 4, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose1d(4, 2, 4, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.tanh(self.down(x)))


def signals(generator: Generator) -> Batch:
    return Batch((normal(generator, N, 2, 8),), normal(generator, N, 2, 8))


class Transformer(nn.Module):
    """Attention, norms and a perceptron; classes for every token, or for the mean of them."""

    def __init__(self, pool: bool, batch_first: bool = True) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first)
        self.norm = nn.LayerNorm(4)
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.head = nn.Linear(4, 3)
        self.pool, self.time = pool, 1 if batch_first else 0

    def forward(self, x: Tensor, exists: Tensor | None = None) -> Tensor:
        x = self.inner(x)
        padding = None if exists is None else ~exists
        x = self.norm(x + self.attention(x, x, x, key_padding_mask=padding)[0])
        x = x + self.down(torch.tanh(self.up(x)))
        if not self.pool:
            return self.head(x)
        if exists is None:
            return self.head(x.mean(self.time))
        weights = exists.to(x.dtype) / exists.sum(1, keepdim=True)
        return self.head((weights.unsqueeze(-1) * x).sum(1))


def tokens(generator: Generator) -> Batch:
    return Batch((normal(generator, N, T, 3),), labels(generator, 3, N, T))


def sequences(generator: Generator) -> Batch:
    return Batch((normal(generator, N, T, 3),), labels(generator, 3, N))


def time_first_sequences(generator: Generator) -> Batch:
    rule = {"": Positions(batch_dim=1), "head": Positions()}
    return Batch((normal(generator, T, N, 3),), labels(generator, 3, N), sharing=rule)


def _exists(generator: Generator) -> Tensor:
    lengths = torch.randint(1, T + 1, (N, 1), generator=generator)
    return torch.arange(T) < lengths


def masked_tokens(generator: Generator) -> Batch:
    exists = _exists(generator)
    x = normal(generator, N, T, 3)
    return Batch((x, exists), labels(generator, 3, N, T), exists, Positions(mask=exists))


def masked_sequences(generator: Generator) -> Batch:
    exists = _exists(generator)
    rule = {"": Positions(mask=exists), "head": Positions()}
    return Batch((normal(generator, N, T, 3), exists), labels(generator, 3, N), sharing=rule)


class Recurrent(nn.Module):
    """A recurrent layer and classes for each step, or for the mean of them."""

    def __init__(self, layer: nn.Module, pool: bool) -> None:
        super().__init__()
        self.layer, self.pool = layer, pool
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)[0]
        return self.head(h.mean(1) if self.pool else h)


class Language(nn.Module):
    """An embedding that is the output layer's weight."""

    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(7, 4), nn.Linear(4, 4)
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 7)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(torch.tanh(self.middle(self.embedding(x)))))


def words(generator: Generator) -> Batch:
    return Batch((labels(generator, 7, N, T),), labels(generator, 7, N, T))


class GraphNetwork(nn.Module):
    """One round of messages along edges, a sum over the nodes of each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.edge, self.node = nn.Linear(9, 4), nn.Linear(7, 5)
        self.norm, self.readout = nn.LayerNorm(5), nn.Linear(5, 2)

    def forward(self, nodes: Tensor, edges: Tensor, ends: Tensor, graph: Tensor) -> Tensor:
        messages = torch.tanh(self.edge(torch.cat([nodes[ends[0]], nodes[ends[1]], edges], -1)))
        sums = nodes.new_zeros(len(nodes), 4).index_add_(0, ends[1], messages)
        nodes = self.norm(torch.tanh(self.node(torch.cat([nodes, sums], -1))))
        graphs = nodes.new_zeros(int(graph.max()) + 1, 5).index_add_(0, graph, nodes)
        return self.readout(graphs)


def graphs(generator: Generator) -> Batch:
    """Five graphs, one of them without edges, and one that takes the padding."""
    sizes = torch.tensor([3, 2, 4, 1, 3, 4])
    graph = torch.repeat_interleave(torch.arange(6), sizes)
    first = torch.cumsum(sizes, 0) - sizes
    edges = torch.tensor([4, 2, 6, 0, 3, 9])
    owner = torch.repeat_interleave(torch.arange(6), edges)
    draw = torch.rand(2, len(owner), generator=generator, dtype=torch.float64)
    ends = first[owner] + (draw * sizes[owner]).long()
    exists = torch.arange(6) < 5
    known = torch.rand(6, 2, generator=generator) < 0.7
    rule = RaggedBatch({
        "edges": Segments(owner, 6, exists),
        "nodes": Segments(graph, 6, exists),
        "graphs": Segments(torch.arange(6), 6, exists),
    })  # fmt: skip
    inputs = (normal(generator, len(graph), 3), normal(generator, len(owner), 3), ends, graph)
    targets = labels(generator, 2, 6, 2).double()
    return Batch(inputs, targets, known & exists[:, None], rule)


class Bare(nn.Module):
    """Parameters that are in no layer, and a layer that is used as a function."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.shift = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(2, 1, 4))
        self.inner, self.borrowed = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.stack([x, -x.square()]) * self.scale + self.shift
        h = torch.tanh(self.inner(x.mean(0)))
        return h @ self.borrowed.weight.T + self.borrowed.bias


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.shared(torch.tanh(self.shared(x)))))
