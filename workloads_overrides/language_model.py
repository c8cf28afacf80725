"""A double of AlgoPerf's language-model workload of 2026 (`finewebedu_lm`), of any size.

The tested commit of AlgoPerf does not have that workload. Written after its public source: RMS
norms, rotary positions, keys and queries of unit length with a learned scale (multiplied in place),
a gated feed-forward part, an output that may be tied to the embedding, bfloat16 autocast around
model and loss, 32-bit token numbers, weights of tokens or None. `FULL_SIZE` has its sizes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from submission.algoperf_compat import spec

NORM_EPSILON = 1e-6
COUNTED = 50  # tokens that `token_batch` uses


@dataclass(frozen=True)
class Shape:
    """Of the net, and how its projections are written."""

    vocabulary: int = 50
    width: int = 16
    layers: int = 2
    heads: int = 2
    tied: bool = True
    fused: bool = True


FULL_SIZE = Shape(vocabulary=50_257, width=1024, layers=12, heads=8)
FULL_LENGTH = 1024  # tokens of a sequence


class Attention(nn.Module):
    """Causal attention with rotary positions and normalised keys and queries."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width, self.heads, self.fused = shape.width, shape.heads, shape.fused
        if shape.fused:
            self.projection = nn.Linear(width, 3 * width, bias=False)
        else:
            self.query, self.key, self.value = (
                nn.Linear(width, width, bias=False) for _ in range(3)
            )
        self.out = nn.Linear(width, width, bias=False)
        self.scale = nn.Parameter(torch.tensor(5.0))

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """[batch, length, width] -> the same shape."""
        if self.fused:
            parts = self.projection(x).chunk(3, -1)
        else:
            parts = self.query(x), self.key(x), self.value(x)
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        query, key = (rotated(t, angles) for t in (query, key))
        query, key = (t / t.norm(dim=-1, keepdim=True) + NORM_EPSILON for t in (query, key))
        query *= self.scale
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        projected: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return projected


def rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions: pairs of entries of [batch, heads, length, d] turned by [length, d / 2]."""
    first, second = x[..., ::2].float(), x[..., 1::2].float()
    sine, cosine = angles.sin(), angles.cos()
    turned = (first * cosine - second * sine, second * cosine + first * sine)
    return torch.stack(turned, -1).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Attention, then a gated feed-forward part, each after a norm and beside a skip."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.width
        self.attention_norm, self.norm = (nn.RMSNorm(width, eps=NORM_EPSILON) for _ in range(2))
        self.attention = Attention(shape)
        self.gated = nn.Linear(width, 8 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        """[batch, length, width] -> the same shape."""
        x = x + self.attention(self.attention_norm(x), angles)
        fed: Tensor = self.down(F.glu(self.gated(self.norm(x)), -1))
        return x + fed


class LanguageModel(nn.Module):
    """Tokens [batch, length] -> logits [batch, length, vocabulary]."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=NORM_EPSILON)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if shape.tied:
            self.head.weight = self.embedding.weight
        self.rates = 10_000.0 ** -torch.linspace(0, 1, shape.width // shape.heads // 2)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of the token that follows each one."""
        angles = torch.outer(torch.arange(tokens.shape[1]), self.rates)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles)
        logits: Tensor = self.head(self.norm(x))
        return logits


class LanguageWorkload:
    """AlgoPerf's interface as a submission sees it."""

    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY
    step_hint = 72_000
    max_allowed_runtime_sec = 31_967
    metrics_logger = None

    def model_fn(
        self, params: nn.Module, augmented_and_preprocessed_input_batch: Any, mode: Any, **_: Any
    ) -> tuple[Tensor, None]:
        """(logits, no state)."""
        training = mode == spec.ForwardPassMode.TRAIN
        params.train(training)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        """The summed loss, the sum of the tokens' weights, each token's loss."""
        with torch.autocast("cpu", torch.bfloat16):
            losses = F.cross_entropy(
                logits_batch.flatten(0, -2), label_batch.flatten(), reduction="none",
                label_smoothing=label_smoothing,
            ).view_as(label_batch)  # fmt: skip
            if mask_batch is not None:
                losses = losses * mask_batch
        valid = losses.new_tensor(losses.numel()) if mask_batch is None else mask_batch.sum()
        return {"summed": losses.sum(), "n_valid_examples": valid, "per_example": losses}


def token_batch(
    shape: Shape, seed: int, weighted: bool, examples: int = 8, length: int = 12
) -> dict[str, Any]:
    """Sequences that count upwards from a random token, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(shape.vocabulary, (examples, 1), generator=generator)
    tokens = (first + torch.arange(length + 1)) % min(shape.vocabulary, COUNTED)
    weights = (torch.rand(examples, length, generator=generator) > 0.3).float()
    return {
        "inputs": tokens[:, :-1].to(torch.int32),
        "targets": tokens[:, 1:],
        "weights": weights if weighted else None,
    }
