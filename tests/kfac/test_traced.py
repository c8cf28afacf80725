"""Statistics of K-FAC-reduce inside the graph of a compiled model: those of the plain one."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel

from submission.kfac import KFACConfig, Preconditioner

pytestmark = pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="compiled models are recorded uncompiled"
)
CLASSES = 5
KEPT = []


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    torch._dynamo.reset()
    yield
    torch.set_default_dtype(torch.float32)


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.qkv, self.out = nn.LayerNorm(8), nn.Linear(8, 24), nn.Linear(8, 8)
        self.experts = nn.Parameter(torch.randn(2, 8, 8) / 3)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v))
        return x + torch.einsum("nrd,gde->nrge", x, self.experts).relu().mean(2)


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 8, 4, 2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.blocks = nn.Sequential(Attention(), Attention())
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.grouped(self.patch(x)).flatten(2).mT
        return self.head(self.blocks(x).mean(1))


class Text(nn.Module):
    """An embedding, a bias that is added apart, a weight that is used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(CLASSES, 8), Attention()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8) / 3), nn.Parameter(torch.zeros(8))
        self.twice, self.head = nn.Linear(8, 8), nn.Linear(8, CLASSES)

    def forward(self, ids):
        x = self.block(self.embed(ids))
        x = torch.tanh(x @ self.weight + self.bias)
        return self.head(self.twice(torch.tanh(self.twice(x))).mean(1))


class Tied(nn.Module):
    """The last layer's weight is the embedding's."""

    def __init__(self):
        super().__init__()
        self.embed, self.block = nn.Embedding(CLASSES, 8), Attention()

    def forward(self, ids):
        return F.linear(self.block(self.embed(ids)).mean(1), self.embed.weight)


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Conv1d(6, 6, 3), nn.Flatten(),
        )  # fmt: skip
        self.head = nn.LazyLinear(CLASSES)

    def forward(self, x):
        return self.head(self.net(x))


def images(n, generator):
    return torch.randn(n, 3, 8, 8, generator=generator)


def ids(n, generator):
    return torch.randint(CLASSES, (n, 7), generator=generator)


def waves(n, generator):
    return torch.randn(n, 3, 9, generator=generator)


CASES = {"vision": (Vision, images), "text": (Text, ids), "tied": (Tied, ids),
         "normed": (Normed, waves)}  # fmt: skip


def net(name):
    torch.manual_seed(0)
    model, make = CASES[name][0](), CASES[name][1]
    model(make(2, torch.Generator().manual_seed(0)))
    return model


def preconditioner(model, **settings):
    return Preconditioner(
        model,
        KFACConfig(**{
            "kfac_approx": "reduce", "fisher_type": "empirical", "factor_update_steps": 1,
            "inverse_update_steps": 2, "factor_decay": 0.5, "damping_kind": "exact",
            "direction": "eigenbasis_adam", **settings,
        }),
    )  # fmt: skip


def train(call, model, kfac, make, *, steps=5, sizes=(6,), passes=1, stated=False, rate=0.02):
    generator = torch.Generator().manual_seed(1)
    for step in range(steps):
        model.zero_grad()
        for _ in range(passes):
            n = sizes[step % len(sizes)]
            x, y = make(n, generator), torch.randint(CLASSES, (n,), generator=generator)
            with kfac.record():
                logits = call(x)
                loss = None if stated else F.cross_entropy(logits, y)
            if stated:
                loss = F.cross_entropy(logits, y, reduction="sum") / n
                kfac.update(logits, "categorical", targets=y, loss=loss)
            (loss / passes).backward()
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                p -= rate * p.grad


def both(name, *, backend="aot_eager", settings=None, **options):
    """A plain model's K-FAC and a compiled one's, after the same training."""
    make = CASES[name][1]
    plain = net(name)
    expected = preconditioner(plain, **(settings or {}))
    train(plain, plain, expected, make, **options)
    model = net(name)
    compiled = torch.compile(model, backend=backend)
    kfac = preconditioner(compiled, **(settings or {}))
    train(compiled, model, kfac, make, **options)
    KEPT.append(compiled)  # what is known of a compiled module goes with it
    return plain, expected, model, kfac


