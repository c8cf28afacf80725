"""The Levenberg-Marquardt rule: the quadratic model against dense algebra, and its verdicts."""

import pytest
import torch
import torch.nn.functional as F
from nets import Mean
from torch import nn

from submission.kfac import KFACConfig, Preconditioner
from submission.kfac.updates.adaptive_damping import (
    OMEGA,
    adapted_damping,
    begin_trial,
    end_trial,
)


class Net(nn.Module):
    """All kinds of blocks: convolution with groups, linear, normalisation, a diagonal one."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv1d(2, 4, 2, groups=2)
        self.linear = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 3, bias=False)
        self.shift = nn.Parameter(torch.randn(3))
        self.other = nn.Parameter(torch.randn(3))

    def forward(self, x):
        h = self.norm(torch.tanh(self.linear(self.conv(x)))).mean(1)
        return self.head(h) + self.shift + self.other.sinh()


def trial_step(kfac_approx="expand", scale=1e-3):
    model, x, y = Net(), torch.randn(6, 2, 4), torch.randint(3, (6,))
    kfac = Preconditioner(
        model, KFACConfig(kfac_approx, damping=0.1, fisher_type="type-2", factor_update_steps=1,
                          inverse_update_steps=5),
    )  # fmt: skip
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    loss = F.cross_entropy(logits, y)
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    trial = begin_trial(kfac)
    kfac.precondition()
    steps = {}
    with torch.no_grad():
        for name, p in model.named_parameters():
            steps[name] = -scale * p.grad
            p += steps[name]
    after = F.cross_entropy(model(x), y)
    return kfac, trial, plain, steps, float(loss.detach()), float(after.detach())


def predicted_change(kfac, trial):
    """M(δ), out of the ratio that a change of the loss by -1 has to it."""
    ratio = end_trial(kfac, trial, 1.0, 0.0)
    assert ratio > 0  # the model predicts a lower loss
    return -1 / ratio


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_the_predicted_change_is_the_quadratic_model(kfac_approx):
    kfac, trial, plain, steps, _, _ = trial_step(kfac_approx)
    expected = sum((plain[n] * steps[n]).sum() + 0.05 * steps[n].square().sum() for n in plain)

    def joint(layer, groups=1):
        weight = steps[f"{layer}.weight"].flatten(1)
        bias = steps["shift"] if layer == "head" else steps[f"{layer}.bias"]
        return torch.cat([weight, bias[:, None]], 1).reshape(groups, -1)

    blocks = kfac.curvature()
    for layer, groups in (("conv", 2), ("linear", 1), ("head", 1)):
        dense = blocks[layer].to_dense().reshape(groups, joint(layer, groups).shape[1], -1)
        step = joint(layer, groups)
        expected += 0.5 * torch.einsum("gi,gij,gj->", step, dense, step)
    norm = torch.stack([steps["norm.weight"], steps["norm.bias"]], 1)
    expected += 0.5 * torch.einsum("ui,uij,uj->", norm, blocks["norm"].blocks, norm)
    expected += 0.5 * (blocks["other"].diagonal * steps["other"].square()).sum()
    assert predicted_change(kfac, trial) == pytest.approx(float(expected), rel=1e-9)


def test_a_small_step_goes_as_predicted_and_lowers_the_damping():
    kfac, trial, _, _, before, after = trial_step(scale=1e-4)
    ratio = end_trial(kfac, trial, before, after)
    assert ratio == pytest.approx(1, abs=0.05)
    assert kfac.damping == pytest.approx(0.1 * OMEGA**5)


def test_a_step_that_raises_the_loss_raises_the_damping():
    kfac, trial, _, _, before, _ = trial_step()
    assert end_trial(kfac, trial, before, before + 1) < 0
    assert kfac.damping == pytest.approx(0.1 / OMEGA**5)


@pytest.mark.parametrize(
    ("ratio", "factor"),
    [(0.8, OMEGA**5), (0.5, 1), (0.2, OMEGA**-5), (-1, OMEGA**-5), (float("nan"), OMEGA**-5)],
)
def test_verdicts(ratio, factor):
    assert adapted_damping(2.0, ratio, 5) == pytest.approx(2.0 * factor)


def test_deep_linear_nets_are_their_quadratic_model():
    # One linear layer with a squared error: K-FAC is exact, so the model is the loss itself.
    model, x, y = nn.Sequential(nn.Linear(3, 2), Mean()), torch.randn(5, 2, 3), torch.randn(5, 2)
    kfac = Preconditioner(model, KFACConfig("reduce", damping=1e-9, fisher_type="type-2"))
    with kfac.record():
        out = model(x)
    kfac.update(out, "gaussian")
    loss = F.mse_loss(out, y)
    loss.backward()
    trial = begin_trial(kfac)
    kfac.precondition()
    with torch.no_grad():
        for p in model.parameters():
            p -= p.grad
        after = F.mse_loss(model(x), y)
    assert end_trial(kfac, trial, float(loss.detach()), float(after)) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("corrected", [True, False])
def test_the_prediction_for_the_minimiser_of_the_damped_model(relative, corrected):
    """Along the exact Newton step of the model, M(δ) = ½ gᵀδ, whatever the units of λ."""
    model, x = nn.Linear(4, 3), 10 * torch.randn(20, 4)
    kfac = Preconditioner(
        model,
        KFACConfig(fisher_type="type-2", damping_kind="exact", relative_damping=relative,
                   damping=0.5, eigenvalue_correction=corrected),
    )  # fmt: skip
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    F.cross_entropy(logits, torch.randint(3, (20,))).backward()
    plain = [p.grad.clone() for p in model.parameters()]
    trial = begin_trial(kfac)
    kfac.precondition()
    with torch.no_grad():
        for p in model.parameters():
            p -= p.grad
    steps = [-p.grad for p in model.parameters()]
    expected = 0.5 * sum(float((g * s).sum()) for g, s in zip(plain, steps, strict=True))
    assert predicted_change(kfac, trial) == pytest.approx(expected, rel=1e-7)
