"""Empirical factors out of the loss's own backward pass: those of a pass of their own."""

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from nets import Mean, Tokens, Twice
from observed import FisherPasses, NoMemoryFor, assert_same_tensors
from observed import curvature_tensors as tensors_of
from torch import nn

from submission.kfac import (
    Bernoulli,
    Categorical,
    Gaussian,
    KFACConfig,
    Positions,
    Preconditioner,
    curvature,
)
from submission.kfac.fisher.loss_pass import proportion


class Tied(nn.Module):
    """Embedding and output layer with one weight."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 4)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)))


def plain():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.LayerNorm(6), Mean(), nn.Linear(6, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(), nn.Conv2d(4, 3, 3, groups=1),
        nn.Flatten(), nn.Linear(12, 3),
    )  # fmt: skip


CASES = {
    "plain": (plain, lambda: torch.randn(7, 2, 4), 3),
    "convolutions": (convolutions, lambda: torch.randn(5, 2, 4, 4), 3),
    "tokens": (lambda: Tokens(pool=False), lambda: torch.randint(6, (5, 3)), 2),
    "tied": (Tied, lambda: torch.randint(5, (4, 3)), 5),
    "twice": (Twice, lambda: torch.randn(6, 2, 3), 2),
    "attention": (
        lambda: nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True),
        lambda: torch.randn(3, 5, 4),
        4,
    ),
}


def cross_entropy(logits, y, scale=1.0, **options):
    return scale * F.cross_entropy(logits.movedim(-1, 1), y, **options)


def configuration(**options):
    return KFACConfig(
        **{
            "fisher_type": "empirical", "factor_update_steps": 1, "inverse_update_steps": 1,
            "damping": 0.1, **options,
        }
    )  # fmt: skip


def step(model, kfac, x, likelihood, loss_of, targets, mask=None, share=True, forward=None):
    """Gradients before and after `precondition`."""
    model.zero_grad()
    with kfac.record():
        logits = (forward or model)(x)
    loss = loss_of(logits)
    kfac.update(logits, likelihood, mask=mask, targets=targets, loss=loss if share else None)
    loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    kfac.precondition()
    return before, [p.grad.clone() for p in model.parameters()]


@pytest.fixture
def passes(monkeypatch):
    """Counts the Fisher passes."""
    return FisherPasses(monkeypatch, Preconditioner)


def compare(model, x, passes, likelihood, loss_of, targets, mask=None, shared=True, **options):
    """Steps with a Fisher pass, and with the loss's pass alone, are the same."""
    apart, together = model, copy.deepcopy(model)
    kfacs = [Preconditioner(m, configuration(**options)) for m in (apart, together)]
    # Adam divides rounding errors of directions without gradient by its epsilon.
    atol = 1e-7 if "direction" in options else 1e-12
    for _ in range(2):
        expected = step(apart, kfacs[0], x, likelihood, loss_of, targets, mask, share=False)
        made = len(passes)
        got = step(together, kfacs[1], x, likelihood, loss_of, targets, mask)
        assert (len(passes) == made) == shared
        for ours, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=atol)
    ours, theirs = tensors_of(kfacs[1]), tensors_of(kfacs[0])
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("scale", [1.0, 1e-3, -40.0])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_the_same_factors_and_gradients(case, kfac_approx, scale, passes):
    make, inputs, classes = CASES[case]
    model, x = make(), inputs()
    y = torch.randint(classes, model(x).shape[:-1])
    compare(
        model, x, passes, "categorical", lambda out: cross_entropy(out, y, scale), y,
        kfac_approx=kfac_approx,
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {"factor_decay": 0.9},
        {"damping_kind": "exact"},
        {"damping_kind": "exact", "eigenvalue_correction": True},
        {"damping_kind": "exact", "direction": "eigenbasis_adam"},
        {"max_factor_side": 4},
        {"inverse_update_steps": 100},  # factors of few rows may be kept as rows
        {"kfac_approx": "auto"},
    ],
)
def test_with_other_settings(options, passes):
    n = 3 if "inverse_update_steps" in options else 20
    x, y = torch.randn(n, 2, 4), torch.randint(3, (n,))
    compare(
        plain(), x, passes, "categorical", lambda out: cross_entropy(out, y), y,
        **{"kfac_approx": "reduce", **options},
    )  # fmt: skip


