"""Losses of torch that are computed inside record(): nothing needs to be stated."""

import pytest
import torch
import torch.nn.functional as F
from ggn import exact_ggn, relative_error
from observed import assert_same_factors
from torch import nn

from submission.kfac import Bernoulli, Categorical, Gaussian, KFACConfig, Preconditioner

WEIGHT = torch.tensor([0.5, 2.0, 1.0], dtype=torch.float64)
BINARY = torch.tensor([[0.0, 1, 1], [1, 0, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0], [0, 0, 0]])
LABELS = torch.tensor([0, 1, 2, 1, 0, 2])
SEEN = {
    "cross_entropy": (lambda f: F.cross_entropy(f, LABELS), Categorical(), {}),
    "sum": (lambda f: F.cross_entropy(f, LABELS, reduction="sum"), Categorical(), {}),
    "class weights": (
        lambda f: F.cross_entropy(f, LABELS, weight=WEIGHT), Categorical(),
        {"mask": WEIGHT[LABELS]},
    ),
    "ignored": (
        lambda f: F.cross_entropy(f, LABELS, ignore_index=1), Categorical(ignore_index=1), {},
    ),
    "smoothed": (
        lambda f: F.cross_entropy(f, LABELS, label_smoothing=0.1),
        Categorical(label_smoothing=0.1), {},
    ),
    "nll": (lambda f: F.nll_loss(F.log_softmax(f, -1), LABELS), Categorical(), {}),
    "module": (lambda f: nn.CrossEntropyLoss()(f, LABELS), Categorical(), {}),
    "binary": (
        lambda f: F.binary_cross_entropy_with_logits(f, BINARY.double()), Bernoulli(), {},
    ),
    "positive weight": (
        lambda f: F.binary_cross_entropy_with_logits(f, BINARY.double(), pos_weight=WEIGHT),
        Bernoulli(), {"weights": 1 + (WEIGHT - 1) * BINARY},
    ),
    "mse": (lambda f: F.mse_loss(f, BINARY.double()), Gaussian(), {}),
}  # fmt: skip


def perceptron():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def recorded_curvature(model, x, total, stated=None, **settings):
    """After one step in which the loss is computed inside record(), or stated."""
    settings = {"fisher_type": "type-2", "factor_update_steps": 1, **settings}
    kfac = Preconditioner(model, KFACConfig(**settings))
    model.zero_grad()
    with kfac.record():
        logits = model(x)
        loss = total(logits) if stated is None else None
    if stated is not None:
        stated(kfac, logits)
        loss = total(logits)
    loss.backward()
    kfac.precondition()
    assert not any(kfac.failures.values())
    return kfac.curvature()


@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("case", list(SEEN))
def test_a_loss_that_is_seen_needs_no_statement(case, fisher_type):
    loss, likelihood, options = SEEN[case]
    model, x = perceptron(), torch.randn(6, 4)
    found = recorded_curvature(model, x, loss, fisher_type=fisher_type)
    is_categorical = isinstance(likelihood, Categorical)
    targets = LABELS if is_categorical else BINARY.double()
    mask = options.get("mask", options.get("weights"))

    def stated(kfac, logits):
        kfac.update(logits, likelihood, targets=targets, mask=mask)

    scale = 1.0
    if case == "positive weight":  # torch divides by the number of terms, not by the weights' sum
        scale = float(mask.sum() / mask.numel())
    expected = recorded_curvature(model, x, loss, stated, fisher_type=fisher_type)
    for name, block in expected.items():
        torch.testing.assert_close(found[name].input_covariance, block.input_covariance)
        b = block.gradient_covariance * scale
        torch.testing.assert_close(found[name].gradient_covariance, b)


