"""The stateful object: against dense linear algebra, over steps, and when things go wrong."""

import copy
import io
import logging

import pytest
import torch
import torch.nn.functional as F
from nets import Mean
from observed import FAILURES, assert_same_tensors, curvature_tensors
from torch import nn

from submission.kfac import KFACConfig, KFACError, Preconditioner, curvature


def net():
    return nn.Sequential(
        nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5, bias=False), nn.LayerNorm(5), Mean(),
        nn.Linear(5, 3),
    )  # fmt: skip


def every_step(**options):
    return KFACConfig(factor_update_steps=1, inverse_update_steps=1, **options)


def batch(n=7):
    return torch.randn(n, 2, 4), torch.randint(3, (n,))


def train_step(model, kfac, x, y, mask=None):
    """One step up to the preconditioned gradient; returns the plain gradients."""
    model.zero_grad()
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical", mask=mask, targets=y)
    F.cross_entropy(logits, y).backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.precondition()
    return plain


def joint(grads, layer):
    weight = grads[f"{layer}.weight"]
    bias = grads.get(f"{layer}.bias")
    return weight if bias is None else torch.cat([weight, bias[:, None]], 1)


def dense_damped(block, kind, damping):
    a, b = block.input_covariance, block.gradient_covariance
    if kind == "exact":
        return torch.kron(b, a) + damping * torch.eye(len(a) * len(b))
    pi = 1.0
    root = damping
    if kind == "pi":
        pi = float(((a.trace() / len(a)) / (b.trace() / len(b))) ** 0.5)
        root = damping**0.5
    return torch.kron(b + root / pi * torch.eye(len(b)), a + root * pi * torch.eye(len(a)))


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("kind", ["both_factors", "pi", "exact"])
def test_linear_layers_against_the_dense_solve(kind, kfac_approx):
    model, (x, y) = net(), batch()
    kfac = Preconditioner(
        model, every_step(damping=0.03, damping_kind=kind, kfac_approx=kfac_approx)
    )
    plain = train_step(model, kfac, x, y)
    after = {name: p.grad for name, p in model.named_parameters()}
    for layer in ("0", "2", "5"):
        dense = dense_damped(kfac.curvature()[layer], kind, 0.03)
        expected = torch.linalg.solve(dense, joint(plain, layer).flatten())
        torch.testing.assert_close(joint(after, layer).flatten(), expected)


@pytest.mark.parametrize("kind", ["both_factors", "exact"])
def test_norms_against_the_dense_solve(kind):
    model, (x, y) = net(), batch()
    kfac = Preconditioner(model, every_step(damping=0.03, damping_kind=kind))
    plain = train_step(model, kfac, x, y)
    blocks = kfac.curvature()["3"].blocks + 0.03 * torch.eye(2)
    grads = torch.stack([plain["3.weight"], plain["3.bias"]], 1)
    expected = torch.linalg.solve(blocks, grads)
    torch.testing.assert_close(torch.stack([model[3].weight.grad, model[3].bias.grad], 1), expected)


def test_grouped_and_transposed_convolutions_write_gradients_where_they_belong():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 2, groups=2), nn.Flatten(1)
    )
    x = torch.randn(3, 4, 4, 4)
    kfac = Preconditioner(model, every_step(damping=0.1, damping_kind="both_factors"))
    with kfac.record():
        out = model(x)
    kfac.update(out, "gaussian")
    out.square().mean().backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    kfac.precondition()
    weight = plain["1.weight"]  # [C_in = 4, C_out / groups = 1, 2, 2]
    for group, block in enumerate(
        zip(
            kfac.curvature()["1"].input_covariance,
            kfac.curvature()["1"].gradient_covariance,
            strict=True,
        )
    ):
        a, b = (f + 0.1 * torch.eye(len(f)) for f in block)
        rows = weight[2 * group : 2 * group + 2].transpose(0, 1).flatten(1)
        rows = torch.cat([rows, plain["1.bias"][group].reshape(1, 1)], 1)
        expected = torch.linalg.solve(b, rows) @ torch.linalg.inv(a)
        got = model[1].weight.grad[2 * group : 2 * group + 2].transpose(0, 1).flatten(1)
        torch.testing.assert_close(got, expected[:, :-1])
        torch.testing.assert_close(model[1].bias.grad[group], expected[0, -1])


