"""Weights that several modules share."""

import copy

import pytest
import torch
import torch.nn.functional as F
from ggn import layer_ggn, relative_error
from torch import nn

from submission.kfac import KFAC, KFACConfig, curvature, kronecker_factors
from submission.kfac.tied import combine


class Language(nn.Module):
    """Embedding and output layer with one weight."""

    def __init__(self, bias=False, tied=True):
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
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
    assert set(tied) == {"middle", "head"}
    head, embedding = apart["head"], apart["embedding"]
    features = embedding.gradient_covariance
    words = embedding.input_covariance
    words = words if embedding.diagonal_input else words.diagonal()
    a, b = head.input_covariance, head.gradient_covariance
    trace = (lambda m: m.sum()) if head.diagonal_gradient else torch.trace
    p = trace(b) * a + words.sum() * F.pad(features, (0, int(bias), 0, int(bias)))
    q = a.trace() * b + features.trace() * (words if head.diagonal_gradient else words.diag())
    got = tied["head"]
    torch.testing.assert_close(got.input_covariance / got.input_covariance.trace(), p / p.trace())
    torch.testing.assert_close(
        got.gradient_covariance / trace(got.gradient_covariance), q / trace(q)
    )
    total = a.trace() * trace(b) + words.sum() * features.trace()
    torch.testing.assert_close(got.input_covariance.trace() * trace(got.gradient_covariance), total)


def test_one_use_alone_is_left_as_it_is():
    a, b = torch.randn(1, 4, 4), torch.randn(1, 7, 7)
    a, b = a @ a.mT, b @ b.mT
    none = {"E_V": torch.zeros(7), "E_d": torch.zeros(4, 4)}
    joined = combine({"A": a, "B": b, **none})
    torch.testing.assert_close(joined["A"], a)
    torch.testing.assert_close(joined["B"], b)


def test_tied_models_train_and_report():
    model = Language()
    kfac = KFAC(model, KFACConfig(factor_update_steps=1, inverse_update_steps=1, damping=0.1))
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
    assert rows["head"].layer == "Linear + Embedding, tied"
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


def test_partly_shared_parameters_fall_back_to_the_diagonal_and_say_so():
    model = Siamese(share_bias=False)
    kfac = KFAC(copy.deepcopy(model))
    reasons = {row.name: row.reason for row in kfac.report() if row.reason}
    assert set(reasons) == {"left.weight", "left.bias", "right.bias"}
    assert all("shared with another module" in reason for reason in reasons.values())
