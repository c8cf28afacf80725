"""Numerical faults, met through the public API in the middle of training: it goes on."""

import gc
import logging

import pytest
import torch
import torch.nn.functional as F
from nets import Mean, Pool
from observed import FAILURES, assert_same_tensors, curvature_tensors, live_tensors, state_tensors
from torch import nn

from submission.kfac import KFACConfig, KFACError, Preconditioner, Segments


def net(dtype=torch.float64):
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.LayerNorm(5), Mean(),
        nn.Linear(5, 3),
    ).to(dtype)  # fmt: skip


def config(**options):
    settings = {"factor_update_steps": 1, "inverse_update_steps": 1, "factor_decay": 0.9}
    return KFACConfig(**{**settings, "damping": 0.1, **options})


def batch(n=7, dtype=torch.float64):
    return torch.randn(n, 2, 4, dtype=dtype), torch.randint(3, (n,))


class Training:
    """A model, K-FAC in front of SGD, and an optional gradient scaler with autocast."""

    def __init__(self, model, settings=None, autocast=None, scale=None):
        self.model, self.autocast = model, autocast
        self.kfac = Preconditioner(model, settings or config())
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=bool(scale))

    def step(self, x, y, mask=None):
        self.optimizer.zero_grad()
        kept = torch.ones(len(y), dtype=torch.bool) if mask is None else mask
        with torch.autocast("cpu", dtype=self.autocast, enabled=self.autocast is not None):
            with self.kfac.record():
                logits = self.model(x)
            self.kfac.update(logits, "categorical", mask=mask)
            losses = F.cross_entropy(logits.float(), y, reduction="none")
            loss = torch.where(kept, losses, 0).sum() / kept.sum().clamp(min=1)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer) if self.scaler.is_enabled() else None
        finite = all(p.grad.isfinite().all() for p in self.model.parameters())
        self.kfac.precondition()
        if finite or self.scaler.is_enabled():  # as a training loop skips a bad step
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return loss.detach()

    def values(self):
        return [p.detach().clone() for p in self.model.parameters()]

    def assert_sound(self):
        for tensor in [*self.values(), *state_tensors(self.kfac)]:
            assert tensor.isfinite().all()


def faulty_batch(fault):
    x, y = batch()
    mask = None
    if fault == "zero batch":
        x.zero_()
    elif fault == "empty mask":
        mask = torch.zeros(len(y), dtype=torch.bool)
    else:
        x[0, 0, 0] = {"NaN": float("nan"), "Inf": float("inf"), "-Inf": float("-inf")}[fault]
    return x, y, mask


@pytest.mark.parametrize("kind", ["both_factors", "pi", "exact"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("fault", ["NaN", "Inf", "-Inf", "zero batch", "empty mask"])
def test_training_goes_on_after_a_bad_batch(fault, kfac_approx, kind, caplog):
    training = Training(net(), config(damping_kind=kind, kfac_approx=kfac_approx))
    for _ in range(3):
        training.step(*batch())
    with caplog.at_level(logging.WARNING):
        training.step(*faulty_batch(fault))
    training.assert_sound()
    dropped = 0 if fault == "zero batch" else 1
    assert training.kfac.failures["statistics"] == dropped
    assert ("previous ones stay in use" in caplog.text) == bool(dropped)
    before = training.values()
    for _ in range(3):
        training.step(*batch())
    training.assert_sound()
    assert not any(torch.equal(a, b) for a, b in zip(before, training.values(), strict=True))
    assert training.kfac.failures["statistics"] == dropped


@pytest.mark.parametrize("fault", ["NaN", "empty mask", "zero batch"])
def test_a_bad_first_batch_leaves_the_plain_gradient_or_a_finite_one(fault):
    training = Training(net())
    training.step(*faulty_batch(fault))
    training.assert_sound()
    training.step(*batch())
    training.assert_sound()
    assert training.kfac.curvature()


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_a_batch_of_nothing_but_padding_graphs_enters_nothing(kfac_approx):
    sizes = torch.tensor([3, 2, 4])
    model = Pool(None, len(sizes), "sum")
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx))

    def step(valid, kept):
        segments = Segments.from_sizes(sizes, int(sizes.sum()), valid)
        model.ids = torch.repeat_interleave(torch.arange(3), sizes)
        with kfac.record({"inner": segments}):
            out = model(torch.randn(int(sizes.sum()), 4))
        kfac.update(out, "bernoulli", mask=kept)
        model.zero_grad()
        (out.square() * kept).sum().backward()
        kfac.precondition()

    some = torch.tensor([True, True, False])
    step(some, some[:, None].expand(3, 2))
    before = curvature_tensors(kfac)
    none = torch.zeros(3, dtype=torch.bool)
    step(none, none[:, None].expand(3, 2))
    assert kfac.failures["statistics"] == 1
    assert_same_tensors(curvature_tensors(kfac), before)
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("kind", ["both_factors", "pi", "exact"])
def test_a_dead_layer_and_its_awakening(kind):
    model = net()
    nn.init.zeros_(model[5].weight)
    training = Training(model, config(damping_kind=kind))
    training.step(*batch())
    dead = training.kfac.curvature()["0"].gradient_covariance
    assert not dead.any()
    training.assert_sound()
    for _ in range(5):
        training.step(*batch())
        training.assert_sound()
    assert training.kfac.curvature()["0"].gradient_covariance.any()
    assert training.kfac.failures == dict.fromkeys(training.kfac.failures, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["both_factors", "pi", "exact"])