@pytest.mark.parametrize("case", [c for c in SEEN if c not in ("sum", "smoothed")])
def test_a_loss_that_is_seen_has_the_exact_curvature(case):
    """Of one layer: A ⊗ B is exact in one example, so is the mean over examples of B."""
    loss, _, _ = SEEN[case]
    model, x = nn.Sequential(nn.Linear(1, 3)), torch.zeros(6, 1)
    truth = exact_ggn(model, ["0.bias"], (x,), loss)
    found = recorded_curvature(model, x, loss)["0"]
    assert float(found.input_covariance[-1, -1]) == pytest.approx(1)
    assert relative_error(found.gradient_covariance, truth) <= 1e-12


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.one, self.two = nn.Linear(1, 4), nn.Linear(4, 3), nn.Linear(4, 2)

    def forward(self, x):
        h = self.trunk(x)
        return self.one(h), self.two(h)


def two_losses(outputs):
    one, two = outputs
    return F.cross_entropy(one, LABELS), F.mse_loss(two, BINARY[:, :2].double())


def test_losses_of_one_pass_add_up_with_their_weights():
    model, x = TwoHeads(), torch.zeros(6, 1)

    def total(outputs):
        first, second = two_losses(outputs)
        return first + 0.4 * second

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return torch.cat(self.net(x), -1)

    truth = exact_ggn(Joined(), ["net.trunk.bias"], (x,), lambda f: total((f[:, :3], f[:, 3:])))
    found = recorded_curvature(model, x, total)["trunk"].gradient_covariance
    assert relative_error(found, truth) <= 1e-12


PARTS = {
    "the batch": lambda model, x: [model(part) for part in x.split((2, 4))],
    "chunks of the outputs": lambda model, x: model(x).split((2, 4)),
    "chunks of outputs with positions": lambda model, x: model(x.view(3, 2, 2)).split((1, 2)),
    "every other output": lambda model, x: [(outputs := model(x))[0::2], outputs[1::2]],
}


@pytest.mark.parametrize("scale", [1, 1024, 0.25])
@pytest.mark.parametrize("parts_of", PARTS)
@pytest.mark.parametrize("fisher_type", ["type-2", "empirical"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_parts_of_one_mean_have_its_curvature(kfac_approx, fisher_type, parts_of, scale):
    """A mean that is taken in parts, each by its share; whatever the loss is scaled by."""
    model, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)), torch.randn(6, 2)
    labels = torch.cat([LABELS[0::2], LABELS[1::2]]) if "every" in parts_of else LABELS

    def curvature(compute):
        kfac = Preconditioner(model, KFACConfig(kfac_approx, fisher_type=fisher_type))
        with kfac.record():
            loss = compute()
        (scale * loss).backward()
        kfac.precondition()
        return kfac.curvature()

    def whole():
        logits = model(x.view(3, 2, 2) if "positions" in parts_of else x)
        return F.cross_entropy(logits.flatten(0, -2), LABELS)

    def parts():
        logits = [part.flatten(0, -2) for part in PARTS[parts_of](model, x)]
        sizes = [len(part) for part in logits]
        losses = map(F.cross_entropy, logits, labels.split(sizes))
        return sum(loss * size / 6 for loss, size in zip(losses, sizes, strict=True))

    assert_same_factors(curvature(parts), curvature(whole))


def test_chunks_of_outputs_without_a_dimension_of_classes():
    model, x = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 1)), torch.randn(6, 2)
    targets, loss = LABELS.double().clamp(max=1), F.binary_cross_entropy_with_logits
    whole = recorded_curvature(model, x, lambda f: loss(f.squeeze(-1), targets))

    def in_parts(f):
        parts = zip(f.squeeze(-1).split(3), targets.split(3), strict=True)
        return sum(loss(*part) for part in parts) / 2

    assert_same_factors(recorded_curvature(model, x, in_parts), whole)


def test_a_loss_that_reaches_no_call_weighs_nothing():
    model, x, penalty = TwoHeads(), torch.randn(6, 1), nn.Parameter(torch.zeros(2))

    def total(outputs):
        losses = two_losses(outputs)
        return losses[0] + 0.4 * losses[1] + 3 * F.mse_loss(penalty, torch.ones(2))

    found = recorded_curvature(model, x, total)
    expected = recorded_curvature(model, x, lambda o: two_losses(o)[0] + 0.4 * two_losses(o)[1])
    assert_same_factors(found, expected)


