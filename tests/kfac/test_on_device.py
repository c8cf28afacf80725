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

from submission.kfac import KFAC, KFACConfig, Preconditioner, kronecker_factors
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


@pytest.fixture(params=DEVICES, autouse=True)
def device(request):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
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
def test_training_is_that_of_the_cpu(name, setting, device):
    config = settings_of(setting, "reduce" if setting == "pi" else "expand")
    found, _ = train(name, device, config)
    expected, _ = train(name, torch.device("cpu"), config)
    same_weights(found, expected)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", ["adam", "polar"])
def test_training_in_the_same_bases_is_that_of_the_cpu(name, setting, device):
    """Eigenvectors of equal eigenvalues, zeros above all, are any: bases are made on the CPU."""
    config = replace(
        settings_of(setting, "reduce"), inverse_update_steps=50, early_updates=False,
        renewal="together",
    )  # fmt: skip
    expected, kfac = train(name, torch.device("cpu"), config, steps=2)
    found = copy.deepcopy(expected).to(device)
    again = Preconditioner(found, config)
    again.load_state_dict(kfac.state_dict())
    go_on(name, found, again, device, range(2, 5))
    go_on(name, expected, kfac, torch.device("cpu"), range(2, 5))
    same_weights(found, expected, polar=setting == "polar")


@pytest.mark.parametrize("setting", ["adam", "polar"])
def test_training_with_new_bases_is_that_of_the_cpu(setting, device, monkeypatch):
    """Where all eigenvalues differ."""
    small = (lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), (4,))
    monkeypatch.setitem(MODELS, "small", small)
    config = settings_of(setting, "reduce")
    found, _ = train("small", device, config, examples=64)
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
def test_a_step_waits_for_the_device_once_in_an_update_of_the_factors(direction, fisher, device):
    """In which it is looked at whether they are finite."""
    if device.type == "cpu":
        pytest.skip("a CPU has nothing to wait for")
    for name in ("attention", "convolutional", "experts"):
        torch.manual_seed(0)
        model = MODELS[name][0]().float().to(device)
        optimizer = KFAC(
            model, lr=1e-3, direction=direction, fisher_type=fisher, early_updates=False,
            damping_kind="pi" if direction == "preconditioned" else "exact",
            renewal="together" if direction == "preconditioned" else "in_turns",
            factor_update_steps=2, inverse_update_steps=4,
        )  # fmt: skip
        x, y = on(device, *batch(MODELS[name][1], 0, torch.float32))

        def step(model=model, optimizer=optimizer, x=x, y=y):
            optimizer.zero_grad()
            with optimizer.record():
                loss = F.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()

        waits = [waits_in(device, step) for _ in range(10)][4:]
        assert waits[1:4] == [0, 1, 0], (name, waits)
        assert waits[5] == 0, (name, waits)
        # Cholesky factors are looked at, too: of a portion of the blocks at once.
        most = 1 + INVERSION_PORTIONS if direction == "preconditioned" else 1
        assert 1 <= waits[0] == waits[4] <= most, (name, waits)