def test_relative_damping_makes_the_update_independent_of_the_scale_of_the_loss():
    steps = []
    for scale in (1.0, 100.0):
        torch.manual_seed(3)
        model, (x, _) = net(), batch()
        kfac = Preconditioner(
            model, every_step(damping=0.1, relative_damping=True, fisher_type="type-2")
        )
        with kfac.record():
            logits = model(x)
        from submission.kfac import Gaussian

        kfac.update(logits, Gaussian(scale=scale))
        (scale * logits.square().mean()).backward()
        kfac.precondition()
        steps.append([p.grad for p in model.parameters()])
    for a, b in zip(*steps, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_moving_average_is_bias_corrected(decay):
    model = net()
    config = every_step(factor_decay=decay, fisher_type="type-2")
    kfac, xs = Preconditioner(model, config), [batch() for _ in range(4)]
    each = []
    for x, y in xs:
        block = curvature(
            model, x, likelihood="categorical", kfac_approx="expand", fisher_type="type-2"
        )
        each.append(block["2"].input_covariance)
        train_step(model, kfac, x, y)
    weights = torch.tensor([(1 - decay) * decay ** (len(xs) - 1 - t) for t in range(len(xs))])
    expected = sum(w * a for w, a in zip(weights / weights.sum(), each, strict=True))
    torch.testing.assert_close(kfac.curvature()["2"].input_covariance, expected)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_micro_batches_of_any_size_add_up_to_the_whole_batch(kfac_approx):
    model, (x, y) = net(), batch(8)
    config = every_step(kfac_approx=kfac_approx, fisher_type="type-2")
    whole, parts = Preconditioner(model, config), Preconditioner(model, config)
    train_step(model, whole, x, y)
    model.zero_grad()
    for piece in (slice(0, 3), slice(3, 8)):
        with parts.record():
            logits = model(x[piece])
        parts.update(logits, "categorical")
        (F.cross_entropy(logits, y[piece], reduction="sum") / 8).backward()
    parts.precondition()
    for name, block in whole.curvature().items():
        for key, value in vars(block).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(vars(parts.curvature()[name])[key], value)


@pytest.mark.parametrize("pieces", [[6], [2, 4], [1, 1, 1, 1, 1, 1]])
@pytest.mark.parametrize("kind", ["both_factors", "pi"])
@pytest.mark.parametrize("interval", [1, 50])
def test_factors_of_few_rows_act_as_the_dense_ones(kind, interval, pieces):
    """Without a moving average they may be kept as rows, with one they may not."""
    model = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Conv1d(3, 8, 5, groups=1), Mean())
    x, y = torch.randn(6, 3, 20), torch.randint(3, (6,))
    results = []
    for decay in (0.0, 0.9):
        config = KFACConfig(
            kfac_approx="reduce", damping=0.01, damping_kind=kind, fisher_type="type-2",
            factor_update_steps=interval, inverse_update_steps=interval, factor_decay=decay,
        )  # fmt: skip
        kfac = Preconditioner(model, config)
        model.zero_grad()
        for xs, ys in zip(x.split(pieces), y.split(pieces), strict=True):
            with kfac.record():
                logits = model(xs)
            kfac.update(logits, "categorical")
            F.cross_entropy(logits, ys, reduction="sum").backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters()}
        kfac.precondition()
        results.append({name: p.grad.clone() for name, p in model.named_parameters()})
        dense = dense_damped(kfac.curvature()["0"], kind, 0.01)
        expected = torch.linalg.solve(dense, joint(plain, "0").flatten())
        torch.testing.assert_close(joint(results[-1], "0").flatten(), expected)
    for name, gradient in results[0].items():
        torch.testing.assert_close(gradient, results[1][name], rtol=1e-9, atol=1e-12)


def test_factors_and_inverses_have_their_own_intervals():
    model = net()
    kfac = Preconditioner(
        model,
        KFACConfig(
            factor_update_steps=2, inverse_update_steps=4, early_updates=False,
            damping_kind="both_factors", damping=0.1,
        ),
    )  # fmt: skip
    blocks = []
    for step in range(8):
        plain = joint(train_step(model, kfac, *batch()), "0").flatten()
        blocks.append(kfac.curvature()["0"])
        got = joint({name: p.grad for name, p in model.named_parameters()}, "0").flatten()

        def solved(block, plain=plain):
            return torch.linalg.solve(dense_damped(block, "both_factors", 0.1), plain)

        torch.testing.assert_close(got, solved(blocks[step - step % 4]))
        if step % 4 > 1:
            assert (got - solved(blocks[step])).norm() > 1e-3 * got.norm()
    factors = [block.input_covariance for block in blocks]
    changed = [t for t in range(1, 8) if not torch.equal(factors[t], factors[t - 1])]
    assert changed == [2, 4, 6]


