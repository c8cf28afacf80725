"""What the shape of a batch says: which likelihood, how rows share weights.

Nothing here knows a workload. A batch of graphs is recognised by its fields (those of jraph's
GraphsTuple), a multi-label loss by a mask with one entry per logit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .algoperf_compat import spec
from .kfac import Bernoulli, Categorical, Gaussian, Likelihood, RaggedBatch, Segments
from .kfac.discovery import unwrap
from .kfac.operations.sharing import SharingRule
from .padding import Forward, padded_rows, paddings_in

GRAPH_FIELDS = ("nodes", "edges", "senders", "receivers", "n_node", "n_edge")


def is_graph(inputs: Any) -> bool:
    """Whether the inputs are a batch of graphs with jraph's fields."""
    return all(hasattr(inputs, name) for name in GRAPH_FIELDS)


def logits_of(output: Any) -> Tensor:
    """The logits of a model's output: a tensor, or the first of a pair of logits and paddings.

    Raises:
        TypeError: it is neither.
    """
    logits = output[0] if paddings_in(output) is not None else output
    if not isinstance(logits, Tensor):
        raise TypeError(
            f"the model returned {type(output).__name__}; K-FAC needs a tensor of logits, or a "
            "pair of logits [N, T, classes] and paddings [N, T] that are 0 or 1"
        )
    return logits


def likelihood_of(
    loss_type: Any, logits: Tensor, batch: Mapping[str, Any], label_smoothing: float = 0.0
) -> Likelihood:
    """The likelihood behind the loss, from its type and the shapes of logits, targets and mask.

    A mask with an entry per logit beside targets of the same shape means independent labels:
    AlgoPerf's ogbg calls its loss softmax cross-entropy, but it is a masked sigmoid one.

    Raises:
        ValueError: unknown loss type.
    """
    targets, mask = batch.get("targets"), batch.get("weights")
    kind = spec.LossType
    per_logit = (
        isinstance(targets, Tensor)
        and isinstance(mask, Tensor)
        and logits.dim() > 1
        and targets.shape == mask.shape == logits.shape
    )
    if loss_type == kind.SIGMOID_CROSS_ENTROPY or (
        loss_type == kind.SOFTMAX_CROSS_ENTROPY and per_logit
    ):
        return Bernoulli(label_smoothing=label_smoothing)
    if loss_type == kind.SOFTMAX_CROSS_ENTROPY:
        return Categorical(label_smoothing=label_smoothing)
    if loss_type == kind.MEAN_SQUARED_ERROR:
        return Gaussian()
    if loss_type == kind.MEAN_ABSOLUTE_ERROR:
        # |f - y| has no useful second derivative; the Fisher of a Gaussian of unit variance
        # stands in for it: the same gradients' scale, a constant curvature.
        return Gaussian(variance=1.0)
    if loss_type == kind.CTC_LOSS:
        # The Fisher of the frames' labels, of which the transcript is a function: an upper bound
        # of the transcript's own, as in natural-gradient EM.
        return Categorical()
    raise ValueError(f"no likelihood is known for the loss type {loss_type}")


def mask_of(output: Any, batch: Mapping[str, Any]) -> Tensor | None:
    """The mask of the loss terms, or None where all of them count.

    It is the batch's own; where that has none, frames that the model's output marks as padding do
    not count. A mask with as many entries as there are logits gets their shape.
    """
    logits, mask = logits_of(output), batch.get("weights")
    if not isinstance(mask, Tensor):
        paddings = paddings_in(output)
        return None if paddings is None else paddings == 0
    if isinstance(output, Tensor) or mask.dim() != 1:
        return mask.reshape(logits.shape) if mask.numel() == logits.numel() else mask
    paddings = paddings_in(output)
    return mask if paddings is None else (paddings == 0) * mask.unsqueeze(-1)


def targets_of(logits: Tensor, batch: Mapping[str, Any]) -> Tensor | None:
    """The labels, in the logits' shape if they are as many; None where there is none per term.

    Transcripts come as a pair with their paddings and belong to no frame.
    """
    targets = batch.get("targets")
    if not isinstance(targets, Tensor):
        return None
    return targets.reshape(logits.shape) if targets.numel() == logits.numel() else targets


def weights_of(batch: Mapping[str, Any]) -> Tensor | None:
    """Which examples count, [N]; None where all of them do."""
    weights = batch.get("weights")
    return weights if isinstance(weights, Tensor) and weights.dim() == 1 else None


def has_labels(loss_type: Any) -> bool:
    """Whether every term of the likelihood has a label. Of a transcript no frame has one: true
    labels mean the loss's own gradients then, with a term for each example."""
    return bool(loss_type != spec.LossType.CTC_LOSS)


