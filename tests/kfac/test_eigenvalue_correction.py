"""EKFAC against the exact GGN in the factors' eigenbasis."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from ggn import layer_ggn, relative_error
from nets import Mean
from torch import nn

from submission.kfac import KFAC as Preconditioner
from submission.kfac import KFACConfig
from submission.kfac.eigenvalue_correction import EigenvalueCorrectedFactors


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


def corrected(kfac, layer):
    inverse = kfac.state_dict()["inverses"][layer]
    return EigenvalueCorrectedFactors(
        inverse["A.eigenvectors"][0], inverse["B.eigenvectors"][0], inverse["corrected"][0]
    )


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_without_sharing_the_eigenvalues_are_the_diagonal_of_the_exact_block(kfac_approx):
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))
    x, y = torch.randn(9, 4), torch.randint(3, (9,))
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx))
    step(model, kfac, x, y)
    for layer in ("0", "2", "4"):
        truth = layer_ggn(model, layer, (x,), lambda f: F.cross_entropy(f, y))
        ekfac = corrected(kfac, layer)
        basis = torch.kron(ekfac.gradient_basis, ekfac.input_basis)
        diagonal = (basis.T @ truth @ basis).diagonal()
        torch.testing.assert_close(ekfac.eigenvalues.flatten(), diagonal, rtol=1e-9, atol=1e-14)
        plain = relative_error(kfac.curvature()[layer].to_dense(), truth)
        assert relative_error(ekfac.to_dense(), truth) < plain


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("groups", [1, 2])
def test_convolutions_correct_each_group(kfac_approx, groups):
    model = nn.Sequential(nn.Conv2d(2, 4, 2, groups=groups), nn.Flatten(), nn.Linear(4, 3))
    x, y = torch.randn(9, 2, 2, 2), torch.randint(3, (9,))
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx))
    step(model, kfac, x, y)
    truth = layer_ggn(model, "0", (x,), lambda f: F.cross_entropy(f, y))
    inverse = kfac.state_dict()["inverses"]["0"]
    for g, block in enumerate(truth if groups > 1 else truth[None]):
        basis = torch.kron(inverse["B.eigenvectors"][g], inverse["A.eigenvectors"][g])
        diagonal = (basis.T @ block @ basis).diagonal()
        torch.testing.assert_close(
            inverse["corrected"][g].flatten(), diagonal, rtol=1e-9, atol=1e-14
        )


def test_the_preconditioner_is_the_damped_inverse():
    model, x, y = nn.Sequential(nn.Linear(4, 3)), torch.randn(9, 4), torch.randint(3, (9,))
    kfac = Preconditioner(model, config())
    plain = step(model, kfac, x, y)
    dense = corrected(kfac, "0").to_dense() + 0.01 * torch.eye(15)
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
    def gradient(factor):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
        kfac = Preconditioner(
            model, config(factor_update_steps=10, inverse_update_steps=10, early_updates=False)
        )
        x, y = torch.randn(20, 4), torch.randint(3, (20,))
        step(model, kfac, x, y)
        kfac.damping *= factor
        plain = step(model, kfac, x, y)
        return kfac, model, plain

    _, same, _ = gradient(1.0)
    _, nearly, _ = gradient(1 + 1e-12)
    torch.testing.assert_close(nearly[0].weight.grad, same[0].weight.grad, rtol=1e-8, atol=1e-12)
    kfac, model, plain = gradient(3.0)
    inverse = kfac.state_dict()["inverses"]["0"]
    q_a, q_b = inverse["A.eigenvectors"][0], inverse["B.eigenvectors"][0]
    joint = torch.cat([plain["0.weight"], plain["0.bias"][:, None]], 1)
    expected = q_b @ ((q_b.T @ joint @ q_a) / (inverse["corrected"][0] + 0.03)) @ q_a.T
    torch.testing.assert_close(model[0].weight.grad, expected[:, :-1])
