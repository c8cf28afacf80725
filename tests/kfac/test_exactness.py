"""K-FAC against the exact GGN where the paper's Lemmas 3 and 5 say that they agree.

The lemmas need a loss Hessian that does not depend on the inputs (else A and B correlate): the
squared error. For other losses a single row is exact.
"""

import pytest
import torch
import torch.nn.functional as F
from ggn import layer_ggn, relative_error
from nets import Mean, Pool, SpatialMean, Tokens, Twice
from torch import nn

from submission.kfac import Segments, kronecker_factors

EXACT = 1e-12


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


def check(model, x, kfac_approx, likelihood="gaussian", layers=None, **kwargs):
    logits = model(x)
    loss = loss_of(likelihood, targets_for(likelihood, logits))
    factors = kronecker_factors(
        model, x, likelihood=likelihood, kfac_approx=kfac_approx, fisher_type="type-2", **kwargs
    )
    for name in layers or factors:
        truth = layer_ggn(model, name, (x,), loss)
        assert truth.norm() > 0
        assert relative_error(factors[name].to_dense(), truth) <= EXACT, name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", [(), (3,), (2, 3), (2, 1, 2)])
def test_expand_in_the_expand_setting(bias, sharing):
    model = nn.Sequential(nn.Linear(4, 3, bias), nn.Linear(3, 5, bias), nn.Linear(5, 2, bias))
    check(model, torch.randn(6, *sharing, 4), "expand")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sharing", [(3,), (2, 3), (2, 1, 2)])
def test_reduce_in_the_reduce_setting(bias, sharing):
    model = nn.Sequential(
        nn.Linear(4, 3, bias), nn.Linear(3, 5, bias), Mean(), nn.Linear(5, 2, bias)
    )
    check(model, torch.randn(6, *sharing, 4), "reduce")


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_one_row_through_a_nonlinear_net(likelihood, kfac_approx):
    model = nn.Sequential(
        nn.Linear(4, 9), nn.ReLU(inplace=True), nn.Linear(9, 6), nn.Tanh(), nn.Linear(6, 4)
    )
    check(model, torch.randn(1, 4), kfac_approx, likelihood)


CONVOLUTIONS = [
    (nn.Conv2d, {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, {"kernel_size": 3, "stride": 2}),
    (nn.Conv2d, {"kernel_size": (3, 2), "padding": "same"}),
    (nn.Conv2d, {"kernel_size": 3, "dilation": 2, "padding": 2}),
    (nn.Conv2d, {"kernel_size": 2, "stride": (2, 1), "padding": (1, 0), "bias": False}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    (nn.Conv2d, {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate"}),
    (nn.Conv1d, {"kernel_size": 3, "stride": 2, "padding": 2, "dilation": 2}),
    (nn.Conv1d, {"kernel_size": 4, "padding": "same", "groups": 2}),
    (nn.Conv3d, {"kernel_size": (2, 1, 3), "padding": (1, 0, 1), "stride": (1, 2, 1)}),
    (nn.ConvTranspose1d, {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1}),
    (nn.ConvTranspose2d, {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 2}),
    (nn.ConvTranspose2d, {"kernel_size": 2, "stride": 2, "groups": 2, "bias": False}),
    (nn.ConvTranspose3d, {"kernel_size": 2, "stride": (1, 2, 1)}),
]


@pytest.mark.parametrize(("layer", "options"), CONVOLUTIONS)
def test_reduce_for_convolutions_before_pooling(layer, options):
    # With a kernel of one pixel behind it and then the mean, all positions of the convolution
    # have the same gradient: the reduce setting.
    convolution = layer(2, 4, **options)
    dims = len(convolution.kernel_size)
    pointwise = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 2, 1)
    model = nn.Sequential(convolution, pointwise, SpatialMean(), nn.Linear(2, 3))
    check(model, torch.randn(5, 2, *(6, 5, 4)[:dims]), "reduce")


@pytest.mark.parametrize(("layer", "options"), CONVOLUTIONS)
def test_expand_for_convolutions_in_the_expand_setting(layer, options):
    # Every output position is a loss term of its own.
    convolution = layer(2, 4, **options)
    dims = len(convolution.kernel_size)
    model = nn.Sequential(convolution)
    check(model, torch.randn(3, 2, *(5, 4, 3)[:dims]), "expand")


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 3), (1, 1)])
def test_convolution_with_one_output_position(kfac_approx, kernel):
    model = nn.Sequential(nn.Conv2d(2, 3, kernel), nn.Flatten(), nn.Linear(3, 2))
    check(model, torch.randn(5, 2, *kernel), kfac_approx)


