"""The engine on each device that there is: `./run.sh gpu-check` runs these on a GPU."""

import copy
import tempfile

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from test_combinations import MODELS, batch
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.parallel import DistributedDataParallel

from submission.kfac import KFAC, KFACConfig, Preconditioner, kronecker_factors

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
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


def train(name, device, config, *, steps=6, state=None):
    torch.manual_seed(0)
    build, shape = MODELS[name]
    model = build().double().to(device)
    kfac = Preconditioner(model, config)
    for step in range(steps):
        x, y = on(device, *batch(shape, step, torch.float64))
        model.zero_grad()
        with kfac.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        kfac.precondition()
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.01 * p.grad
    return model, kfac


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_training_is_that_of_the_cpu(name, setting, device):
    """Not so for eigenbasis rules after many steps: bases of equal eigenvalues are any."""
    approx = "reduce" if setting in ("adam", "polar", "pi") else "expand"
    config = settings_of(setting, approx)
    steps = 3 if "eigenbasis" in config.direction else 6
    found, _ = train(name, device, config, steps=steps)
    expected, _ = train(name, torch.device("cpu"), config, steps=steps)
    for key, value in expected.state_dict().items():
        torch.testing.assert_close(found.state_dict()[key].cpu(), value, rtol=1e-7, atol=1e-8)


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


def test_a_state_moves_between_devices(device):
    config = settings_of("polar", "reduce")
    model, kfac = train("attention", torch.device("cpu"), config)
    moved = copy.deepcopy(model).to(device)
    again = Preconditioner(moved, config)
    again.load_state_dict(copy.deepcopy(kfac.state_dict()))
    x, y = batch(MODELS["attention"][1], 9, torch.float64)
    for one, other, where in ((model, kfac, torch.device("cpu")), (moved, again, device)):
        one.zero_grad()
        with other.record():
            loss = F.cross_entropy(one(x.to(where)), y.to(where))
        loss.backward()
        other.precondition()
    for p, q in zip(model.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(q.grad.cpu(), p.grad, rtol=1e-8, atol=1e-9)


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


@pytest.mark.parametrize("direction", ["preconditioned", "eigenbasis_polar"])
def test_steps_without_an_update_never_wait_for_the_device(direction, device):
    if device.type != "cuda":
        pytest.skip("a CPU has nothing to wait for")
    torch.manual_seed(0)
    model = MODELS["attention"][0]().to(device)
    kind = "pi" if direction == "preconditioned" else "exact"
    optimizer = KFAC(
        model, lr=1e-3, direction=direction, damping_kind=kind, early_updates=False,
        factor_update_steps=100, inverse_update_steps=100,
    )  # fmt: skip
    x, y = on(device, *batch(None, 0, torch.float32))

    def step():
        optimizer.zero_grad()
        with optimizer.record():
            loss = F.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()

    for _ in range(3):
        step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
