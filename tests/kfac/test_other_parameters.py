"""Normalisation layers and parameters outside layers: their blocks against the exact GGN."""

import pytest
import torch
import torch.nn.functional as F
from ggn import exact_ggn
from nets import Mean, SpatialMean
from observed import state_tensors
from torch import nn

from submission.kfac import (
    Categorical,
    DiagonalCurvature,
    KFACConfig,
    Positions,
    Preconditioner,
    UnitwiseCurvature,
    curvature,
)
from submission.kfac.operations.sharing import example_dim


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
    """Parameters that are added, multiplied by, and used in some other way."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 4)
        self.positions = nn.Parameter(torch.randn(1, 2, 4))
        self.scale = nn.Parameter(torch.randn(()))
        self.other = nn.Parameter(torch.randn(2, 1))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        h = torch.tanh(self.linear(x) + self.positions) + self.other.sinh()
        return self.head(h.mean(1)) * self.scale


def exact_diagonal(model, name, x):
    labels = torch.zeros(len(x), dtype=int)
    truth = exact_ggn(model, [name], (x,), lambda f: F.cross_entropy(f, labels))
    return truth.diagonal().reshape(dict(model.named_parameters())[name].shape)


def diagonal_of(block, kind):
    assert isinstance(block, kind)
    return (block.blocks if kind is UnitwiseCurvature else block.diagonal).flatten()


KINDS = [
    ("positions", UnitwiseCurvature),
    ("scale", UnitwiseCurvature),
    ("other", DiagonalCurvature),
]


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_parameters_outside_layers_are_exact_with_all_outputs(name, kind, kfac_approx):
    model, x = WithPositions(), torch.randn(5, 2, 3)
    block = curvature(
        model, x, likelihood="categorical", kfac_approx=kfac_approx, fisher_type="type-2"
    )[name]
    truth = exact_diagonal(model, name, x).flatten()
    torch.testing.assert_close(diagonal_of(block, kind), truth)


@pytest.mark.parametrize(("name", "kind"), KINDS)
def test_parameters_outside_layers_are_unbiased_with_samples(name, kind):
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
    truth = exact_diagonal(model, name, x).flatten()
    # A squared sum of about Gaussian gradients has a relative standard deviation of √2.
    assert (diagonal_of(block, kind) / truth - 1).abs().max() < 5 * (2 / samples) ** 0.5


class Table(nn.Module):
    """Rows of a parameter, in an operation that has no block with factors."""

    def __init__(self, rows=50, features=4):
        super().__init__()
        self.table = nn.Parameter(torch.randn(rows, features))
        self.head = nn.Linear(features, 3)

    def forward(self, index):
        return self.head(self.table.sinh()[index])


@pytest.mark.parametrize("fisher_type", ["type-2", "mc", "empirical"])
def test_a_large_parameter_keeps_the_mean_of_its_diagonal_in_each_row(fisher_type):
    model, index, targets = Table(), torch.arange(0, 20), torch.randint(3, (20,))

    def table(side):
        found = curvature(
            model, index, likelihood="categorical", kfac_approx="expand", fisher_type=fisher_type,
            targets=targets, max_factor_side=side,
        )  # fmt: skip
        return found["table"].diagonal

    whole, by_row = table(100), table(10)
    assert by_row.shape == whole.shape
    expected = whole.mean(1, keepdim=True).expand_as(whole)
    torch.testing.assert_close(by_row, expected, rtol=1e-10, atol=0)
    assert (by_row[20:] == 0).all()


def test_a_large_parameter_is_preconditioned_and_resumed_by_row():
    torch.manual_seed(1)
    model, index = Table(), torch.arange(0, 20)
    settings = KFACConfig(damping=0.1, max_factor_side=10, factor_decay=0.5, early_updates=False)
    kfac = Preconditioner(model, settings)
    with kfac.record():
        logits = model(index)
    kfac.update(logits, "categorical")
    logits.square().sum().backward()
    gradient = model.table.grad.clone()
    kfac.precondition()
    saved = [tensor.numel() for tensor in state_tensors(kfac)]
    assert max(saved) == 50 < model.table.numel()  # a number for each row
    diagonal = kfac.curvature()["table"].diagonal
    torch.testing.assert_close(model.table.grad, gradient / (diagonal + 0.1))
    row = next(row for row in kfac.report() if row.name == "table")
    assert row.preconditioner == "diagonal, by row"
    again = Preconditioner(model, settings)
    again.load_state_dict(kfac.state_dict())
    model.table.grad = gradient.clone()
    again.precondition()
    torch.testing.assert_close(model.table.grad, gradient / (diagonal + 0.1))


def test_a_complex_parameter_keeps_its_imaginary_gradient():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, dtype=torch.complex128))
            self.head = nn.Linear(4, 3)

        def forward(self, x):
            return self.head((torch.fft.fft(x) * self.scale).real)

    model, x = Spectral(), torch.randn(6, 4)
    settings = KFACConfig(fisher_type="type-2", damping=0.1)
    kfac = Preconditioner(model, settings)
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "gaussian")
    logits.square().sum().backward()
    plain = torch.view_as_real(model.scale.grad).clone()
    kfac.precondition()
    diagonal = kfac.curvature()["scale"].diagonal
    assert diagonal.shape == (4, 2)
    # The same with two real parameters.
    parts = torch.view_as_real(model.scale.detach()).clone().requires_grad_()
    spectrum = torch.fft.fft(x) * torch.view_as_complex(parts)
    logits = model.head(spectrum.real)
    root = logits.new_full((), 2**0.5)  # Gaussian(): the Hessian is 2 for each of N·3 terms
    squares = sum(
        (root * torch.autograd.grad(value, parts, retain_graph=True)[0]).square()
        for value in logits.flatten()
    )
    torch.testing.assert_close(diagonal, squares / logits.numel())
    torch.testing.assert_close(torch.view_as_real(model.scale.grad), plain / (diagonal + 0.1))
    adam = Preconditioner(model, KFACConfig(direction="eigenbasis_adam", damping_kind="exact"))
    with adam.record():
        logits = model(x)
    adam.update(logits, "gaussian")
    model.scale.grad = torch.view_as_complex(plain.clone())
    adam.precondition()
    look_ahead = 1.9  # (β (1 - β) + 1 - β) / (1 - β) in the first step
    update = torch.view_as_real(model.scale.grad)
    torch.testing.assert_close(update, look_ahead * plain.sign(), rtol=0, atol=1e-5)


def test_sparse_gradients_are_left_as_they_are_and_the_report_says_so():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))
    kfac = Preconditioner(model, KFACConfig())
    with kfac.record():
        logits = model(torch.tensor([1, 1, 2, 3]))
    kfac.update(logits, "gaussian")
    logits.square().mean().backward()
    before = model[0].weight.grad.to_dense().clone()
    kfac.precondition()
    torch.testing.assert_close(model[0].weight.grad.to_dense(), before)
    row = next(row for row in kfac.report() if row.name == "0.weight")
    assert (row.preconditioner, row.memory) == ("raw gradient", 0)
    assert "sparse" in row.reason


def test_several_parameters_by_row_are_preconditioned_each_alone():
    class Tables(nn.Module):
        def __init__(self):
            super().__init__()
            self.first = nn.Parameter(torch.randn(100, 4))
            self.second = nn.Parameter(torch.randn(100, 4))

        def forward(self, index):
            return self.first.sinh()[index] + self.second.sinh()[index] ** 2

    model = Tables()
    kfac = Preconditioner(model, KFACConfig(damping=0.1, max_factor_side=10))
    with kfac.record():
        logits = model(torch.arange(20))
    kfac.update(logits, "gaussian")
    logits.square().sum().backward()
    plain = [p.grad.clone() for p in model.parameters()]
    kfac.precondition()
    diagonals = [kfac.curvature()[name].diagonal for name in ("first", "second")]
    for p, g, d in zip(model.parameters(), plain, diagonals, strict=True):
        torch.testing.assert_close(p.grad, g / (d + 0.1))


class Layout(nn.Module):
    """A scale and a shift of values whose examples are in the second dimension."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)
        self.scale, self.shift = nn.Parameter(torch.randn(4)), nn.Parameter(torch.randn(2, 1, 4))

    def forward(self, x):
        h = torch.tanh(self.inner(x).transpose(0, 1) * self.scale) + self.shift
        return self.outer(h.tanh().mean(0))


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("is_stated", [True, False])
def test_examples_in_another_dimension_are_stated_or_found_by_their_number(is_stated, kfac_approx):
    model, x = Layout(), torch.randn(5, 2, 3)
    rule = {name: Positions(batch_dim=1) for name in ("scale", "shift")}
    found = curvature(
        model, x, likelihood="categorical", kfac_approx=kfac_approx, fisher_type="type-2",
        sharing=rule if is_stated else None,
    )  # fmt: skip
    for name in ("scale", "shift"):
        truth = exact_diagonal(model, name, x).flatten()
        torch.testing.assert_close(diagonal_of(found[name], UnitwiseCurvature), truth)


@pytest.mark.parametrize(
    ("sizes", "examples", "expected"),
    [
        ((5, 7), 5, 0),  # in front
        ((5, 7), 35, 0),  # outputs for every position
        ((7, 5), 5, 1),  # time in front
        ((5, 7), 30, 0),  # outputs for six of the seven positions
        ((30, 5), 5, None),  # five examples' windows may be folded in front
        ((64 * 9, 16), 64, None),
        ((7, 6), 5, None),
        ((5, 5, 3), 5, 0),
        ((7, 5, 5), 5, None),
    ],
)
def test_which_dimension_counts_the_examples(sizes, examples, expected):
    assert example_dim(sizes, range(len(sizes)), {examples}, {examples}) == expected