def test_embedding_expand_has_the_exact_diagonal_input_factor():
    model = Tokens(pool=False)
    x = torch.randint(6, (5, 4))
    check(model, x, "expand")
    factors = kronecker_factors(model, x, likelihood="gaussian", kfac_approx="expand")
    assert factors["embedding"].diagonal_input
    assert factors["embedding"].input_covariance.shape == (6,)


def test_embedding_reduce_before_pooling():
    check(Tokens(pool=True), torch.randint(6, (5, 4)), "reduce")


def test_a_layer_used_twice_has_more_shared_positions():
    check(Twice(), torch.randn(5, 2, 3), "reduce")


SIZES = {"equal": [3, 3, 3, 3], "unequal": [1, 4, 2, 5], "with an empty graph": [3, 0, 2, 1]}


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("sizes", list(SIZES))
@pytest.mark.parametrize(("pooling", "scaling"), [("mean", "mean_sum"), ("sum", "sum_mean")])
def test_ragged_reduce_is_exact_with_the_scaling_of_the_pooling(pooling, scaling, sizes, padding):
    check_ragged(SIZES[sizes], pooling, scaling, padding)


@pytest.mark.parametrize("padding", [0, 4])
@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_ragged_reduce_with_the_papers_scaling_is_exact_for_equal_sizes(pooling, padding):
    check_ragged(SIZES["equal"], pooling, "sqrt", padding)


@pytest.mark.parametrize("pooling", ["mean", "sum"])
def test_ragged_reduce_with_the_papers_scaling_is_inexact_for_unequal_sizes(pooling):
    with pytest.raises(AssertionError):
        check_ragged(SIZES["unequal"], pooling, "sqrt", 0)


def check_ragged(sizes, pooling, scaling, padding):
    """Compares with the exact GGN of the graphs without the padding graph."""
    real = Segments.from_sizes(torch.tensor(sizes))
    model = Pool(real.ids, len(sizes), pooling)
    x = torch.randn(sum(sizes), 4)
    truth = {
        name: layer_ggn(model, name, (x,), lambda f: F.mse_loss(f, torch.zeros_like(f)))
        for name in ("inner", "outer")
    }
    mask = torch.ones(len(sizes), 2, dtype=torch.bool)
    graph_mask = torch.ones(len(sizes), dtype=torch.bool)
    if padding:
        x = torch.cat([x, torch.full((padding, 4), 7.0)])
        sizes = [*sizes, padding]
        mask = torch.cat([mask, torch.zeros(1, 2, dtype=torch.bool)])
        graph_mask = torch.cat([graph_mask, torch.zeros(1, dtype=torch.bool)])
    rows = Segments.from_sizes(torch.tensor(sizes), segment_mask=graph_mask)
    graphs = Segments(torch.arange(len(sizes)), len(sizes), graph_mask)
    model.ids, model.segments = rows.ids, len(sizes)
    factors = kronecker_factors(
        model,
        x,
        likelihood="gaussian",
        kfac_approx="reduce",
        fisher_type="type-2",
        mask=mask,
        sharing={"inner": rows, "outer": graphs},
        ragged_scaling=scaling,
    )
    for name in truth:
        assert relative_error(factors[name].to_dense(), truth[name]) <= EXACT, name


class PaddedBags(nn.Module):
    """The mean of the embeddings of an example's words; others fill it up."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(7, 4, padding_idx=2)
        self.head = nn.Linear(4, 3)

    def forward(self, words):
        counts = (words != 2).sum(1, keepdim=True)
        return self.head(self.words(words).sum(1) / counts)


@pytest.mark.parametrize(("kfac_approx", "words"), [("expand", 1), ("reduce", 1), ("reduce", 2)])
def test_the_rows_of_padding_idx_do_not_exist(kfac_approx, words):
    """They are in no sum and no count: what fills an example up changes no scale."""
    model = PaddedBags()
    with torch.no_grad():
        model.words.weight[2] = 0
    x = torch.full((5, 4), 2)
    for number, example in enumerate(x):
        example[torch.randperm(4)[:words]] = torch.tensor([0, 1, 3, 4, 5, 6])[number:][:words]
    truth = layer_ggn(model, "words", (x,), lambda f: F.mse_loss(f, torch.zeros_like(f)))
    factors = kronecker_factors(
        model, x, likelihood="gaussian", kfac_approx=kfac_approx, fisher_type="type-2"
    )
    assert relative_error(factors["words"].to_dense(), truth) <= 1e-12
