"""Operations on parameters, however a model writes them, have the same factors."""

import pytest
import torch
import torch.nn.functional as F
from ggn import exact_ggn, relative_error
from torch import nn
from torch.func import functional_call

from submission.kfac import (
    Bernoulli,
    Categorical,
    Gaussian,
    KFACConfig,
    Preconditioner,
    curvature,
)

OPTIONS = {"likelihood": "categorical", "fisher_type": "type-2"}
approxes = pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])


def assert_same_factors(found, expected, rtol=1e-12):
    assert len(found) == len(expected) > 0
    for block, other in zip(found.values(), expected.values(), strict=True):
        for key, value in vars(other).items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(getattr(block, key), value, rtol=rtol, atol=1e-14)


# ---- one net, written in many ways ---------------------------------------------------------------


class Net(nn.Module):
    """Two linear maps around a tanh, then a mean over positions."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.outer(self.inner(x).tanh()).mean(1)


class OwnForward(nn.Linear):
    """Leaves out nn.Linear's forward."""

    def forward(self, x):
        return x.matmul(self.weight.t()) + self.bias


def written(linear):
    """The net with another way to write a linear map."""

    def forward(self, x):
        h = linear(x, self.inner.weight, self.inner.bias).tanh()
        return linear(h, self.outer.weight, self.outer.bias).mean(1)

    return forward


WAYS = {
    "F.linear": F.linear,
    "matmul": lambda x, w, b: x @ w.T + b,
    "torch.matmul": lambda x, w, b: torch.matmul(x, w.mT).add(b),
    "bias first": lambda x, w, b: b + x @ w.t(),
    "einsum": lambda x, w, b: torch.einsum("nri,oi->nro", x, w) + b,
    "einsum, ellipsis": lambda x, w, b: torch.einsum("oi,...i->...o", w, x) + b,
    "addmm": lambda x, w, b: torch.addmm(b, x.flatten(0, 1), w.T).unflatten(0, x.shape[:2]),
    "addmm of a view": lambda x, w, b: torch.addmm(b, x.view(-1, x.shape[-1]), w.T).view(
        *x.shape[:-1], -1
    ),
    "added in place": lambda x, w, b: (x @ w.T).add_(b),
}  # fmt: skip


@approxes
@pytest.mark.parametrize("way", list(WAYS))
def test_a_linear_map_is_one_however_it_is_written(way, kfac_approx):
    model, x = Net(), torch.randn(6, 3, 4)
    options = {**OPTIONS, "kfac_approx": kfac_approx}
    expected = curvature(model, x, **options)
    other = type("Written", (Net,), {"forward": written(WAYS[way])})()
    other.load_state_dict(model.state_dict())
    torch.testing.assert_close(other(x), model(x))
    found = curvature(other, x, **options)
    assert list(found) == ["inner", "outer"]
    assert_same_factors(found, expected)


@approxes
def test_a_functional_call_and_a_subclass_with_its_own_forward_are_seen(kfac_approx):
    model, x = Net(), torch.randn(6, 3, 4)
    options = {**OPTIONS, "kfac_approx": kfac_approx}
    expected = curvature(model, x, **options)

    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model

        def forward(self, x):
            return functional_call(self.net, dict(self.net.named_parameters()), (x,))

    assert_same_factors(curvature(Functional(), x, **options), expected)
    own = Net()
    own.inner, own.outer = OwnForward(4, 5), OwnForward(5, 3)
    own.load_state_dict(model.state_dict())
    assert_same_factors(curvature(own, x, **options), expected)


def test_a_bias_that_is_subtracted_is_exact():
    class Minus(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.bias = nn.Linear(4, 3, bias=False), nn.Parameter(torch.randn(3))

        def forward(self, x):
            return self.map(x) - self.bias

    model, x = Minus(), torch.randn(1, 4)
    truth = exact_ggn(model, ["map.weight", "bias"], (x,), lambda f: f.square().mean())
    found = curvature(model, x, likelihood="gaussian", kfac_approx="expand", fisher_type="type-2")
    assert relative_error(found["map"].to_dense(), truth[:12, :12]) <= 1e-12
    torch.testing.assert_close(found["bias"].blocks.flatten(), truth[12:, 12:].diagonal())


@approxes
def test_a_weight_on_the_left_of_its_inputs_has_the_factors_of_one_on_the_right(kfac_approx):
    class Left(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 5, bias=False), nn.Linear(5, 3, bias=False)

        def forward(self, x):  # [N, R, 4]
            h = (self.inner.weight @ x.mT).tanh()
            return torch.einsum("oi,nir->nro", self.outer.weight, h).mean(1)

    class Right(Left):
        def forward(self, x):
            return self.outer(self.inner(x).tanh()).mean(1)

    left, right, x = Left(), Right(), torch.randn(6, 3, 4)
    right.load_state_dict(left.state_dict())
    options = {**OPTIONS, "kfac_approx": kfac_approx}
    assert_same_factors(curvature(left, x, **options), curvature(right, x, **options))


def test_an_output_that_is_also_used_without_its_bias_does_not_share_the_bias():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.map, self.bias = nn.Linear(4, 3, bias=False), nn.Parameter(torch.randn(3))

        def forward(self, x):
            y = self.map(x)
            return (y + self.bias) + 2 * y

    model, x = Both(), torch.randn(1, 4)
    truth = exact_ggn(model, ["map.weight", "bias"], (x,), lambda f: f.square().mean())
    found = curvature(model, x, likelihood="gaussian", kfac_approx="expand", fisher_type="type-2")
    assert relative_error(found["map"].to_dense(), truth[:12, :12]) <= 1e-12
    bias = found["bias"]
    diagonal = bias.blocks if hasattr(bias, "blocks") else bias.diagonal
    torch.testing.assert_close(diagonal.flatten(), truth[12:, 12:].diagonal())


# ---- stacked weights -----------------------------------------------------------------------------


class Experts(nn.Module):
    """A stack of linear maps, each for its own rows."""

    def __init__(self, way, bias):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(2, 4, 3))
        self.bias = nn.Parameter(torch.randn(2, 1, 3)) if bias else None
        self.way = way

    def forward(self, x):  # [experts, N, 4]
        return self.way(x, self.weight, self.bias).tanh().sum(0)


