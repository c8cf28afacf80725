"""Weights of layers that are used in other ways, too, or by hand."""

import pytest
import torch
import torch.nn.functional as F
from ggn import loss_hessian
from torch import nn

from submission.kfac import KFACConfig, Preconditioner, curvature


class Computed(nn.Module):
    """A layer whose weight is used otherwise, too."""

    def __init__(self, use):
        super().__init__()
        self.embedding, self.middle, self.use = nn.Embedding(6, 3), nn.Linear(3, 3), use

    def forward(self, x):
        return self.use(self.middle, self.embedding(x))


OTHER_USES = {
    "behind the layer": lambda m, h: m(h) @ m.weight.sinh(),
    "before the layer": lambda m, h: m(h @ m.weight.sinh()),
    "the layer's bias": lambda m, h: F.linear(h, m.weight, m.weight.sum(1)),
    "a bias elsewhere": lambda m, h: F.linear(m(h), torch.eye(3), m.weight.sinh().sum(1)),
    "a weight beside a bias": lambda m, h: F.linear(m(h), m.weight.sinh(), m.bias),
    "added": lambda m, h: torch.addmm(m.weight.sinh().sum(0), m(h).flatten(0, 1), m.weight),
    "a norm's scale": lambda m, h: F.layer_norm(m(h), (3,), m.weight.sinh().sum(0), m.bias),
    "a convolution's": lambda m, h: F.conv1d(
        m(h).mT, m.weight.sinh().unsqueeze(-1), m.bias
    ).mT,
}  # fmt: skip


class Force(nn.Module):
    """The gradient of an energy with respect to positions, as in interatomic potentials."""

    def __init__(self):
        super().__init__()
        self.middle, self.embedding = nn.Linear(3, 4), nn.Embedding(6, 3)

    def forward(self, x):
        h = self.embedding(x)
        energy = self.middle(h).tanh().sum()
        (force,) = torch.autograd.grad(energy, h, create_graph=True)
        return force


def diagonal_of_all_uses(model, x, name):
    logits, weight = model(x), model.get_parameter(name)
    jacobian = torch.stack([
        torch.autograd.grad(value, weight, retain_graph=True)[0].flatten()
        for value in logits.flatten()
    ])  # fmt: skip
    targets = torch.zeros(4, dtype=int)
    hessian = loss_hessian(logits, lambda f: F.cross_entropy(f.flatten(0, -2), targets))
    return (jacobian.T @ hessian @ jacobian).diagonal()


@pytest.mark.parametrize("case", [*OTHER_USES, "gradient as output"])
def test_a_weight_with_other_uses_has_the_diagonal_of_all_of_them(case, caplog):
    model = Computed(OTHER_USES[case]) if case in OTHER_USES else Force()
    x, name = torch.randint(6, (4, 1)), "middle.weight"
    found = curvature(
        model, x, likelihood="categorical", kfac_approx="expand", fisher_type="type-2"
    )
    assert "middle" not in found
    truth = diagonal_of_all_uses(model, x, name)
    torch.testing.assert_close(found[name].diagonal.flatten(), truth, rtol=1e-10, atol=1e-14)
    kfac = Preconditioner(model, KFACConfig(fisher_type="type-2"))
    for _ in range(2):
        with kfac.record():
            logits = model(x)
        kfac.update(logits, "categorical")
        logits.square().sum().backward()
        kfac.precondition()
    rows = {row.name: row for row in kfac.report()}
    assert rows[name].preconditioner == "diagonal"
    assert "used in" in rows[name].reason
    assert "not used" not in rows[name].reason
    assert "middle" in caplog.text


class CalledByHand(nn.Module):
    """A layer that is called as a module and besides through its forward method."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(6, 3), nn.Linear(3, 6)

    def forward(self, x):
        h = self.embedding(x)
        return self.middle.forward(h) + 0.5 * self.middle(h)


def test_a_layer_called_by_hand_is_called_like_any_other():
    model, x = CalledByHand(), torch.randint(6, (4, 1))
    options = {"likelihood": "categorical", "kfac_approx": "expand", "fisher_type": "type-2"}
    found = curvature(model, x, **options)["middle"]
    h = torch.cat([model.embedding(x).squeeze(1), torch.ones(4, 1)], 1)
    torch.testing.assert_close(found.input_covariance, h.T @ h / 4)
    p = model(x).squeeze(1).softmax(-1)
    hessian = (torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1)).mean(0)
    # Each call by itself: the gradients of the two have factors 1 and 0.5.
    torch.testing.assert_close(found.gradient_covariance, 1.25 * hessian)


class HandTied(nn.Module):
    """An embedding whose weight is multiplied with by hand for the logits, as in some GPTs."""

    def __init__(self):
        super().__init__()
        self.embedding, self.middle = nn.Embedding(6, 3), nn.Linear(3, 3)

    def forward(self, x):
        return self.middle(self.embedding(x)) @ self.embedding.weight.T


def test_an_embedding_that_is_multiplied_by_hand_is_tied():
    model, x = HandTied(), torch.randint(6, (4, 2))
    head = nn.Linear(3, 6, bias=False)
    head.weight = model.embedding.weight
    modules = nn.Sequential(model.embedding, model.middle, head)
    for approx in ("expand", "reduce"):
        options = {"likelihood": "categorical", "kfac_approx": approx, "fisher_type": "type-2"}
        found, expected = (curvature(m, x, **options) for m in (model, modules))
        assert found.keys() == {"embedding", "middle"}
        for name, block in zip(("0", "1"), found.values(), strict=True):
            torch.testing.assert_close(block.to_dense(), expected[name].to_dense())
