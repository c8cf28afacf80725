"""Random batches of graphs of the size of ogbg's molecules, padded as AlgoPerf pads them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Averages of ogbg-molpcba (Hu et al. 2020): 26.0 nodes and 28.1 bonds a molecule.
MEAN_NODES = 26
EXTRA_BONDS = 3  # more than a tree has: the rings
LABELLED = 0.6  # share of the labels that are known


class Graphs(NamedTuple):
    """A batch of graphs, with the fields of jraph's GraphsTuple.

    Attributes:
        nodes, edges: features, [nodes, 9] and [edges, 3].
        senders, receivers: node numbers, [edges].
        globals: unused.
        n_node, n_edge: sizes, [graphs].
    """

    nodes: Tensor
    edges: Tensor
    senders: Tensor
    receivers: Tensor
    globals: dict[str, Tensor]
    n_node: Tensor
    n_edge: Tensor


def random_graphs(count: int, labels: int) -> tuple[Graphs, Tensor, Tensor]:
    """`count` random trees with a few rings, then a padding graph that fills the batch up.

    Returns:
        (graphs, labels [count + 1, labels], which labels are known [count + 1, labels]).
    """
    sizes = (MEAN_NODES + 6 * torch.randn(count)).round().clamp(6, MEAN_NODES * 2).long()
    budget = max(int(sizes.sum()), count * MEAN_NODES) + 1
    senders, receivers, bonds = [], [], []
    offset = 0
    for size in sizes.tolist():
        child = torch.arange(1, size)
        parent = (torch.rand(size - 1) * child).long()
        ring = torch.randint(size, (2, EXTRA_BONDS))
        ends = torch.stack([torch.cat([child, ring[0]]), torch.cat([parent, ring[1]])]) + offset
        senders.append(ends.flatten())
        receivers.append(ends.flip(0).flatten())
        bonds.append(ends.numel())
        offset += size
    padding_edges = max(0, count * 2 * (MEAN_NODES + EXTRA_BONDS) - sum(bonds))
    padding = torch.full((padding_edges,), offset)
    graphs = Graphs(
        nodes=torch.randint(10, (budget, 9)).float(),
        edges=torch.randint(4, (sum(bonds) + padding_edges, 3)).float(),
        senders=torch.cat([*senders, padding]),
        receivers=torch.cat([*receivers, padding]),
        globals={},
        n_node=torch.cat([sizes, torch.tensor([budget - offset])]),
        n_edge=torch.tensor([*bonds, padding_edges]),
    )
    targets = (torch.rand(count + 1, labels) < 0.05).float()
    known = torch.rand(count + 1, labels) < LABELLED
    known[-1] = False
    return graphs, targets, known
