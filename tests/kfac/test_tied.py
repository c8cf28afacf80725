"""Weights that several modules share."""

import pytest
import torch
import torch.nn.functional as F
from ggn import exact_ggn, layer_ggn, relative_error
from torch import nn

from submission.kfac import KFACConfig, Preconditioner, curvature, kronecker_factors


def recorded(kfac, model, x):
    """After one step of mean squares."""
    model.zero_grad()
    with kfac.record():
        y = model(x)
    kfac.update(y, "gaussian")
    y.square().mean().backward()
    kfac.precondition()
    return kfac


class Language(nn.Module):
    """Embedding and output layer with one weight."""

    def __init__(self, bias=False, tied=True, padding_idx=None):
        super().__init__()
        self.embedding = nn.Embedding(7, 4, padding_idx)
        self.middle = nn.Linear(4, 4)
        self.head = nn.Linear(4, 7, bias)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.middle(self.embedding(x))))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("max_factor_side", [100, 6])
def test_tied_factors_join_those_of_both_uses(kfac_approx, bias, max_factor_side):
    model, untied = Language(bias), Language(bias, tied=False)
    untied.load_state_dict(model.state_dict())
    x = torch.randint(7, (5, 3))
    options = {
        "likelihood": "categorical", "kfac_approx": kfac_approx, "fisher_type": "type-2",
        "max_factor_side": max_factor_side,
    }  # fmt: skip
    tied, apart = curvature(model, x, **options), curvature(untied, x, **options)
    assert set(tied) == {"embedding", "middle"}
    head, embedding = apart["head"], apart["embedding"]
    features = embedding.gradient_covariance
    words = embedding.input_covariance
    # The mean of one-hot vectors has a factor of its own, where that is not too large.
    assert embedding.diagonal_input == (kfac_approx == "expand" or max_factor_side == 6)
    if embedding.diagonal_input and not head.diagonal_gradient:
        words = words.diag()
    a, b = head.input_covariance, head.gradient_covariance
    trace = (lambda m: m.sum()) if head.diagonal_gradient else torch.trace
    p = trace(b) * a + trace(words) * F.pad(features, (0, int(bias), 0, int(bias)))
    q = a.trace() * b + features.trace() * words
    got = tied["embedding"]
    torch.testing.assert_close(got.input_covariance / got.input_covariance.trace(), p / p.trace())
    torch.testing.assert_close(
        got.gradient_covariance / trace(got.gradient_covariance), q / trace(q)
    )
    total = a.trace() * trace(b) + trace(words) * features.trace()
    torch.testing.assert_close(got.input_covariance.trace() * trace(got.gradient_covariance), total)


def test_tied_models_train_and_report():
    model = Language()
    kfac = Preconditioner(
        model, KFACConfig(factor_update_steps=1, inverse_update_steps=1, damping=0.1)
    )
    x, y = torch.randint(7, (5, 3)), torch.randint(7, (5, 3))
    before = None
    for _ in range(20):
        model.zero_grad()
        with kfac.record():
            logits = model(x)
        kfac.update(logits, "categorical")
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten())
        before = before or float(loss.detach())
        loss.backward()
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert float(loss.detach()) < 0.9 * before
    rows = {row.name: row for row in kfac.report()}
    assert rows["embedding"].layer == "matrix, tied"
    assert sum(row.parameters for row in rows.values()) == sum(
        p.numel() for p in model.parameters()
    )


class Siamese(nn.Module):
    """Two linear modules with the same parameters."""

    def __init__(self, share_bias=True):
        super().__init__()
        self.left, self.right = nn.Linear(3, 3), nn.Linear(3, 3)
        self.right.weight = self.left.weight
        if share_bias:
            self.right.bias = self.left.bias
        self.last = nn.Linear(3, 2)

    def forward(self, x):
        first, second = x.unbind(1)
        return self.last(0.5 * (self.left(first) + self.right(second)))


def test_modules_with_the_same_parameters_are_one_layer_with_more_calls():
    model, x = Siamese(), torch.randn(5, 2, 3)
    blocks = kronecker_factors(
        model, x, likelihood="gaussian", kfac_approx="reduce", fisher_type="type-2"
    )
    assert set(blocks) == {"left", "last"}
    truth = layer_ggn(model, "left", (x,), lambda f: F.mse_loss(f, torch.zeros_like(f)))
    assert relative_error(blocks["left"].to_dense(), truth) <= 1e-12


def test_biases_of_a_shared_weight_fall_back_to_the_diagonal_and_say_so():
    model, x = Siamese(share_bias=False), torch.randn(5, 2, 3)
    kfac = Preconditioner(model, KFACConfig("reduce", fisher_type="type-2"))
    rows = recorded(kfac, model, x).report()
    reasons = {row.name: row.reason for row in rows if row.reason}
    assert set(reasons) == {"left.bias", "right.bias"}
    assert all("not always added to one matrix" in reason for reason in reasons.values())
    blocks = kfac.curvature()

    def truth(name):
        return exact_ggn(model, [name], (x,), lambda f: F.mse_loss(f, torch.zeros_like(f)))

    assert relative_error(blocks["left"].to_dense(), truth("left.weight")) <= 1e-12
    for name in reasons:
        torch.testing.assert_close(blocks[name].diagonal, truth(name).diagonal())