def test_other_losses(passes):
    x, model = torch.randn(7, 2, 4), plain()
    y = torch.rand(7, 3).round()
    mask = torch.rand(7, 3) > 0.3
    compare(
        model, x, passes, Bernoulli(),
        lambda out: (F.binary_cross_entropy_with_logits(out, y, reduction="none") * mask).sum()
        / mask.sum(),
        y, mask,
    )  # fmt: skip
    compare(model, x, passes, Gaussian(scale=3.0), lambda out: F.mse_loss(out, y), y)
    labels = torch.randint(3, (7,))
    compare(
        model, x, passes, Categorical(label_smoothing=0.1),
        lambda out: cross_entropy(out, labels, label_smoothing=0.1), labels,
    )  # fmt: skip


def test_losses_that_are_another_multiple_in_each_term_take_a_pass_of_their_own(passes):
    x, y, model = torch.randn(7, 2, 4), torch.randint(3, (7,)), plain()
    weights = torch.rand(7) + 0.5
    compare(
        model, x, passes, "categorical",
        lambda out: (F.cross_entropy(out, y, reduction="none") * weights).sum(), y, weights,
        shared=False,
    )  # fmt: skip
    compare(
        model, x, passes, "categorical",
        lambda out: cross_entropy(out, y, label_smoothing=0.1), y, shared=False,
    )  # fmt: skip
    compare(
        model, x, passes, "categorical",
        lambda out: out.square().sum(), y,
        shared=False,
    )  # fmt: skip


def test_penalties_on_activations_take_a_pass_of_their_own(passes):
    class Penalised(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

        def forward(self, x):
            self.hidden = torch.tanh(self.first(x))
            return self.last(self.hidden)

    model, x, y = Penalised(), torch.randn(7, 4), torch.randint(3, (7,))
    kfac = Preconditioner(model, configuration())
    for penalty in (0.1, 0.0):
        step(
            model, kfac, x, "categorical",
            lambda out, penalty=penalty: cross_entropy(out, y)
            + (penalty * model.hidden.square().sum() if penalty else 0),
            y,
        )  # fmt: skip
        assert len(passes) == 1  # in the first step only


def test_penalties_on_parameters_do_not_hinder(passes):
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfacs = [Preconditioner(model, configuration()) for _ in range(2)]

    def loss_of(out):
        return cross_entropy(out, y) + sum(p.square().sum() for p in model.parameters())

    expected = step(model, kfacs[0], x, "categorical", loss_of, y, share=False)
    got = step(model, kfacs[1], x, "categorical", loss_of, y)
    assert len(passes) == 1
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_batch_norm_in_training_mode(passes):
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))
    x, y = torch.randn(7, 4), torch.randint(3, (7,))
    compare(
        model.eval(), x, passes, "categorical", lambda out: cross_entropy(out, y), y
    )  # fmt: skip
    # What reaches an example's outputs from the losses of others counts as its own.
    model.train()
    made = len(passes)
    kfac = Preconditioner(model, configuration(kfac_approx="expand"))
    step(model, kfac, x, "categorical", lambda out: cross_entropy(out, y), y)
    assert len(passes) == made
    outputs = []
    handle = model[0].register_forward_hook(lambda *args: outputs.append(args[-1]))
    (g,) = torch.autograd.grad(7 * cross_entropy(model(x), y), outputs)
    handle.remove()
    torch.testing.assert_close(kfac.curvature()["0"].gradient_covariance, g.T @ g / 7)


