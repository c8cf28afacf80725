"""The engine on each device that there is: `./run.sh gpu-check` runs these on a GPU.

Where there is none, `test_simulated_device.py` runs them on a simulated one.
"""

import copy
import os
import tempfile
import warnings
from dataclasses import replace

import pytest
import simulated_device
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_combinations import MODELS, batch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.parallel import DistributedDataParallel

from submission.kfac import (
    KFAC,
    KFACConfig,
    OwnGradients,
    Positions,
    Preconditioner,
    Segments,
    kronecker_factors,
)
from submission.kfac.tuning import INVERSION_PORTIONS

DEVICES = os.environ.get("KFAC_TEST_DEVICES", "").split() or [
    "cpu", *(["cuda"] if torch.cuda.is_available() else [])
]  # fmt: skip
if simulated_device.NAME in DEVICES:  # autograd looks for devices in its first backward pass
    simulated_device.register()
SETTINGS = {
    "pi": {"damping_kind": "pi"},
    "both": {"damping_kind": "both_factors", "factor_decay": 0.0},
    "exact": {"damping_kind": "exact", "renewal": "in_turns"},
    "adam": {"damping_kind": "exact", "direction": "eigenbasis_adam"},
    "polar": {"damping_kind": "exact", "direction": "eigenbasis_polar", "renewal": "in_turns"},
}
OTHERS = [name for name in DEVICES if name != "cpu"]  # which are compared with the CPU


@pytest.fixture(autouse=True)
def whole_float32():
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(params=DEVICES)
def device(request):
    return torch.device(request.param)


@pytest.fixture(params=OTHERS)
def other(request):
    return torch.device(request.param)


def on(device, x, y):
    return x.to(device), y.to(device)


def settings_of(name, approx, fisher="empirical"):
    return KFACConfig(**{
        "kfac_approx": approx, "fisher_type": fisher, "damping": 0.1, "factor_decay": 0.5,
        "factor_update_steps": 2, "inverse_update_steps": 4, **SETTINGS[name],
    })  # fmt: skip


def train(name, device, config, *, steps=6, examples=6):
    torch.manual_seed(0)
    model = MODELS[name][0]().double().to(device)
    kfac = Preconditioner(model, config)
    go_on(name, model, kfac, device, range(steps), examples)
    return model, kfac


def go_on(name, model, kfac, device, steps, examples=6):
    if (name, device.type) == ("recurrent", simulated_device.NAME):
        pytest.skip("PyTorch asks devices other than a CPU for fused cells, which this one has not")
    for step in steps:
        x, y = on(device, *batch(MODELS[name][1], step, torch.float64, examples))
        model.zero_grad()
        with kfac.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad


def same_weights(found, expected, *, polar=False):
    """Weights are equal. The polar factor takes small singular values a thousand times."""
    rtol, atol = (1e-4, 1e-6) if polar else (1e-7, 1e-8)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key].cpu(), value, rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", ["pi", "both", "exact"])
def test_training_is_that_of_the_cpu(name, setting, other):
    config = settings_of(setting, "reduce" if setting == "pi" else "expand")
    found, _ = train(name, other, config)
    expected, _ = train(name, torch.device("cpu"), config)
    same_weights(found, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", ["adam", "polar"])
def test_training_in_the_same_bases_is_that_of_the_cpu(name, setting, other):
    """Eigenvectors of equal eigenvalues, zeros above all, are any: bases are made on the CPU."""
    config = replace(
        settings_of(setting, "reduce"), inverse_update_steps=50, early_updates=False,
        renewal="together",
    )  # fmt: skip
    expected, kfac = train(name, torch.device("cpu"), config, steps=2)
    found = copy.deepcopy(expected).to(other)
    again = Preconditioner(found, config)
    again.load_state_dict(kfac.state_dict())
    go_on(name, found, again, other, range(2, 5))
    go_on(name, expected, kfac, torch.device("cpu"), range(2, 5))
    same_weights(found, expected, polar=setting == "polar")


def cross_entropy(sharing=lambda _: None, weight=None):
    """A recorded pass with a loss that is seen."""

    def run(model, kfac, x, y):
        with kfac.record(sharing(x.device)):
            logits = model(x).flatten(0, -2)
            given = None if weight is None else torch.tensor(weight, device=x.device)
            loss = F.cross_entropy(logits, y.flatten(), weight=given)
        loss.backward()

    return run


def prefixes(device):
    lengths = torch.tensor([3, 7, 5, 1, 6])
    return Positions(mask=(torch.arange(7) < lengths[:, None]).to(device))


def graphs(device):
    return Segments(torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2]).to(device), 3)


