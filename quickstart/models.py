"""The two model families of AlgoPerf's ogbg and imagenet_vit workloads, at a width for a laptop.

Both follow the benchmark's description: a GraphNetwork (Battaglia et al. 2018, algorithm 1, with
separate sums over sent and received edges) and a simplified ViT (Beyer et al. 2022). Dropout rates
are arguments of `forward`, since a submission chooses them at each call.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NUM_NODE_FEATURES = 9
NUM_EDGE_FEATURES = 3
LAYER_NORM_EPS = 1e-6
# Standard deviation of a unit normal that is cut off at two standard deviations.
TRUNCATED_NORMAL_STD = 0.87962566103423978


def lecun_normal_(layer: nn.Linear | nn.Conv2d) -> None:
    """Truncated normal weights of variance 1/fan_in, zero bias: AlgoPerf's default."""
    std = 1 / (math.sqrt(layer.weight[0].numel()) * TRUNCATED_NORMAL_STD)
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


class MLP(nn.Module):
    """Linear, LayerNorm, ReLU, dropout, for each hidden width.

    Args:
        in_features: width of the input.
        hidden: widths of the layers.
    """

    def __init__(self, in_features: int, hidden: tuple[int, ...]) -> None:
        super().__init__()
        widths = (in_features, *hidden)
        self.linears = nn.ModuleList(nn.Linear(a, b) for a, b in zip(widths, hidden, strict=False))
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=LAYER_NORM_EPS) for width in hidden)

    def forward(self, x: Tensor, dropout_rate: float) -> Tensor:
        """Maps (rows, in_features) to (rows, hidden[-1])."""
        for linear, norm in zip(self.linears, self.norms, strict=True):
            x = F.dropout(F.relu(norm(linear(x))), dropout_rate, training=self.training)
        return x