def test_parts_with_losses_beside_each_other_and_accumulated_ones():
    model, x = TwoHeads(), torch.randn(6, 1)

    def curvature(parts, accumulated):
        kfac = Preconditioner(model, KFACConfig("expand", fisher_type="type-2"))
        for number in range(accumulated):
            with kfac.record():
                loss = 0
                for part in torch.arange(6)[number::accumulated].chunk(parts):
                    one, two = model(x[part])
                    own = F.cross_entropy(one, LABELS[part]) + 0.4 * F.mse_loss(
                        two, BINARY[part, :2].double()
                    )
                    loss = loss + own / (parts * accumulated)
            loss.backward()
        kfac.precondition()
        return kfac.curvature()

    expected = curvature(1, 1)
    for parts, accumulated in ((1, 2), (3, 1), (1, 3)):
        assert_same_factors(curvature(parts, accumulated), expected)


def test_weights_of_several_losses_are_relative_where_the_loss_is_scaled():
    model, x = TwoHeads(), torch.zeros(6, 1)
    found = [
        recorded_curvature(model, x, lambda o, c=c: c * (two_losses(o)[0] + 0.4 * two_losses(o)[1]))
        for c in (1, 1024, 0.25)
    ]
    for other in found[1:]:
        assert_same_factors(other, found[0])


def test_a_loss_that_is_not_trained_on_does_not_count():
    model, x = TwoHeads(), torch.randn(6, 1)
    both = recorded_curvature(model, x, lambda outputs: two_losses(outputs)[0])
    one = recorded_curvature(model, x, lambda outputs: F.cross_entropy(outputs[0], LABELS))
    for name in ("trunk", "one"):
        assert_same_factors({name: both[name]}, {name: one[name]})


def test_passes_without_gradients_and_detached_outputs_are_not_counted():
    model, x = perceptron(), torch.randn(6, 4)
    plain = recorded_curvature(model, x, SEEN["cross_entropy"][0])

    def total(logits):
        with torch.no_grad():
            model(2 * x)
        teacher = model(3 * x).detach()
        return F.cross_entropy(logits, LABELS) + 0 * teacher.sum()

    assert_same_factors(recorded_curvature(model, x, total), plain)


def test_heads_that_the_loss_does_not_reach_keep_the_raw_gradient():
    model, x = TwoHeads(), torch.randn(6, 1)
    kfac = Preconditioner(model, KFACConfig(fisher_type="type-2"))
    with kfac.record():
        one, two = model(x)
        loss = F.cross_entropy(one, LABELS)
    (loss + two.sum()).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.precondition()
    for name in ("two.weight", "two.bias"):
        assert torch.equal(model.get_parameter(name).grad, plain[name])
    assert not torch.allclose(model.one.weight.grad, plain["one.weight"])
    row = next(row for row in kfac.report() if row.name == "two")
    assert (row.preconditioner, row.reason) == (
        "raw gradient", "the loss has not reached it so far",
    )  # fmt: skip


@pytest.mark.parametrize("weights", [None, torch.tensor([1.0, 2, 0, 1, 1, 0])])
@pytest.mark.parametrize("ignored", [-100, 2])
def test_weights_of_an_unreduced_loss_do_not_go_by_without_a_word(weights, ignored, caplog):
    def total(logits):
        terms = F.cross_entropy(logits, LABELS, reduction="none", ignore_index=ignored)
        if ignored == 2:
            terms = terms[LABELS != 2]
        used = weights if weights is None or ignored != 2 else weights[LABELS != 2]
        return terms.mean() if used is None else (terms * used).sum() / used.sum()

    recorded_curvature(perceptron(), torch.randn(6, 4), total)
    assert ("have weights of their own" in caplog.text) == (weights is not None)
