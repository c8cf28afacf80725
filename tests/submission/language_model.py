"""A double of AlgoPerf's language-model workload of 2026: its structure at small size.

Written after its public source: RMS norms, rotary positions, keys and queries of unit length with a
learned scale, a gated feed-forward part, an output that may be tied to the embedding, bfloat16
autocast around model and loss, 32-bit token numbers, weights of tokens or None.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from submission.algoperf_compat import spec


@dataclass(frozen=True)
class Shape:
    """Of the net, and how its projections are written."""

    vocabulary: int = 50
    width: int = 16
    layers: int = 2
    heads: int = 2
    tied: bool = True
    fused: bool = True


class Attention(nn.Module):
    def __init__(self, shape):
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

    def forward(self, x, angles):
        if self.fused:
            parts = self.projection(x).chunk(3, -1)
        else:
            parts = self.query(x), self.key(x), self.value(x)
        query, key, value = (p.unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in parts)
        query, key = (self.rotated(t, angles) for t in (query, key))
        query = query / query.norm(dim=-1, keepdim=True) * self.scale
        key = key / key.norm(dim=-1, keepdim=True)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        return self.out(mixed.transpose(1, 2).flatten(2))

    @staticmethod
    def rotated(x, angles):
        first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
        sine, cosine = angles.sin(), angles.cos()
        turned = (first * cosine - second * sine, second * cosine + first * sine)
        return torch.stack(turned, -1).flatten(-2).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.attention_norm, self.norm = (nn.RMSNorm(shape.width, eps=1e-6) for _ in range(2))
        self.attention = Attention(shape)
        self.gated = nn.Linear(shape.width, 8 * shape.width, bias=False)
        self.down = nn.Linear(4 * shape.width, shape.width, bias=False)

    def forward(self, x, angles):
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.down(F.glu(self.gated(self.norm(x)), -1))


class LanguageModel(nn.Module):
    def __init__(self, shape):
        super().__init__()
        self.embedding = nn.Embedding(shape.vocabulary, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm = nn.RMSNorm(shape.width, eps=1e-6)
        self.head = nn.Linear(shape.width, shape.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        if shape.tied:
            self.head.weight = self.embedding.weight
        self.rates = 10_000.0 ** -torch.linspace(0, 1, shape.width // shape.heads // 2)

    def forward(self, tokens):
        angles = torch.outer(torch.arange(tokens.shape[1]), self.rates)
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, angles)
        return self.head(self.norm(x))


class LanguageWorkload:
    """AlgoPerf's interface as a submission sees it."""

    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY
    step_hint = 72_000
    max_allowed_runtime_sec = 31_967
    metrics_logger = None

    def model_fn(self, params, augmented_and_preprocessed_input_batch, mode, **_):
        training = mode == spec.ForwardPassMode.TRAIN
        params.train(training)
        with torch.set_grad_enabled(training), torch.autocast("cpu", torch.bfloat16):
            return params(augmented_and_preprocessed_input_batch["inputs"]), None

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        with torch.autocast("cpu", torch.bfloat16):
            losses = F.cross_entropy(
                logits_batch.flatten(0, -2), label_batch.flatten(), reduction="none",
                label_smoothing=label_smoothing,
            ).view_as(label_batch)  # fmt: skip
            if mask_batch is not None:
                losses = losses * mask_batch
        valid = losses.new_tensor(losses.numel()) if mask_batch is None else mask_batch.sum()
        return {"summed": losses.sum(), "n_valid_examples": valid, "per_example": losses}


def token_batch(shape, seed, weighted, examples=8, length=12):
    """Sequences that count upwards from a random token, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    first = torch.randint(shape.vocabulary, (examples, 1), generator=generator)
    tokens = (first + torch.arange(length + 1)) % min(shape.vocabulary, 50)
    weights = (torch.rand(examples, length, generator=generator) > 0.3).float()
    return {
        "inputs": tokens[:, :-1].to(torch.int32),
        "targets": tokens[:, 1:],
        "weights": weights if weighted else None,
    }