STACKED = {
    "bmm": lambda x, w, b: torch.bmm(x, w),
    "matmul": lambda x, w, b: x @ w,
    "einsum": lambda x, w, b: torch.einsum("eni,eio->eno", x, w),
    "slices": lambda x, w, b: torch.stack([x[e] @ w[e] for e in range(2)]),
    "unbound": lambda x, w, b: torch.stack([F.linear(y, v.T) for y, v in zip(x, w.unbind())]),  # noqa: B905
}


@pytest.mark.parametrize("way", [*STACKED, "baddbmm"])
def test_stacked_weights_have_a_pair_of_factors_each(way):
    bias = way == "baddbmm"
    model = Experts(STACKED.get(way, lambda x, w, b: torch.baddbmm(b, x, w)), bias)
    x = torch.randn(2, 6, 4)
    found = curvature(model, x, kfac_approx="expand", **OPTIONS)
    # What the exact GGN of single rows says: A of the inputs, B of the gradients of the outputs.
    outputs = [torch.einsum("eni,eio->eno", x, model.weight)]
    if bias:
        outputs[0] = outputs[0] + model.bias
    logits = outputs[0].tanh().sum(0)
    p = logits.softmax(-1)
    root = torch.linalg.cholesky(
        torch.diag_embed(p) - p.unsqueeze(2) * p.unsqueeze(1) + 1e-15 * torch.eye(3)
    )
    g = sum(
        torch.einsum("eno,enq->eoq", v, v)
        for v in (torch.autograd.grad(logits, outputs, root[..., c], True)[0] for c in range(3))
    )
    rows = torch.cat([x, torch.ones(2, 6, 1)], -1) if bias else x
    a = rows.mT @ rows / 6
    blocks = list(found.values())
    if len(blocks) == 1:
        inputs, gradients = blocks[0].input_covariance, blocks[0].gradient_covariance
    else:
        assert list(found) == ["[0:1]", "[1:2]"] or len(found) == 2
        inputs = torch.stack([b.input_covariance for b in blocks])
        gradients = torch.stack([b.gradient_covariance for b in blocks])
    torch.testing.assert_close(inputs, a)
    torch.testing.assert_close(gradients, g / 6, rtol=1e-7, atol=1e-9)


# ---- lookups -------------------------------------------------------------------------------------


class Lookup(nn.Module):
    def __init__(self, look):
        super().__init__()
        self.table, self.head, self.look = nn.Embedding(6, 4), nn.Linear(4, 3), look

    def forward(self, x):
        return self.head(self.look(self.table.weight, x)).mean(1)


@approxes
@pytest.mark.parametrize(
    "look",
    [
        F.embedding.__call__ and (lambda w, x: F.embedding(x, w)),
        lambda w, x: w[x],
        lambda w, x: torch.index_select(w, 0, x.flatten()).view(*x.shape, -1),
        lambda w, x: F.one_hot(x, 6).double() @ w,
    ],
    ids=["embedding", "index", "index_select", "one-hot product"],
)
def test_rows_of_a_table_are_an_embedding_however_they_are_looked_up(look, kfac_approx):
    model, plain = Lookup(look), Lookup(lambda w, x: F.embedding(x, w))
    plain.load_state_dict(model.state_dict())
    x = torch.randint(6, (5, 3))
    options = {**OPTIONS, "kfac_approx": kfac_approx}
    found, expected = curvature(model, x, **options), curvature(plain, x, **options)
    a, b = (blocks["table"].to_dense() for blocks in (found, expected))
    if a.shape == b.shape and not torch.allclose(a, b):  # [V, d] and [d, V]
        a = a.reshape(6, 4, 6, 4).permute(1, 0, 3, 2).reshape(24, 24)
    if kfac_approx == "expand":  # a product's A is dense, but one-hot rows are orthogonal
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(found["head"].to_dense(), expected["head"].to_dense())


@pytest.mark.parametrize("mode", ["sum", "mean"])
def test_bags_are_sums_of_one_hot_rows(mode):
    class Bags(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.EmbeddingBag(6, 4, mode=mode), nn.Linear(4, 3)

        def forward(self, x):
            return self.head(self.table(x))

    class Product(Bags):
        def forward(self, x):
            counts = F.one_hot(x, 6).double().sum(1)
            counts = counts / x.shape[1] if mode == "mean" else counts
            return self.head(F.linear(counts, self.table.weight.T))

    bags, product, x = Bags(), Product(), torch.randint(6, (5, 3))
    product.load_state_dict(bags.state_dict())
    torch.testing.assert_close(bags(x), product(x))
    found, expected = (curvature(m, x, kfac_approx="reduce", **OPTIONS) for m in (bags, product))
    assert_same_factors(found, expected)


# ---- losses that are seen ------------------------------------------------------------------------


def targets_for(logits):
    return torch.arange(logits.shape[0]) % logits.shape[-1]


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
