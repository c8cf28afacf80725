"""Operations on parameters, however a model writes them, have the same factors."""

import pytest
import torch
import torch.nn.functional as F
from ggn import exact_ggn, relative_error
from observed import assert_same_factors
from torch import nn
from torch.func import functional_call

from submission.kfac import curvature

OPTIONS = {"likelihood": "categorical", "fisher_type": "type-2"}
approxes = pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])


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
    # Equation 7, row by row.
    outputs = torch.einsum("eni,eio->eno", x, model.weight)
    outputs = outputs + model.bias if bias else outputs
    logits = outputs.tanh().sum(0)
    p = logits.softmax(-1)
    root = p.sqrt().diag_embed() - p.unsqueeze(2) * p.sqrt().unsqueeze(1)
    g = sum(
        torch.einsum("eno,enq->eoq", v, v)
        for v in (torch.autograd.grad(logits, outputs, root[..., c], True)[0] for c in range(3))
    )
    rows = torch.cat([x, torch.ones(2, 6, 1)], -1) if bias else x
    a = rows.mT @ rows / 6
    blocks = list(found.values())
    assert len(blocks) == (2 if way in ("slices", "unbound") else 1)
    inputs = torch.stack([b.input_covariance for b in blocks]).view(2, *a.shape[1:])
    gradients = torch.stack([b.gradient_covariance for b in blocks]).view(2, 3, 3)
    torch.testing.assert_close(inputs, a)
    torch.testing.assert_close(gradients, g / 6)


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
        lambda w, x: F.embedding(x, w),
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
