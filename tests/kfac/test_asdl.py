"""Equality with ASDL (package asdfghjkl), the library of the paper's runs.

One preconditioned gradient of both, from the same sampled labels, after the conversion of scale
that docs/conventions.md has. Skipped where the package is not installed; it is one of
requirements/experiments.txt.
"""

import copy
import dataclasses
import importlib.metadata
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from submission.hyperparameters import Hyperparameters
from submission.kfac import KFACConfig, Preconditioner, kronecker_factors

pytestmark = pytest.mark.filterwarnings("ignore:Using a non-full backward hook:FutureWarning")

PAPER = Path(__file__).parents[2] / "workloads_overrides" / "paper"
DAMPING = 0.013
SEED = 11
TOLERANCE = 1e-5  # relative, in float64


class Attention(nn.Module):
    """Self-attention of one head, from linear layers."""

    def __init__(self, width):
        super().__init__()
        self.query, self.value, self.out = (nn.Linear(width, width) for _ in range(3))
        self.key = nn.Linear(width, width, bias=False)  # softmax takes a bias of the keys out

    def forward(self, x):
        weights = (self.query(x) @ self.key(x).mT / x.shape[-1] ** 0.5).softmax(-1)
        return self.out(weights @ self.value(x))


class Transformer(nn.Module):
    """Tokens [N, R, 5] -> logits [N, 3]: attention, norms, an MLP, a mean over positions."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Linear(5, 6)
        self.norm1, self.norm2 = nn.LayerNorm(6), nn.LayerNorm(6)
        self.attention = Attention(6)
        self.up, self.down = nn.Linear(6, 8), nn.Linear(8, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.embed(x)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(torch.tanh(self.up(self.norm2(x))))
        return self.head(x.mean(1))


def linear_net():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, 3))


def convolutional_net():
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 2, stride=2, bias=False),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


NETS = {
    "linear": (linear_net, (9, 5), {}),
    "convolutional": (convolutional_net, (9, 2, 4, 4), {}),
    # ASDL divides a linear layer's A by N; here it is a mean over all N · R rows.
    "transformer": (Transformer, (9, 4, 5), dict.fromkeys(
        ("embed", "attention.query", "attention.key", "attention.value", "attention.out", "up",
         "down"), 4)),
}  # fmt: skip


def problem(net):
    make, shape, positions = NETS[net]
    model, x = make(), torch.randn(shape)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too are to be away from their start
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model, x, torch.randint(3, (shape[0],)), positions


def sampled_labels(model, x):
    """The labels that ASDL draws from its seed."""
    torch.manual_seed(SEED)
    return torch.distributions.Categorical(F.softmax(model(x).detach(), -1)).sample()


def theirs(model, x, targets, damping, **options):
    """Parameter name -> gradient that ASDL has preconditioned."""
    asdl = pytest.importorskip("asdl", reason="ASDL is not installed: requirements/experiments.txt")
    model = copy.deepcopy(model)
    config = asdl.PreconditioningConfig(data_size=len(x), damping=damping, **options)
    maker = asdl.KfacGradientMaker(model, config, fisher_type="fisher_mc", seed=SEED)
    logits = maker.setup_model_call(model, x)
    maker.setup_loss_call(F.cross_entropy, logits, targets)
    maker.forward_and_backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def ours(model, x, labels, targets, damping, **options):
    """Parameter name -> gradient that this engine has preconditioned with the given labels."""
    model = copy.deepcopy(model)
    settings = {
        "kfac_approx": "expand",
        "fisher_type": "empirical",  # at the labels that ASDL has sampled
        "damping": damping,
        "damping_kind": "asdl",
        "bias": "output",
        "norm_rows": "positions",
    }
    kfac = Preconditioner(model, KFACConfig(**{**settings, **options}))
    with kfac.record():
        logits = model(x)
    kfac.update(logits, "categorical", targets=labels)
    F.cross_entropy(logits, targets).backward()
    kfac.precondition()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def difference(found, expected):
    """The largest relative difference over the parameters."""
    return max(float((found[n] - g).norm() / g.norm()) for n, g in expected.items())


@pytest.mark.parametrize("net", list(NETS))
def test_a_preconditioned_gradient_is_asdls(net, record_property):
    model, x, targets, positions = problem(net)
    labels = sampled_labels(model, x)
    expected = theirs(model, x, targets, DAMPING)
    found = {}
    for count in {1, *positions.values()}:
        # Their A is R times ours: with λ / R for their λ, our B is damped as theirs, and our
        # direction is R times theirs for a weight, and theirs for a bias.
        direction = ours(model, x, labels, targets, DAMPING / count)
        for name, gradient in direction.items():
            layer, _, kind = name.rpartition(".")
            if positions.get(layer, 1) == count:
                found[name] = gradient / count if kind == "weight" else gradient
    worst = difference(found, expected)
    version = importlib.metadata.version("asdfghjkl")
    print(f"{net}: largest relative difference to ASDL {version} {worst:.1e}")
    record_property("difference", worst)
    assert found.keys() == expected.keys()
    assert worst < TOLERANCE


@pytest.mark.parametrize("approx", ["expand", "reduce"])
@pytest.mark.parametrize("figure", ["ogbg", "imagenet_vit", "every_step"])
def test_the_papers_settings_are_its_library_with_its_listing(figure, approx, monkeypatch):
    """With the paper's listing in ASDL's linear layers a published damping is ours as it stands."""
    asdl = pytest.importorskip("asdl", reason="ASDL is not installed: requirements/experiments.txt")

    def inputs(module, a, _):
        if a.ndim == 2:
            return a
        return a.mean(1) if approx == "reduce" else a.flatten(0, 1) / a.shape[1] ** 0.5

    def gradients(module, g):
        if g.ndim == 2:
            return g
        return g.sum(1) if approx == "reduce" else g.flatten(0, 1)

    monkeypatch.setattr(asdl.operations.Linear, "preprocess_in_data", staticmethod(inputs))
    monkeypatch.setattr(asdl.operations.Linear, "preprocess_out_grads", staticmethod(gradients))
    (point,) = json.loads((PAPER / figure / f"kfac_{approx}.json").read_text())
    config = Hyperparameters.from_tuning_point(point).kfac_config(seed=0)
    options = {**dataclasses.asdict(config), "fisher_type": "empirical"}
    model, x, targets, _ = problem("transformer")
    labels = sampled_labels(model, x)
    expected = theirs(model, x, targets, config.damping)
    if approx == "reduce":
        del expected["attention.key.weight"]  # the sum of its gradients over positions is 0
    worst = difference(ours(model, x, labels, targets, **options), expected)
    print(f"{figure}, {approx}: largest relative difference to ASDL with the listing {worst:.1e}")
    assert worst < TOLERANCE


def test_the_moving_average_weighs_the_new_factor(monkeypatch):
    """ema_decay is the new factor's weight; there is no correction for the start."""
    for name in ("range_push", "range_pop"):  # which a PyTorch without CUDA does not have
        monkeypatch.setattr(torch.cuda.nvtx, name, lambda *_: None)
    asdl = pytest.importorskip("asdl", reason="ASDL is not installed: requirements/experiments.txt")
    model, x, targets, _ = problem("linear")
    plain, averaged = {}, {}
    for ema_decay, factors in ((1.0, plain), (0.9, averaged)):
        net = copy.deepcopy(model)
        config = asdl.PreconditioningConfig(data_size=len(x), damping=0.1, ema_decay=ema_decay)
        maker = asdl.KfacGradientMaker(net, config, fisher_type="fisher_mc", seed=SEED)
        for step in range(2):
            logits = maker.setup_model_call(net, x * (1 + step))
            maker.setup_loss_call(F.cross_entropy, logits, targets)
            maker.forward_and_backward()
            factors[step] = net[0].fisher.kron.A.clone()
    expected = 0.1 * (0.9 * plain[0]) + 0.9 * plain[1]
    torch.testing.assert_close(averaged[1], expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("net", ["convolutional", "transformer"])
def test_a_preconditioned_gradient_of_reduce_is_equation_10(net, record_property):
    """Equation 10 written down once more: means of inputs, sums of gradients, over positions."""
    model, x, targets, _ = problem(net)
    labels = sampled_labels(model, x)
    found = ours(model, x, labels, targets, DAMPING, kfac_approx="reduce")
    layers = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    layers.pop("attention.key", None)  # softmax: the sum of their gradients over positions is 0
    inputs, outputs = {}, {}

    def keep(layer, given, output):
        inputs[layer], outputs[layer] = given[0].detach(), output

    handles = [layer.register_forward_hook(keep) for layer in layers.values()]
    logits = model(x)
    for handle in handles:
        handle.remove()
    loss = F.cross_entropy(logits, labels, reduction="sum")
    gradients = torch.autograd.grad(loss, list(outputs.values()))
    would_be = dict(zip(outputs, gradients, strict=True))
    F.cross_entropy(model(x), targets).backward()
    expected = {}
    for name, layer in layers.items():
        a, b = inputs[layer], would_be[layer]
        if isinstance(layer, nn.Conv2d):
            a = F.unfold(a, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
            b = b.flatten(2).mT
        a, b = (value.reshape(len(x), -1, value.shape[-1]) for value in (a, b))
        mean, total = a.mean(1), b.sum(1)
        factor_a, factor_b = mean.T @ mean / len(x), total.T @ total / len(x)
        pi = ((factor_a.trace() / len(factor_a)) / (factor_b.trace() / len(factor_b))).sqrt()
        inverse_a = (factor_a + DAMPING**0.5 * pi * torch.eye(len(factor_a))).inverse()
        inverse_b = (factor_b + DAMPING**0.5 / pi * torch.eye(len(factor_b))).inverse()
        gradient = layer.weight.grad.flatten(1)
        expected[f"{name}.weight"] = (inverse_b @ gradient @ inverse_a).view_as(layer.weight)
        if layer.bias is not None:
            expected[f"{name}.bias"] = inverse_b @ layer.bias.grad
    worst = difference(found, expected)
    print(f"{net}: largest relative difference to equation 10 {worst:.1e}")
    record_property("difference", worst)
    assert worst < TOLERANCE


def test_factors_with_the_bias_outside_have_no_row_for_it():
    model, x, _, _ = problem("convolutional")
    options = {"likelihood": "categorical", "kfac_approx": "expand"}
    joint = kronecker_factors(model, x, **options)
    outside = kronecker_factors(model, x, bias="output", **options)
    for name, block in outside.items():
        side = block.input_covariance.shape[-1]
        a = joint[name].input_covariance[:side, :side]
        torch.testing.assert_close(block.input_covariance, a, rtol=1e-12, atol=0)
        torch.testing.assert_close(block.gradient_covariance, joint[name].gradient_covariance)
    assert outside["0"].input_covariance.shape[-1] == 18


def test_a_bias_outside_needs_damped_factors():
    with pytest.raises(ValueError, match="bias 'output' needs the inverse of B by itself"):
        KFACConfig(bias="output", damping_kind="exact")


def test_dead_layers_and_tiny_factors_are_damped_as_in_asdl():
    """π of 0 or ∞ puts λ on either factor; nothing below 1e-7 is added."""
    model, x, targets, _ = problem("linear")
    with torch.no_grad():
        model[4].weight.zero_()  # no gradient reaches the layers below
    expected = theirs(model, x, targets, 1e-6)
    found = ours(model, x, sampled_labels(model, x), targets, 1e-6)
    head = {name: found[name] for name in ("4.weight", "4.bias")}
    assert difference(found, {name: expected[name] for name in head}) < TOLERANCE
    with torch.no_grad():
        model[4].weight.copy_(1e-6 * torch.randn(3, 4))  # a tiny B in the layers below
    expected = theirs(model, x, targets, 1e-12)
    found = ours(model, x, sampled_labels(model, x), targets, 1e-12)
    assert difference(found, expected) < TOLERANCE
