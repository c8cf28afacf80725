"""Monte-Carlo factors: unbiased, and their error falls as 1/√S.

For B = mean of S independent draws, E ‖B_S - B‖² = V / S exactly. Each test measures the root
mean square of the relative error over `SEEDS` independent runs at two sample numbers, from fixed
seeds. The ratio of both must be that of the roots up to a factor 2: a biased estimate stops
falling (ratio 1), and samples that are not independent fall too slowly. Besides, errors are
bounded absolutely, and the bias by the spread of the runs.
"""

import pytest
import torch
from nets import Mean, Pool
from torch import nn

from submission.kfac import (
    Bernoulli,
    Categorical,
    Gaussian,
    Positions,
    Segments,
    curvature,
    kronecker_factors,
)

FEW, MANY = 4, 32
SEEDS = 24
# Relative error of a single sample, √V / ‖B‖, is about 1 to 6 for these nets.
LARGEST_SINGLE_SAMPLE_ERROR = 8.0
# Distance of the mean over the runs from the truth, in standard errors.
LARGEST_T = 3.0
# In reduce, the key layer of an attention has no curvature at all: adding one vector to all keys
# shifts all scores of a query alike, so its gradients sum to zero over the positions.
ZERO = 1e-25


class Attention(nn.Module):
    """Positions interact: softmax(q kᵀ) v, so that a row's gradient holds many labels' noise."""

    def __init__(self, width, outputs, pool=False):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)
        self.temperature = nn.Parameter(torch.tensor(0.7))
        self.out = nn.Linear(width, outputs)
        self.pool = pool

    def forward(self, x):
        scores = self.query(x) @ self.key(x).mT * self.temperature
        h = self.norm(x + scores.softmax(-1) @ self.value(x))
        return self.out(h.mean(1) if self.pool else h)


LIKELIHOODS = {
    "categorical": Categorical(),
    "bernoulli": Bernoulli(),
    "gaussian": Gaussian(variance=1.0, scale=3.0),
}
APPROXES = ("expand", "reduce")


def estimates(model, inputs, samples, **options):
    """Blocks of `SEEDS` independent runs."""
    for seed in range(SEEDS):
        yield curvature(
            model,
            inputs,
            fisher_type="mc",
            mc_samples=samples,
            generator=torch.Generator().manual_seed(seed),
            **options,
        )


def curvature_tensors(block):
    """What depends on the labels: everything but A."""
    return {
        key: value
        for key, value in vars(block).items()
        if isinstance(value, torch.Tensor) and key != "input_covariance"
    }


def confident(model):
    """Probabilities away from even ones, in place: else sampling from a fair coin would pass."""
    last = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)][-1]
    with torch.no_grad():
        last.weight.mul_(4)
    return model


def check(model, inputs, **options):
    exact = curvature(confident(model), inputs, fisher_type="type-2", **options)
    errors = {}
    for samples in (FEW, MANY):
        squares, means = {}, {}
        for blocks in estimates(model, inputs, samples, **options):
            assert blocks.keys() == exact.keys()
            for name, block in blocks.items():
                for key, value in curvature_tensors(block).items():
                    truth = curvature_tensors(exact[name])[key]
                    if float(truth.norm()) < ZERO:
                        assert float(value.norm()) < ZERO, (name, key)
                        continue
                    difference = (value - truth) / truth.norm()
                    where = (name, key)
                    squares[where] = squares.get(where, 0.0) + float(difference.square().sum())
                    means[where] = means.get(where, 0.0) + difference / SEEDS
                if hasattr(block, "input_covariance"):
                    assert torch.equal(block.input_covariance, exact[name].input_covariance)
        assert squares
        for where, total in squares.items():
            errors[where, samples] = (total / SEEDS) ** 0.5
            assert errors[where, samples] < LARGEST_SINGLE_SAMPLE_ERROR / samples**0.5, where
            # The mean over the runs differs from the truth by its standard error, as the spread
            # of the runs around their mean gives it; a bias makes that spread no larger.
            distance = float(means[where].norm())
            spread = max(total / SEEDS - distance**2, 0.0)
            assert distance < LARGEST_T * (spread / (SEEDS - 1)) ** 0.5, where
    rate = (MANY / FEW) ** 0.5
    for where in squares:
        ratio = errors[where, FEW] / errors[where, MANY]
        assert rate / 2 < ratio < rate * 2, where


@pytest.mark.parametrize("likelihood", list(LIKELIHOODS))
@pytest.mark.parametrize("kfac_approx", APPROXES)
def test_interacting_positions_with_a_loss_at_every_position(kfac_approx, likelihood):
    model = Attention(3, 4)
    check(model, torch.randn(3, 3, 3), likelihood=LIKELIHOODS[likelihood], kfac_approx=kfac_approx)


