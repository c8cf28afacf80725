"""Random combinations of model, surrounding, Fisher type, approximation and precision.

Each is compared with the plain loop on the same model: the gradients after `precondition`, in two
steps, are the same.
"""

import copy
import random
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from submission.kfac import KFACConfig, Preconditioner

COMBINATIONS, BATCHES = 200, 10


class Convolutional(nn.Module):
    """Images, with a norm of channels and groups."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(2, 4, 3, padding=1, groups=2)
        self.norm, self.last = nn.GroupNorm(2, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(self.norm(self.first(x)).tanh().mean((2, 3)))


class Attention(nn.Module):
    """A transformer layer on tokens."""

    def __init__(self):
        super().__init__()
        self.word, self.position = nn.Embedding(7, 8), nn.Parameter(torch.randn(1, 5, 8))
        self.layer = nn.TransformerEncoderLayer(8, 2, 12, 0.0, batch_first=True)
        self.last = nn.Linear(8, 3)

    def forward(self, tokens):
        return self.last(self.layer(self.word(tokens) + self.position).mean(1))


class Recurrent(nn.Module):
    """A GRU."""

    def __init__(self):
        super().__init__()
        self.inner, self.last = nn.GRU(4, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.inner(x)[0][:, -1])


class Tied(nn.Module):
    """The same matrix looks words up and gives the outputs."""

    def __init__(self):
        super().__init__()
        self.word, self.inner = nn.Embedding(3, 6), nn.Linear(6, 6)

    def forward(self, tokens):
        return self.inner(self.word(tokens % 3).mean(1)).tanh() @ self.word.weight.T


class Experts(nn.Module):
    """Stacked matrices, a scale, and a parameter that is used in some other way."""

    def __init__(self):
        super().__init__()
        self.stack = nn.Parameter(torch.randn(2, 4, 5) / 2)
        self.scale, self.other = nn.Parameter(torch.ones(5)), nn.Parameter(torch.randn(5))
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        h = torch.einsum("nri,eio->nreo", x, self.stack).tanh().mean(2)
        return self.last((h * self.scale + self.other.sinh()).mean(1))


MODELS = {
    "dense": (lambda: nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.Flatten(1, -1),
              nn.Linear(30, 3)), (5, 4)),
    "convolutional": (Convolutional, (2, 4, 4)),
    "attention": (Attention, None),
    "recurrent": (Recurrent, (5, 4)),
    "tied": (Tied, None),
    "experts": (Experts, (5, 4)),
}  # fmt: skip


def batch(shape, step, dtype, examples=6):
    generator = torch.Generator().manual_seed(step)
    labels = torch.randint(3, (examples,), generator=generator)
    if shape is None:
        return torch.randint(7, (examples, 5), generator=generator), labels
    return torch.randn(examples, *shape, generator=generator, dtype=dtype), labels


def plain(model, x):
    return model(x)


def checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def functional(model, x):
    return torch.func.functional_call(model, dict(model.named_parameters()), (x,))


def compiled(model, x):
    return torch.compile(model, backend="eager")(x)


def hooked(model, x):
    handle = model.register_forward_hook(lambda _m, _i, y: y * 1.0)
    try:
        return model(x)
    finally:
        handle.remove()


def beside_a_teacher(model, x):
    with torch.no_grad():
        copy.deepcopy(model)(x)
        model(x)
    return model(x)


CALLS = [plain, checkpointed, functional, compiled, hooked, beside_a_teacher]
CHANGES = ["nothing", "assigned", "copied", "saved"]


def changed(how, model, kfac, config):
    """What happens between two steps; the model and the preconditioner that go on."""
    if how == "assigned":
        values = {key: value.clone() for key, value in model.state_dict().items()}
        model.load_state_dict(values, assign=True)
    if how == "copied":
        return copy.deepcopy((model, kfac))
    if how == "saved":
        state = copy.deepcopy(kfac.state_dict())
        kfac = Preconditioner(model, config)
        kfac.load_state_dict(state)
    return model, kfac


def gradients(build, shape, config, dtype, call, change, micro, seen):
    torch.manual_seed(0)
    model = build().to(dtype)
    kfac = Preconditioner(model, config)
    found = []
    for step in range(2):
        x, y = batch(shape, step, dtype)
        for part in torch.arange(len(x)).chunk(2 if micro else 1):
            with kfac.record():
                logits = call(model, x[part])
                loss = F.cross_entropy(logits, y[part]) if seen else None
            if loss is None:
                loss = F.cross_entropy(logits, y[part])
                kfac.update(logits, "categorical", targets=y[part])
            (loss * len(part) / len(x)).backward()
        kfac.precondition()
        found += [p.grad.clone() for p in model.parameters() if p.grad is not None]
        model.zero_grad()
        model, kfac = changed(change, model, kfac, config)
    return found


def combination(number):
    draw = random.Random(number)
    name, approx = draw.choice(sorted(MODELS)), draw.choice(["expand", "reduce"])
    fisher, kind = draw.choice(["type-2", "empirical", "mc"]), draw.choice(["pi", "exact"])
    dtype = draw.choice([torch.float64, torch.float32])
    call, change = draw.choice(CALLS), draw.choice(CHANGES)
    if call is checkpointed and name in ("attention", "recurrent"):
        call = plain  # these stay as they are inside a checkpoint: the diagonal (docs/limits.md)
    # Micro-batches draw other labels (and signs) than a whole batch.
    micro = draw.random() < 0.3 and fisher == "type-2"
    # The order of two losses' sums differs with its own pass, not the sums.
    seen = draw.random() < 0.5
    config = KFACConfig(
        kfac_approx=approx, fisher_type=fisher, damping=0.1, damping_kind=kind, factor_decay=0.5,
        factor_update_steps=1, inverse_update_steps=1,
    )  # fmt: skip
    return name, config, dtype, call, change, micro, seen


@pytest.mark.parametrize("part", range(BATCHES))
def test_combinations_agree_with_the_plain_loop(part):
    for number in range(part, COMBINATIONS, BATCHES):
        name, config, dtype, call, change, micro, seen = combination(number)
        build, shape = MODELS[name]
        with torch.random.fork_rng() if call is compiled else nullcontext():
            found = gradients(build, shape, config, dtype, call, change, micro, seen)
        wanted = gradients(build, shape, config, dtype, plain, "nothing", False, seen)
        tolerance = 1e-9 if dtype == torch.float64 else 2e-3
        for one, other in zip(found, wanted, strict=True):
            difference = (one - other).norm() / other.norm().clamp(min=1e-12)
            told = [number, name, config, dtype, call.__name__, change, micro, seen]
            assert difference < tolerance, told
