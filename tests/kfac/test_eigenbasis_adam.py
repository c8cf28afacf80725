"""Adam in the eigenbasis of the factors."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import Mean
from torch import nn

from submission.kfac import KFAC, KFACConfig
from submission.kfac.eigenbasis_adam import AdamStep, directions, out_of_basis, turn_moments
from submission.kfac.partition import partition
from submission.optimizers import NAdamW

BETAS, EPSILON = (0.9, 0.99), 1e-8


def orthogonal(side):
    return torch.linalg.qr(torch.randn(2, side, side)).Q


def test_with_a_fixed_basis_it_is_nadamw_on_rotated_parameters():
    basis = {"A.eigenvectors": orthogonal(4), "B.eigenvectors": orthogonal(3)}
    rotated = nn.Parameter(torch.zeros(2, 3, 4))
    reference = NAdamW([rotated], lr=1.0, betas=BETAS, eps=EPSILON)
    position, count = torch.zeros(2, 3, 4), None
    moments = {"first": torch.zeros(2, 3, 4), "second": torch.zeros(2, 3, 4)}
    for _ in range(5):
        gradient = torch.randn(2, 3, 4)
        step = AdamStep.of(count, [gradient], betas=BETAS, epsilon=EPSILON)
        count = step.count
        (update,) = directions([basis], [moments], [gradient], step)
        position -= update
        rotated.grad = basis["B.eigenvectors"].mT @ gradient @ basis["A.eigenvectors"]
        reference.step()
        back = basis["B.eigenvectors"] @ rotated.detach() @ basis["A.eigenvectors"].mT
        torch.testing.assert_close(position, back, rtol=1e-10, atol=1e-12)


def linear_part():
    model = nn.Sequential(nn.Linear(3, 2, bias=False))
    return partition(model, approx="expand", max_factor_side=100).parts


def test_a_turn_by_a_permutation_moves_the_second_moments_along():
    second = torch.rand(1, 2, 3)
    old = {"0": {"A.eigenvectors": torch.eye(3)[None], "B.eigenvectors": torch.eye(2)[None]}}
    order_a, order_b = torch.tensor([2, 0, 1]), torch.tensor([1, 0])
    new = {
        "0": {
            "A.eigenvectors": -torch.eye(3)[:, order_a][None],  # signs do not matter
            "B.eigenvectors": torch.eye(2)[:, order_b][None],
        }
    }
    moments = {"0": {"first": second, "second": second.clone()}}
    turn_moments(moments, linear_part(), old, new)
    torch.testing.assert_close(moments["0"]["second"], second[:, order_b][:, :, order_a])
    turn_moments(moments, linear_part(), new, new)
    torch.testing.assert_close(moments["0"]["second"], second[:, order_b][:, :, order_a])


def test_a_turn_leaves_the_mean_of_the_gradients_where_it_is():
    mean, second = torch.randn(1, 2, 3), torch.rand(1, 2, 3)
    moments = {"0": {"first": mean, "second": second}}
    old, new = (
        {"0": {"A.eigenvectors": orthogonal(3)[:1], "B.eigenvectors": orthogonal(2)[:1]}}
        for _ in range(2)
    )
    there = out_of_basis(old["0"], mean)
    turn_moments(moments, linear_part(), old, new)
    torch.testing.assert_close(out_of_basis(new["0"], moments["0"]["first"]), there)
    turn_moments(moments, linear_part(), new, {})  # to no basis: that of the entries
    torch.testing.assert_close(moments["0"]["first"], there)
    turn_moments(moments, linear_part(), {}, old)
    torch.testing.assert_close(moments["0"]["first"], mean)


def test_a_turn_gives_the_variances_of_uncorrelated_entries():
    q = orthogonal(3)[:1]
    variances = torch.rand(1, 2, 3)
    samples = torch.randn(200_000, 2, 3) * variances.sqrt()
    expected = (samples @ q).square().mean(0, keepdim=True)
    moments = {"0": {"first": variances, "second": variances.clone()}}
    eye = torch.eye(2)[None]
    old = {"0": {"A.eigenvectors": torch.eye(3)[None], "B.eigenvectors": eye}}
    new = {"0": {"A.eigenvectors": q, "B.eigenvectors": eye}}
    turn_moments(moments, linear_part(), old, new)
    torch.testing.assert_close(moments["0"]["second"], expected, rtol=0.02, atol=0)
    torch.testing.assert_close(moments["0"]["second"].sum(), variances.sum())


def net():
    return nn.Sequential(
        nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), Mean(), nn.Linear(6, 3)
    )


def config(**settings):
    return KFACConfig(
        direction="eigenbasis_adam", damping_kind="exact", factor_decay=0.9,
        factor_update_steps=3, inverse_update_steps=3, **settings,
    )  # fmt: skip


def train(model, kfac, optimizer, steps):
    losses = []
    for t in steps:
        generator = torch.Generator().manual_seed(t)
        x = torch.randint(7, (16, 5), generator=generator)
        y = (x == 0).sum(1).clamp(max=2)
        with kfac.record():
            logits = model(x)
        kfac.update(logits, "categorical")
        loss = F.cross_entropy(logits, y)
        model.zero_grad()
        loss.backward()
        kfac.precondition()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_it_trains_everything_and_resumes_to_the_bit(kfac_approx):
    model = net()
    kfac = KFAC(model, config(kfac_approx=kfac_approx))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(model, kfac, optimizer, range(8))
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    resumed = copy.deepcopy(model)
    again = KFAC(resumed, config(kfac_approx=kfac_approx))
    again.load_state_dict(copy.deepcopy(kfac.state_dict()))
    other = torch.optim.SGD(resumed.parameters(), lr=0.02, weight_decay=0.01)
    losses += train(model, kfac, optimizer, range(8, 60))
    train(resumed, again, other, range(8, 60))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_only_layers_with_a_basis_are_observed_and_the_report_says_so():
    model = net()
    kfac = KFAC(model, config())
    train(model, kfac, torch.optim.SGD(model.parameters(), lr=0.02), range(1))
    assert list(kfac.curvature()) == ["0", "1", "5"]
    rows = {row.name: row.preconditioner for row in kfac.report()}
    assert rows == {"0": "K-FAC-expand", "1": "K-FAC-expand", "2": "Adam", "5": "K-FAC-expand"}


def test_parameters_outside_layers_are_trained_by_adam():
    model = net()
    kfac = KFAC(model, config())
    twin = copy.deepcopy(model[2])
    adam = NAdamW(twin.parameters(), lr=0.02, betas=BETAS, eps=EPSILON)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    own, copies = list(model[2].parameters()), list(twin.parameters())

    def copy_gradient(p, q):
        q.grad = p.grad.clone()

    for p, q in zip(own, copies, strict=True):
        p.register_post_accumulate_grad_hook(lambda p, q=q: copy_gradient(p, q))
    for t in range(4):
        train(model, kfac, optimizer, [t])
        adam.step()
    for p, q in zip(own, copies, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_a_step_that_is_not_finite_enters_no_moment():
    model = net()
    kfac = KFAC(model, config())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    train(model, kfac, optimizer, range(3))
    before = copy.deepcopy(kfac.state_dict())
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    kfac.precondition()
    after = kfac.state_dict()
    assert torch.equal(before["count"], after["count"])
    for name, moments in before["moments"].items():
        for key, value in moments.items():
            torch.testing.assert_close(after["moments"][name][key], value)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"damping_kind": "pi"}, "needs damping_kind='exact'"),
        ({"damping_kind": "exact", "eigenvalue_correction": True}, "eigenvalue_correction=False"),
        ({"damping_kind": "exact", "inverse_placement": "one_rank"}, "inverse_placement"),
        ({"damping_kind": "exact", "betas": (0.9, 1.0)}, "betas must be"),
        ({"damping_kind": "exact", "epsilon": 0.0}, "epsilon must be"),
    ],
)
def test_settings_that_do_not_go_together(settings, message):
    with pytest.raises(ValueError, match=message):
        KFACConfig(direction="eigenbasis_adam", **settings)
