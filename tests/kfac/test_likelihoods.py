"""Would-be gradients: their outer products against the Hessian of the loss by autograd."""

import pytest
import torch
import torch.nn.functional as F
from ggn import loss_hessian

from submission.kfac import Bernoulli, Categorical, Gaussian


def outer_products(likelihood, logits, **kwargs):
    """Σ v vᵀ per example: block-diagonal over examples, flattened."""
    n = logits.shape[0]
    total = torch.zeros(n, logits[0].numel(), logits[0].numel())
    for vector in likelihood.would_be_gradients(logits, **kwargs):
        flat = vector.reshape(n, -1)
        total += flat.unsqueeze(2) * flat.unsqueeze(1)
    return torch.block_diag(*total)


CASES = {
    "categorical": (Categorical(), (4, 3), lambda f: F.cross_entropy(f, torch.zeros(4, dtype=int))),
    "categorical per position": (
        Categorical(),
        (2, 3, 4),
        lambda f: F.cross_entropy(f.flatten(0, 1), torch.zeros(6, dtype=int)),
    ),
    "categorical, classes second": (
        Categorical(class_dim=1),
        (2, 3, 2, 2),
        lambda f: F.cross_entropy(f, torch.zeros(2, 2, 2, dtype=int)),
    ),
    "label smoothing": (
        Categorical(label_smoothing=0.2),
        (4, 3),
        lambda f: F.cross_entropy(f, torch.zeros(4, dtype=int), label_smoothing=0.2),
    ),
    "bernoulli": (
        Bernoulli(),
        (4, 3),
        lambda f: F.binary_cross_entropy_with_logits(f, torch.zeros_like(f)),
    ),
    "gaussian": (Gaussian(), (4, 3), lambda f: F.mse_loss(f, torch.zeros_like(f))),
    "unit variance": (
        Gaussian(variance=1.0),
        (4, 3),
        lambda f: 0.5 * F.mse_loss(f, torch.zeros_like(f)),
    ),
    "scaled": (Gaussian(scale=3.0), (4, 3), lambda f: 3 * F.mse_loss(f, torch.zeros_like(f))),
}