def test_the_first_interval_is_updated_at_powers_of_two():
    model = net()
    kfac = Preconditioner(model, KFACConfig(factor_update_steps=10, inverse_update_steps=10))
    due = []
    for step in range(25):
        assert kfac.step == step
        assert kfac.inverses_due == kfac.factors_due
        due += [step] if kfac.factors_due else []
        train_step(model, kfac, *batch())
    assert due == [0, 1, 2, 4, 8, 10, 20]


def test_a_new_damping_renews_the_inverses():
    model, (x, y) = net(), batch()
    kfac = Preconditioner(
        model, KFACConfig(damping=0.1, early_updates=False, damping_kind="both_factors")
    )
    train_step(model, kfac, x, y)
    kfac.damping = 10.0
    plain = train_step(model, kfac, x, y)
    dense = dense_damped(kfac.curvature()["2"], "both_factors", 10.0)
    expected = torch.linalg.solve(dense, plain["2.weight"].flatten())
    torch.testing.assert_close(model[2].weight.grad.flatten(), expected)


def test_after_an_error_inverses_are_made_again(monkeypatch):
    model, (x, y) = net(), batch()
    kfac = Preconditioner(
        model, KFACConfig(damping=0.1, early_updates=False, damping_kind="both_factors")
    )
    train_step(model, kfac, x, y)
    kfac.damping = 10.0

    def wrong(*args, **options):
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", wrong)
        with pytest.raises(ZeroDivisionError):
            train_step(model, kfac, x, y)
    plain = train_step(model, kfac, x, y)
    dense = dense_damped(kfac.curvature()["2"], "both_factors", 10.0)
    expected = torch.linalg.solve(dense, plain["2.weight"].flatten())
    torch.testing.assert_close(model[2].weight.grad.flatten(), expected)


def test_labels_are_sampled_as_in_the_run_that_was_saved():
    """Whatever seed the new run was given."""
    model, (x, y) = net(), batch()
    saved = Preconditioner(model, every_step(seed=5))
    train_step(model, saved, x, y)
    loaded, other = (Preconditioner(model, every_step(seed=seed)) for seed in (0, 0))
    loaded.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert loaded.config.seed == 5
    for kfac in (other, saved, loaded):
        train_step(model, kfac, x, y)
    assert_same_tensors(curvature_tensors(loaded), curvature_tensors(saved))
    sampled = "0.gradient_covariance"
    assert not torch.equal(curvature_tensors(loaded)[sampled], curvature_tensors(other)[sampled])


@pytest.mark.parametrize("kind", ["pi", "exact"])
@pytest.mark.parametrize("stop_after", [1, 3, 6])
def test_a_resumed_run_is_bit_for_bit_the_same(stop_after, kind):
    config = KFACConfig(
        factor_update_steps=2, inverse_update_steps=4, factor_decay=0.5, damping_kind=kind
    )
    batches = [batch() for _ in range(9)]

    def run(model, kfac, steps):
        for x, y in steps:
            train_step(model, kfac, x, y)
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.1 * p.grad

    model = net()
    resumed = copy.deepcopy(model)
    kfac = Preconditioner(model, config)
    run(model, kfac, batches)

    first = Preconditioner(resumed, config)
    run(resumed, first, batches[:stop_after])
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = Preconditioner(resumed, config)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(resumed, second, batches[stop_after:])
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(p, q)


def test_states_of_other_models_and_settings_are_refused():
    model = net()
    kfac = Preconditioner(model, KFACConfig(kfac_approx="expand"))
    train_step(model, kfac, *batch())
    state = kfac.state_dict()
    with pytest.raises(ValueError, match="kfac_approx='expand', not 'reduce'"):
        Preconditioner(net(), KFACConfig(kfac_approx="reduce")).load_state_dict(state)
    with pytest.raises(ValueError, match="belongs to another model"):
        Preconditioner(nn.Sequential(nn.Linear(4, 3))).load_state_dict(state)
    with pytest.raises(ValueError, match="version 0"):
        Preconditioner(net()).load_state_dict({**state, "version": 0})