def masked_bernoulli(model, kfac, x, y):
    mask = (torch.arange(y.numel()).view_as(y) % 4 > 0).to(x.device)
    with kfac.record():
        logits = model(x)
    losses = F.binary_cross_entropy_with_logits(logits, y, reduction="none")
    loss = (losses * mask).sum() / mask.sum()
    kfac.update(logits, "bernoulli", mask=mask, targets=y, loss=loss)
    loss.backward()


def two_losses(model, kfac, x, y):
    with kfac.record():
        outputs = model(x)
        loss = F.cross_entropy(outputs[:3], y[:3]) + 0.3 * F.mse_loss(outputs, outputs.detach() + 1)
    loss.backward()


def distance(model, kfac, x, y):
    with kfac.record():
        outputs = model(x)
    loss = (outputs - y).abs().mean()
    kfac.update(outputs, OwnGradients(), loss=loss)
    loss.backward()


def ctc(model, kfac, x, y):
    sizes = torch.full((len(x),), x.shape[1]), torch.full((len(y),), y.shape[1])
    with kfac.record():
        loss = F.ctc_loss(model(x).log_softmax(-1).mT.movedim(-1, 0), y, *sizes)
    loss.backward()


def perceptron():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))


def convolutions():
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 4, 3, 2),
        nn.ConvTranspose2d(4, 4, 2, 2), nn.InstanceNorm2d(4, affine=True),
        nn.Conv2d(4, 6, 3, groups=2, dilation=2), nn.Flatten(), nn.Linear(96, 3),
    )  # fmt: skip


def words():
    return nn.Sequential(nn.Embedding(9, 5, padding_idx=0), nn.RMSNorm(5), nn.Linear(5, 3))


def bag():
    return nn.Sequential(nn.EmbeddingBag(9, 5, padding_idx=0), nn.Linear(5, 3))


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