class Convolutions(nn.Module):
    """A convolution and another one that hold the same weight; only some are called."""

    def __init__(self, first, second, called):
        super().__init__()
        self.first, self.second, self.called = first, second, called
        second.weight = first.weight
        if first.bias is not None:
            second.bias = first.bias

    def forward(self, x):
        return self.called(self, x).flatten(1)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (nn.Conv1d(2, 2, 3, padding=1, bias=False), nn.ConvTranspose1d(2, 2, 3, bias=False)),
        (nn.Conv1d(4, 2, 3, bias=False), nn.Conv1d(8, 2, 3, groups=2, bias=False)),
    ],
    ids=["transposed", "groups"],
)
def test_a_weight_that_is_another_matrix_elsewhere_is_no_common_layer(first, second):
    model = Convolutions(first, second, lambda m, x: m.first(x)).double()
    x = torch.randn(3, first.in_channels, 8)
    kfac = Preconditioner(model, KFACConfig(fisher_type="type-2", factor_update_steps=1))
    (row,) = recorded(kfac, model, x).report()
    assert (row.preconditioner, row.reason) == ("K-FAC-expand", "")
    twice = x if second.in_channels == first.in_channels else torch.cat([x, x], 1)
    model.called = lambda m, x: torch.cat([m.first(x), m.second(twice[: len(x)])], -1)
    for _ in range(2):
        recorded(kfac, model, x)
    (row,) = kfac.report()
    assert row.preconditioner == "diagonal"
    assert "used as different matrices" in row.reason
    truth = exact_ggn(
        model, ["first.weight"], (x,), lambda f: F.mse_loss(f, torch.zeros_like(f))
    ).diagonal()
    torch.testing.assert_close(kfac.curvature()["first.weight"].diagonal.flatten(), truth)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_every_call_of_a_shared_layer_has_its_own_output_size(kfac_approx):
    def longer(layer, x):
        return layer(x, output_size=[2 * x.shape[-1] + 1])

    layers = [nn.ConvTranspose1d(2, 3, 2, stride=2) for _ in range(2)]
    shared = Convolutions(*layers, lambda m, x: longer(m.second, x))
    single = Convolutions(layers[0], nn.Module(), lambda m, x: longer(m.first, x))
    single.second.weight = single.second.bias = None
    x = torch.randn(4, 2, 3)
    options = {"likelihood": "gaussian", "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    found, expected = (kronecker_factors(m, x, **options)["first"] for m in (shared, single))
    assert relative_error(found.to_dense(), expected.to_dense()) < 1e-12


@pytest.mark.parametrize("kwargs", [{"sparse": True}, {"scale_grad_by_freq": True}])
def test_shared_embeddings_are_handled_only_where_one_alone_is(kwargs):
    model = nn.ModuleList([nn.Embedding(5, 3, **kwargs) for _ in range(2)])
    model[1].weight = model[0].weight
    model.forward = lambda x: model[0](x) + 2 * model[1](x + 1)
    (row,) = recorded(Preconditioner(model), model, torch.tensor([0, 1, 1])).report()
    assert not row.preconditioner.startswith("K-FAC")
    assert row.reason


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_one_use_alone_is_left_as_it_is(kfac_approx):
    """The embedding sees padding only, which has no gradient."""
    tied, untied = Language(padding_idx=0), Language(tied=False, padding_idx=0)
    untied.load_state_dict(tied.state_dict())
    x = torch.zeros(5, 3, dtype=torch.long)
    mask = torch.randn(5, 3, 4)
    for model in (tied, untied):
        model.middle.register_forward_hook(lambda module, args, output: output + mask)
    options = {"kfac_approx": kfac_approx, "fisher_type": "type-2", "likelihood": "categorical"}
    found, expected = (
        curvature(model, x, **options)[name]
        for model, name in ((tied, "embedding"), (untied, "head"))
    )
    torch.testing.assert_close(found.to_dense(), expected.to_dense(), rtol=1e-12, atol=0)


class PaddedLanguage(nn.Module):
    """Tied weights; the output layer sees constants, so that only its factor A counts."""

    def __init__(self, tied):
        super().__init__()
        self.embedding = nn.Embedding(6, 3, padding_idx=0)
        self.middle, self.head = nn.Linear(3, 3), nn.Linear(3, 6, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x):
        zeros = torch.zeros(*x.shape, 3)
        return self.middle(self.embedding(x)) + 0 * self.head(zeros)[..., :3]


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_padding_counts_in_a_tied_embedding_as_in_one_alone(kfac_approx):
    x = torch.randint(0, 3, (50, 2))
    tied, untied = PaddedLanguage(True), PaddedLanguage(False)
    untied.load_state_dict(tied.state_dict())
    options = {"kfac_approx": kfac_approx, "fisher_type": "type-2", "likelihood": "gaussian"}
    traces = [
        curvature(model, x, **options)["embedding"].to_dense().trace() for model in (tied, untied)
    ]
    torch.testing.assert_close(*traces, rtol=1e-10, atol=0)
