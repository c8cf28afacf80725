"""EKFAC against the exact GGN in the factors' eigenbasis."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from ggn import layer_ggn, matrix_order, relative_error
from nets import Mean
from observed import preconditioner_matrix
from torch import nn

from submission.kfac import KFACConfig, Preconditioner


def config(**options):
    return KFACConfig(
        **{
            "damping": 0.01,
            "damping_kind": "exact",
            "eigenvalue_correction": True,
            "fisher_type": "type-2",
            "factor_update_steps": 1,
            "inverse_update_steps": 1,
            **options,
        }
    )


def step(model, kfac, x, y):
    model.zero_grad()
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    F.cross_entropy(logits, y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.precondition()
    return plain


SELDOM = {"factor_update_steps": 1000, "inverse_update_steps": 1000, "early_updates": False}


def corrected(model, kfac, layer, damping=0.01):
    """The curvature that a layer is preconditioned by, [groups, P, P]: that of `ggn.layer_ggn`.

    Takes many steps.
    """
    curvature = preconditioner_matrix(model, kfac, layer).inverse()
    curvature -= damping * torch.eye(len(curvature))
    orders = matrix_order(model.get_submodule(layer))
    blocks = torch.stack([curvature[order][:, order] for order in orders])
    assert relative_error(blocks.square().sum(), curvature.square().sum()) < 1e-9  # no others
    return blocks


def assert_the_diagonal_in_the_basis(found, block, truth):
    """Diagonal in the eigenbasis of A and B, with the diagonal that the truth has there."""
    vectors = (torch.linalg.eigh(f).eigenvectors for f in block)
    basis = torch.kron(*vectors)
    turned = basis.T @ found @ basis
    expected = (basis.T @ truth @ basis).diagonal()
    torch.testing.assert_close(turned, expected.diag(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_without_sharing_the_eigenvalues_are_the_diagonal_of_the_exact_block(kfac_approx):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx, **SELDOM))
    step(model, kfac, x, y)
    for layer in ("0", "2", "4"):
        truth = layer_ggn(model, layer, (x,), lambda f: F.cross_entropy(f, y))
        block = kfac.curvature()[layer]
        (found,) = corrected(model, kfac, layer)
        assert_the_diagonal_in_the_basis(
            found, (block.gradient_covariance, block.input_covariance), truth
        )
        plain = relative_error(block.to_dense(), truth)
        assert relative_error(found, truth) < plain


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_correct_each_group(kfac_approx, groups):
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=groups), nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randn(9, 2, 2, 2), torch.randint(3, (9,))
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx, **SELDOM))
    step(model, kfac, x, y)
    truth = layer_ggn(model, "0", (x,), lambda f: F.cross_entropy(f, y))
    block = kfac.curvature()["0"]
    a, b = block.input_covariance, block.gradient_covariance
    factors = zip(b, a, strict=True) if groups > 1 else [(b, a)]
    truths = truth if groups > 1 else truth[None]
    found = corrected(model, kfac, "0")
    for one, factor, exact in zip(found, factors, truths, strict=True):
        assert_the_diagonal_in_the_basis(one, factor, exact)


def test_the_preconditioner_is_the_damped_inverse():
    """Of the curvature whose eigenvalues are the diagonal of the exact block."""
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(9, 4), torch.randint(3, (9,))
    kfac = Preconditioner(model, config())
    plain = step(model, kfac, x, y)
    truth = layer_ggn(model, "0", (x,), lambda f: F.cross_entropy(f, y))
    block = kfac.curvature()["0"]
    factors = (block.gradient_covariance, block.input_covariance)
    basis = torch.kron(*(torch.linalg.eigh(f).eigenvectors for f in factors))
    dense = basis @ ((basis.T @ truth @ basis).diagonal() + 0.01).diag() @ basis.T
    joint = torch.cat([plain["0.weight"], plain["0.bias"][:, None]], 1).flatten()
    expected = torch.linalg.solve(dense, joint).reshape(3, 5)
    torch.testing.assert_close(model[0].weight.grad, expected[:, :4])
    torch.testing.assert_close(model[0].bias.grad, expected[:, 4])


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_shared_positions_and_intervals_resume_bit_for_bit(kfac_approx):
    options = {"factor_update_steps": 1, "inverse_update_steps": 3, "factor_decay": 0.5}
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Mean(), nn.Linear(6, 3))
    batches = [(torch.randn(7, 2, 4), torch.randint(3, (7,))) for _ in range(8)]

    def run(model, kfac, steps):
        for x, y in steps:
            step(model, kfac, x, y)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    resumed = copy.deepcopy(model)
    run(model, Preconditioner(model, config(kfac_approx=kfac_approx, **options)), batches)
    first = Preconditioner(resumed, config(kfac_approx=kfac_approx, **options))
    run(resumed, first, batches[:5])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Preconditioner(resumed, config(kfac_approx=kfac_approx, **options))
    second.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, second, batches[5:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_it_needs_exact_damping():
    with pytest.raises(ValueError, match="needs damping_kind 'exact', not 'pi'"):
        KFACConfig(eigenvalue_correction=True)


def test_a_new_damping_between_updates_keeps_the_corrected_eigenvalues():
    def curvature_at(factor):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        kfac = Preconditioner(model, config(**SELDOM))
        step(model, kfac, torch.randn(20, 4), torch.randint(3, (20,)))
        kfac.damping *= factor
        (found,) = corrected(model, kfac, "0", kfac.damping)
        return found, kfac.curvature()["0"].to_dense()

    same, plain = curvature_at(1.0)
    for factor in (1 + 1e-12, 3.0):
        found, _ = curvature_at(factor)
        torch.testing.assert_close(found, same, rtol=1e-8, atol=1e-12)
    assert relative_error(same, plain) > 1e-2
