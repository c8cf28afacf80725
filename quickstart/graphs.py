"""Graphs in packed arrays, and AlgoPerf's dynamic batching on top of them.

AlgoPerf feeds `jraph.dynamically_batch` one graph at a time and concatenates hundreds of small
arrays per batch, on the clock. Here all graphs lie end to end in a few arrays, so that a batch is
a handful of gathers; which graphs make up a batch, their order, and the padding are the same.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import jraph
import numpy as np
import numpy.typing as npt
import torch

IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class PackedGraphs:
    """Many graphs end to end.

    Attributes:
        nodes: node features, (total nodes, 9), small integers.
        edges: bond features, (total bonds, 3); every bond is two directed edges.
        senders, receivers: for each bond the two node numbers within its graph, (total bonds,).
        n_node, n_bond: sizes, (graphs,).
        labels: (graphs, tasks), 1 active, 0 inactive, -1 not measured.
    """

    nodes: IntArray
    edges: IntArray
    senders: IntArray
    receivers: IntArray
    n_node: IntArray
    n_bond: IntArray
    labels: IntArray

    def __len__(self) -> int:
        return len(self.n_node)

    @property
    def num_tasks(self) -> int:
        """Number of binary labels per graph."""
        return int(self.labels.shape[1])


@dataclass(frozen=True)
class BatchBudget:
    """Upper limits of one batch; the padding graph comes on top (one graph, one node)."""

    nodes: int
    edges: int
    graphs: int

    @classmethod
    def from_averages(cls, graphs: PackedGraphs, batch_size: int) -> "BatchBudget":
        """Room for `batch_size` graphs of average size, averages rounded up as in AlgoPerf."""
        return cls(
            nodes=int(np.ceil(graphs.n_node.mean())) * batch_size,
            edges=int(np.ceil(2 * graphs.n_bond.mean())) * batch_size,
            graphs=batch_size,
        )


def count_that_fits(graphs: PackedGraphs, order: IntArray, start: int, budget: BatchBudget) -> int:
    """How many graphs of `order`, from position `start` on, fit into one batch (at least 1).

    Raises:
        ValueError: if the first of them alone is over the budget.
    """
    window = order[start : start + budget.graphs]
    nodes = np.cumsum(graphs.n_node[window], dtype=np.int64)
    edges = 2 * np.cumsum(graphs.n_bond[window], dtype=np.int64)
    count = min(
        int(np.searchsorted(nodes, budget.nodes, side="right")),
        int(np.searchsorted(edges, budget.edges, side="right")),
        len(window),
    )
    if count == 0:
        raise ValueError(
            f"graph {int(window[0])} has {int(nodes[0])} nodes and {int(edges[0])} edges; a batch "
            f"holds {budget.nodes} nodes and {budget.edges} edges: use a larger batch size"
        )
    return count


def _ragged_positions(starts: IntArray, lengths: IntArray) -> npt.NDArray[np.int64]:
    """Positions starts[i], ..., starts[i] + lengths[i] - 1 for all i, end to end."""
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    shift = np.asarray(starts, dtype=np.int64) - (ends - lengths)
    positions: npt.NDArray[np.int64] = np.arange(total) + np.repeat(shift, lengths)
    return positions


class GraphBatcher:
    """Builds padded batches out of packed graphs.

    Args:
        graphs: the data set.
        budget: limits of one batch; all batches have exactly this size after padding.
        device: where the tensors of a batch are put.
    """

    def __init__(self, graphs: PackedGraphs, budget: BatchBudget, device: torch.device) -> None:
        self.graphs = graphs
        self.budget = budget
        self.device = device
        self._node_start = np.cumsum(graphs.n_node, dtype=np.int64) - graphs.n_node
        self._bond_start = np.cumsum(graphs.n_bond, dtype=np.int64) - graphs.n_bond

    def batch(self, members: IntArray) -> dict[str, Any]:
        """The batch of the graphs `members`, padded to the budget.

        Returns:
            'inputs': a `jraph.GraphsTuple` with `budget.graphs + 1` graphs: the members, then one
            padding graph with all padding nodes and edges, then empty graphs; 'targets': labels,
            (graphs, tasks) float, 0 where not measured; 'weights': (graphs, tasks) bool, False
            where not measured and on padding.
        """
        graphs, budget = self.graphs, self.budget
        n_node, n_bond = graphs.n_node[members], graphs.n_bond[members]
        node_rows = _ragged_positions(self._node_start[members], n_node)
        bond_rows = _ragged_positions(self._bond_start[members], n_bond)
        node_total, bond_total = len(node_rows), len(bond_rows)

        nodes = np.zeros((budget.nodes + 1, graphs.nodes.shape[1]), dtype=np.float32)
        nodes[:node_total] = graphs.nodes[node_rows]

        # Each graph's edges come as in AlgoPerf: all bonds one way, then all bonds the other way.
        first_node = np.cumsum(n_node, dtype=np.int64) - n_node
        offset = np.repeat(first_node, n_bond)
        ends = np.stack([graphs.senders[bond_rows], graphs.receivers[bond_rows]]) + offset
        bond_first = np.cumsum(n_bond, dtype=np.int64) - n_bond
        there = np.arange(bond_total) + np.repeat(bond_first, n_bond)
        back = there + np.repeat(n_bond.astype(np.int64), n_bond)
        # Padding edges join the first padding node with itself.
        senders = np.full(budget.edges, node_total, dtype=np.int64)
        receivers = np.full(budget.edges, node_total, dtype=np.int64)
        edges = np.zeros((budget.edges, graphs.edges.shape[1]), dtype=np.float32)
        senders[there], receivers[there] = ends[0], ends[1]
        senders[back], receivers[back] = ends[1], ends[0]
        edges[there] = edges[back] = graphs.edges[bond_rows]

        sizes = np.zeros((2, budget.graphs + 1), dtype=np.int64)
        sizes[0, : len(members)], sizes[1, : len(members)] = n_node, 2 * n_bond
        sizes[0, len(members)] = budget.nodes + 1 - node_total
        sizes[1, len(members)] = budget.edges - 2 * bond_total

        labels = np.zeros((budget.graphs + 1, graphs.num_tasks), dtype=np.float32)
        weights = np.zeros((budget.graphs + 1, graphs.num_tasks), dtype=bool)
        known = graphs.labels[members]
        weights[: len(members)] = known >= 0
        labels[: len(members)] = np.maximum(known, 0)

        return {
            "inputs": jraph.GraphsTuple(
                nodes=self._tensor(nodes),
                edges=self._tensor(edges),
                senders=self._tensor(senders),
                receivers=self._tensor(receivers),
                globals={},
                n_node=self._tensor(sizes[0]),
                n_edge=self._tensor(sizes[1]),
            ),
            "targets": self._tensor(labels),
            "weights": self._tensor(weights),
        }

    def one_pass(self, members: IntArray) -> Iterator[dict[str, Any]]:
        """Batches that hold each of `members` exactly once, in order."""
        start = 0
        while start < len(members):
            count = count_that_fits(self.graphs, members, start, self.budget)
            yield self.batch(members[start : start + count])
            start += count

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(array).to(self.device)


class TrainingQueue:
    """Endless stream of training batches; the n-th batch depends on the seed and on n alone.

    The members are visited in a new random order in each epoch and batches run across the end of
    an epoch, as in AlgoPerf's shuffled and repeated data set.

    Args:
        batcher: builds the batches.
        members: numbers of the training graphs.
        seed: integers that decide the orders.
    """

    def __init__(self, batcher: GraphBatcher, members: IntArray, seed: list[int]) -> None:
        if len(members) < batcher.budget.graphs:
            raise ValueError(
                f"{len(members)} training graphs are fewer than the {batcher.budget.graphs} of "
                "one batch: use a smaller batch size"
            )
        self._batcher = batcher
        self._members = members
        self._seed = seed
        self._epoch = 0
        self._start = 0
        self._order = self._epoch_order(0)
        self.position = 0
        """Number of batches drawn so far; what a checkpoint has to remember."""

    def __iter__(self) -> "TrainingQueue":
        return self

    def __next__(self) -> dict[str, Any]:
        return self._batcher.batch(self._next_members())

    def skip_to(self, position: int) -> None:
        """Moves forward to where `position` batches have been drawn, without building them."""
        while self.position < position:
            self._next_members()

    def _epoch_order(self, epoch: int) -> IntArray:
        return np.random.default_rng([*self._seed, epoch]).permutation(self._members)

    def _next_members(self) -> IntArray:
        budget = self._batcher.budget
        if len(self._order) - self._start < budget.graphs:
            self._epoch += 1
            rest = self._order[self._start :]
            self._order = np.concatenate([rest, self._epoch_order(self._epoch)])
            self._start = 0
        count = count_that_fits(self._batcher.graphs, self._order, self._start, budget)
        members = self._order[self._start : self._start + count]
        self._start += count
        self.position += 1
        return members