class MessagePassing(nn.Module):
    """One round of edge, node and global updates.

    Args:
        node_width, edge_width, global_width: widths of the incoming attributes.
        hidden: widths of the three MLPs, whose last is the width of all outgoing attributes.
    """

    def __init__(
        self, node_width: int, edge_width: int, global_width: int, hidden: tuple[int, ...]
    ) -> None:
        super().__init__()
        width = hidden[-1]
        self.update_edges = MLP(edge_width + 2 * node_width + global_width, hidden)
        self.update_nodes = MLP(node_width + 2 * width + global_width, hidden)
        self.update_globals = MLP(2 * width + global_width, hidden)

    def forward(
        self,
        nodes: Tensor,
        edges: Tensor,
        globals_: Tensor,
        indices: "GraphIndices",
        dropout_rate: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Maps (nodes, edges, globals) to updated ones; rows stay, widths become `hidden[-1]`."""
        edges = self.update_edges(
            torch.cat(
                [
                    edges,
                    _gather(nodes, indices.senders),
                    _gather(nodes, indices.receivers),
                    _gather(globals_, indices.graph_of_edge),
                ],
                dim=1,
            ),
            dropout_rate,
        )
        nodes = self.update_nodes(
            torch.cat(
                [
                    nodes,
                    _segment_sum(edges, indices.senders, len(nodes)),
                    _segment_sum(edges, indices.receivers, len(nodes)),
                    _gather(globals_, indices.graph_of_node),
                ],
                dim=1,
            ),
            dropout_rate,
        )
        globals_ = self.update_globals(
            torch.cat(
                [
                    _segment_sum(nodes, indices.graph_of_node, len(globals_)),
                    _segment_sum(edges, indices.graph_of_edge, len(globals_)),
                    globals_,
                ],
                dim=1,
            ),
            dropout_rate,
        )
        return nodes, edges, globals_


class GraphIndices:
    """Which node, and which graph, each row of a batch belongs to.

    Args:
        graph: a `jraph.GraphsTuple` of tensors.
    """

    def __init__(self, graph: Any) -> None:
        self.senders: Tensor = graph.senders
        self.receivers: Tensor = graph.receivers
        number = torch.arange(len(graph.n_node), device=graph.n_node.device)
        self.graph_of_node = number.repeat_interleave(graph.n_node, output_size=len(graph.nodes))
        self.graph_of_edge = number.repeat_interleave(graph.n_edge, output_size=len(graph.edges))


class GraphNetwork(nn.Module):
    """AlgoPerf's ogbg model: embeddings, rounds of message passing, a decoder on the globals.

    Args:
        num_outputs: number of logits per graph, also the width of the (zero) initial globals.
        width: width of the embeddings and of the hidden layers.
        num_message_passing_steps: number of rounds.
    """

    def __init__(
        self, num_outputs: int, width: int = 64, num_message_passing_steps: int = 2
    ) -> None:
        super().__init__()
        self.num_outputs = num_outputs
        self.node_embedder = nn.Linear(NUM_NODE_FEATURES, width)
        self.edge_embedder = nn.Linear(NUM_EDGE_FEATURES, width)
        self.rounds = nn.ModuleList(
            MessagePassing(width, width, num_outputs if i == 0 else width, (width,))
            for i in range(num_message_passing_steps)
        )
        self.decoder = nn.Linear(width, num_outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module)

    def forward(self, graph: Any, dropout_rate: float = 0.1) -> Tensor:
        """Logits, (graphs, num_outputs), of a `jraph.GraphsTuple` of tensors."""
        indices = GraphIndices(graph)
        nodes: Tensor = self.node_embedder(graph.nodes)
        edges: Tensor = self.edge_embedder(graph.edges)
        globals_ = nodes.new_zeros(len(graph.n_node), self.num_outputs)
        for message_passing in self.rounds:
            nodes, edges, globals_ = message_passing(nodes, edges, globals_, indices, dropout_rate)
        logits: Tensor = self.decoder(globals_)
        return logits


class SelfAttention(nn.Module):
    """Multi-head self-attention with separate query, key, value and output layers."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, dropout_rate: float) -> Tensor:
        """Maps (images, tokens, width) to the same shape."""
        heads = (*x.shape[:2], self.num_heads, -1)
        query, key, value = (
            layer(x).view(heads).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        rate = dropout_rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=rate)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class EncoderBlock(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, mlp_width: int, num_heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.attention = SelfAttention(width, num_heads)
        self.mlp_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.mlp_in = nn.Linear(width, mlp_width)
        self.mlp_out = nn.Linear(mlp_width, width)

    def forward(self, x: Tensor, dropout_rate: float) -> Tensor:
        """Maps (images, tokens, width) to the same shape."""
        y = self.attention(self.attention_norm(x), dropout_rate)
        x = x + F.dropout(y, dropout_rate, training=self.training)
        y = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        y = self.mlp_out(F.dropout(y, dropout_rate, training=self.training))
        return x + F.dropout(y, dropout_rate, training=self.training)


class ViT(nn.Module):
    """AlgoPerf's imagenet_vit model: convolutional patches, fixed positions, mean pooling.

    Args:
        num_classes: number of logits.
        channels: channels of the image.
        patch_size: side of a patch in pixels.
        width, depth, num_heads, mlp_width: size of the encoder.
    """

    def __init__(
        self,
        num_classes: int,
        channels: int,
        patch_size: int,
        width: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        mlp_width: int = 128,
    ) -> None:
        super().__init__()
        if width % 4 or width % num_heads:
            raise ValueError(f"width {width} is not a multiple of 4 and of {num_heads} heads")
        self.patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.blocks = nn.ModuleList(EncoderBlock(width, mlp_width, num_heads) for _ in range(depth))
        self.final_norm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.pre_logits = nn.Linear(width, width)
        self.head = nn.Linear(width, num_classes)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        lecun_normal_(self.patches)
        lecun_normal_(self.pre_logits)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, dropout_rate: float = 0.0) -> Tensor:
        """Logits, (images, num_classes), of (images, channels, height, width)."""
        x: Tensor = self.patches(images)
        positions = sincos_positions(x.shape[2], x.shape[3], x.shape[1], x.device)
        x = x.flatten(2).transpose(1, 2) + positions
        x = F.dropout(x, dropout_rate, training=self.training)
        for block in self.blocks:
            x = block(x, dropout_rate)
        x = self.final_norm(x).mean(dim=1)
        logits: Tensor = self.head(torch.tanh(self.pre_logits(x)))
        return logits


def sincos_positions(
    height: int, width: int, features: int, device: torch.device | None = None
) -> Tensor:
    """Two-dimensional sine and cosine position codes, (height * width, features)."""
    count = features // 4
    frequency = 10_000.0 ** -(torch.arange(count, device=device) / max(count - 1, 1))
    y = torch.arange(height, device=device).repeat_interleave(width)[:, None] * frequency
    x = torch.arange(width, device=device).repeat(height)[:, None] * frequency
    return torch.cat([x.sin(), x.cos(), y.sin(), y.cos()], dim=1)


def _gather(rows: Tensor, index: Tensor) -> Tensor:
    """The rows at `index`, with a backward pass that is fast on a CPU."""
    gathered = rows.index_select(0, index)
    if gathered.requires_grad:
        # The gradient is a slice of that of a concatenation; adding up its strided rows is slow.
        gathered.register_hook(torch.Tensor.contiguous)  # type: ignore[no-untyped-call]
    return gathered


def _segment_sum(rows: Tensor, segment: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, rows.shape[1]).index_add_(0, segment, rows)