def assert_same(plain, expected, model, kfac, tolerance=1e-12):
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=tolerance, atol=tolerance)
    found = kfac.curvature()
    for name, curvature in expected.curvature().items():
        for which, value in vars(curvature).items():
            if isinstance(value, torch.Tensor):
                other = getattr(found[name], which)
                torch.testing.assert_close(other, value, rtol=tolerance, atol=tolerance)
    assert [row.sharing for row in kfac.report()] == [row.sharing for row in expected.report()]


def graphs(kfac):
    return kfac._seen._compiled


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "options", [{}, {"passes": 2}, {"stated": True}, {"sizes": (6, 6, 3), "steps": 8}], ids=str
)
def test_it_trains_as_the_plain_model_does(name, options):
    pair = both(name, **options)
    assert_same(*pair)
    assert graphs(pair[-1]).refusals == []
    assert graphs(pair[-1]).compiled == len(set(options.get("sizes", (6,))))


@pytest.mark.parametrize("settings", [
    {"direction": "eigenbasis_polar"},
    {"direction": "preconditioned", "damping_kind": "pi", "fallback": "gradient"},
    {"max_factor_side": 7},
    {"exclude": ("blocks.0",)},
    {"bias": "separate"},
], ids=str)  # fmt: skip
def test_other_settings(settings):
    pair = both("vision", settings=settings)
    assert_same(*pair)


@pytest.mark.parametrize("settings", [
    {"kfac_approx": "expand"},
    {"fisher_type": "mc"},
    {"direction": "preconditioned", "eigenvalue_correction": True},
    {"direction": "preconditioned", "damping_kind": "pi"},  # norms' curvature is no sum
], ids=str)  # fmt: skip
def test_settings_that_need_rows_run_uncompiled(settings):
    pair = both("vision", settings=settings)
    assert_same(*pair)
    assert graphs(pair[-1]).compiled == 0


def test_it_compiles_once():
    backend = CompileCounterWithBackend("aot_eager")
    model = net("vision")
    compiled = torch.compile(model, backend=backend)
    kfac = preconditioner(compiled)
    train(compiled, model, kfac, images, steps=3)
    assert backend.frame_count == 1  # with statistics
    for _ in range(2):
        compiled(images(6, None))
        assert backend.frame_count == 2  # without
        train(compiled, model, kfac, images, steps=4)
    assert backend.frame_count == 2


def test_a_second_loss_can_come_later():
    """Then the statistics take passes of their own through the compiled graph."""
    results = []
    for compiles in (False, True):
        model = net("vision")
        called = torch.compile(model, backend="aot_eager") if compiles else model
        kfac = preconditioner(called)
        for t in range(7):
            generator = torch.Generator().manual_seed(t)
            x = images(6, generator)
            labels = torch.randint(CLASSES, (6,), generator=generator)
            model.zero_grad()
            with kfac.record():
                logits = called(x)
                loss = F.cross_entropy(logits, labels)
                if t >= 4:
                    loss = loss + 0.5 * F.mse_loss(logits, torch.zeros_like(logits))
            loss.backward()
            kfac.precondition()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
        results += [model, kfac]
        KEPT.append(called)
    assert graphs(results[-1]).compiled == 1
    assert_same(*results)


@pytest.mark.parametrize("parts", [False, True])
def test_a_model_that_is_called_twice_in_a_pass(parts):
    """Also in the pass in which the sizes of its inputs come for the second time."""

    def factors(compiled):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4))
        call = torch.compile(model, backend="aot_eager") if compiled else model
        kfac = preconditioner(call)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 5, 3, generator=generator)
            y = torch.randint(4, (4,), generator=generator)
            with kfac.record():
                if step == 0:
                    loss = F.cross_entropy(call(x).mean(1), torch.cat([y, y]))
                elif parts:
                    loss = sum(F.cross_entropy(call(part).mean(1), y) / 2 for part in x.split(4))
                else:
                    loss = F.cross_entropy(sum(call(part).mean(1) for part in x.split(4)), y)
            loss.backward()
            kfac.precondition()
            model.zero_grad()
        return kfac.curvature()

    plain, found = factors(False), factors(True)
    for name, block in plain.items():
        for key in ("input_covariance", "gradient_covariance"):
            torch.testing.assert_close(getattr(found[name], key), getattr(block, key))


