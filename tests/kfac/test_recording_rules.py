"""What happens when a model or a loop is not the plain one: nothing is wrong in silence."""

import gc
import re

import pytest
import torch
from nets import Mean
from observed import NoMemoryFor, assert_same_tensors, curvature_tensors
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from submission.kfac import (
    Bernoulli,
    Categorical,
    Gaussian,
    KFACConfig,
    Positions,
    Preconditioner,
    Segments,
    SharingError,
    UnitwiseCurvature,
    curvature,
    kronecker_factors,
)
from submission.kfac.operations.sharing import without_padding, zero_padding

EVERY_STEP = {"factor_update_steps": 1, "inverse_update_steps": 1}


def config(**settings):
    return KFACConfig(**{**EVERY_STEP, "fisher_type": "type-2", **settings})


def step(model, kfac, x, likelihood="categorical", **options):
    model.zero_grad()
    with kfac.record():
        logits = model(x)
    kfac.update(logits, likelihood, **options)
    logits.square().mean().backward()
    kfac.precondition()


# ---- BatchNorm in training mode carries would-be gradients from example to example ---------------


def batch_norm_net():
    return nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3))


def gradients_by_term(model, x, layer, **options):
    """Output gradients of a layer [terms, N, out], one example's loss at a time."""
    outputs = []
    handle = model.get_submodule(layer).register_forward_hook(lambda m, i, y: outputs.append(y))
    logits = model(x)
    handle.remove()
    found = []
    for column in Categorical().would_be_gradients(logits, **options):
        for n in range(len(x)):
            alone = torch.zeros_like(column)
            alone[n] = column[n]
            found += torch.autograd.grad(logits, outputs, alone, retain_graph=True)
    return torch.stack(found)


@pytest.mark.parametrize("layer", ["0", "3"])
def test_type_2_through_a_batch_norm_in_training_mode_is_exact(layer):
    model, x = batch_norm_net(), torch.randn(8, 4)
    g = gradients_by_term(model, x, layer, fisher_type="type-2").flatten(0, 1)
    found = kronecker_factors(
        model, x, likelihood="categorical", kfac_approx="expand", fisher_type="type-2"
    )
    torch.testing.assert_close(found[layer].gradient_covariance, g.T @ g / 8, rtol=1e-12, atol=0)


def test_type_2_unit_wise_blocks_of_a_batch_norm_in_training_mode_are_exact():
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Tanh()
    )
    x = torch.randn(6, 4)
    found = curvature(model, x, likelihood="gaussian", kfac_approx="expand", fisher_type="type-2")
    norm = model[1]
    exact = torch.zeros(5, 2, 2)
    logits = model(x)
    for out in logits.flatten():
        weight, bias = torch.autograd.grad(out, [norm.weight, norm.bias], retain_graph=True)
        both = torch.stack([weight, bias], 1)
        exact += 2 * both.unsqueeze(2) * both.unsqueeze(1) / logits.numel()
    torch.testing.assert_close(found["1"].blocks, exact, rtol=1e-10, atol=1e-12)


def test_empirical_through_a_batch_norm_in_training_mode_is_unbiased():
    model, x, y = batch_norm_net(), torch.randn(8, 4), torch.randint(3, (8,))
    g = gradients_by_term(model, x, "0", fisher_type="empirical", targets=y).flatten(0, 1)
    exact = g.T @ g / 8
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([
        kronecker_factors(
            model, x, likelihood="categorical", kfac_approx="expand", fisher_type="empirical",
            targets=y, generator=generator,
        )["0"].gradient_covariance
        for _ in range(600)
    ])  # fmt: skip
    error = draws.std(0) / 600**0.5
    assert ((draws.mean(0) - exact).abs() <= 4.5 * error).all()


def test_in_evaluation_mode_no_sign_is_drawn():
    model, x, y = batch_norm_net().eval(), torch.randn(8, 4), torch.randint(3, (8,))
    options = {"likelihood": "categorical", "kfac_approx": "expand", "fisher_type": "empirical"}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    a, b = (kronecker_factors(model, x, targets=y, generator=g, **options)["0"] for g in generators)
    assert torch.equal(a.gradient_covariance, b.gradient_covariance)


