from __future__ import annotations

from collections.abc import Iterator

import jraph
import numpy as np
import pytest
import torch

from quickstart.graphs import BatchBudget, GraphBatcher, PackedGraphs, TrainingQueue

CPU = torch.device("cpu")


def as_jraph(graphs: PackedGraphs, index: int) -> jraph.GraphsTuple:
    """One graph as AlgoPerf's pipeline builds it: bonds one way, then the other way."""
    node = int(graphs.n_node[:index].sum())
    bond = int(graphs.n_bond[:index].sum())
    nodes = slice(node, node + int(graphs.n_node[index]))
    bonds = slice(bond, bond + int(graphs.n_bond[index]))
    senders, receivers = graphs.senders[bonds].astype(int), graphs.receivers[bonds].astype(int)
    labels = graphs.labels[index].astype(np.float32)
    labels[labels < 0] = np.nan
    return jraph.GraphsTuple(
        n_node=graphs.n_node[index : index + 1],
        n_edge=2 * graphs.n_bond[index : index + 1],
        nodes=graphs.nodes[nodes].astype(np.float32),
        edges=np.concatenate([graphs.edges[bonds]] * 2).astype(np.float32),
        senders=np.concatenate([senders, receivers]),
        receivers=np.concatenate([receivers, senders]),
        globals=labels[None],
    )


def reference_batches(
    graphs: PackedGraphs, order: np.ndarray, budget: BatchBudget
) -> Iterator[jraph.GraphsTuple]:
    return jraph.dynamically_batch(
        (as_jraph(graphs, int(i)) for i in order),
        budget.nodes + 1,
        budget.edges,
        budget.graphs + 1,
    )


@pytest.mark.parametrize("batch_size", [3, 16])
def test_batches_equal_those_of_jraph(graphs: PackedGraphs, batch_size: int) -> None:
    budget = BatchBudget.from_averages(graphs, batch_size)
    order = np.random.default_rng(1).permutation(len(graphs))
    ours = list(GraphBatcher(graphs, budget, CPU).one_pass(order))
    theirs = list(reference_batches(graphs, order, budget))
    assert len(ours) == len(theirs) > 5
    sizes = {int((batch["inputs"].n_node[:-1] > 0).sum()) for batch in ours}
    assert len(sizes) > 1  # the node and edge budgets bind, not only the number of graphs
    for batch, expected in zip(ours, theirs, strict=True):
        for name in ("nodes", "edges", "senders", "receivers", "n_node", "n_edge"):
            found = getattr(batch["inputs"], name).numpy()
            np.testing.assert_array_equal(found, getattr(expected, name), err_msg=name)
        real = jraph.get_graph_padding_mask(expected)
        weights = ~np.isnan(expected.globals) & np.asarray(real)[:, None]
        np.testing.assert_array_equal(batch["weights"].numpy(), weights)
        np.testing.assert_array_equal(batch["targets"].numpy(), np.nan_to_num(expected.globals))
        assert batch["weights"].dtype == torch.bool


def test_padding_lies_behind_the_graphs_and_carries_no_weight(graphs: PackedGraphs) -> None:
    budget = BatchBudget(nodes=100, edges=220, graphs=8)
    batch = GraphBatcher(graphs, budget, CPU).batch(np.array([5, 0, 9]))
    graph = batch["inputs"]
    assert graph.n_node.tolist()[:3] == graphs.n_node[[5, 0, 9]].tolist()
    assert graph.n_node.sum() == len(graph.nodes) == 101
    assert graph.n_edge.sum() == len(graph.edges) == 220
    assert graph.n_node.tolist()[4:] == [0] * 5
    used = int(graph.n_node[:3].sum())
    assert not graph.nodes[used:].any()
    assert (graph.senders[int(graph.n_edge[:3].sum()) :] == used).all()
    assert not batch["weights"][3:].any()


def test_a_graph_over_the_budget_is_named(graphs: PackedGraphs) -> None:
    batcher = GraphBatcher(graphs, BatchBudget(nodes=2, edges=4, graphs=4), CPU)
    with pytest.raises(ValueError, match=r"graph 159 has \d+ nodes .* larger batch size"):
        next(batcher.one_pass(np.array([159])))


def members_of(queue: TrainingQueue, batches: int) -> list[list[int]]:
    return [queue._next_members().tolist() for _ in range(batches)]


def make_queue(graphs: PackedGraphs, seed: int) -> TrainingQueue:
    batcher = GraphBatcher(graphs, BatchBudget.from_averages(graphs, 16), CPU)
    return TrainingQueue(batcher, np.arange(100), [seed, 7])


def test_every_epoch_holds_every_graph_once(graphs: PackedGraphs) -> None:
    stream = [i for members in members_of(make_queue(graphs, 0), 40) for i in members]
    for epoch in range(4):
        assert sorted(stream[100 * epoch : 100 * (epoch + 1)]) == list(range(100))
    assert stream[:100] != stream[100:200]


def test_order_depends_on_the_seed_alone(graphs: PackedGraphs) -> None:
    first, again, other = (members_of(make_queue(graphs, seed), 9) for seed in (0, 0, 1))
    assert first == again
    assert first != other


@pytest.mark.parametrize("position", [0, 1, 6, 7, 8, 25])
def test_skipping_equals_drawing(graphs: PackedGraphs, position: int) -> None:
    drawn, skipped = make_queue(graphs, 0), make_queue(graphs, 0)
    for _ in range(position):
        next(drawn)
    skipped.skip_to(position)
    assert drawn.position == skipped.position == position
    assert members_of(drawn, 5) == members_of(skipped, 5)


def test_too_few_graphs_for_a_batch(graphs: PackedGraphs) -> None:
    batcher = GraphBatcher(graphs, BatchBudget.from_averages(graphs, 128), CPU)
    with pytest.raises(ValueError, match="100 training graphs are fewer than the 128"):
        TrainingQueue(batcher, np.arange(100), [0])