REDUCE = {"kfac_approx": "reduce"}
KINDS = {  # a network, its inputs and targets, a recorded pass, settings
    "masked tokens": (
        perceptron, lambda: (normal(5, 7, 4), torch.randint(3, (5, 7))), cross_entropy(prefixes),
        REDUCE,
    ),
    "graphs": (
        perceptron, lambda: (normal(9, 4), torch.randint(3, (9,))), cross_entropy(graphs), REDUCE,
    ),
    "class weights": (
        perceptron, lambda: (normal(6, 4), torch.randint(3, (6,))),
        cross_entropy(weight=[1.0, 2.0, 3.0]), {},
    ),
    "convolutions": (
        convolutions, lambda: (normal(5, 3, 9, 9), torch.randint(3, (5,))), cross_entropy(), {},
    ),
    "reduced convolutions": (
        convolutions, lambda: (normal(5, 3, 9, 9), torch.randint(3, (5,))), cross_entropy(), REDUCE,
    ),
    "words": (
        words, lambda: (torch.randint(9, (6, 4)), torch.randint(3, (6, 4))), cross_entropy(),
        REDUCE,
    ),
    "bag of words": (
        bag, lambda: (torch.randint(9, (6, 4)), torch.randint(3, (6,))), cross_entropy(), {},
    ),
    "masked labels": (
        perceptron, lambda: (normal(6, 4), normal(6, 3).gt(0).double()), masked_bernoulli, {},
    ),
    "exact": (
        perceptron, lambda: (normal(6, 4), normal(6, 3).gt(0).double()), masked_bernoulli,
        {"fisher_type": "type-2"},
    ),
    "two losses": (
        perceptron, lambda: (normal(6, 4), torch.randint(3, (6,))), two_losses, {},
    ),
    "own gradients": (perceptron, lambda: (normal(6, 4), normal(6, 3)), distance, {}),
    "ctc": (perceptron, lambda: (normal(4, 8, 4), torch.randint(1, 3, (4, 3))), ctc, {}),
    "corrected eigenvalues": (
        perceptron, lambda: (normal(5, 7, 4), torch.randint(3, (5, 7))), cross_entropy(),
        {"damping_kind": "exact", "eigenvalue_correction": True},
    ),
    "biases by B": (
        perceptron, lambda: (normal(6, 4), torch.randint(3, (6,))), cross_entropy(),
        {"bias": "output", "damping_kind": "both_factors"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_layers_and_losses_train_as_on_the_cpu(kind, other):
    build, make, run, settings = KINDS[kind]
    config = KFACConfig(**{
        "kfac_approx": "expand", "fisher_type": "empirical", "damping": 0.1,
        "factor_update_steps": 1, "inverse_update_steps": 2, **settings,
    })  # fmt: skip
    found = []
    for where in (other, torch.device("cpu")):
        torch.manual_seed(0)
        model = build().double().to(where)
        kfac = Preconditioner(model, config)
        data = on(where, *make())
        for _ in range(4):
            model.zero_grad()
            run(model, kfac, *data)
            kfac.precondition()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
        found.append(model)
    same_weights(*found)


@pytest.mark.parametrize("setting", ["adam", "polar"])
def test_training_with_new_bases_is_that_of_the_cpu(setting, other, monkeypatch):
    """Where all eigenvalues differ."""
    small = (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,))
    monkeypatch.setitem(MODELS, "small", small)
    config = settings_of(setting, "reduce")
    found, _ = train("small", other, config, examples=64)
    expected, _ = train("small", torch.device("cpu"), config, examples=64)
    same_weights(found, expected)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_factors_of_a_deep_linear_net_are_the_exact_ggn(approx, device):
    torch.manual_seed(0)
    shape = (6, 3, 4) if approx == "expand" else (6, 1, 4)
    model = nn.Linear(4, 3, bias=False).double().to(device)
    x = torch.randn(shape, dtype=torch.float64).to(device)
    one = x[:1]  # of one row, or rows with one loss each: A ⊗ B is exact
    factors = kronecker_factors(
        model, one[:, :1], likelihood="gaussian", kfac_approx=approx, fisher_type="type-2"
    )[""]
    product = torch.kron(factors.gradient_covariance, factors.input_covariance)
    jacobian = jacrev(lambda w: functional_call(model, {"weight": w}, (one[:, :1],)).flatten())(
        model.weight.detach()
    ).flatten(1)
    exact = jacobian.mT @ jacobian
    scale = exact.trace() / product.trace()  # of the mean over terms, and the Gaussian's
    torch.testing.assert_close(product * scale, exact, rtol=1e-12, atol=1e-12)


def test_sampled_labels_give_the_exact_fisher_on_average(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double().to(device)
    x = torch.randn(8, 4, dtype=torch.float64).to(device)
    common = {"likelihood": "categorical", "kfac_approx": "expand"}
    exact = kronecker_factors(model, x, fisher_type="type-2", **common)
    generator = torch.Generator(device).manual_seed(0)
    sampled = kronecker_factors(
        model, x, fisher_type="mc", mc_samples=4000, generator=generator, **common
    )
    for name, factors in exact.items():
        error = sampled[name].gradient_covariance - factors.gradient_covariance
        assert error.norm() < 0.1 * factors.gradient_covariance.norm()


def test_half_precision_with_a_scaler(device):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)).to(device)
    optimizer = KFAC(model, lr=1e-2, factor_update_steps=1, inverse_update_steps=2)
    dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
    scaler = torch.amp.GradScaler(device.type)
    x, y = torch.randn(32, 4, device=device), torch.randint(3, (32,), device=device)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        with torch.autocast(device.type, dtype), optimizer.record():
            loss = F.cross_entropy(model(x), y)
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.skipif(
    not hasattr(torch.compiler, "set_stance"), reason="compiled models are recorded uncompiled"
)
def test_a_compiled_model_trains_as_the_plain_one(device):
    backend = "inductor" if device.type == "cuda" else "aot_eager"
    config = settings_of("adam", "reduce")
    found = []
    for compile_ in (False, True):
        torch.manual_seed(0)
        model = MODELS["convolutional"][0]().double().to(device)
        call = torch.compile(model, backend=backend) if compile_ else model
        kfac = Preconditioner(call, config)
        for step in range(8):
            x, y = on(device, *batch((2, 4, 4), step, torch.float64))
            model.zero_grad()
            with kfac.record():
                loss = F.cross_entropy(call(x), y)
            loss.backward()
            kfac.precondition()
            with torch.no_grad():
                for p in model.parameters():
                    p -= 0.01 * p.grad
        found.append(model.state_dict())
    assert kfac._seen._compiled.compiled == 1
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-7, atol=1e-8)