# ---- what a call may change ----------------------------------------------------------------------


class Resized(nn.Module):
    def __init__(self, output_padding):
        super().__init__()
        self.up = nn.ConvTranspose2d(2, 3, 3, stride=3, output_padding=output_padding)
        self.size = None if output_padding else (8, 7)

    def forward(self, x):
        y = self.up(x) if self.size is None else self.up(x, output_size=self.size)
        return y.flatten(2).mean(-1)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_the_output_size_of_a_call_counts_and_not_the_modules_padding(kfac_approx):
    called, fixed, x = Resized(0), Resized((2, 1)), torch.randn(4, 2, 2, 2)
    fixed.load_state_dict(called.state_dict())
    options = {"likelihood": "gaussian", "kfac_approx": kfac_approx, "fisher_type": "type-2"}
    a, b = (kronecker_factors(model, x, **options)["up"] for model in (called, fixed))
    for key in ("input_covariance", "gradient_covariance"):
        torch.testing.assert_close(getattr(a, key), getattr(b, key), rtol=1e-13, atol=0)
    assert called.up.output_padding == (0, 0)


def test_a_users_hook_that_changes_the_output_comes_after_ours():
    model, x = nn.Sequential(nn.Linear(3, 2)), torch.randn(5, 3)
    model[0].register_forward_hook(lambda module, args, y: 2 * y)
    found = kronecker_factors(
        model, x, likelihood="gaussian", kfac_approx="expand", fisher_type="type-2"
    )["0"]
    # One term per output: B = 1/(5 · 2) Σ 2 · (2 e)(2 e)ᵀ over 5 examples = 4 I.
    torch.testing.assert_close(found.gradient_covariance, 4 * torch.eye(2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_labels_are_sampled_in_single_precision(dtype):
    p = 0.001
    logits = torch.full((200_000, 1), p).logit().to(dtype)
    exact = logits.double().sigmoid()[0].item()
    (v,) = Bernoulli().would_be_gradients(
        logits, fisher_type="mc", generator=torch.Generator().manual_seed(0)
    )
    frequency = (v < 0).double().mean().item()
    assert abs(frequency - exact) < 5 * (exact / len(logits)) ** 0.5
    assert v.dtype == torch.float32


# ---- layers that come and go ---------------------------------------------------------------------


class Branches(nn.Module):
    """Two linear layers, of which a pass uses those that `use` names."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.use = nn.Linear(4, 4), nn.Linear(4, 4), "ab"
        self.scale = nn.Parameter(torch.ones(4))
        self.norm = nn.LayerNorm(4)

    def forward(self, x):
        x = self.a(x)
        return x + self.scale * self.norm(self.b(x)) if "b" in self.use else x


@pytest.mark.parametrize("decay", [0.0, 0.9])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_a_pass_without_a_layer_leaves_its_average_alone(kfac_approx, decay):
    model, x = Branches(), torch.randn(6, 4)
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx, factor_decay=decay))
    step(model, kfac, x, "gaussian")
    before = kfac.curvature()
    model.use = "a"
    step(model, kfac, x, "gaussian")
    after = kfac.curvature()
    assert before.keys() == after.keys()
    for name in ("b", "norm", "scale"):
        for key, value in vars(before[name]).items():
            assert value is vars(after[name])[key] or torch.equal(
                torch.as_tensor(value), torch.as_tensor(vars(after[name])[key])
            )
    assert not torch.equal(before["a"].gradient_covariance, after["a"].gradient_covariance)


def test_a_layer_missing_in_the_first_pass_becomes_one_when_it_is_called(caplog):
    model, x = Branches(), torch.randn(6, 4)
    model.use = "a"
    kfac = Preconditioner(model, config())
    step(model, kfac, x, "gaussian")
    (warning,) = [r.getMessage() for r in caplog.records if "Kronecker" in r.message]
    assert all(name in warning for name in ("b.weight (16: not used", "scale (4: not used"))
    assert {"b.weight", "b.bias", "norm.weight"} <= {row.name for row in kfac.report()}
    resumed = Preconditioner(model, config())
    resumed.load_state_dict(kfac.state_dict())
    model.use = "ab"
    for _ in range(2):  # seen in the first, with factors from the second on
        for each in (kfac, resumed):
            step(model, each, x, "gaussian")
    assert {row.name for row in kfac.report()} == {"a", "b", "norm", "scale"}
    fresh = Preconditioner(model, config())
    step(model, fresh, x, "gaussian")
    for each in (kfac, resumed):
        for name in ("b", "norm"):
            for key, value in vars(fresh.curvature()[name]).items():
                found = vars(each.curvature()[name])[key]
                torch.testing.assert_close(torch.as_tensor(found), torch.as_tensor(value))


def test_freezing_and_unfreezing_is_followed():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(6, 4)
    kfac = Preconditioner(
        model, config(factor_update_steps=50, inverse_update_steps=50, early_updates=False)
    )
    step(model, kfac, x)
    model[0].requires_grad_(False)
    assert kfac.factors_due
    step(model, kfac, x)
    assert kfac.curvature().keys() == {"2"}
    assert not kfac.factors_due
    model[0].requires_grad_(True)
    step(model, kfac, x)
    assert kfac.curvature().keys() == {"0", "2"}
    fresh = Preconditioner(model, config())
    expected = {}
    for each in (fresh, kfac):
        if each is kfac:
            each.load_state_dict(fresh.state_dict())
        step(model, each, x)
        expected[each] = model[0].weight.grad.clone()
    torch.testing.assert_close(expected[fresh], expected[kfac])


def test_a_missing_gradient_of_the_bias_does_not_stop_the_weight():
    model, x = nn.Sequential(nn.Linear(4, 3)), torch.randn(6, 4)
    kfac = Preconditioner(model, config())
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical")
    logits.square().mean().backward()
    plain = model[0].weight.grad.clone()
    model[0].bias.grad = None
    kfac.precondition()
    assert model[0].bias.grad is None
    assert not torch.allclose(plain, model[0].weight.grad)


def test_excluded_layers_are_not_layers():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Sequential(nn.Linear(5, 3))), torch.randn(6, 4)
    kfac = Preconditioner(model, config(exclude=("1",)))
    step(model, kfac, x)
    assert {row.name: row.reason for row in kfac.report()} == {
        "0": "", "1.0.weight": "excluded", "1.0.bias": "excluded",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"exclude names '2'.*no module"):
        Preconditioner(model, config(exclude=("2",)))
    with pytest.raises(ValueError, match="tuple of names"):
        config(exclude="1")


def test_a_compiled_model_is_recorded_uncompiled():
    inner, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(6, 4)
    compiled = torch.compile(inner, backend="eager")
    compiled(x)
    kfac = Preconditioner(compiled, config())
    step(compiled, kfac, x)
    assert kfac.curvature().keys() == {"0", "2"}


# ---- errors that say what to do ------------------------------------------------------------------


def net():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def test_logits_of_another_pass_are_refused():
    model, x = net(), torch.randn(6, 4)
    kfac = Preconditioner(model, config())
    with kfac.record():
        old = model(x)
    with kfac.record():
        model(x)
    with pytest.raises(RuntimeError, match="another forward pass"):
        kfac.update(old, "categorical")


def test_logits_without_a_graph_are_refused():
    model, x = net(), torch.randn(6, 4)
    kfac = Preconditioner(model, config())
    with kfac.record():
        logits = model(x)
    with pytest.raises(RuntimeError, match="no graph"):
        kfac.update(logits.detach(), "categorical")
    kfac.update(logits, "categorical")  # the recording is still there


def test_update_after_the_backward_pass_is_refused():
    model, x = net(), torch.randn(6, 4)
    kfac = Preconditioner(model, config())
    with kfac.record():
        logits = model(x)
    logits.sum().backward()
    with pytest.raises(RuntimeError, match="update comes before"):
        kfac.update(logits, "categorical")


def test_a_wrong_likelihood_leaves_the_recording():
    model, x = net(), torch.randn(6, 4)
    kfac = Preconditioner(model, config())
    with kfac.record():
        logits = model(x)
    with pytest.raises(ValueError, match="likelihood must be one of"):
        kfac.update(logits, "softmax")
    kfac.update(logits, "categorical")


def test_names_in_a_sharing_rule_are_checked():
    model, x = net(), torch.randn(6, 4)
    rows = Segments.from_sizes(torch.tensor([2, 4]))
    with pytest.raises(SharingError, match="'O', which is no layer"):
        kronecker_factors(
            model, x, likelihood="gaussian", kfac_approx="expand", sharing={"O": rows}
        )
    kfac = Preconditioner(model, config())
    with pytest.raises(SharingError, match=r"'3\.linear'"), kfac.record({"3.linear": rows}):
        pass


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_segments_need_an_id_for_every_row(kfac_approx):
    rows = Segments.from_sizes(torch.tensor([2, 3]))
    for model in (net(), nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))):
        with pytest.raises(SharingError, match=r"layer '[012]'.*5 ids for 6 rows"):
            curvature(
                model, torch.randn(6, 4), likelihood="gaussian", kfac_approx=kfac_approx,
                sharing=rows,
            )  # fmt: skip
    with pytest.raises(SharingError, match="range from 0 to 2"):
        Segments(torch.tensor([0, 1, 2]), 2)


def test_reduce_needs_the_same_examples_in_all_calls():
    class Uneven(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x):
            return self.linear(x) + self.linear(x[:3]).sum(0)

    with pytest.raises(SharingError, match="3 and 6 examples"):
        kronecker_factors(Uneven(), torch.randn(6, 4), likelihood="gaussian", kfac_approx="reduce")


@pytest.mark.parametrize(
    ("likelihood", "targets", "message"),
    [
        (Gaussian(), torch.zeros(6), "would be broadcast"),
        (Bernoulli(), torch.zeros(6, 1), "would be broadcast"),
        (Categorical(), torch.zeros(6, 1, dtype=int), "class indices have the shape"),
        (Categorical(ignore_index=-1), torch.zeros(6, 3), "needs class indices"),
    ],
)
def test_targets_of_another_shape_are_refused(likelihood, targets, message):
    with pytest.raises(ValueError, match=message):
        list(
            likelihood.would_be_gradients(
                torch.randn(6, 3), fisher_type="empirical", targets=targets
            )
        )


def test_negative_weights_are_refused():
    weights = torch.tensor([1.0, -0.5, 1.0])
    with pytest.raises(ValueError, match="negative weights"):
        list(
            Categorical().would_be_gradients(torch.randn(3, 2), fisher_type="type-2", mask=weights)
        )


def test_layers_without_a_shape_are_refused():
    with pytest.raises(ValueError, match="run one forward pass"):
        Preconditioner(nn.Sequential(nn.LazyLinear(3)), config())


def test_layers_without_entries_and_complex_ones_are_left_out():
    model = nn.ModuleDict({
        "none": nn.Linear(3, 0), "complex": nn.Linear(3, 2, dtype=torch.complex128),
        "good": nn.Linear(3, 2),
    })  # fmt: skip
    model.forward = lambda x: (
        model["good"](x) + model["complex"](x.cdouble()).real + model["none"](x).sum(1, True)
    )
    kfac = Preconditioner(model, config())
    step(model, kfac, torch.randn(6, 3), "gaussian")
    reasons = {row.name: row.reason for row in kfac.report()}
    assert reasons == {
        "good": "", "complex.weight": "complex parameters", "complex.bias": "complex parameters",
    }  # fmt: skip


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_an_empty_batch_is_dropped(kfac_approx):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, groups=2), nn.ConvTranspose2d(4, 2, 2, groups=2), nn.Flatten(2), Mean(),
    )  # fmt: skip
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx, fisher_type="mc"))
    step(model, kfac, torch.randn(0, 2, 5, 5), "gaussian")
    assert kfac.failures["statistics"] == 1
    step(model, kfac, torch.randn(3, 2, 5, 5), "gaussian")
    assert kfac.curvature().keys() == {"0", "1"}


# ---- memory runs out -----------------------------------------------------------------------------


@pytest.mark.parametrize("side", [5, 8, 7, 3])  # of A of both layers, of B of both
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_when_memory_runs_out_the_old_factors_stay_and_fewer_rows_are_used(
    kfac_approx, side, caplog
):
    model, x = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)), torch.randn(20, 4)
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx, factor_decay=0.5))
    step(model, kfac, x)
    before = curvature_tensors(kfac)
    with NoMemoryFor(side, side) as refusal:
        with kfac.record():
            logits = model(2 * x)
        kfac.update(logits, "categorical")
        kfac.precondition()
    assert refusal.refused
    assert kfac.failures == {"statistics": 0, "inverse": 0, "memory": 1}
    where = r"memory ran out in the statistics of (layer '[02]' .*|the inputs|the gradients)"
    assert re.search(where + "; from now on 50 % of the examples", caplog.text)
    assert_same_tensors(curvature_tensors(kfac), before)
    step(model, kfac, x)  # now with the first half of the examples
    half = Preconditioner(model, config(kfac_approx=kfac_approx))
    step(model, half, x[:10])
    ones = torch.cat([x[:10], torch.ones(10, 1)], 1)
    torch.testing.assert_close(half.curvature()["0"].input_covariance, ones.T @ ones / 10)
    for name, value in curvature_tensors(half).items():
        mean = (before[name] + 2 * value) / 3  # the second time of a moving average
        torch.testing.assert_close(curvature_tensors(kfac)[name], mean)


def test_inputs_may_come_by_any_keyword():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.layer = nn.RMSNorm(4), nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(input=self.norm(x=x))

    model = Keywords()
    kfac = Preconditioner(model, config())
    step(model, kfac, torch.randn(3, 4))
    assert kfac.curvature().keys() == {"norm", "layer"}


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_examples_without_positions_give_zeros(kfac_approx):
    model = nn.Sequential(nn.Linear(1, 2), Mean())
    model[1].forward = lambda x: x.sum(1)
    found = kronecker_factors(
        model, torch.randn(3, 0, 1), likelihood="gaussian", kfac_approx=kfac_approx,
        fisher_type="type-2",
    )  # fmt: skip
    assert all(not block.gradient_covariance.any() for block in found.values())


# ---- rows of the logits that are not the examples of the layers ---------------------------------


class Mixing(nn.Module):
    """Positions of an example interact; outputs for each, in one of several layouts."""

    def __init__(self, layout):
        super().__init__()
        self.inner, self.outer, self.layout = nn.Linear(4, 4), nn.Linear(4, 3), layout

    def forward(self, x):
        h = self.inner(x).tanh()
        h = h + h.mean(1, keepdim=True).square()
        return self.layout(self.outer(h))


LAYOUTS = {
    "positions first": (lambda y: y.transpose(0, 1), Categorical()),
    "folded": (lambda y: y.flatten(0, 1), Categorical()),
    "classes first": (lambda y: y.permute(2, 0, 1), Categorical(class_dim=0)),
    "classes second": (lambda y: y.transpose(1, 2), Categorical(class_dim=1)),
}


def curvature_of(block):
    """Its tensors; of a shift the diagonal, whether it is a block of units or not."""
    if isinstance(block, UnitwiseCurvature):
        return {"diagonal": block.blocks.flatten()}
    return {k: v for k, v in vars(block).items() if isinstance(v, torch.Tensor)}


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_the_layout_of_the_logits_does_not_matter_to_the_exact_ggn(layout, kfac_approx):
    reshape, likelihood = LAYOUTS[layout]
    plain, other = Mixing(lambda y: y), Mixing(reshape)
    plain.bare, plain.computed = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(3))
    other.bare, other.computed = plain.bare, plain.computed
    other.load_state_dict(plain.state_dict())
    for model in (plain, other):
        model.outer.register_forward_hook(lambda m, i, y: y + plain.bare + plain.computed.sinh())
    x = torch.randn(5, 7, 4)
    options = {"kfac_approx": kfac_approx, "fisher_type": "type-2"}
    expected = curvature(plain, x, likelihood="categorical", **options)
    found = curvature(other, x, likelihood=likelihood, **options)
    assert found.keys() == {"inner", "outer", "bare", "computed"}
    for name, block in expected.items():
        for key, value in curvature_of(block).items():
            other = curvature_of(found[name])[key]
            torch.testing.assert_close(other, value, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_outputs_of_nodes_that_interact_agree_with_samples(kfac_approx):
    sizes = torch.tensor([3, 2, 4])
    mixing = torch.block_diag(*[torch.ones(n, n) / n for n in sizes.tolist()])

    class Nodes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(3, 4), nn.Linear(4, 3)

        def forward(self, x):
            return self.outer(mixing @ self.inner(x).tanh())

    model, x = Nodes(), torch.randn(9, 3)
    options = {"likelihood": "categorical", "kfac_approx": kfac_approx,
               "sharing": Segments.from_sizes(sizes)}  # fmt: skip
    exact = kronecker_factors(model, x, fisher_type="type-2", **options)
    sampled = kronecker_factors(model, x, fisher_type="mc", mc_samples=4000, **options)
    for name, block in exact.items():
        difference = block.gradient_covariance - sampled[name].gradient_covariance
        assert difference.norm() < 0.1 * block.gradient_covariance.norm()


# ---- what is kept of a recorded pass -------------------------------------------------------------


@pytest.mark.parametrize("eigenvalue_correction", [False, True])
def test_an_input_buffer_may_be_used_again_before_the_factors_are(eigenvalue_correction):
    """Rows that are kept must not be views of an input that the next micro-batch is copied into."""

    def factors_of(reuse):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(40, 30, bias=False), nn.Linear(30, 3))
        settings = {"damping_kind": "exact", "eigenvalue_correction": True, "factor_decay": 0.5}
        kfac = Preconditioner(
            model, config(damping=0.1, **(settings if eigenvalue_correction else {}))
        )
        buffer = torch.empty(2, 40)
        for _ in range(3):
            given = torch.randn(2, 40)
            x = buffer.copy_(given) if reuse else given
            with kfac.record():
                logits = model(x)
            kfac.update(logits, "categorical")
            logits.square().sum().backward()
        kfac.precondition()
        return [p.grad for p in model.parameters()]

    for a, b in zip(factors_of(True), factors_of(False), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_a_layer_may_be_called_in_a_later_micro_batch_first(kfac_approx):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer, self.used = nn.Linear(4, 4), nn.Linear(4, 3), True

        def forward(self, x):
            return self.outer(self.inner(x) if self.used else x)

    model = Sometimes()
    kfac = Preconditioner(model, config(kfac_approx=kfac_approx, factor_decay=0.5))
    step(model, kfac, torch.randn(6, 4))
    for used in (False, True):
        model.used = used
        with kfac.record():
            logits = model(torch.randn(6, 4))
        kfac.update(logits, "categorical")
        logits.square().mean().backward()
    kfac.precondition()
    assert kfac.failures == {"statistics": 0, "inverse": 0, "memory": 0}


def test_parameters_that_were_frozen_have_an_inverse_again_at_once():
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    seldom = {"factor_update_steps": 10, "inverse_update_steps": 10, "early_updates": False}
    kfac = Preconditioner(
        model, config(damping_kind="exact", factor_decay=0.5, damping=0.1, **seldom)
    )
    for trains in (True, False, True):
        model[0].requires_grad_(trains)
        model.zero_grad()
        with kfac.record():
            logits = model(torch.randn(6, 4))
        kfac.update(logits, "categorical")
        logits.square().mean().backward()
        plain = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
        kfac.precondition()
    for layer in ("0", "2"):
        joint = torch.cat([plain[f"{layer}.weight"], plain[f"{layer}.bias"][:, None]], 1)
        dense = kfac.curvature()[layer].to_dense()
        expected = torch.linalg.solve(dense + 0.1 * torch.eye(len(dense)), joint.flatten())
        torch.testing.assert_close(
            model.get_submodule(layer).weight.grad, expected.view_as(joint)[:, :-1]
        )


def test_padding_positions_count_in_no_norm_of_images():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(3, track_running_stats=False)

        def forward(self, x):
            return self.norm(x).flatten(1)

    mask = torch.tensor([[True, True, False], [True, False, False]])
    x = torch.randn(2, 3, 3)
    options = {"likelihood": "gaussian", "kfac_approx": "reduce", "fisher_type": "type-2"}
    model = Net()
    seen = curvature(model, x, sharing=Positions(mask=mask), **options)["norm"].blocks
    without = curvature(model, x, mask=mask.unsqueeze(1).expand(2, 3, 3).reshape(2, 9), **options)[
        "norm"
    ].blocks
    share = mask.sum() / mask.numel()  # of the terms, which the second divides by
    torch.testing.assert_close(seen, without * share)


@pytest.mark.parametrize("approx", ["expand", "reduce", "auto"])
def test_recordings_that_are_not_used_are_let_go_of(approx):
    """And with them the graphs of their forward passes."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    saved = []  # the output of Tanh, which its backward pass needs
    model[1].register_forward_hook(
        lambda module, args, output: saved.append(StorageWeakRef(output.untyped_storage()))
    )
    kfac = Preconditioner(model, config(kfac_approx=approx))
    for _ in range(3):
        with kfac.record():
            model(torch.randn(6, 4))
    gc.collect()
    assert [one.expired() for one in saved[:2]] == [True, True]
    step(model, kfac, torch.randn(6, 4))
    gc.collect()
    assert len(saved) == 4
    assert all(one.expired() for one in saved)


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_the_graph_keeps_nothing_that_was_collected(kfac_approx):
    """It lives as long as the logits."""
    model = nn.Sequential(
        nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.LayerNorm(5), nn.Linear(5, 3)
    )
    settings = {"factor_decay": 0.5, "fisher_type": "mc"}
    kfac, logits = Preconditioner(model, config(kfac_approx=kfac_approx, **settings)), []
    factors = {(5, 5), (6, 6), (3, 3)}

    def steps():
        for _ in range(5):
            model.zero_grad()
            with kfac.record():
                logits.append(model(torch.randn(6, 4)))
            kfac.update(logits[-1], "categorical")
            logits[-1].square().mean().backward(retain_graph=True)
            kfac.precondition()

    def held():
        """Tensors as large as a factor."""
        found = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor]
        return sum(tensor.shape[-2:] in factors for tensor in found)

    steps()
    gc.collect()
    gc.disable()
    try:  # at once, not when the collector of garbage comes
        before = held()
        steps()
        assert held() == before > 0
    finally:
        gc.enable()


@pytest.mark.parametrize(
    ("sizes", "exist", "expected"),
    [
        ([2, 3], None, 5),
        ([2, 3], [True, True], 5),
        ([2, 3], [True, False], 2),
        ([2, 3, 0], [True, False, True], 2),
        ([2, 3], [False, False], 0),
        ([2, 3, 1], [True, False, True], None),
        ([2, 3], [False, True], None),
    ],
)
def test_padding_rows_are_cut_off_where_nothing_comes_after_them(sizes, exist, expected):
    mask = None if exist is None else torch.tensor(exist)
    segments = Segments.from_sizes(torch.tensor(sizes), segment_mask=mask)
    assert segments.rows_before_padding == expected
    rows = torch.randn(sum(sizes), 3)
    kept = without_padding(rows, segments)
    assert len(kept) == (sum(sizes) if expected is None else expected)
    assert torch.equal(kept, zero_padding(rows, segments)[: len(kept)])
    with pytest.raises(SharingError, match="ids for"):
        without_padding(rows[1:], segments)
