"""Public architectures at small size, with random weights and one batch, for `coverage`.

Their packages are in requirements/coverage.txt. Each entry is built on demand; a package that is
not installed leaves its entries out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCABULARY, WIDTH, LAYERS, HEADS, TOKENS = 512, 64, 2, 4, 12


@dataclass
class Architecture:
    """A model, and the loss of one batch.

    Attributes:
        model: with random weights.
        loss: of a fixed batch.
        sharing: how rows share weights, as `record` takes it.
    """

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]
    sharing: Any = None
    settings: dict[str, Any] = field(default_factory=dict)


ARCHITECTURES: dict[str, Callable[[], Architecture]] = {}


def _entry(name: str) -> Callable[[Callable[[], Architecture]], Callable[[], Architecture]]:
    def register(build: Callable[[], Architecture]) -> Callable[[], Architecture]:
        ARCHITECTURES[name] = build
        return build

    return register


def _tokens(count: int = 4, length: int = TOKENS) -> Tensor:
    return torch.randint(3, VOCABULARY, (count, length))


def _language(name: str, head: str, **options: Any) -> Architecture:
    """A model of transformers that computes its loss from labels."""
    library: Any = importlib.import_module("transformers")
    config = getattr(library, f"{name}Config")(**options)
    model = getattr(library, head)(config)
    ids = _tokens()
    if config.is_encoder_decoder:
        labels = _tokens()
        return Architecture(model, lambda m: m(input_ids=ids, labels=labels).loss)
    return Architecture(model, lambda m: m(input_ids=ids, labels=ids).loss)


_HF = {
    "vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "intermediate_size": 2 * WIDTH,
}  # fmt: skip
_GPT2 = {
    "vocab_size": VOCABULARY, "n_positions": 2 * TOKENS, "n_embd": WIDTH, "n_layer": LAYERS,
    "n_head": HEADS,
}  # fmt: skip


@_entry("GPT-2 (transformers)")
def _gpt2() -> Architecture:
    return _language("GPT2", "GPT2LMHeadModel", **_GPT2)


@_entry("GPT-2 with LoRA (peft)")
def _lora() -> Architecture:
    peft: Any = importlib.import_module("peft")
    plain = _gpt2()
    config = peft.LoraConfig(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)
    return Architecture(peft.get_peft_model(plain.model, config), plain.loss)


@_entry("Llama (transformers)")
def _llama() -> Architecture:
    return _language("Llama", "LlamaForCausalLM", **_HF, num_key_value_heads=2)


@_entry("Mixtral (transformers)")
def _mixtral() -> Architecture:
    return _language(
        "Mixtral", "MixtralForCausalLM", **_HF, num_key_value_heads=2, num_local_experts=4
    )


@_entry("BERT (transformers)")
def _bert() -> Architecture:
    return _language("Bert", "BertForMaskedLM", **_HF, max_position_embeddings=2 * TOKENS)


@_entry("T5 (transformers)")
def _t5() -> Architecture:
    return _language(
        "T5", "T5ForConditionalGeneration", vocab_size=VOCABULARY, d_model=WIDTH, d_kv=16,
        d_ff=2 * WIDTH, num_layers=LAYERS, num_heads=HEADS, decoder_start_token_id=0,
    )  # fmt: skip


@_entry("Mamba (transformers)")
def _mamba() -> Architecture:
    return _language(
        "Mamba", "MambaForCausalLM", vocab_size=VOCABULARY, hidden_size=WIDTH,
        num_hidden_layers=LAYERS, state_size=8,
    )  # fmt: skip


@_entry("Whisper (transformers)")
def _whisper() -> Architecture:
    library: Any = importlib.import_module("transformers")
    config = library.WhisperConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=LAYERS, decoder_layers=LAYERS,
        encoder_attention_heads=HEADS, decoder_attention_heads=HEADS, encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH, num_mel_bins=20, max_source_positions=30,
        max_target_positions=20, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        decoder_start_token_id=1,
    )  # fmt: skip
    model = library.WhisperForConditionalGeneration(config)
    sound, ids = torch.randn(4, 20, 60), _tokens()
    return Architecture(model, lambda m: m(input_features=sound, labels=ids).loss)


def _images(model: nn.Module, size: int = 32) -> Architecture:
    x, y = torch.randn(4, 3, size, size), torch.arange(4)
    return Architecture(model, lambda m: F.cross_entropy(m(x), y))


def _timm(name: str, size: int = 32, **options: Any) -> Architecture:
    timm: Any = importlib.import_module("timm")
    return _images(timm.create_model(name, pretrained=False, num_classes=10, **options), size)


_VIT = {"img_size": 32, "patch_size": 4, "embed_dim": 128, "depth": 4, "num_heads": HEADS}


@_entry("ViT (timm)")
def _vit() -> Architecture:
    return _timm("vit_tiny_patch16_224", **_VIT)


@_entry("BEiT (timm)")
def _beit() -> Architecture:
    return _timm("beit_base_patch16_224", **_VIT)


@_entry("EVA (timm)")
def _eva() -> Architecture:
    return _timm("eva02_tiny_patch14_224", **_VIT)


@_entry("Swin (timm)")
def _swin_timm() -> Architecture:
    return _timm(
        "swin_tiny_patch4_window7_224", img_size=32, patch_size=2, window_size=4, embed_dim=64,
        depths=(2, 2), num_heads=(2, 4),
    )  # fmt: skip


@_entry("ConvNeXt (timm)")
def _convnext() -> Architecture:
    return _timm("convnext_tiny", dims=(48, 96, 192, 384), depths=(1, 1, 2, 1))


@_entry("Swin (torchvision)")
def _swin_torchvision() -> Architecture:
    models: Any = importlib.import_module("torchvision.models.swin_transformer")
    return _images(models.SwinTransformer([2, 2], 64, [2, 2], [2, 4], [4, 4], num_classes=10))


@_entry("ViT (torchvision)")
def _vit_torchvision() -> Architecture:
    models: Any = importlib.import_module("torchvision.models")
    return _images(models.VisionTransformer(32, 4, 4, HEADS, 128, 256, num_classes=10))


@_entry("ResNet-18 (torchvision)")
def _resnet() -> Architecture:
    models: Any = importlib.import_module("torchvision.models")
    return _images(models.resnet18(num_classes=10))


def _graph(convolutions: Callable[[Any], list[nn.Module]]) -> Architecture:
    """Two graph convolutions of PyTorch Geometric, a mean over each graph, and a head."""
    from submission.kfac import Positions, Segments

    library: Any = importlib.import_module("torch_geometric.nn")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions = nn.ModuleList(convolutions(library))
            self.head = nn.Linear(WIDTH, 3)

        def forward(self, x: Tensor, edges: Tensor, graphs: Tensor) -> Tensor:
            for convolution in self.convolutions:
                x = convolution(x, edges).relu()
            y: Tensor = self.head(library.global_mean_pool(x, graphs))
            return y

    nodes, count = 6, 5
    ring = torch.arange(nodes)
    rings = [torch.stack([ring, (ring + 1) % nodes]) + nodes * i for i in range(count)]
    edges = torch.cat(rings, 1)
    edges = torch.cat([edges, edges.flip(0)], 1)
    graphs = torch.arange(count).repeat_interleave(nodes)
    x, y = torch.randn(nodes * count, WIDTH), torch.arange(count) % 3
    rule = {"convolutions": Segments(graphs, count), "head": Positions()}
    return Architecture(Net(), lambda m: F.cross_entropy(m(x, edges, graphs), y), rule)


@_entry("GCN (PyG)")
def _gcn() -> Architecture:
    return _graph(lambda pyg: [pyg.GCNConv(WIDTH, WIDTH) for _ in range(2)])


@_entry("GAT (PyG)")
def _gat() -> Architecture:
    return _graph(lambda pyg: [pyg.GATConv(WIDTH, WIDTH // 4, heads=4) for _ in range(2)])


@_entry("GATv2 (PyG)")
def _gatv2() -> Architecture:
    return _graph(lambda pyg: [pyg.GATv2Conv(WIDTH, WIDTH // 4, heads=4) for _ in range(2)])


@_entry("SAGE (PyG)")
def _sage() -> Architecture:
    return _graph(lambda pyg: [pyg.SAGEConv(WIDTH, WIDTH) for _ in range(2)])


@_entry("GIN (PyG)")
def _gin() -> Architecture:
    return _graph(lambda pyg: [pyg.GIN(WIDTH, WIDTH, 2)])


@_entry("GPS (PyG)")
def _gps() -> Architecture:
    def convolutions(pyg: Any) -> list[nn.Module]:
        inner = [pyg.SAGEConv(WIDTH, WIDTH) for _ in range(2)]
        return [pyg.GPSConv(WIDTH, conv, heads=HEADS) for conv in inner]

    return _graph(convolutions)