@pytest.mark.parametrize("case", list(CASES))
def test_hessian_root_squares_to_the_hessian_of_the_mean_loss(case):
    likelihood, shape, loss = CASES[case]
    logits = torch.randn(shape)
    hessian = outer_products(likelihood, logits, fisher_type="type-2") / likelihood.terms(logits)
    torch.testing.assert_close(hessian, loss_hessian(logits, loss), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("case", list(CASES))
def test_sampled_gradients_converge_at_the_monte_carlo_rate(case):
    likelihood, shape, _ = CASES[case]
    logits = torch.randn(shape)
    exact = outer_products(likelihood, logits, fisher_type="type-2")
    errors = {}
    for samples in (100, 10_000):
        estimate = outer_products(
            likelihood,
            logits,
            fisher_type="mc",
            mc_samples=samples,
            generator=torch.Generator().manual_seed(1),
        )
        errors[samples] = float((estimate - exact).norm() / exact.norm())
        assert errors[samples] < 8 / samples**0.5
    assert errors[10_000] < errors[100] / 3


@pytest.mark.parametrize("case", list(CASES))
def test_the_empirical_gradient_is_that_of_the_loss(case):
    likelihood, shape, loss = CASES[case]
    logits = torch.randn(shape, requires_grad=True)
    if isinstance(likelihood, Categorical):
        targets = torch.zeros(likelihood.term_shape(logits), dtype=int)
    else:
        targets = torch.zeros(shape)
    (expected,) = torch.autograd.grad(loss(logits), logits)
    (vector,) = likelihood.would_be_gradients(logits, fisher_type="empirical", targets=targets)
    scale = likelihood.scale**0.5  # outer products scale linearly, so gradients by the root
    torch.testing.assert_close(vector * scale / likelihood.terms(logits), expected)


@pytest.mark.parametrize("fisher_type", ["mc", "type-2", "empirical"])
@pytest.mark.parametrize("likelihood", [Categorical(), Bernoulli(), Gaussian()])
def test_masked_terms_do_not_count_whatever_they_hold(likelihood, fisher_type):
    logits = torch.randn(5, 4)
    mask = torch.tensor([True, False, True, True, False])
    per_term = mask[:, None].expand(5, 4) if likelihood.term_shape(logits) == (5, 4) else mask
    logits[~mask] = float("nan")
    targets = torch.zeros(likelihood.term_shape(logits), dtype=int)
    vectors = list(
        likelihood.would_be_gradients(
            logits,
            fisher_type=fisher_type,
            mask=per_term,
            targets=targets,
            generator=torch.Generator().manual_seed(0),
        )
    )
    assert all(v[mask].isfinite().all() and (v[mask] != 0).any() for v in vectors)
    assert all((v[~mask] == 0).all() for v in vectors)
    assert likelihood.terms(logits, per_term) == per_term.sum()


def test_weights_in_the_mask_weigh_the_terms():
    logits, weights = torch.randn(4, 3), torch.tensor([2.0, 0.0, 0.5, 1.0])
    likelihood = Categorical()

    def loss(f):
        per_example = F.cross_entropy(f, torch.zeros(4, dtype=int), reduction="none")
        return (weights * per_example).sum() / weights.sum()

    hessian = outer_products(likelihood, logits, fisher_type="type-2", mask=weights)
    hessian /= likelihood.terms(logits, weights)
    torch.testing.assert_close(hessian, loss_hessian(logits, loss))


def test_ignored_labels_are_masked():
    likelihood = Categorical(ignore_index=-100)
    logits, targets = torch.randn(4, 3), torch.tensor([0, -100, 2, -100])
    expected = torch.autograd.functional.jacobian(lambda f: F.cross_entropy(f, targets), logits)
    (vector,) = likelihood.would_be_gradients(logits, fisher_type="empirical", targets=targets)
    assert likelihood.terms(logits, targets=targets) == 2
    torch.testing.assert_close(vector / 2, expected)


def test_labels_out_of_range_may_stand_under_a_mask_only():
    logits, targets = torch.randn(4, 3), torch.tensor([0, -100, 2, 3])
    mask = torch.tensor([True, False, True, False])
    options = {"fisher_type": "empirical", "targets": targets}
    (vector,) = Categorical().would_be_gradients(logits, mask=mask, **options)
    (expected,) = Categorical().would_be_gradients(
        logits[::2], fisher_type="empirical", targets=targets[::2]
    )
    torch.testing.assert_close(vector[::2], expected)
    assert not vector[1::2].any()
    with pytest.raises(ValueError, match=r"label -100 is not in 0 .. 2: mask the terms"):
        list(Categorical().would_be_gradients(logits, **options))
    with pytest.raises(ValueError, match=r"label 3 is not in 0 .. 2"):
        list(Categorical(ignore_index=-100).would_be_gradients(logits, **options))


def test_soft_labels():
    logits, targets = torch.randn(4, 3), torch.rand(4, 3).softmax(-1)
    expected = torch.autograd.functional.jacobian(lambda f: F.cross_entropy(f, targets), logits)
    (vector,) = Categorical().would_be_gradients(logits, fisher_type="empirical", targets=targets)
    torch.testing.assert_close(vector / 4, expected)


def test_wrong_arguments_are_named():
    logits = torch.randn(4, 3)
    with pytest.raises(ValueError, match="fisher_type must be"):
        list(Categorical().would_be_gradients(logits, fisher_type="exact"))
    with pytest.raises(ValueError, match="needs the targets"):
        list(Categorical().would_be_gradients(logits, fisher_type="empirical"))
    with pytest.raises(ValueError, match="mask has shape"):
        Categorical().terms(logits, torch.ones(3))
    with pytest.raises(ValueError, match="variance must be positive"):
        Gaussian(variance=0.0)
