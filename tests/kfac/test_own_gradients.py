"""The empirical Fisher of a loss of which its own gradients alone are known: CTC, L1, any."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from submission.kfac import KFACConfig, OwnGradients, Preconditioner, curvature

EXAMPLES, FRAMES, CLASSES = 4, 6, 5
TARGETS = torch.tensor([[1, 2], [3, 3], [2, 4], [4, 1]])
LENGTHS = torch.tensor([2, 1, 2, 2])


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def net(*first):
    return nn.Sequential(*first, nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, CLASSES))


def ctc(logits, reduction):
    frames = torch.full((EXAMPLES,), FRAMES)
    outputs = logits.log_softmax(-1).transpose(0, 1)
    return F.ctc_loss(outputs, TARGETS, frames, LENGTHS, reduction=reduction)


def factors(model, x, gradient, approx):
    """A and B of the last layer; `gradient`: of the summed loss at the outputs [N, R, classes]."""
    inputs = model[:-1](x).detach()
    a = torch.cat([inputs, torch.ones(*inputs.shape[:2], 1)], -1)
    if approx == "expand":
        a, g = a.flatten(0, 1), gradient.flatten(0, 1)
    else:
        a, g = a.mean(1), gradient.sum(1)
    return a.T @ a / len(a), g.T @ g / len(gradient)


def recorded(model, x, approx, loss_of, weight=1.0, state=None, fisher_type="empirical"):
    """The curvature that the preconditioner has after one step.

    `state`: a function of (kfac, logits, loss) that states it; None where it is seen.
    """
    kfac = Preconditioner(model, KFACConfig(kfac_approx=approx, fisher_type=fisher_type))
    with kfac.record():
        logits = model(x)
        loss = loss_of(logits) if state is None else None
    if state is not None:
        loss = loss_of(logits)
        state(kfac, logits, loss)
    (weight * loss.sum()).backward()
    kfac.precondition()
    return kfac.curvature()["last" if hasattr(model, "last") else str(len(model) - 1)]


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("weight", [1.0, 3.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_ctc_loss_is_seen(approx, weight, reduction):
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)
    logits = model(x)
    each = ctc(logits, "none") / (LENGTHS if reduction == "mean" else 1)
    a, b = factors(model, x, torch.autograd.grad(each.sum(), logits)[0], approx)
    found = recorded(model, x, approx, lambda logits: ctc(logits, reduction), weight)
    torch.testing.assert_close(found.input_covariance, a)
    torch.testing.assert_close(found.gradient_covariance, b)


def l1(logits):
    return logits.abs().sum((1, 2))


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("is_sum", [True, False])
@pytest.mark.parametrize("normed", [True, False])  # whose parameters take a pass of their own
@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_any_loss_can_be_stated(approx, is_sum, normed, weight):
    model = net(*[nn.LayerNorm(3)] * normed, *[nn.Conv1d(FRAMES, FRAMES, 1)] * (not normed))
    x = torch.randn(EXAMPLES, FRAMES, 3)
    logits = model(x)
    a, b = factors(model, x, torch.autograd.grad(l1(logits).sum(), logits)[0], approx)

    def state(kfac, logits, loss):
        kfac.update(logits, OwnGradients(is_sum=is_sum, scale=2.0), loss=loss)

    def loss_of(logits):
        return l1(logits).sum() if is_sum else l1(logits).mean()

    found = recorded(model, x, approx, loss_of, weight, state)
    torch.testing.assert_close(found.input_covariance, a)
    torch.testing.assert_close(found.gradient_covariance, 2 * b)


def test_the_loss_of_masked_examples_does_not_count():
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    logits = model(x)
    (gradient,) = torch.autograd.grad((l1(logits) * mask).sum(), logits)
    _, b = factors(model, x, gradient, "expand")

    def state(kfac, logits, loss):
        kfac.update(logits, OwnGradients(), mask=mask, loss=loss)

    found = recorded(
        model, x, "expand", lambda logits: (l1(logits) * mask).sum() / mask.sum(), 1.0, state
    )
    torch.testing.assert_close(found.gradient_covariance, b * EXAMPLES / 3)


def test_without_training_the_gradients_are_the_targets():
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)
    logits = model(x)
    (gradient,) = torch.autograd.grad(l1(logits).sum(), logits)
    _, b = factors(model, x, gradient, "reduce")
    found = curvature(
        model, x, likelihood=OwnGradients(), kfac_approx="reduce", fisher_type="empirical",
        targets=gradient,
    )  # fmt: skip
    torch.testing.assert_close(found["2"].gradient_covariance, b)


def test_beside_another_seen_loss():
    """Their curvatures add up; CTC then takes a pass of its own."""
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)
    labels = torch.randint(CLASSES, (EXAMPLES, FRAMES))

    def cross_entropy(logits):
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    found = [
        recorded(model, x, "expand", loss_of).gradient_covariance
        for loss_of in (
            cross_entropy,
            lambda logits: ctc(logits, "mean"),
            lambda logits: cross_entropy(logits) + ctc(logits, "mean"),
        )
    ]
    torch.testing.assert_close(found[2], found[0] + found[1])


def test_labels_cannot_be_sampled_from_it():
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)
    for fisher_type in ("mc", "type-2"):
        with pytest.raises(ValueError, match="no labels can be sampled"):
            recorded(
                model, x, "expand", lambda logits: l1(logits).mean(), 1.0,
                lambda kfac, logits, loss: kfac.update(logits, OwnGradients(), loss=loss),
                fisher_type,
            )  # fmt: skip
    with pytest.raises(RuntimeError, match="fisher_type='empirical' CTC is seen"):
        recorded(model, x, "expand", lambda logits: ctc(logits, "mean"), fisher_type="mc")


def test_the_loss_that_is_given_has_to_be_the_one():
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)

    with pytest.raises(ValueError, match="the loss itself is needed"):
        recorded(
            model, x, "expand", lambda logits: l1(logits).mean(), 1.0,
            lambda kfac, logits, loss: kfac.update(logits, OwnGradients()),
        )  # fmt: skip


def test_what_else_reaches_the_outputs_is_no_part_of_it(caplog):
    """As with other likelihoods, the first update is dropped, and says why."""
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)
    kfac = Preconditioner(model, KFACConfig(fisher_type="empirical"))
    with kfac.record():
        logits = model(x)
    loss = l1(logits).mean()
    kfac.update(logits, OwnGradients(), loss=loss)
    (loss + 10 * logits.square().mean()).backward()
    kfac.precondition()
    assert sum(kfac.failures.values()) == 1
    assert "not a multiple" in caplog.text
    assert not kfac.curvature()


def test_single_terms_are_unreduced():
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)
    logits = model(x)
    _, b = factors(model, x, torch.autograd.grad(l1(logits).sum(), logits)[0], "expand")

    def state(kfac, logits, loss):
        kfac.update(logits, OwnGradients(), loss=loss)

    found = recorded(model, x, "expand", l1, 1.0, state)
    torch.testing.assert_close(found.gradient_covariance, b)


def test_later_updates_take_the_scale_from_the_loss():
    model = net()
    kfac = Preconditioner(
        model, KFACConfig(fisher_type="empirical", factor_update_steps=1, inverse_update_steps=1)
    )
    for weight in (1.0, 2.0, 0.5):
        model.zero_grad()
        x = torch.randn(EXAMPLES, FRAMES, 3)
        with kfac.record():
            logits = model(x)
        loss = l1(logits).mean()
        _, b = factors(
            model, x, EXAMPLES * torch.autograd.grad(loss, logits, retain_graph=True)[0], "expand"
        )
        kfac.update(logits, OwnGradients(), loss=loss)
        (weight * loss).backward()
        kfac.precondition()
        torch.testing.assert_close(kfac.curvature()["2"].gradient_covariance, b)


def test_a_ctc_loss_of_one_example_needs_a_dimension_for_it():
    model = net()
    kfac = Preconditioner(model, KFACConfig(fisher_type="empirical"))
    x, labels, lengths = torch.randn(FRAMES, 3), torch.tensor([1, 2]), torch.tensor([FRAMES, 2])

    def run():
        with kfac.record():
            F.ctc_loss(model(x).log_softmax(-1), labels, *lengths)

    with pytest.raises(ValueError, match="without a dimension of examples"):
        run()


def test_a_ctc_loss_that_is_left_out_is_named(caplog):
    model, x = net(), torch.randn(EXAMPLES, FRAMES, 3)
    labels = torch.randint(CLASSES, (EXAMPLES * FRAMES,))
    recorded(
        model, x, "expand",
        lambda logits: F.cross_entropy(logits.flatten(0, 1), labels) + ctc(logits, "mean"),
        fisher_type="mc",
    )  # fmt: skip
    assert "has no part in the curvature" in caplog.text
