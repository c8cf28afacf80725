"""Adam in the eigenbasis of the factors, and its polar factor."""

import copy

import pytest
import torch
import torch.nn.functional as F
from nets import Mean
from torch import nn

from submission.kfac import KFACConfig, Preconditioner
from submission.kfac.linalg.factor import Factor
from submission.kfac.linalg.inverses import followed_eigenvectors
from submission.kfac.linalg.polar import polar_factor, with_equal_singular_values
from submission.optimizers import NAdamW

BETAS, EPSILON = (0.9, 0.99), 1e-8


def settings_of(every, direction="eigenbasis_adam", **settings):
    return KFACConfig(
        direction=direction, damping_kind="exact", fisher_type="type-2",
        factor_update_steps=every, inverse_update_steps=every, early_updates=False,
        betas=BETAS, epsilon=EPSILON, **settings,
    )  # fmt: skip


def step_of(model, kfac, x, y, mask=None):
    """The gradients of one step, and what replaces them."""
    model.zero_grad()
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical", mask=mask)
    F.cross_entropy(logits, y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.precondition()
    return plain, {name: p.grad.clone() for name, p in model.named_parameters()}


def joint(gradients):
    return torch.cat([gradients["0.weight"], gradients["0.bias"][:, None]], 1)


def basis_of(kfac):
    """The vectors in use for B and A."""
    basis = kfac.state.blocks["0"].inverse.eigenbasis()
    return basis.b[0].clone(), basis.a[0].clone()


def batch_of(t):
    """Their scales, and with them the bases, change from step to step."""
    scales = torch.tensor([1.0, 2.0, 0.5, 3.0]).roll(t)
    return scales * torch.randn(20, 4), torch.randint(3, (20,))


def test_with_a_fixed_basis_it_is_nadamw_on_rotated_parameters():
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    kfac = Preconditioner(model, settings_of(1000))
    rotated = nn.Parameter(torch.zeros(3, 5))
    reference = NAdamW([rotated], lr=1.0, betas=BETAS, eps=EPSILON)
    position = torch.zeros(3, 5)
    for t in range(5):
        plain, update = step_of(model, kfac, *batch_of(t))
        q_b, q_a = basis_of(kfac)
        position -= joint(update)
        rotated.grad = q_b.T @ joint(plain) @ q_a
        reference.step()
        back = q_b @ rotated.detach() @ q_a.T
        torch.testing.assert_close(position, back, rtol=1e-10, atol=1e-12)


class Moments:
    """Adam's moments of one layer, in the basis of the entries at first."""

    def __init__(self):
        self.basis = torch.eye(3), torch.eye(5)
        self.first, self.second, self.count = torch.zeros(3, 5), torch.zeros(3, 5), 0

    def turn(self, basis):
        """The mean turns with the basis, variances of uncorrelated entries by the squares."""
        b, a = (old.T @ new for old, new in zip(self.basis, basis, strict=True))
        self.first = b.T @ self.first @ a
        self.second = b.square().T @ self.second @ a.square()
        self.basis = basis

    def update(self, gradient):
        q_b, q_a = self.basis
        g = q_b.T @ gradient @ q_a
        self.count += 1
        for name, value, beta in zip(("first", "second"), (g, g.square()), BETAS, strict=True):
            setattr(self, name, beta * getattr(self, name) + (1 - beta) * value)
        ahead = (BETAS[0] * self.first + (1 - BETAS[0]) * g) / (1 - BETAS[0] ** self.count)
        scale = (self.second / (1 - BETAS[1] ** self.count)).sqrt() + EPSILON
        return q_b @ (ahead / scale) @ q_a.T


@pytest.mark.parametrize("late", [True, False])
def test_the_moments_turn_along_with_the_basis(late):
    """Also from none at all, where the first update had no valid label."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    kfac, moments = Preconditioner(model, settings_of(2)), Moments()
    turned = 0
    for t in range(7):
        mask = torch.zeros(20, dtype=torch.bool) if late and t == 0 else None
        plain, update = step_of(model, kfac, *batch_of(t), mask)
        if "0" in kfac.curvature():
            before, basis = moments.basis, basis_of(kfac)
            turned += not torch.equal(before[1], basis[1])
            moments.turn(basis)
        torch.testing.assert_close(joint(update), moments.update(joint(plain)))
    assert turned == (3 if late else 4)


@pytest.mark.parametrize("form", ["dense", "rows"])
def test_a_followed_basis_comes_to_the_eigenvectors(form):
    rows = torch.randn(1, 6, 5, dtype=torch.float64) * torch.tensor([3.0, 0.2, 1.0, 9.0, 0.05])
    dense = rows.mT @ rows
    factor = Factor(dense if form == "dense" else rows, form)
    vectors = torch.eye(5, dtype=torch.float64)[None]
    for _ in range(60):
        quotients, vectors = followed_eigenvectors(factor, vectors)
    eye = torch.eye(5, dtype=torch.float64)
    torch.testing.assert_close(vectors.mT @ vectors, eye[None])
    torch.testing.assert_close(quotients, torch.linalg.eigvalsh(dense).flip(-1))
    torch.testing.assert_close(vectors.mT @ dense @ vectors, torch.diag_embed(quotients))


def test_a_followed_basis_of_a_factor_without_rank_is_orthonormal():
    vectors = torch.linalg.qr(torch.randn(1, 8, 8)).Q
    one = torch.randn(1, 1, 8)
    for _ in range(20):
        quotients, vectors = followed_eigenvectors(Factor(one.mT @ one, "dense"), vectors)
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(8)[None], atol=1e-5, rtol=0)
    torch.testing.assert_close(quotients[0, 0], one.square().sum())
    spoiled = Factor(one.mT @ one * torch.nan, "dense")
    assert followed_eigenvectors(spoiled, vectors)[1].equal(vectors)  # the old ones


def test_variances_of_uncorrelated_entries_turn_by_the_squares():
    moments, q = Moments(), torch.linalg.qr(torch.randn(5, 5)).Q
    moments.second = variances = torch.rand(3, 5)
    samples = torch.randn(200_000, 3, 5) * variances.sqrt()
    moments.turn((torch.eye(3), q))
    torch.testing.assert_close(moments.second, (samples @ q).square().mean(0), rtol=0.02, atol=0)
    torch.testing.assert_close(moments.second.sum(), variances.sum())


def net():
    return nn.Sequential(
        nn.Embedding(7, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), Mean(), nn.Linear(6, 3)
    )


def config(direction="eigenbasis_adam", **settings):
    return KFACConfig(
        direction=direction, damping_kind="exact", factor_decay=0.9,
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
@pytest.mark.parametrize("direction", ["eigenbasis_adam", "eigenbasis_polar"])
def test_it_trains_everything_and_resumes_to_the_bit(direction, kfac_approx):
    model = net()
    kfac = Preconditioner(model, config(direction, kfac_approx=kfac_approx))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, weight_decay=0.01)
    before = [p.detach().clone() for p in model.parameters()]
    losses = train(model, kfac, optimizer, range(8))
    assert all(not torch.equal(p, q) for p, q in zip(before, model.parameters(), strict=True))
    resumed = copy.deepcopy(model)
    again = Preconditioner(resumed, config(direction, kfac_approx=kfac_approx))
    again.load_state_dict(copy.deepcopy(kfac.state_dict()))
    other = torch.optim.SGD(resumed.parameters(), lr=0.02, weight_decay=0.01)
    losses += train(model, kfac, optimizer, range(8, 60))
    train(resumed, again, other, range(8, 60))
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_only_layers_with_a_basis_are_observed_and_the_report_says_so():
    model = net()
    kfac = Preconditioner(model, config())
    train(model, kfac, torch.optim.SGD(model.parameters(), lr=0.02), range(1))
    assert list(kfac.curvature()) == ["0", "1", "5"]
    rows = {row.name: row.preconditioner for row in kfac.report()}
    assert rows == {"0": "K-FAC-expand", "1": "K-FAC-expand", "2": "Adam", "5": "K-FAC-expand"}


def test_parameters_outside_layers_are_trained_by_adam():
    model = net()
    kfac = Preconditioner(model, config())
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
    model = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3), nn.Linear(3, 3))
    faulty, sound = (Preconditioner(model, settings_of(1000)) for _ in range(2))
    for t in range(3):
        x, y = batch_of(t)
        for kfac in (faulty, sound):
            step_of(model, kfac, x, y)
    for p in model.parameters():
        p.grad = torch.full_like(p, float("nan"))
    faulty.precondition()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for t in range(3, 5):
        x, y = batch_of(t)
        (_, found), (_, expected) = (step_of(model, kfac, x, y) for kfac in (faulty, sound))
        for name, update in expected.items():
            torch.testing.assert_close(found[name], update)


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


def polar(matrix):
    """In the directions that the matrix has: the gradients of a softmax, say, add up to zero."""
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    present = values > 1e-6 * values.amax(-1, keepdim=True)
    return (left * present[..., None, :]) @ right


@pytest.mark.parametrize("shape", [(1, 7), (5, 3), (4, 4), (2, 3, 6), (2, 2, 8, 5)])
def test_a_polar_factor_has_singular_values_of_one(shape):
    matrix = torch.randn(shape) * 1e-6
    torch.testing.assert_close(polar_factor(matrix), polar(matrix), rtol=0, atol=3e-3)


def test_the_polar_factor_of_few_directions_is_in_them_and_of_none_is_zero():
    rows, columns = torch.randn(8, 2), torch.randn(2, 9)
    found = torch.linalg.svdvals(polar_factor(rows @ columns))
    torch.testing.assert_close(found[:2], torch.ones(2), rtol=0, atol=2e-3)
    assert found[2:].max() < 1e-6
    assert not polar_factor(torch.zeros(3, 4)).any()


@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-22, 1.0, 1e30])
def test_the_polar_factor_has_the_norm_of_the_matrix_whatever_its_size(size):
    matrix = torch.randn(5, 3, dtype=torch.float32)
    found = with_equal_singular_values(matrix * size).double() / size
    expected = polar(matrix.double()) * matrix.double().norm() / 3**0.5
    torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2)
    for shape in [(0, 5), (5, 0), (0, 3, 4), (1, 4)]:
        assert with_equal_singular_values(torch.ones(shape)).shape == shape


def test_eigenbasis_polar_is_the_polar_factor_of_adams_update_of_its_norm():
    """Layers of equal and other shapes, a grouped convolution, and what has no factors."""

    class Net(nn.Sequential):
        def __init__(self):
            super().__init__(
                nn.Conv2d(4, 6, 3, groups=2), nn.Flatten(), nn.Linear(24, 5), nn.LayerNorm(5),
                nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3),
            )  # fmt: skip

    def joint(name, update):
        weight, bias = update[f"{name}.weight"], update[f"{name}.bias"]
        groups = 2 if weight.dim() > 2 else 1
        rows = torch.cat([weight.flatten(1), bias[:, None]], 1)
        return rows.reshape(groups, -1, rows.shape[-1])

    model = Net()
    rules = ("eigenbasis_adam", "eigenbasis_polar")
    adam, found = (Preconditioner(model, settings_of(2, rule)) for rule in rules)
    compared = 0
    for _ in range(5):
        x, y = torch.randn(12, 4, 4, 4), torch.randint(3, (12,))
        (_, update), (_, taken) = (step_of(model, kfac, x, y) for kfac in (adam, found))
        for name in ("0", "2", "4", "6", "8"):
            plain, result = joint(name, update), joint(name, taken)
            norms = torch.linalg.matrix_norm(plain, keepdim=True)
            torch.testing.assert_close(torch.linalg.matrix_norm(result, keepdim=True), norms)
            values = torch.linalg.svdvals(plain / norms)
            if ((values < 1e-6) | (values > 1e-3)).all():  # smaller ones get part of the way
                compared += 1
                expected = polar(plain)
                expected *= norms / torch.linalg.matrix_norm(expected, keepdim=True)
                torch.testing.assert_close(result, expected, rtol=0, atol=3e-3 * norms.max().item())
        for name in ("3.weight", "3.bias"):
            assert torch.equal(update[name], taken[name])
    assert compared >= 20
