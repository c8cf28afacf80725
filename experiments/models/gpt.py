"""A decoder in the shapes of GPT-2, as nanoGPT builds it.

Radford et al. 2019: pre-norm blocks, learned positions, one linear layer for queries, keys and
values, GELU (tanh form), output layer tied to the token embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class GPTShape:
    """Sizes of a decoder.

    Args:
        vocabulary: number of tokens.
        block_size: largest number of positions.
        layers, heads, width: blocks, attention heads, features.
    """

    vocabulary: int
    block_size: int
    layers: int
    heads: int
    width: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide a width of {self.width}")


class Block(nn.Module):
    """Causal self-attention and an MLP, each behind a LayerNorm: [N, T, width] to the same."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        width = shape.width
        self.heads = shape.heads
        self.attention_norm = nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.attention_out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Adds both branches."""
        n, t, width = x.shape
        qkv = self.query_key_value(self.attention_norm(x))
        q, k, v = qkv.view(n, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(y.transpose(1, 2).reshape(n, t, width))
        hidden = F.gelu(self.mlp_in(self.mlp_norm(x)), approximate="tanh")
        total: Tensor = x + self.mlp_out(hidden)
        return total


class GPT(nn.Module):
    """The decoder: tokens [N, T] to logits [N, T, vocabulary]."""

    def __init__(self, shape: GPTShape) -> None:
        super().__init__()
        self.tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.positions = nn.Embedding(shape.block_size, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.LayerNorm(shape.width)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        self._initialise(shape.layers)

    def _initialise(self, layers: int) -> None:
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                ends_branch = name.endswith(("attention_out", "mlp_out"))
                deviation = 0.02 / (2 * layers) ** 0.5 if ends_branch else 0.02
                nn.init.normal_(module.weight, std=deviation)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the next token at each position."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x: Tensor = self.tokens(tokens) + self.positions(positions.expand_as(tokens))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits
