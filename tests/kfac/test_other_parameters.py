"""Normalisation layers and parameters outside layers: their blocks against the exact GGN."""

import pytest
import torch
import torch.nn.functional as F
from ggn import exact_ggn
from nets import Mean, SpatialMean
from torch import nn

from submission.kfac import Categorical, curvature


def check_unitwise(model, layer, x, class_dim=-1):
    """2×2 blocks of (scale, shift) per unit, cut out of the exact GGN."""
    module = model.get_submodule(layer)
    names = [f"{layer}.weight"] + ([f"{layer}.bias"] if module.bias is not None else [])
    labels = torch.zeros(Categorical(class_dim=class_dim).term_shape(model(x)), dtype=int)
    truth = exact_ggn(model, names, (x,), lambda f: F.cross_entropy(f, labels))
    units = module.weight.numel()
    index = torch.arange(units * len(names)).reshape(len(names), units).T
    blocks = curvature(
        model,
        x,
        likelihood=Categorical(class_dim=class_dim),
        kfac_approx="reduce",
        fisher_type="type-2",
    )[layer].blocks
    expected = torch.stack([truth[i][:, i] for i in index])
    torch.testing.assert_close(blocks, expected, rtol=1e-10, atol=1e-13)


def scrambled(module):
    """Scale and shift away from their initial 1 and 0."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.uniform_(0.5, 1.5)
    return module


@pytest.mark.parametrize(
    "norm",
    [nn.LayerNorm(4), nn.LayerNorm(4, bias=False), nn.LayerNorm((2, 4)), nn.RMSNorm(4)],
    ids=str,
)
def test_trailing_norms(norm):
    norm.bias = getattr(norm, "bias", None)
    model = nn.Sequential(
        nn.Linear(3, 4), scrambled(norm.double()), nn.Tanh(), Mean(), nn.Linear(4, 3)
    )
    check_unitwise(model, "1", torch.randn(5, 2, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "norm",
    [
        # Without running statistics, which torch.func cannot update.
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.GroupNorm(2, 4),
        nn.InstanceNorm2d(4, affine=True),
    ],
    ids=lambda n: type(n).__name__,
)
def test_channel_norms(norm, training):
    norm = scrambled(norm.double())
    model = nn.Sequential(nn.Conv2d(2, 4, 3), norm, nn.Tanh(), SpatialMean(), nn.Linear(4, 3))
    check_unitwise(model.train(training), "1", torch.randn(5, 2, 5, 5))


def test_batch_norm_on_vectors_with_running_statistics():
    norm = scrambled(nn.BatchNorm1d(4).double())
    norm.running_mean.uniform_(-1, 1)
    norm.running_var.uniform_(0.5, 2)
    model = nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 3)).double()
    check_unitwise(model.eval(), "1", torch.randn(5, 3))


class WithPositions(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.positions = nn.Parameter(torch.randn(1, 2, 4))
        self.scale = nn.Parameter(torch.randn(()))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.linear(x) + self.positions)
        return self.head(h.mean(1)) * self.scale


def exact_diagonal(model, name, x):
    labels = torch.zeros(len(x), dtype=int)
    truth = exact_ggn(model, [name], (x,), lambda f: F.cross_entropy(f, labels))
    return truth.diagonal().reshape(dict(model.named_parameters())[name].shape)


@pytest.mark.parametrize("name", ["positions", "scale"])
def test_diagonal_of_parameters_outside_layers_is_exact_with_all_outputs(name):
    model, x = WithPositions(), torch.randn(5, 2, 3)
    block = curvature(
        model, x, likelihood="categorical", kfac_approx="expand", fisher_type="type-2"
    )[name]
    torch.testing.assert_close(block.diagonal, exact_diagonal(model, name, x))


@pytest.mark.parametrize("name", ["positions", "scale"])
def test_diagonal_of_parameters_outside_layers_is_unbiased_with_samples(name):
    model, x = WithPositions(), torch.randn(5, 2, 3)
    generator = torch.Generator().manual_seed(0)
    samples = 4000
    block = curvature(
        model,
        x,
        likelihood="categorical",
        kfac_approx="expand",
        mc_samples=samples,
        generator=generator,
    )[name]
    truth = exact_diagonal(model, name, x)
    # A squared sum of about Gaussian gradients has a relative standard deviation of √2.
    assert (block.diagonal / truth - 1).abs().max() < 5 * (2 / samples) ** 0.5