@pytest.mark.parametrize("likelihood", ["categorical", "bernoulli", "gaussian"])
@pytest.mark.parametrize("kfac_approx", APPROXES)
def test_interacting_positions_with_one_loss_for_each_example(kfac_approx, likelihood):
    model = Attention(3, 4, pool=True)
    check(model, torch.randn(4, 3, 3), likelihood=LIKELIHOODS[likelihood], kfac_approx=kfac_approx)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("kfac_approx", APPROXES)
def test_masked_bernoulli(kfac_approx, weights):
    # The mask of a multi-task problem: of each example some labels are missing, of one all.
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), Mean(), nn.Linear(5, 6))
    mask = torch.rand(5, 6) < 0.6
    mask[2] = False
    if weights:
        mask = mask * (0.5 + torch.rand(5, 6))
    check(model, torch.randn(5, 2, 4), likelihood="bernoulli", kfac_approx=kfac_approx, mask=mask)


@pytest.mark.parametrize("kfac_approx", APPROXES)
def test_masked_tokens(kfac_approx):
    model, mask = Attention(3, 4), torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 0]]).bool()
    check(
        model,
        torch.randn(3, 3, 3),
        likelihood="categorical",
        kfac_approx=kfac_approx,
        mask=mask,
    )


@pytest.mark.parametrize("kfac_approx", APPROXES)
def test_classes_in_the_second_dimension(kfac_approx):
    model = nn.Sequential(nn.Conv2d(2, 3, 2), nn.Tanh(), nn.Conv2d(3, 3, 2))
    check(
        model,
        torch.randn(3, 2, 3, 4),
        likelihood=Categorical(class_dim=1),
        kfac_approx=kfac_approx,
    )


@pytest.mark.parametrize(
    ("kfac_approx", "likelihood", "scaling"),
    [
        ("expand", "bernoulli", "sqrt"),
        ("reduce", "categorical", "sqrt"),
        ("reduce", "bernoulli", "sqrt"),
        ("reduce", "gaussian", "sqrt"),
        ("reduce", "bernoulli", "mean_sum"),
        ("reduce", "bernoulli", "sum_mean"),
    ],
)
def test_ragged_rows_with_padding(kfac_approx, likelihood, scaling):
    sizes = torch.tensor([3, 1, 0, 2, 4])  # the last graph is padding
    real = torch.tensor([True, True, True, True, False])
    rows = Segments.from_sizes(sizes, segment_mask=real)
    model = nn.Sequential(Pool(rows.ids, 5, "mean"))
    x = torch.randn(10, 4)
    x[6:] = 1e6
    check(
        model,
        x,
        likelihood=likelihood,
        kfac_approx=kfac_approx,
        mask=real,
        sharing={"0.inner": rows, "0.outer": Segments(torch.arange(5), 5, real)},
        ragged_scaling=scaling,
    )


@pytest.mark.parametrize("kfac_approx", APPROXES)
def test_ragged_positions(kfac_approx):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 0]]).bool()
    x = torch.where(mask.unsqueeze(-1), torch.randn(3, 3, 4), float("nan"))
    check(
        model,
        x,
        likelihood="categorical",
        kfac_approx=kfac_approx,
        mask=mask,
        sharing=Positions(mask=mask),
    )


def test_samples_are_averaged_not_added():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(4, 3)
    options = {"likelihood": "gaussian", "kfac_approx": "expand", "fisher_type": "mc"}
    joint = kronecker_factors(
        model, x, mc_samples=3, generator=torch.Generator().manual_seed(5), **options
    )
    generator = torch.Generator().manual_seed(5)
    single = [kronecker_factors(model, x, generator=generator, **options) for _ in range(3)]
    mean = sum(block["0"].gradient_covariance for block in single) / 3
    torch.testing.assert_close(joint["0"].gradient_covariance, mean)


def test_labels_come_from_the_model_and_the_targets_play_no_role():
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(5, 3)
    options = {"likelihood": "categorical", "kfac_approx": "expand", "fisher_type": "mc"}
    blocks = [
        kronecker_factors(model, x, targets=torch.full((5,), label), **options) for label in (0, 3)
    ]
    assert torch.equal(blocks[0]["0"].gradient_covariance, blocks[1]["0"].gradient_covariance)


def test_repeated_calls_agree_and_seeds_differ():
    model, x = nn.Sequential(nn.Linear(3, 4)), torch.randn(5, 3)
    options = {"likelihood": "categorical", "kfac_approx": "expand", "fisher_type": "mc"}
    first, again = (kronecker_factors(model, x, **options)["0"] for _ in range(2))
    other = kronecker_factors(model, x, generator=torch.Generator().manual_seed(9), **options)["0"]
    assert torch.equal(first.gradient_covariance, again.gradient_covariance)
    assert not torch.equal(first.gradient_covariance, other.gradient_covariance)
