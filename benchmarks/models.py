"""The networks that are measured, with random weights and random data.

| name | network |
|---|---|
| `wrn` | Wide ResNet 16-4 (Zagoruyko & Komodakis 2016) with BatchNorm, 32×32 images, 10 classes |
| `vit` | AlgoPerf's ViT at size S/16: 12 blocks, 384 wide, 6 heads, 224×224 images, 1000 classes |
| `gpt` | nanoGPT: 6 blocks, 384 wide, 6 heads, 256 tokens, a head of 512 classes at every token |
| `graph` | AlgoPerf's ogbg network: 5 rounds of message passing, 256 wide, 128 labels |

`size="tiny"` keeps the structure and shrinks everything: for tests.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.graphs import random_graphs
from quickstart.models import GraphNetwork, ViT, lecun_normal_
from submission.batch_structure import sharing_of
from submission.kfac.operations.sharing import SharingRule

SIZES = ("full", "tiny")


@dataclass(frozen=True)
class Case:
    """A network and a batch to train it on.

    Attributes:
        name: a key of `TITLES`.
        batch_size: number of examples.
        likelihood: "categorical" or "bernoulli".
        targets: labels, [examples] or [examples, tokens]; [graphs, labels] for "bernoulli".
        weights: which labels count, or None.
        update_rule: of AlgoPerf's reference for this kind of network, a key of UPDATE_RULES.
        factors_only: measured without inverses and update, since the network has layers that are
            seldom preconditioned.
    """

    name: str
    batch_size: int
    model: nn.Module
    inputs: Any
    targets: Tensor
    likelihood: str = "categorical"
    weights: Tensor | None = None
    update_rule: str = "nesterov"
    factors_only: bool = False

    @property
    def terms_per_example(self) -> int:
        """Number of loss terms of one example (tokens)."""
        return self.targets[0].numel() if self.likelihood == "categorical" else 1

    def loss(self, logits: Tensor) -> Tensor:
        """The mean over all terms."""
        if self.likelihood == "bernoulli":
            assert self.weights is not None
            each = F.binary_cross_entropy_with_logits(logits, self.targets, reduction="none")
            return torch.where(self.weights, each, 0).sum() / self.weights.sum()
        return F.cross_entropy(logits.flatten(0, -2), self.targets.flatten())

    def sharing(self) -> SharingRule:
        """How rows share weights, as a submission finds out at each step."""
        batch = {"inputs": self.inputs, "weights": self.weights}
        return sharing_of(self.model, batch, {})


class _WideBlock(nn.Module):
    """Pre-activation block: BatchNorm, ReLU, 3×3 convolution, twice, and a shortcut."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        same = channels_in == channels and stride == 1
        self.shortcut = None if same else nn.Conv2d(channels_in, channels, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        shortcut = x if self.shortcut is None else self.shortcut(y)
        y = self.conv2(F.relu(self.norm2(self.conv1(y))))
        total: Tensor = y + shortcut
        return total


class WideResNet(nn.Module):
    """Wide ResNet for small images.

    Args:
        depth: 6 n + 4 layers.
        widen: factor on the 16, 32 and 64 channels of the three groups.
        classes: number of logits.
    """

    def __init__(self, depth: int = 16, widen: int = 4, classes: int = 10) -> None:
        super().__init__()
        blocks_per_group = (depth - 4) // 6
        widths = [16 * widen, 32 * widen, 64 * widen]
        self.stem = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        blocks: list[nn.Module] = []
        channels = 16
        for group, width in enumerate(widths):
            for block in range(blocks_per_group):
                stride = 2 if group > 0 and block == 0 else 1
                blocks.append(_WideBlock(channels, width, stride))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits, [images, classes]."""
        x = F.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


class _GPTBlock(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.projection = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp_in = nn.Linear(width, 4 * width)
        self.mlp_out = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = (*x.shape[:2], self.heads, -1)
        q, k, v = (
            part.view(heads).transpose(1, 2)
            for part in self.attention(self.norm1(x)).chunk(3, dim=-1)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.projection(y.transpose(1, 2).flatten(2))
        hidden: Tensor = x + self.mlp_out(F.gelu(self.mlp_in(self.norm2(x))))
        return hidden


class GPT(nn.Module):
    """nanoGPT (Karpathy 2022), with a head of its own for the classes.

    Args:
        classes: size of the vocabulary, and of the head.
        tokens: length of a sequence.
        width, depth, heads: size of the network.
    """

    def __init__(
        self,
        classes: int = 512,
        tokens: int = 256,
        width: int = 384,
        depth: int = 6,
        heads: int = 6,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(classes, width)
        self.positions = nn.Embedding(tokens, width)
        self.blocks = nn.Sequential(*(_GPTBlock(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits, [sequences, tokens, classes]."""
        where = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        x = self.blocks(self.tokens(tokens) + self.positions(where))
        logits: Tensor = self.head(self.norm(x))
        return logits


def _wrn(batch_size: int, tiny: bool) -> Case:
    model = WideResNet(depth=10, widen=1) if tiny else WideResNet()
    side = 8 if tiny else 32
    images, labels = torch.randn(batch_size, 3, side, side), torch.randint(10, (batch_size,))
    return Case("wrn", batch_size, model, images, labels)


def _vit(batch_size: int, tiny: bool) -> Case:
    if tiny:
        model = ViT(10, 3, 4, width=16, depth=1, num_heads=2, mlp_width=32)
    else:
        model = ViT(1000, 3, 16, width=384, depth=12, num_heads=6, mlp_width=1536)
    # A head of zeros, as at the start of training, would make all other layers' curvature zero.
    lecun_normal_(model.head)
    side = 8 if tiny else 224
    images = torch.randn(batch_size, 3, side, side)
    labels = torch.randint(model.head.out_features, (batch_size,))
    return Case("vit", batch_size, model, images, labels, update_rule="nadamw")


def _gpt(batch_size: int, tiny: bool) -> Case:
    classes, tokens = (16, 8) if tiny else (512, 256)
    model = GPT(classes, tokens, width=16, depth=1, heads=2) if tiny else GPT(classes, tokens)
    text = torch.randint(classes, (batch_size, tokens + 1))
    inputs, targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
    return Case("gpt", batch_size, model, inputs, targets, update_rule="nadamw", factors_only=True)


def _graph(batch_size: int, tiny: bool) -> Case:
    labels = 4 if tiny else 128
    model = GraphNetwork(labels, 8, 1) if tiny else GraphNetwork(labels, 256, 5)
    graphs, targets, weights = random_graphs(batch_size, labels)
    return Case("graph", batch_size, model, graphs, targets, "bernoulli", weights)


_BUILDERS: dict[str, Callable[[int, bool], Case]] = {
    "wrn": _wrn,
    "vit": _vit,
    "gpt": _gpt,
    "graph": _graph,
}
TITLES = {
    "wrn": "Wide ResNet 16-4 with BatchNorm, 32x32",
    "vit": "ViT-S/16, 224x224",
    "gpt": "nanoGPT, 6 x 384, 256 tokens, 512 classes",
    "graph": "GraphNetwork, 5 rounds x 256, 128 labels",
}
BATCH_SIZES = {"wrn": (32, 128), "vit": (4,), "gpt": (4,), "graph": (128,)}


def make_case(name: str, batch_size: int, device: torch.device, size: str = "full") -> Case:
    """A network in training mode and a batch, the same ones at every call.

    Raises:
        ValueError: unknown network or size.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown model '{name}'; known are {', '.join(_BUILDERS)}")
    if size not in SIZES:
        raise ValueError(f"size must be one of {', '.join(SIZES)}, not '{size}'")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        case = _BUILDERS[name](batch_size, size == "tiny")
    case.model.train().to(device)
    moved = {
        "inputs": _to(case.inputs, device),
        "targets": case.targets.to(device),
        "weights": None if case.weights is None else case.weights.to(device),
    }
    return Case(**{**case.__dict__, **moved})


def _to(inputs: Any, device: torch.device) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    moved = (part.to(device) if isinstance(part, Tensor) else part for part in inputs)
    return type(inputs)(*moved)