class Shifted(nn.Module):
    """A parameter that is in no layer."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(4))
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        return self.linear(x + self.shift.sinh())


def test_parameters_outside_layers_take_one_fisher_pass_for_all(passes):
    model = Shifted()
    x, y = torch.randn(50, 4), torch.randint(3, (50,))
    exact = curvature(
        model, x, likelihood="categorical", kfac_approx="expand", fisher_type="empirical",
        targets=y,
    )  # fmt: skip
    assert len(passes) == 0  # `curvature` is not counted
    found = []
    for seed in range(60):
        kfac = Preconditioner(model, configuration(seed=seed))
        step(model, kfac, x, "categorical", lambda out: cross_entropy(out, y), y)
        block = kfac.curvature()["linear"]
        torch.testing.assert_close(block.gradient_covariance, exact["linear"].gradient_covariance)
        found.append(kfac.curvature()["shift"].diagonal)
    assert len(passes) == 60
    values, truth = torch.stack(found), exact["shift"].diagonal
    error = values.std(0) / 60**0.5
    assert ((values.mean(0) - truth).abs() < 4 * error).all()
    assert (error < 0.3 * truth).all()
    # Adam asks for no curvature of theirs.
    kfac = Preconditioner(model, configuration(direction="eigenbasis_adam", damping_kind="exact"))
    step(model, kfac, x, "categorical", lambda out: cross_entropy(out, y), y)
    assert len(passes) == 60


@pytest.mark.parametrize("fisher_type", ["mc", "type-2"])
def test_other_fisher_types_make_their_own_pass(fisher_type, passes):
    x, y = torch.randn(7, 2, 4), torch.randint(3, (7,))
    compare(
        plain(), x, passes, "categorical", lambda out: cross_entropy(out, y), y, shared=False,
        fisher_type=fisher_type,
    )  # fmt: skip


def test_several_micro_batches(passes):
    model, y = plain(), torch.randint(3, (8,))
    x = torch.randn(8, 2, 4)
    together, parts = Preconditioner(model, configuration()), Preconditioner(model, configuration())
    step(model, together, x, "categorical", lambda out: cross_entropy(out, y), y, share=False)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    for chosen, share in ((slice(0, 3), 3 / 8), (slice(3, 8), 5 / 8)):
        with parts.record():
            logits = model(x[chosen])
        loss = cross_entropy(logits, y[chosen], share)
        parts.update(logits, "categorical", targets=y[chosen], loss=loss)
        parts.reduce_factors()  # too early: nothing is there yet
        loss.backward()
    parts.precondition()
    assert len(passes) == 1
    for p, theirs in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, theirs)
    for key, value in tensors_of(together).items():
        torch.testing.assert_close(tensors_of(parts)[key], value)


def test_a_loss_of_all_right_answers_is_no_fault():
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    y = model(x).detach()
    kfac = Preconditioner(model, configuration())
    step(model, kfac, x, "gaussian", lambda out: F.mse_loss(out, y), y)
    assert kfac.failures == {} or not any(kfac.failures.values())
    assert not tensors_of(kfac)[".gradient_covariance"].any()


def test_a_loss_that_becomes_another_one_drops_the_update():
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfac = Preconditioner(model, configuration(factor_decay=0.9))
    step(model, kfac, x, "categorical", lambda out: cross_entropy(out, y), y)
    before = tensors_of(kfac)
    step(model, kfac, x, "categorical", lambda out: cross_entropy(out, y, label_smoothing=0.3), y)
    assert kfac.failures["statistics"] == 1
    for key, value in before.items():
        torch.testing.assert_close(tensors_of(kfac)[key], value, rtol=0, atol=0)


def test_a_backward_pass_that_does_not_come_or_comes_twice():
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfac = Preconditioner(model, configuration())

    def updated():
        model.zero_grad()
        with kfac.record():
            logits = model(x)
        loss = cross_entropy(logits, y)
        kfac.update(logits, "categorical", targets=y, loss=loss)
        return loss

    updated()
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\) before"):
        kfac.precondition()
    loss = updated()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"leave `loss` out of \w+\.update"):
        loss.backward()
    updated()  # a step that is given up
    updated().backward()
    kfac.precondition()
    assert kfac.step == 1


def measured(logits, loss_of, y, weights=None):
    """c of a loss, and the number that it is when the loss is the likelihood's."""
    logits = logits.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss_of(logits), logits)
    (vector,) = Categorical().would_be_gradients(
        logits, fisher_type="empirical", targets=y, mask=weights
    )
    return proportion(gradient, vector, torch.tensor(float(len(y))))