def test_one_rank_is_one_process(device):
    if device.type == simulated_device.NAME:
        pytest.skip("it has no collectives")
    config = settings_of("pi", "reduce")
    expected, _ = train("attention", device, config)
    if device.type == "cuda":
        torch.cuda.set_device(0)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            init_method=f"file://{folder}/store", rank=0, world_size=1,
        )  # fmt: skip
        try:
            torch.manual_seed(0)
            model = MODELS["attention"][0]().double().to(device)
            call = DistributedDataParallel(model)
            kfac = Preconditioner(call, config)
            for step in range(6):
                x, y = on(device, *batch(None, step, torch.float64))
                model.zero_grad()
                with kfac.record():
                    loss = F.cross_entropy(call(x), y)
                kfac.reduce_factors()
                loss.backward()
                kfac.precondition()
                with torch.no_grad():
                    for p in model.parameters():
                        p -= 0.01 * p.grad
        finally:
            dist.destroy_process_group()
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[key], value, rtol=1e-9, atol=1e-10)


def waits_in(device, step):
    """How often a step waits for the device."""
    if device.type == simulated_device.NAME:
        simulated_device.waits()
        step()
        return sum(simulated_device.waits().values())
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as found:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(warning.message) for warning in found)


@pytest.mark.parametrize("fisher", ["empirical", "mc"])
@pytest.mark.parametrize("direction", ["preconditioned", "eigenbasis_adam", "eigenbasis_polar"])
def test_a_step_waits_for_the_device_once_in_an_update_of_the_factors(direction, fisher, other):
    """In which it is looked at whether they are finite."""
    for name in ("attention", "convolutional", "experts"):
        torch.manual_seed(0)
        model = MODELS[name][0]().float().to(other)
        optimizer = KFAC(
            model, lr=1e-3, direction=direction, fisher_type=fisher, early_updates=False,
            damping_kind="pi" if direction == "preconditioned" else "exact",
            renewal="together" if direction == "preconditioned" else "in_turns",
            factor_update_steps=2, inverse_update_steps=4,
        )  # fmt: skip
        x, y = on(other, *batch(MODELS[name][1], 0, torch.float32))

        def step(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            with optimizer.record():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

        waits = [waits_in(other, step) for _ in range(10)][4:]
        assert waits[1:4] == [0, 1, 0], (name, waits)
        assert waits[5] == 0, (name, waits)
        # Cholesky factors are looked at, too: of a portion of the blocks at once.
        most = 1 + INVERSION_PORTIONS if direction == "preconditioned" else 1
        assert 1 <= waits[0] == waits[4] <= most, (name, waits)