def test_there_may_be_many_compiled_models():
    """PyTorch compiles one function at most eight times."""
    for _ in range(10):
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, CLASSES))
        compiled = torch.compile(model, backend="eager")
        kfac = preconditioner(compiled)
        train(compiled, model, kfac, lambda n, g: torch.randn(n, 4, generator=g), steps=4)
        assert graphs(kfac).compiled == 1


def test_the_optimizer_can_be_made_of_the_model_before_it_is_compiled():
    plain, model = net("vision"), net("vision")
    expected, kfac = preconditioner(plain), preconditioner(model)
    train(plain, plain, expected, images)
    train(torch.compile(model, backend="aot_eager"), model, kfac, images)
    assert_same(plain, expected, model, kfac)
    assert graphs(kfac).compiled == 1


def test_many_sizes_run_uncompiled():
    sizes = tuple(range(2, 14))
    pair = both("vision", sizes=sizes, steps=24)
    assert_same(*pair)
    assert "sizes" in graphs(pair[-1]).refusals[0]


class WithLoss(Vision):
    def forward(self, x, y=None):
        logits = super().forward(x)
        return logits if y is None else (logits, F.cross_entropy(logits, y))


class Breaks(Vision):
    def forward(self, x):
        x = super().forward(x)
        torch._dynamo.graph_break()
        return x * 1.0


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.GRU(3, 4, batch_first=True), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x.mT)[0].mean(1))


class LogProbabilities(Vision):
    def forward(self, x):
        return super().forward(x).log_softmax(-1)


class TimeFirst(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.head = nn.Linear(3, 4), nn.Linear(4, CLASSES)

    def forward(self, x):
        return self.head(self.inner(x.movedim(2, 0)).tanh().mean(0))


@pytest.mark.parametrize("model_class", [WithLoss, Breaks, Recurrent, LogProbabilities, TimeFirst])
def test_models_that_cannot_are_recorded_uncompiled_and_say_why(model_class):
    make = waves if model_class in (Recurrent, TimeFirst) else images

    def trained(compile_):
        torch.manual_seed(0)
        model = model_class()
        call = torch.compile(model, backend="aot_eager") if compile_ else model
        kfac = preconditioner(call)
        generator = torch.Generator().manual_seed(1)
        for _ in range(4):
            model.zero_grad()
            x, y = make(6, generator), torch.randint(CLASSES, (6,), generator=generator)
            with kfac.record():
                if model_class is WithLoss:
                    loss = call(x, y)[1]
                elif model_class is LogProbabilities:
                    loss = F.nll_loss(call(x), y)
                else:
                    loss = F.cross_entropy(call(x), y)
            loss.backward()
            kfac.precondition()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.02 * p.grad
        KEPT.append(call)
        return model, kfac

    pair = (*trained(False), *trained(True))
    assert_same(*pair)
    assert graphs(pair[-1]).compiled == 0
    assert len(graphs(pair[-1]).refusals) == 1


@pytest.mark.parametrize("order", ["DDP of a compiled model", "a compiled DDP"])
def test_with_ddp(order):
    plain = net("vision")
    expected = preconditioner(plain)
    train(plain, plain, expected, images)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)
        try:
            model = net("vision")
            if order == "a compiled DDP":
                call = torch.compile(DistributedDataParallel(model), backend="aot_eager")
            else:
                call = DistributedDataParallel(torch.compile(model, backend="aot_eager"))
            kfac = preconditioner(call)
            train(call, model, kfac, images)
        finally:
            dist.destroy_process_group()
    assert_same(plain, expected, model, kfac)
    assert graphs(kfac).compiled == (1 if order != "a compiled DDP" else graphs(kfac).compiled)


def test_nothing_of_a_pass_is_kept_and_copies_go_on():
    model = net("vision")
    compiled = torch.compile(model, backend="aot_eager")
    kfac = preconditioner(compiled)
    train(compiled, model, kfac, images, steps=4)
    assert graphs(kfac).recording is None
    again, other = copy.deepcopy((kfac, model))
    train(other, other, again, images, steps=2)
    train(compiled, model, kfac, images, steps=2)
    assert_same(other, again, model, kfac)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_inductor_gives_the_same_statistics(name):
    """Of parameters that stay as they are: rounding grows in training."""
    torch.set_default_dtype(torch.float32)
    pair = both(name, backend="inductor", steps=4, rate=0.0)
    assert_same(*pair, tolerance=2e-6)
    assert graphs(pair[-1]).compiled == 1