@pytest.mark.parametrize("classes", [10, 256, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_proportion_in_single_and_half_precision(dtype, classes):
    logits = torch.randn(64, classes, dtype=torch.float32).to(dtype)
    y = torch.randint(classes, (64,))
    c = measured(logits, lambda f: 128 * F.cross_entropy(f.float(), y), y)
    torch.testing.assert_close(float(c), 2.0, rtol=1e-2, atol=0)
    weights = torch.linspace(0, 2, 64)
    wrong = {
        "weights": lambda f: (F.cross_entropy(f.float(), y, reduction="none") * weights).sum(),
        "another loss": lambda f: F.cross_entropy(f.float(), y) + 1e-2 * f.float().square().sum(),
    }
    for name, loss_of in wrong.items():
        assert measured(logits, loss_of, y, weights if name == "weights" else None).isnan(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_proportion_where_almost_all_probability_is_right(dtype):
    y = torch.randint(10, (64,))
    logits = (torch.randn(64, 10, dtype=torch.float32) + 12 * F.one_hot(y, 10)).to(dtype)
    c = measured(logits, lambda f: F.cross_entropy(f.float(), y), y)
    torch.testing.assert_close(float(c), 1 / 64, rtol=2e-2, atol=0)
    smoothed = measured(logits, lambda f: F.cross_entropy(f.float(), y, label_smoothing=0.1), y)
    assert smoothed.isnan()
    zero = torch.zeros(4, 3)
    assert proportion(zero, torch.ones(4, 3), torch.tensor(4.0)).isnan()


class TwoOutputs(nn.Module):
    """Logits and other outputs of one layer."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 6)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x))).split(3, -1)


def test_other_outputs_of_the_same_operation_are_another_way(passes):
    model, x, y = TwoOutputs(), torch.randn(7, 4), torch.randint(3, (7,))
    kfac = Preconditioner(model, configuration())
    for weight in (0.0, 1.0, 0.0):
        others = []

        def forward(x, others=others):
            logits, other = model(x)
            others.append(other)
            return logits

        def loss_of(out, others=others, weight=weight):
            return cross_entropy(out, y) + (weight * others[0].square().sum() if weight else 0)

        made = len(passes)
        step(model, kfac, x, "categorical", loss_of, y, forward=forward)
        assert (len(passes) > made) == bool(weight)


def test_a_backward_pass_that_breaks_off_gives_no_statistics(caplog):
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfac, reference = (Preconditioner(model, configuration()) for _ in range(2))
    with kfac.record():
        hidden = model[:2](x)
        logits = model[2:](hidden)
    hidden.register_hook(lambda g: (_ for _ in ()).throw(torch.OutOfMemoryError("no room")))
    loss = cross_entropy(logits, y)
    kfac.update(logits, "categorical", targets=y, loss=loss)
    with pytest.raises(torch.OutOfMemoryError):
        loss.backward()
    step(model, kfac, x, "categorical", lambda out: cross_entropy(out, y), y)
    assert "are dropped" in caplog.text
    step(model, reference, x, "categorical", lambda out: cross_entropy(out, y), y)
    for key, value in tensors_of(reference).items():
        torch.testing.assert_close(tensors_of(kfac)[key], value)


def test_other_backward_passes_in_between_are_not_heard():
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfac, reference = (Preconditioner(model, configuration()) for _ in range(2))
    step(model, reference, x, "categorical", lambda out: cross_entropy(out, y), y)
    model.zero_grad()
    with kfac.record():
        hidden = model[:2](x)
        logits = model[2:](hidden)
    loss = cross_entropy(logits, y)
    kfac.update(logits, "categorical", targets=y, loss=loss)
    torch.autograd.grad(hidden.square().sum(), model[0].weight, retain_graph=True)
    loss.backward()
    kfac.precondition()
    for key, value in tensors_of(reference).items():
        torch.testing.assert_close(tensors_of(kfac)[key], value)


def test_a_loss_that_changes_for_good_is_looked_at_again(passes):
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfac = Preconditioner(model, configuration(max_failures=2))
    for smoothing in (0.0, 0.3, 0.3, 0.3, 0.3):
        step(
            model, kfac, x, "categorical",
            lambda out, s=smoothing: cross_entropy(out, y, label_smoothing=s), y,
        )  # fmt: skip
    assert kfac.failures["statistics"] == 1
    assert len(passes) == 3


def test_penalties_and_bare_parameters_may_come_later(passes):
    class Penalised(Shifted):
        def forward(self, x):
            self.hidden = super().forward(x)
            return self.hidden + 0

    model, x, y = Penalised(), torch.randn(7, 4), torch.randint(3, (7,))
    model.shift.requires_grad_(False)
    kfac = Preconditioner(model, configuration())

    def loss_of(out, penalty=0.0):
        return cross_entropy(out, y) + (penalty * model.hidden.square().sum() if penalty else 0)

    def train(penalty):
        model.zero_grad()
        with kfac.record():
            logits = model(x)
        loss = loss_of(logits, penalty)
        kfac.update(logits, "categorical", targets=y, loss=loss)
        loss.backward()
        kfac.precondition()

    train(0.0)
    assert not passes
    train(1.0)
    assert len(passes) == 1
    model.shift.requires_grad_(True)
    train(0.0)
    assert len(passes) == 2
    assert "shift" in kfac.curvature()


def test_nothing_is_kept_alive_by_the_graph_of_a_pass():
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfac = Preconditioner(model, configuration())
    with kfac.record():
        logits = model(x)
    loss = cross_entropy(logits, y)
    kfac.update(logits, "categorical", targets=y, loss=loss)
    kept = weakref.ref(kfac)
    del kfac, logits, loss
    gc.collect()
    assert kept() is None


def test_memory_that_runs_out_before_the_loss_comes_drops_the_update():
    """Whether `reduce_factors` is called too early or not."""
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfac, refusal = Preconditioner(model, configuration(factor_decay=0.9)), NoMemoryFor(5, 5)
    for lost in (False, True):
        before = tensors_of(kfac)
        with refusal if lost else nullcontext():
            with kfac.record():
                logits = model(x)
            loss = cross_entropy(logits, y)
            kfac.update(logits, "categorical", targets=y, loss=loss)
            kfac.reduce_factors()
            loss.backward()
            kfac.precondition()
    assert refusal.refused
    assert kfac.failures == {"statistics": 0, "inverse": 0, "memory": 1}
    assert_same_tensors(tensors_of(kfac), before)


def test_a_state_that_is_loaded_ends_the_wait_for_a_loss():
    model, x, y = plain(), torch.randn(7, 2, 4), torch.randint(3, (7,))
    kfac, other = (Preconditioner(model, configuration(factor_decay=0.9)) for _ in range(2))
    step(model, other, x, "categorical", lambda out: cross_entropy(out, y), y)
    with kfac.record():
        logits = model(3 * x)
    loss = cross_entropy(logits, y)
    kfac.update(logits, "categorical", targets=y, loss=loss)
    kfac.load_state_dict(copy.deepcopy(other.state_dict()))
    loss.backward()
    kfac.precondition()
    assert_same_tensors(tensors_of(kfac), tensors_of(other))
    assert not any(kfac.failures.values())


def test_time_first_with_as_many_steps_as_examples_gets_no_signs():
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y = torch.randn(5, 5, 4), torch.randint(3, (5, 5))
    found = []
    for share in (True, False):
        kfac = Preconditioner(model, configuration(kfac_approx="reduce"))
        model.zero_grad()
        with kfac.record(Positions(batch_dim=1)):
            logits = model(x)
        loss = cross_entropy(logits, y)
        kfac.update(logits, "categorical", targets=y, loss=loss if share else None)
        loss.backward()
        kfac.precondition()
        found.append(tensors_of(kfac))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


def test_rows_of_one_example_get_no_signs_of_their_own():
    """Positions folded into the rows of the logits: those of one example add up in a layer."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3), nn.Flatten(0, 1))
    x, y = torch.randn(5, 4, 4), torch.randint(3, (20,))
    found = []
    for share in (True, False):
        kfac = Preconditioner(model, configuration(kfac_approx="reduce"))
        step(model, kfac, x, "categorical", lambda out: cross_entropy(out, y), y, share=share)
        found.append(tensors_of(kfac))
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value)


def test_the_scale_of_many_logits_is_known_to_rounding():
    """A million entries and more: float32 norms of so many are 1e-3 off on a CPU."""
    torch.manual_seed(0)
    logits = (0.3 * torch.randn(8192, 256, dtype=torch.float32)).requires_grad_()
    labels = torch.randint(256, (8192,))
    (gradient,) = torch.autograd.grad(3 * F.cross_entropy(logits, labels), logits)
    (vector,) = Categorical().would_be_gradients(logits, fisher_type="empirical", targets=labels)
    scale = proportion(gradient, vector, torch.tensor(8192.0))
    assert float(scale) == pytest.approx(3 / 8192, rel=1e-6)