# ---- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["nan", "inf", "no valid label"])
def test_a_bad_batch_does_not_enter_the_averages(fault, caplog):
    model, (x, y) = net(), batch()
    kfac = Preconditioner(model, every_step(factor_decay=0.9))
    train_step(model, kfac, x, y)
    before, mask = curvature_tensors(kfac), None
    bad = x.clone()
    if fault == "no valid label":
        mask = torch.zeros(7, dtype=torch.bool)
    else:
        bad[0, 0, 0] = float(fault)
    with caplog.at_level(logging.WARNING):
        train_step(model, kfac, bad, y, mask)
    assert_same_tensors(curvature_tensors(kfac), before)
    assert kfac.failures["statistics"] == 1
    assert "previous ones stay in use" in caplog.text
    train_step(model, kfac, x, y)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_a_batch_of_zeros_is_legal():
    model = net()
    kfac = Preconditioner(model, every_step())
    train_step(model, kfac, torch.zeros(7, 2, 4), torch.zeros(7, dtype=int))
    assert not any(kfac.failures.values())
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_layers_below_a_zero_initialised_head_are_dead_at_first():
    model, (x, y) = net(), batch()
    nn.init.zeros_(model[5].weight)
    kfac = Preconditioner(model, KFACConfig(factor_update_steps=50, inverse_update_steps=50))
    for _ in range(2):
        train_step(model, kfac, x, y)
        assert all(p.grad.isfinite().all() for p in model.parameters())
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad
    assert kfac.curvature()["0"].gradient_covariance.norm() > 0  # the early update at step 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["both_factors", "pi", "exact"])
def test_singular_and_ill_conditioned_factors(kind, dtype):
    model = net().to(dtype)
    kfac = Preconditioner(model, every_step(damping=1e-9, damping_kind=kind))
    x = torch.randn(7, 2, 4, dtype=dtype)
    x[..., 1] = x[..., 0]  # singular
    x[..., 2] *= 1e6  # condition number 1e12
    train_step(model, kfac, x, torch.zeros(7, dtype=int))
    assert kfac.failures["inverse"] == 0
    assert all(p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("how", list(FAILURES))
def test_a_failed_inversion_keeps_the_previous_inverse(how, monkeypatch):
    model, (x, y) = net(), batch()
    kfac = Preconditioner(model, every_step(damping=0.1))
    train_step(model, kfac, x, y)
    before = kfac.curvature()
    with monkeypatch.context() as patch:
        patch.setattr(torch.linalg, "cholesky_ex", FAILURES[how])
        plain = train_step(model, kfac, x, y)
    assert kfac.failures["inverse"] == 1  # one event, of all layers
    after = {name: p.grad for name, p in model.named_parameters()}
    for layer in ("0", "2", "5"):
        assert not torch.equal(
            kfac.curvature()[layer].gradient_covariance, before[layer].gradient_covariance
        )
        dense = dense_damped(before[layer], "pi", 0.1)
        expected = torch.linalg.solve(dense, joint(plain, layer).flatten())
        torch.testing.assert_close(joint(after, layer).flatten(), expected)


def test_too_many_failures_in_a_row_end_training_with_one_message():
    model = net()
    kfac = Preconditioner(model, every_step(max_failures=3))
    bad, y = torch.full((7, 2, 4), float("nan")), torch.zeros(7, dtype=int)
    for _ in range(2):
        train_step(model, kfac, bad, y)
    with pytest.raises(KFACError, match="3 K-FAC updates in a row failed"):
        train_step(model, kfac, bad, y)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": 0.0}, "damping must be positive"),
        ({"damping": float("nan")}, "damping must be positive"),
        ({"damping_kind": "tikhonov"}, "damping_kind must be one of both_factors, pi, asdl, exact"),
        ({"kfac_approx": "shrink"}, "kfac_approx must be one of expand, reduce"),
        ({"fisher_type": "full"}, "fisher_type must be one of mc, type-2, empirical"),
        ({"factor_decay": 1.0}, r"factor_decay must be in \[0, 1\)"),
        ({"mc_samples": 0}, "mc_samples must be an integer of at least 1"),
        ({"mc_samples": 4, "fisher_type": "empirical"}, r"mc_samples \(4\) counts sampled labels"),
        ({"factor_update_steps": 10, "inverse_update_steps": 15}, "must be a multiple of"),
    ],
)
def test_bad_settings_are_refused_with_what_is_allowed(options, message):
    with pytest.raises(ValueError, match=message):
        KFACConfig(**options)


def test_the_report_names_every_parameter_and_its_preconditioner():
    model, (x, y) = net(), batch()
    kfac = Preconditioner(model, every_step(kfac_approx="reduce"))
    train_step(model, kfac, x, y)
    rows = {row.name: row for row in kfac.report()}
    assert rows["0"].sides == "5 x 6"
    assert rows["0"].sharing == "2 positions"
    assert rows["3"].preconditioner == "unit-wise"
    assert sum(row.parameters for row in rows.values()) == sum(
        p.numel() for p in model.parameters()
    )
    text = kfac.describe()
    assert "K-FAC-reduce" in text
    assert "not K-FAC: 3: unit-wise (a scale or shift of single units: exact blocks)" in text
