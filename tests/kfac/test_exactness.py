"""K-FAC against the exact GGN where the paper's Lemmas say that they agree."""

import pytest
import torch
import torch.nn.functional as F
from ggn import layer_ggn, relative_error
from torch import nn

from submission.kfac import Bernoulli, Categorical, Gaussian, kronecker_factors

EXACT = 1e-12


class Mean(nn.Module):
    """Mean over all sharing dimensions: the reduce setting."""

    def forward(self, x):
        return x.flatten(1, -2).mean(1)


class SpatialMean(nn.Module):
    def forward(self, x):
        return x.flatten(2).mean(-1)


LOSSES = {
    "categorical": (Categorical(), None),
    "bernoulli": (Bernoulli(), None),
    "gaussian": (Gaussian(), None),
}


def loss_of(name, targets):
    if name == "categorical":
        return lambda f: F.cross_entropy(f.flatten(0, -2), targets.flatten())
    if name == "bernoulli":
        return lambda f: F.binary_cross_entropy_with_logits(f, targets)
    return lambda f: F.mse_loss(f, targets)


def targets_for(name, logits):
    if name == "categorical":
        return torch.randint(logits.shape[-1], logits.shape[:-1])
    return torch.rand_like(logits)


@pytest.fixture(autouse=True)
def _double():
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def check(model, x, kfac_approx, likelihood="categorical", **kwargs):
    logits = model(x)
    targets = targets_for(likelihood, logits)
    factors = kronecker_factors(
        model, x, likelihood=likelihood, kfac_approx=kfac_approx, fisher_type="type-2", **kwargs
    )
    assert factors
    for name, block in factors.items():
        truth = layer_ggn(model, name, (x,), loss_of(likelihood, targets))
        assert truth.norm() > 0
        assert relative_error(block.to_dense(), truth) <= EXACT, name


# The lemmas need a loss Hessian that does not depend on the inputs (else A and B correlate): the
# squared error. For other losses a single row is exact (below).
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", [(), (3,), (2, 3), (2, 1, 2)])
def test_expand_is_exact_in_the_expand_setting(bias, sharing):
    model = nn.Sequential(nn.Linear(4, 3, bias), nn.Linear(3, 5, bias), nn.Linear(5, 2, bias))
    check(model, torch.randn(6, *sharing, 4), "expand", "gaussian")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", [(3,), (2, 3), (2, 1, 2)])
def test_reduce_is_exact_in_the_reduce_setting(bias, sharing):
    model = nn.Sequential(
        nn.Linear(4, 3, bias), nn.Linear(3, 5, bias), Mean(), nn.Linear(5, 2, bias)
    )
    check(model, torch.randn(6, *sharing, 4), "reduce", "gaussian")


@pytest.mark.parametrize("likelihood", list(LOSSES))
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_one_example_without_sharing_is_exact_for_nonlinear_nets(likelihood, kfac_approx):
    model = nn.Sequential(
        nn.Linear(4, 9), nn.ReLU(inplace=True), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)
    )
    check(model, torch.randn(1, 4), kfac_approx, likelihood)


CONVOLUTIONS = [
    dict(kernel_size=3, padding=1),
    dict(kernel_size=3, stride=2),
    dict(kernel_size=(3, 2), padding="same"),
    dict(kernel_size=3, dilation=2, padding=2),
    dict(kernel_size=2, stride=(2, 1), padding=(1, 0), bias=False),
    dict(kernel_size=3, padding=1, padding_mode="circular"),
    dict(kernel_size=3, padding=1, padding_mode="reflect"),
    dict(kernel_size=3, padding=1, padding_mode="replicate"),
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_reduce_is_exact_for_convolutions_before_pooling(options):
    model = nn.Sequential(
        nn.Conv2d(2, 4, **options),
        nn.Conv2d(4, 2, 1),
        SpatialMean(),
        nn.Linear(2, 3),
    )
    # With a kernel of one pixel behind it and then the mean, all positions of the convolution have
    # the same gradient: the reduce setting.
    x = torch.randn(5, 2, 6, 6)
    check(model, x, "reduce", "gaussian")


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(
    "options", [o for o in CONVOLUTIONS if "stride" not in o or o["stride"] == 2]
)
def test_convolution_with_one_output_position_is_exact(kfac_approx, options):
    options = {k: v for k, v in options.items() if k in ("kernel_size", "dilation", "bias")}
    model = nn.Sequential(nn.Conv2d(2, 3, **options), nn.Flatten(), nn.Linear(3, 2))
    dilation = options.get("dilation", 1)
    kernel = options["kernel_size"]
    kernel = (kernel, kernel) if isinstance(kernel, int) else kernel
    x = torch.randn(5, 2, *[dilation * (k - 1) + 1 for k in kernel])
    check(model, x, kfac_approx, "gaussian")
