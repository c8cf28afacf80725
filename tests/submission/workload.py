"""A workload on synthetic graphs or vectors, with AlgoPerf's interface as a submission sees it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from submission.algoperf_compat import spec


class Graphs(NamedTuple):
    """The fields of jraph's GraphsTuple."""

    nodes: object
    edges: object
    receivers: object
    senders: object
    globals: object
    n_node: object
    n_edge: object


class GraphNet(nn.Module):
    """One round of message passing: edges, nodes, graphs, each with a linear layer."""

    def __init__(self):
        super().__init__()
        self.edge_layer = nn.Linear(3 + 2 * 4, 6)
        self.node_layer = nn.Linear(4 + 6, 6)
        self.graph_layer = nn.Linear(6, 5)

    def forward(self, graph, dropout_rate=0.1):
        ends = torch.cat([graph.nodes[graph.senders], graph.nodes[graph.receivers]], 1)
        edges = F.relu(self.edge_layer(torch.cat([graph.edges, ends], 1)))
        inbox = edges.new_zeros(len(graph.nodes), 6).index_add_(0, graph.receivers, edges)
        nodes = F.relu(self.node_layer(torch.cat([graph.nodes, inbox], 1)))
        owner = torch.repeat_interleave(torch.arange(len(graph.n_node)), graph.n_node)
        pooled = nodes.new_zeros(len(graph.n_node), 6).index_add_(0, owner, nodes)
        return self.graph_layer(F.dropout(pooled, dropout_rate, self.training))


def graph_batch(n_node, n_edge, seed, padded=True):
    """Random graphs; the last one is padding, full of large numbers."""
    generator = torch.Generator().manual_seed(seed)
    nodes = torch.randn(sum(n_node), 4, generator=generator)
    edges = torch.randn(sum(n_edge), 3, generator=generator)
    starts = torch.cumsum(torch.tensor([0, *n_node[:-1]]), 0)
    owner = torch.repeat_interleave(torch.arange(len(n_edge)), torch.tensor(n_edge))
    sizes = torch.tensor(n_node)[owner].clamp(min=1)
    ends = [
        starts[owner] + torch.randint(1000, (sum(n_edge),), generator=generator) % sizes
        for _ in range(2)
    ]
    targets = (torch.rand(len(n_node), 5, generator=generator) > 0.5).float()
    weights = torch.rand(len(n_node), 5, generator=generator) > 0.3
    if padded:
        nodes[sum(n_node[:-1]) :] = 1e3
        weights[-1] = False
    graph = Graphs(nodes, edges, ends[0], ends[1], None, torch.tensor(n_node), torch.tensor(n_edge))
    return {"inputs": graph, "targets": targets, "weights": weights}


class GraphWorkload:
    """Masked multi-label loss on graphs, called softmax cross-entropy as in AlgoPerf's ogbg."""

    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY
    step_hint = 100
    metrics_logger = None

    def model_fn(
        self,
        params,
        augmented_and_preprocessed_input_batch,
        model_state,
        mode,
        rng,
        update_batch_norm,
        dropout_rate=0.1,
    ):
        assert mode == spec.ForwardPassMode.TRAIN
        return params(augmented_and_preprocessed_input_batch["inputs"], dropout_rate), None

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        labels = (1 - label_smoothing) * label_batch + 0.5 * label_smoothing
        losses = F.binary_cross_entropy_with_logits(logits_batch, labels, reduction="none")
        losses = torch.where(mask_batch, losses, 0)
        return {"summed": losses.sum(), "n_valid_examples": mask_batch.sum(), "per_example": losses}

    def has_reached_validation_target(self, result):
        return result["validation/metric"] > 0.5

    def has_reached_test_target(self, result):
        return result["test/metric"] > 0.5


class Squares(GraphWorkload):
    """Squared errors of vectors."""

    loss_type = spec.LossType.MEAN_SQUARED_ERROR

    def model_fn(self, params, augmented_and_preprocessed_input_batch, *args, **kwargs):
        return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        losses = (logits_batch - label_batch).square().sum(-1)
        return {"summed": losses.sum(), "n_valid_examples": len(losses), "per_example": losses}