def is_sum_of_terms(loss_type: Any) -> bool:
    """Whether an example's loss is the sum of its terms; of regression losses it is their mean."""
    kind = spec.LossType
    return loss_type not in (kind.MEAN_SQUARED_ERROR, kind.MEAN_ABSOLUTE_ERROR)


def sharing_of(model: nn.Module, batch: Mapping[str, Any], known: dict[str, str]) -> SharingRule:
    """How rows share weights: ragged nodes, edges and graphs for graph batches.

    Args:
        model: asked, with a graph made unambiguous, which layer works on which rows, should the
            batch's numbers of nodes, edges and graphs not tell.
        known: layer name -> kind of rows, kept by the caller over batches.
    """
    graph = batch["inputs"]
    if not is_graph(graph):
        return None
    valid = valid_graphs(graph.n_node, batch.get("weights"))
    graphs = int(graph.n_node.shape[0])
    everyone = torch.arange(graphs, device=graph.n_node.device)
    kinds = {
        "nodes": Segments.from_sizes(graph.n_node, graph.nodes.shape[0], valid),
        "edges": Segments.from_sizes(graph.n_edge, graph.edges.shape[0], valid),
        "graphs": Segments(everyone, graphs, valid),
    }
    return RaggedBatch(kinds, known, lambda: kinds_by_probe(model, graph))


@contextmanager
def shared_rows(
    model: nn.Module, batch: Mapping[str, Any], known: dict[str, str], forward: Forward
) -> Iterator[SharingRule]:
    """How rows share weights in the forward pass inside: those of graphs, or padded sequences.

    Arguments as in `padding.padded_rows`.
    """
    if is_graph(batch["inputs"]):
        yield sharing_of(model, batch, known)
        return
    with padded_rows(model, batch, known, forward) as rule:
        yield rule


def valid_graphs(n_node: Tensor, weights: Tensor | None) -> Tensor:
    """False for padding graphs: jraph puts all padding nodes into one graph behind the real ones,
    and empty graphs behind that. [graphs].

    A last graph that has labels is a real one: then the batch was not padded.
    """
    index = torch.arange(n_node.shape[0], device=n_node.device)
    last = torch.where(n_node > 0, index, -1).max()
    valid = index < last
    if weights is not None and weights.shape[:1] == n_node.shape:
        valid = valid | (weights.reshape(n_node.shape[0], -1) > 0).any(1)
    return valid


def kinds_by_probe(model: nn.Module, graph: Any) -> dict[str, str]:
    """Layer name -> "nodes", "edges" or "graphs", from a forward pass on a probe graph.

    The probe is the batch with so many empty graphs, isolated nodes and self-loops of a padding
    node added that the three totals differ from each other.
    """
    nodes, edges, graphs = graph.nodes.shape[0], graph.edges.shape[0], graph.n_node.shape[0]
    size = max(nodes, edges, graphs)
    probe = _grown(graph, nodes=size + 1, edges=size + 2, graphs=size + 3)
    totals = {size + 1: "nodes", size + 2: "edges", size + 3: "graphs"}
    kinds: dict[str, str] = {}
    handles = []
    inner = unwrap(model)
    for name, module in inner.named_modules():
        if not module._parameters:
            continue

        def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
            if args and isinstance(args[0], Tensor) and args[0].shape[0] in totals:
                kinds[name] = totals[args[0].shape[0]]

        handles.append(module.register_forward_pre_hook(hook))
    training = inner.training
    devices = [graph.nodes.device] if graph.nodes.is_cuda else []
    try:
        inner.eval()
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            inner(probe)
    finally:
        inner.train(training)
        for handle in handles:
            handle.remove()
    return kinds


def _grown(graph: Any, *, nodes: int, edges: int, graphs: int) -> Any:
    """The graph batch with padding up to the given totals, all in one last graph."""
    more_nodes, more_edges = nodes - graph.nodes.shape[0], edges - graph.edges.shape[0]
    more_graphs = graphs - graph.n_node.shape[0]
    sizes = graph.n_node.new_zeros(more_graphs)
    sizes[0] = more_nodes
    edge_sizes = graph.n_edge.new_zeros(more_graphs)
    edge_sizes[0] = more_edges
    ends = graph.senders.new_full((more_edges,), graph.nodes.shape[0])
    return graph._replace(
        nodes=_pad_rows(graph.nodes, more_nodes),
        edges=_pad_rows(graph.edges, more_edges),
        senders=torch.cat([graph.senders, ends]),
        receivers=torch.cat([graph.receivers, ends]),
        n_node=torch.cat([graph.n_node, sizes]),
        n_edge=torch.cat([graph.n_edge, edge_sizes]),
        globals=_pad_rows(graph.globals, more_graphs)
        if isinstance(graph.globals, Tensor)
        else graph.globals,
    )


def _pad_rows(rows: Tensor, more: int) -> Tensor:
    return torch.cat([rows, rows.new_zeros(more, *rows.shape[1:])])
