from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score

from quickstart.graphs import BatchBudget, GraphBatcher, PackedGraphs
from quickstart.metrics import mean_average_precision
from quickstart.models import GraphNetwork, ViT, sincos_positions
from quickstart.parameter_types import parameter_types
from submission.algoperf_compat import spec


def test_mean_average_precision_is_the_mean_over_tasks_of_measured_labels() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(50, 4))
    mask = rng.random((50, 4)) < 0.6
    labels = (rng.random((50, 4)) < 0.4) * mask * 1.0
    labels[:, 2] = 0  # a task without actives does not count
    expected = np.mean(
        [average_precision_score(labels[mask[:, t], t], logits[mask[:, t], t]) for t in (0, 1, 3)]
    )
    assert mean_average_precision(logits, labels, mask) == pytest.approx(expected)
    # Monotone in the logits: the sigmoid that AlgoPerf applies first changes nothing.
    assert mean_average_precision(1 / (1 + np.exp(-logits)), labels, mask) == pytest.approx(
        expected
    )
    assert np.isnan(mean_average_precision(logits, 0 * labels, mask))


def logits_of(model: GraphNetwork, graphs: PackedGraphs, members: list[int], budget: BatchBudget):
    batch = GraphBatcher(graphs, budget, torch.device("cpu")).batch(np.array(members))
    return model(batch["inputs"], dropout_rate=0.0)[: len(members)]


def test_neither_padding_nor_neighbours_change_a_graph(graphs: PackedGraphs) -> None:
    torch.manual_seed(0)
    model = GraphNetwork(3, width=16)
    together = logits_of(model, graphs, [3, 80, 9], BatchBudget(200, 400, 10))
    alone = [logits_of(model, graphs, [i], BatchBudget(60, 130, 1)) for i in (3, 80, 9)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def test_message_passing_equals_its_definition(graphs: PackedGraphs) -> None:
    torch.manual_seed(0)
    model = GraphNetwork(3, width=8, num_message_passing_steps=1)
    batcher = GraphBatcher(graphs, BatchBudget(40, 90, 2), torch.device("cpu"))
    graph = batcher.batch(np.array([4, 30]))["inputs"]
    step = model.rounds[0]
    nodes, edges = model.node_embedder(graph.nodes), model.edge_embedder(graph.edges)
    zeros = torch.zeros(3)
    edge_rows = [
        torch.cat([edges[e], nodes[graph.senders[e]], nodes[graph.receivers[e]], zeros])
        for e in range(len(edges))
    ]
    edges = step.update_edges(torch.stack(edge_rows), 0.0)
    node_rows = [
        torch.cat(
            [nodes[n], edges[graph.senders == n].sum(0), edges[graph.receivers == n].sum(0), zeros]
        )
        for n in range(len(nodes))
    ]
    nodes = step.update_nodes(torch.stack(node_rows), 0.0)
    graph_rows = [
        torch.cat([n.sum(0), e.sum(0), zeros])
        for n, e in zip(
            nodes.split(graph.n_node.tolist()), edges.split(graph.n_edge.tolist()), strict=True
        )
    ]
    expected = model.decoder(step.update_globals(torch.stack(graph_rows), 0.0))
    torch.testing.assert_close(model(graph, 0.0), expected, rtol=1e-4, atol=1e-5)


def test_dropout_only_in_training(graphs: PackedGraphs) -> None:
    model = GraphNetwork(3, width=16)
    batch = GraphBatcher(graphs, BatchBudget(40, 90, 2), torch.device("cpu")).batch(
        np.array([4, 30])
    )
    with torch.no_grad():
        assert not torch.equal(model(batch["inputs"], 0.5), model(batch["inputs"], 0.5))
        assert torch.equal(model(batch["inputs"], 0.0), model(batch["inputs"], 0.0))
        model.eval()
        assert torch.equal(model(batch["inputs"], 0.5), model(batch["inputs"], 0.0))


def test_vit_starts_at_zero_logits_and_learns() -> None:
    torch.manual_seed(0)
    model = ViT(10, channels=3, patch_size=4, width=16, depth=1, num_heads=2, mlp_width=32)
    images = torch.randn(2, 3, 16, 16)
    logits = model(images)
    assert logits.shape == (2, 10)
    assert not logits.any()
    torch.nn.functional.cross_entropy(logits, torch.tensor([1, 2])).backward()
    assert model.head.weight.grad.any()
    with pytest.raises(ValueError, match="width 18 is not a multiple"):
        ViT(10, channels=3, patch_size=4, width=18)


def test_positions_tell_all_places_apart() -> None:
    positions = sincos_positions(3, 5, 32)
    assert positions.shape == (15, 32)
    distances = torch.cdist(positions, positions) + torch.eye(15)
    assert distances.min() > 0.1


def test_parameter_types() -> None:
    kinds = spec.ParameterType
    types = parameter_types(GraphNetwork(3, width=8))
    assert types["rounds.0.update_edges.linears.0.weight"] == kinds.WEIGHT
    assert types["rounds.0.update_edges.norms.0.bias"] == kinds.LAYER_NORM_BIAS
    assert types["node_embedder.weight"] == kinds.EMBEDDING
    types = parameter_types(ViT(10, channels=1, patch_size=2, width=16, depth=1))
    assert types["patches.weight"] == kinds.CONV_WEIGHT
    assert types["blocks.0.attention.query.weight"] == kinds.ATTENTION_Q
    assert types["blocks.0.attention.out.bias"] == kinds.ATTENTION_BIAS