@pytest.mark.parametrize("form", ["singular", "condition 1e12"])
def test_degenerate_factors(form, kind, dtype):
    training = Training(net(dtype), config(damping_kind=kind, damping=1e-8))
    for _ in range(4):
        x, y = batch(dtype=dtype)
        if form == "singular":
            x[..., 1:] = x[..., :1]
        else:
            x[..., 0] *= 1e6
        training.step(x, y)
        assert all(tensor.isfinite().all() for tensor in state_tensors(training.kfac))
        gradients = [p.grad for p in training.model.parameters()]
        assert all(gradient.isfinite().all() for gradient in gradients)
    assert training.kfac.failures["inverse"] == 0


# ---- half precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
def test_training_under_autocast(autocast):
    torch.set_default_dtype(torch.float32)
    training = Training(net(torch.float32), autocast=autocast, scale=2.0**8)
    x, y = batch(64, torch.float32)
    losses = [float(training.step(x, y)) for _ in range(40)]
    training.assert_sound()
    assert losses[-1] < 0.95 * losses[0]
    assert all(tensor.dtype != autocast for tensor in state_tensors(training.kfac))
    assert training.kfac.failures == dict.fromkeys(training.kfac.failures, 0)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_convolutions_have_the_same_factors_under_autocast_but_for_the_gradients(kfac_approx):
    """What the model's passes see is rounded; the products behind the factors are not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.Flatten(), nn.Linear(8 * 36, 3)).float()
    x = torch.randn(16, 8, 6, 6, dtype=torch.float32)
    found = []
    for enabled in (False, True):
        kfac = Preconditioner(model, config(kfac_approx=kfac_approx))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            with kfac.record():
                logits = model(x)
            kfac.update(logits, "categorical")
            logits.float().square().mean().backward()
        kfac.precondition()
        assert kfac.failures == {"statistics": 0, "inverse": 0, "memory": 0}
        found.append(kfac.curvature()["0"].input_covariance)
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-5)


def test_an_overflow_of_the_scaled_gradient_skips_the_step_and_shrinks_the_scale():
    torch.set_default_dtype(torch.float32)
    training = Training(net(torch.float32), autocast=torch.float16, scale=2.0**30)
    x, y = batch(dtype=torch.float32)
    before = training.values()
    training.step(x, y)
    assert training.scaler.get_scale() == 2.0**29
    assert all(torch.equal(a, b) for a, b in zip(before, training.values(), strict=True))
    training.assert_sound()
    for _ in range(30):
        training.step(x, y)
    training.assert_sound()
    assert training.scaler.get_scale() < 2.0**29
    assert not any(torch.equal(a, b) for a, b in zip(before, training.values(), strict=True))
    assert training.kfac.failures["statistics"] == 0


def test_an_overflow_in_the_forward_pass_drops_its_statistics():
    torch.set_default_dtype(torch.float32)
    training = Training(net(torch.float32), autocast=torch.float16, scale=2.0**8)
    training.step(*batch(dtype=torch.float32))
    before = training.values()
    x, y = batch(dtype=torch.float32)
    training.step(x * 1e6, y)  # beyond float16
    assert training.kfac.failures["statistics"] == 1
    assert all(torch.equal(a, b) for a, b in zip(before, training.values(), strict=True))
    training.step(x, y)
    training.assert_sound()


# ---- memory, compiled modules ------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_memory_is_flat_over_2000_steps(decay, monkeypatch):
    # pytest keeps every record that is logged.
    monkeypatch.setattr(logging.root.manager, "disable", logging.WARNING)
    training = Training(net(), config(factor_decay=decay))
    for _ in range(20):
        training.step(*batch())
    before, objects = live_tensors(), len(gc.get_objects())
    for t in range(2000):
        training.step(*(faulty_batch("NaN") if t % 7 == 0 else batch()))
    assert live_tensors() == before
    assert len(gc.get_objects()) < objects + 50


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_plain_one_and_compiles_once():
    from torch._dynamo.utils import counters

    plain = Training(net(), config(factor_update_steps=3, inverse_update_steps=3))
    model = net()
    model.load_state_dict(plain.model.state_dict())
    compiled = torch.compile(model, backend="aot_eager")
    kfac = Preconditioner(compiled, plain.kfac.config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    counters.clear()
    torch._dynamo.reset()
    frames = []
    for _ in range(12):
        x, y = batch()
        optimizer.zero_grad()
        if kfac.factors_due:
            with kfac.record():
                logits = model(x)
            kfac.update(logits, "categorical")
        else:
            logits = compiled(x)
        F.cross_entropy(logits.float(), y).backward()
        kfac.precondition()
        optimizer.step()
        plain.step(x, y)
        frames.append(counters["frames"]["ok"])
    assert frames[-1] == max(frames) >= 1
    assert frames[-1] == next(f for f in frames if f)  # not one more after the first
    for p, q in zip(model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)


# ---- failures in a row, and blocks of rank one ---------------------------------------------------


@pytest.mark.parametrize("how", list(FAILURES))
def test_inversions_that_keep_failing_end_training(how, monkeypatch):
    training = Training(net(), config(max_failures=3))
    training.step(*batch())
    monkeypatch.setattr(torch.linalg, "cholesky_ex", FAILURES[how])
    training.step(*batch())
    training.step(*batch())
    with pytest.raises(KFACError, match="3 K-FAC updates in a row failed"):
        training.step(*batch())
    assert training.kfac.failures["inverse"] == 3


def test_one_good_update_ends_the_failures_in_a_row():
    training = Training(net(), config(max_failures=2))
    for _ in range(3):
        x, y = batch()
        training.step(x, y, mask=torch.zeros(len(y), dtype=torch.bool))
        training.step(x, y)
    assert training.kfac.failures["statistics"] == 3


@pytest.mark.parametrize("damping", [1e-3, 1e-6, 1e-9])
def test_norms_of_a_single_example_are_preconditioned_downhill(damping):
    """Their 2×2 blocks have rank one: in float32 the determinant must not cancel to nothing."""
    for seed in range(20):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 3)).float()
        with torch.no_grad():
            model[2].weight *= 100
        kfac = Preconditioner(
            model, config(damping=damping, factor_decay=0.0, fisher_type="type-2")
        )
        x = torch.randn(1, 4, dtype=torch.float32)
        with kfac.record():
            logits = model(x)
        kfac.update(logits, "categorical")
        F.cross_entropy(logits, torch.tensor([0])).backward()
        plain = [p.grad.clone() for p in model[1].parameters()]
        kfac.precondition()
        new = [p.grad for p in model[1].parameters()]
        assert all(g.isfinite().all() for g in new)
        along = sum(a * b for a, b in zip(plain, new, strict=True))
        assert (along >= 0).all()


@pytest.mark.parametrize("damping", [0.0, -1.0, 1e-320, float("nan"), float("inf")])
def test_a_damping_that_float32_cannot_divide_by_is_refused(damping):
    with pytest.raises(ValueError, match="at least 1e-30"):
        KFACConfig(damping=damping)
    kfac = Preconditioner(net())
    with pytest.raises(ValueError, match="at least 1e-30"):
        kfac.damping = damping
    assert kfac.damping == KFACConfig().damping


@pytest.mark.parametrize("every", [2, 2000])  # the inverse meets few vectors, or many
@pytest.mark.parametrize("fault", ["forward pass", "no loss"])
def test_inverses_outlive_a_recording_that_comes_to_nothing(fault, every):
    """Also those of large sides, in a step that is due to renew them."""
    model = nn.Linear(600, 3)
    settings = config(inverse_update_steps=every, damping_kind="both_factors", early_updates=True)
    kfac = Preconditioner(model, settings)

    def forward():
        with kfac.record():
            return model(torch.randn(5, 600))

    logits = forward()
    kfac.update(logits, "categorical")
    logits.square().mean().backward()
    kfac.precondition()
    before = curvature_tensors(kfac)
    assert kfac.inverses_due  # an early update
    if fault == "forward pass":
        with pytest.raises(ZeroDivisionError), kfac.record():
            model(torch.randn(5, 600)).sum() / (1 // 0)
    else:
        forward()
    with pytest.raises(RuntimeError, match="this step updates the factors"):
        kfac.precondition()
    assert_same_tensors(curvature_tensors(kfac), before)
    logits = forward()
    kfac.update(logits, "categorical", mask=torch.zeros(5))  # no term: the update is dropped
    model.zero_grad()
    logits.square().mean().backward()
    plain = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1)
    kfac.precondition()
    assert_same_tensors(curvature_tensors(kfac), before)
    a, b = (before[f".{side}_covariance"] for side in ("input", "gradient"))
    a, b = (factor + 0.1 * torch.eye(len(factor)) for factor in (a, b))
    expected = torch.linalg.solve(a, torch.linalg.solve(b, plain).T).T
    torch.testing.assert_close(model.weight.grad, expected[:, :-1])
    torch.testing.assert_close(model.bias.grad, expected[:, -1])
