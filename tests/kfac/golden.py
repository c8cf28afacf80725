"""What training with the preconditioner gave once: stored numbers, and how they are made.

`python -m tests.kfac.golden` writes golden.pt anew: for every case and parameter the norm and three
random projections of the first preconditioned gradient, and of the parameter after `STEPS` steps.
Names of cases write these alone. With `--check` it compares instead, and prints the largest
difference of each case as a multiple of what is allowed. The state in state_version_4.pt is of an
older format, which is refused.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from submission.kfac import Bernoulli, Categorical, Gaussian, KFACConfig, Likelihood, Preconditioner
from submission.kfac.updates.adaptive_damping import begin_trial, end_trial

sys.path.insert(0, str(Path(__file__).parent))
import golden_models as models

FILE = Path(__file__).with_name("golden.pt")
STATE_FILE = Path(__file__).with_name("state_version_4.pt")
STEPS, PROJECTIONS = 30, 3
RELATIVE = 1e-9  # of the norm of a parameter
OF_ALL = 1e-12  # of the norm of all parameters, where one is nothing but rounding errors


@dataclass(frozen=True)
class Case:
    """One model and how it is trained.

    Attributes:
        gives_loss: whether `update` is given the loss.
        micro_batches: batches in a step.
        adapts: whether the damping is adapted by trials.
    """

    model: Callable[[], nn.Module]
    batch: Callable[[Generator], models.Batch]
    approx: str
    settings: dict[str, Any] = field(default_factory=dict)
    likelihood: Likelihood = Categorical()  # noqa: RUF009  (frozen)
    gives_loss: bool = False
    micro_batches: int = 1
    adapts: bool = False


EXACT = {"damping_kind": "exact"}
BOTH = {"damping_kind": "both_factors"}
ADAM = {**EXACT, "direction": "eigenbasis_adam", "epsilon": 1e-4}
EKFAC = {**EXACT, "eigenvalue_correction": True}
EMPIRICAL = {"fisher_type": "empirical"}
SAMPLED = {"fisher_type": "mc"}


def lstm() -> nn.Module:
    return models.Recurrent(nn.LSTM(3, 4, batch_first=True), pool=True)


def gru() -> nn.Module:
    layer = nn.GRU(3, 2, num_layers=2, bidirectional=True, batch_first=True)
    return models.Recurrent(layer, pool=False)


def tanh_recurrent() -> nn.Module:
    return models.Recurrent(nn.RNN(3, 4, batch_first=True), pool=False)


def transformer(pool: bool, batch_first: bool = True) -> Callable[[], nn.Module]:
    return lambda: models.Transformer(pool, batch_first)


CASES: dict[str, Case] = {
    "perceptron": Case(models.perceptron, models.vectors, "expand"),
    "perceptron, bias apart": Case(
        models.perceptron, models.vectors, "expand", {**BOTH, "bias": "separate"}
    ),
    "perceptron, relative exact damping": Case(
        models.perceptron, models.vectors, "reduce", {**EXACT, "relative_damping": True}
    ),
    "perceptron, no moving average, few rows": Case(
        models.perceptron,
        models.few_vectors,
        "expand",
        {"factor_decay": 0.0, "inverse_update_steps": 100, "factor_update_steps": 100},
    ),
    "perceptron, small sides": Case(
        models.perceptron, models.vectors, "expand", {"max_factor_side": 5}
    ),
    "perceptron, adaptive damping": Case(
        models.perceptron, models.vectors, "expand", adapts=True
    ),
    "perceptron, two micro-batches": Case(
        models.perceptron, models.vectors, "expand", micro_batches=2
    ),
    "perceptron, sampled": Case(models.perceptron, models.vectors, "expand", SAMPLED),
    "perceptron, two samples": Case(
        models.perceptron, models.vectors, "expand", {**SAMPLED, "mc_samples": 2, "seed": 3}
    ),
    "convolutions, expand": Case(models.convolutions, models.images, "expand", EXACT),
    "convolutions, reduce": Case(models.convolutions, models.images, "reduce", BOTH),
    "convolutions, auto": Case(models.convolutions, models.images, "auto"),
    "BatchNorm": Case(models.normalised_convolutions, models.images, "expand"),
    "BatchNorm, raw gradient, excluded": Case(
        models.normalised_convolutions,
        models.images,
        "reduce",
        {"fallback": "gradient", "exclude": ("3",)},
    ),
    "up and down": Case(models.Upsampled, models.signals, "expand", likelihood=Gaussian()),
    "up and down, reduce": Case(
        models.Upsampled, models.signals, "reduce", EXACT, Gaussian(variance=1.0, scale=2.0)
    ),
    "attention, pooled": Case(transformer(pool=True), models.sequences, "reduce"),
    "attention, tokens": Case(transformer(pool=False), models.tokens, "expand", BOTH),
    "attention, time first": Case(
        transformer(pool=True, batch_first=False), models.time_first_sequences, "reduce"
    ),
    "attention, masked and pooled": Case(
        transformer(pool=True), models.masked_sequences, "reduce"
    ),
    "attention, masked tokens": Case(transformer(pool=False), models.masked_tokens, "expand"),
    "LSTM": Case(lstm, models.sequences, "reduce"),
    "GRU, two layers, both ways": Case(gru, models.tokens, "expand", EXACT),
    "RNN": Case(tanh_recurrent, models.tokens, "expand", BOTH),
    "embedding": Case(lambda: models.Language(False), models.words, "expand"),
    "embedding, tied, expand": Case(lambda: models.Language(True), models.words, "expand"),
    "embedding, tied, reduce": Case(lambda: models.Language(True), models.words, "reduce", BOTH),
    "graphs, expand": Case(models.GraphNetwork, models.graphs, "expand", likelihood=Bernoulli()),
    "graphs, reduce": Case(models.GraphNetwork, models.graphs, "reduce", likelihood=Bernoulli()),
    "graphs, reduce, means": Case(
        models.GraphNetwork, models.graphs, "reduce", {"ragged_scaling": "mean_sum"}, Bernoulli()
    ),
    "bare parameters": Case(models.Bare, models.vectors, "expand"),
    "a layer twice, expand": Case(models.Twice, models.vectors, "expand"),
    "a layer twice, reduce": Case(models.Twice, models.vectors, "reduce"),
    "Adam in the eigenbasis": Case(models.perceptron, models.vectors, "expand", ADAM),
    "Adam in the eigenbasis, bare parameters": Case(models.Bare, models.vectors, "expand", ADAM),
    "EKFAC": Case(models.perceptron, models.vectors, "expand", EKFAC),
    "EKFAC, convolutions, reduce": Case(models.convolutions, models.images, "reduce", EKFAC),
    "empirical": Case(models.perceptron, models.vectors, "expand", EMPIRICAL),
    "empirical, from the loss": Case(
        models.perceptron, models.vectors, "expand", EMPIRICAL, gives_loss=True
    ),
    "empirical, from the loss, attention": Case(
        transformer(pool=True), models.sequences, "reduce", EMPIRICAL, gives_loss=True
    ),
    "empirical, from the loss, micro-batches": Case(
        models.convolutions, models.images, "expand", EMPIRICAL, gives_loss=True, micro_batches=2
    ),
}  # fmt: skip


def mean_loss(case: Case, logits: Tensor, batch: models.Batch) -> Tensor:
    """The mean over the terms of the likelihood that are not masked."""
    if isinstance(case.likelihood, Categorical):
        losses = F.cross_entropy(logits.movedim(-1, 1), batch.targets, reduction="none")
    elif isinstance(case.likelihood, Bernoulli):
        losses = F.binary_cross_entropy_with_logits(logits, batch.targets, reduction="none")
    else:
        losses = (logits - batch.targets).square()
    if batch.mask is None:
        return losses.mean()
    return (losses * batch.mask).sum() / batch.mask.sum()


@contextmanager
def float64_from_a_seed() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_default_dtype(before)


def configuration(case: Case) -> KFACConfig:
    settings = {
        "fisher_type": "type-2", "damping": 0.1, "factor_decay": 0.9, "factor_update_steps": 2,
        "inverse_update_steps": 4, **case.settings,
    }  # fmt: skip
    return KFACConfig(kfac_approx=case.approx, **settings)


def train_step(
    case: Case, model: nn.Module, kfac: Preconditioner, batches: list[models.Batch]
) -> dict[str, Tensor]:
    """One step; returns the preconditioned gradients."""
    model.zero_grad()
    before = 0.0
    for batch in batches:
        with kfac.record(batch.sharing):
            logits = model(*batch.inputs)
        loss = mean_loss(case, logits, batch) / len(batches)
        kfac.update(
            logits,
            case.likelihood,
            mask=batch.mask,
            targets=batch.targets,
            loss=loss if case.gives_loss else None,
        )
        loss.backward()
        before += float(loss.detach())
    trial = begin_trial(kfac) if case.adapts else None
    kfac.precondition()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    rate = 0.005 if case.settings.get("direction") == "eigenbasis_adam" else 0.02
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= rate * parameter.grad
        if trial is not None and kfac.inverses_due:
            (batch,) = batches
            end_trial(kfac, trial, before, float(mean_loss(case, model(*batch.inputs), batch)))
    return gradients


def digest(values: dict[str, Tensor]) -> Tensor:
    """[parameters, 1 + PROJECTIONS]: norms, and inner products with random vectors of norm 1."""
    generator, rows = Generator().manual_seed(1), []
    for value in values.values():
        directions = models.normal(generator, PROJECTIONS, value.numel())
        directions /= directions.norm(dim=1, keepdim=True)
        rows.append(torch.cat([value.norm()[None], directions @ value.flatten()]))
    return torch.stack(rows)


def run(case: Case) -> dict[str, Any]:
    """Names of the parameters, and the digests of their gradients and values."""
    with float64_from_a_seed():
        model, generator = case.model(), Generator().manual_seed(2)
        kfac = Preconditioner(model, configuration(case))
        found: dict[str, Any] = {"names": [name for name, _ in model.named_parameters()]}
        for step in range(STEPS):
            batches = [case.batch(generator) for _ in range(case.micro_batches)]
            gradients = train_step(case, model, kfac, batches)
            if step == 0:
                found["gradients"] = digest(gradients)
        assert kfac.failures == {"statistics": 0, "inverse": 0, "memory": 0}
        found["parameters"] = digest({n: p.detach() for n, p in model.named_parameters()})
    return found


def differences(found: dict[str, Any], stored: dict[str, Any]) -> dict[str, float]:
    """What was compared -> the largest difference, in units of what is allowed."""
    assert found["names"] == stored["names"]
    compared = {}
    for key in ("gradients", "parameters"):
        norms = stored[key][:, :1]
        allowed = RELATIVE * norms + OF_ALL * norms.norm()
        error = ((found[key] - stored[key]).abs() / allowed).amax(1)
        for name, value in zip(found["names"], error.tolist(), strict=True):
            compared[f"{key} of {name}"] = value
    return compared


def main(arguments: list[str]) -> int:
    if arguments and arguments != ["--check"]:
        stored = torch.load(FILE, weights_only=True)
        torch.save(stored | {name: run(CASES[name]) for name in arguments}, FILE)
        return 0
    found = {name: run(case) for name, case in CASES.items()}
    if arguments == ["--check"]:
        stored = torch.load(FILE, weights_only=True)
        worst = {name: max(differences(one, stored[name]).values()) for name, one in found.items()}
        for name, ratio in worst.items():
            print(f"{ratio:12.3g} {name}")
        return int(not max(worst.values()) <= 1)
    torch.save(found, FILE)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
