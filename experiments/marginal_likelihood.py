"""Tables 2 and 5: one weight decay per layer, learned by the Laplace marginal likelihood.

A Wide ResNet with Fixup is trained by laplace-torch's own `marglik_training`, on this project's
K-FAC as its curvature backend (`laplace_backend`): every five epochs the factors of the whole data
set are accumulated and diagonalised, and the precision of each parameter tensor's prior takes ten
steps up the marginal likelihood. *Fixed* is the same training with all precisions at 1. Weight
decay here is precision / N: the loss is mean cross-entropy + 1/2 Σ weight decay · |parameter|².

By default on scikit-learn's handwritten digits; augmentation moves them by one pixel. `update` is
the time of one such update of the weight decays, of expand and reduce in turns on one model. What
grows with the data set, the accumulation, is also timed for the paper's network.

The paper's size, on a GPU: --data-dir DIR --depth 16 --width 4 --epochs 300 --batch-size 128
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from experiments import cifar, photographs, pictures, results
from experiments.models.wide_resnet import WideResNet
from experiments.tables import Table, mean_and_error, plus_minus
from quickstart import images
from quickstart.errors import QuickstartError
from quickstart.images import ImageData

SMALL: list[str] = []
PAPER = """
The paper's Tables 2 and 5 have a Wide ResNet 16-4 (Fixup) on CIFAR-10 with and without
augmentation; reduce takes about half of expand's time there. Its other numbers were not available
when this was written. At its size: `./run.sh experiments marginal_likelihood --data-dir DIR
--depth 16 --width 4 --epochs 300 --batch-size 128` (300 epochs are ours; the paper's optimizer
settings were not available either).
"""

APPROXES = ("expand", "reduce")
METHODS = (*APPROXES, "fixed")
FREQUENCY = 5  # epochs between updates of the weight decays
HYPERSTEPS = 10
LARGE_BATCH = 32


class Batches:
    """Shuffled batches of the training images, as laplace-torch wants them.

    Attributes:
        dataset: has the length that laplace-torch asks for.
    """

    def __init__(
        self, data: ImageData, batch_size: int, seed: int, augment: bool, device: torch.device
    ) -> None:
        self.dataset = data.splits["train"]
        self._data, self._batch_size, self._augment = data, batch_size, augment
        self._generator = np.random.default_rng(seed)
        self._device = device

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        order = self._generator.permutation(self.dataset)
        for start in range(0, len(order), self._batch_size):
            members = order[start : start + self._batch_size]
            pixels = self._data.images[members]
            if self._augment:
                pixels = augmented(pixels, self._data.augment, self._generator)
            batch = images.image_batch(pixels, self._data.classes[members], self._device)
            yield batch["inputs"], batch["targets"]

    def __len__(self) -> int:
        return -(-len(self.dataset) // self._batch_size)


def augmented(
    pixels: npt.NDArray[np.uint8], mirror: bool, generator: np.random.Generator
) -> npt.NDArray[np.uint8]:
    """Photographs are mirrored and moved by up to 4 pixels; digits are moved by up to one."""
    if mirror:
        return images.augment(pixels, generator)
    padded = np.pad(pixels, ((0, 0), (0, 0), (1, 1), (1, 1)))
    height, width = pixels.shape[2:]
    moved = np.empty_like(pixels)
    for number, (top, left) in enumerate(generator.integers(0, 3, size=(len(pixels), 2))):
        moved[number] = padded[number, :, top : top + height, left : left + width]
    return moved


def train(
    options: argparse.Namespace, data: ImageData, method: str, augment: bool, seed: int
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains one net; returns it, and its test results and weight decays."""
    laplace, backends = _laplace()
    device = torch.device(options.device)
    torch.manual_seed(seed)
    model = _model(options, data).to(device)
    batches = Batches(data, options.batch_size, seed, augment, device)
    posterior, _, margliks, losses = laplace.marglik_training(
        model,
        batches,
        backend=backends["reduce" if method == "fixed" else method],
        optimizer_kwargs={"lr": options.learning_rate},
        scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR,
        scheduler_kwargs={"T_max": options.epochs * len(batches)},
        n_epochs=options.epochs,
        n_epochs_burnin=options.epochs + 1 if method == "fixed" else 0,
        marglik_frequency=FREQUENCY,
        n_hypersteps=HYPERSTEPS,
    )
    precision = posterior.prior_precision.detach()
    nll, accuracy = test(model, data, device)
    layers = {
        name.removesuffix(".weight"): float(value) / len(batches.dataset)
        for (name, parameter), value in zip(model.named_parameters(), precision, strict=True)
        if parameter.dim() > 1
    }
    return model, {
        "method": method,
        "augment": augment,
        "seed": seed,
        "nll": nll,
        "accuracy": accuracy,
        "train_loss": losses[-1],
        "log_marginal_likelihoods": [-value for value in margliks],
        "weight_decay": layers,
    }


@torch.no_grad()
def test(model: nn.Module, data: ImageData, device: torch.device) -> tuple[float, float]:
    """Mean negative log-likelihood and accuracy on the test images."""
    model.eval()
    loss = correct = 0.0
    members = data.splits["test"]
    for start in range(0, len(members), 512):
        x, y = cifar.tensors(data, members[start : start + 512], device)
        logits = model(x)
        loss += float(F.cross_entropy(logits, y, reduction="sum"))
        correct += float((logits.argmax(1) == y).sum())
    return loss / len(members), correct / len(members)


def time_update(model: nn.Module, batches: Batches, approx: str) -> dict[str, float]:
    """Seconds of one update of the weight decays, in parts."""
    laplace, backends = _laplace()
    device = next(model.parameters()).device
    count = sum(1 for _ in model.parameters())
    logarithm = torch.zeros(count, device=device, requires_grad=True)
    optimizer = torch.optim.Adam([logarithm], lr=0.1)
    posterior = laplace.Laplace(model, "classification", "all", "kron", backend=backends[approx])
    results.synchronize(device)
    start = time.perf_counter()
    posterior.fit(batches)  # factors, and their eigendecomposition
    results.synchronize(device)
    fitted = time.perf_counter()
    for _ in range(HYPERSTEPS):
        optimizer.zero_grad()
        loss = -posterior.log_marginal_likelihood(logarithm.exp())
        loss.backward()
        optimizer.step()
    results.synchronize(device)
    end = time.perf_counter()
    return {"fit": fitted - start, "steps": end - fitted}


def time_large_net(data: ImageData | None, device: torch.device, count: int) -> dict[str, Any]:
    """Seconds of each batch's accumulation, and of the eigendecomposition, in the paper's network.

    Args:
        data: images of 3 x 32 x 32 pixels, or None for random ones.
        count: batches of 32 images.
    """
    _, backends = _laplace()
    torch.manual_seed(0)
    model = WideResNet(16, 4, fixup_zeros=False).to(device).eval()
    batches = [_large_batch(data, number, device) for number in range(count + 1)]
    seconds: dict[str, dict[str, list[float]]] = {}
    curvatures = {approx: backends[approx](model, "classification") for approx in APPROXES}
    krons = {}
    for number, (x, y) in enumerate(batches):
        for approx in APPROXES if number % 2 else APPROXES[::-1]:
            results.synchronize(device)
            start = time.perf_counter()
            krons[approx] = curvatures[approx].kron(x, y, N=LARGE_BATCH * count)[1]
            results.synchronize(device)
            if number:  # the first is not counted
                parts = seconds.setdefault(approx, {"batch": [], "eigenvalues": []})
                parts["batch"].append(time.perf_counter() - start)
    for approx, kron in krons.items():
        start = time.perf_counter()
        kron.decompose()
        results.synchronize(device)
        seconds[approx]["eigenvalues"].append(time.perf_counter() - start)
    pixels = photographs.DATA if data is None else f"images of {data.name}"
    return {"pixels": pixels, "seconds": seconds}


def _large_batch(
    data: ImageData | None, number: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    if data is not None:
        members = data.splits["train"][number * LARGE_BATCH :][:LARGE_BATCH]
        return cifar.tensors(data, members, device)
    x, y = photographs.crops((number + 1) * LARGE_BATCH, device)
    return x[-LARGE_BATCH:], y[-LARGE_BATCH:]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes, data, device."""
    add = parser.add_argument
    add("--data-dir", type=Path, help="CIFAR-10 (default: scikit-learn's digits)")
    add("--depth", type=int, default=10, help="6n + 4 (default: 10)")
    add("--width", type=int, default=1, help="widening factor (default: 1)")
    add("--epochs", type=int, default=30, help="5 or more (default: 30)")
    add("--batch-size", type=int, default=128)
    add("--learning-rate", type=float, default=3e-3, help="of Adam (default: 0.003)")
    add("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    add("--repeats", type=int, default=5, help="timed updates of each (default: 5)")
    add("--large-batches", type=int, default=4,
        help="timed batches of the paper's network; 0 leaves it out (default: 4)")  # fmt: skip
    add("--train-images", type=int, help="take only so many training images")
    add("--device", default=results.default_device())


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Trains all nets, then times updates on the last one."""
    del folder
    _laplace()
    if options.epochs < FREQUENCY:
        raise QuickstartError(
            f"--epochs must be {FREQUENCY} or more: that often decays are learned"
        )
    if options.repeats < 1 or options.batch_size < 1:
        raise QuickstartError("--repeats and --batch-size must be 1 or more")
    data = images.load_digits() if options.data_dir is None else cifar.load(options.data_dir)
    if options.train_images:
        data.splits["train"] = data.splits["train"][: options.train_images]
    jobs = [(m, a, s) for s in options.seeds for a in (False, True) for m in METHODS]
    runs = []
    model = None
    for method, augment, seed in track(jobs, "training", console=console, transient=True):
        model, outcome = train(options, data, method, augment, seed)
        runs.append(outcome)
    assert model is not None
    updates: dict[str, list[dict[str, float]]] = {approx: [] for approx in APPROXES}
    device = torch.device(options.device)
    for number in range(options.repeats + 1):
        for approx in APPROXES if number % 2 else APPROXES[::-1]:
            batches = Batches(data, options.batch_size, number, False, device)
            seconds = time_update(model, batches, approx)
            if number:  # the first is not counted
                updates[approx].append(seconds)
    large = None
    if options.large_batches > 0:
        pictured = None if options.data_dir is None else data
        large = time_large_net(pictured, device, options.large_batches)
    return {
        "data": data.name,
        "large": large,
        "train_images": len(data.splits["train"]),
        "parameters": sum(p.numel() for p in model.parameters()),
        "runs": runs,
        "updates": updates,
    }


def _model(options: argparse.Namespace, data: ImageData) -> WideResNet:
    try:
        return WideResNet(
            options.depth,
            options.width,
            num_classes=int(data.classes.max()) + 1,
            channels=data.images.shape[1],
        )
    except ValueError as error:
        raise QuickstartError(f"--depth: {error}") from error


def _laplace() -> tuple[Any, dict[str, type]]:
    """The package, and our backends with sampled labels."""
    try:
        import laplace

        from experiments import laplace_backend
    except ModuleNotFoundError as error:
        raise QuickstartError(
            f"the package {error.name} is missing: run ./run.sh experiments marginal_likelihood, "
            "or pip install --no-deps -r requirements/experiments.txt"
        ) from error
    return laplace, {
        "expand": laplace_backend.SampledKFACExpandGGN,
        "reduce": laplace_backend.SampledKFACReduceGGN,
    }


def update_seconds(result: dict[str, Any], approx: str) -> list[float]:
    """Seconds of each timed update, all parts together."""
    return [sum(parts.values()) for parts in result["updates"][approx]]


def _select(result: dict[str, Any], method: str, augment: bool) -> list[dict[str, Any]]:
    return [r for r in result["runs"] if r["method"] == method and r["augment"] == augment]


def tables(result: dict[str, Any]) -> list[Table]:
    """Test results; learned weight decays; time of an update."""
    tested = []
    for augment in (False, True):
        for method in METHODS:
            runs = _select(result, method, augment)
            name = f"K-FAC-{method}" if method in APPROXES else "fixed weight decay"
            cells = [plus_minus([r[key] for r in runs]) for key in ("nll", "accuracy")]
            last = [r["log_marginal_likelihoods"][-1:] for r in runs]
            known = [value for values in last for value in values]
            marginal = plus_minus(known, 0) if known else "-"
            tested.append((name, "yes" if augment else "no", *cells, marginal))
    reference = mean_and_error(update_seconds(result, "expand"))[0]
    timed = []
    for approx in APPROXES:
        seconds = update_seconds(result, approx)
        fit, steps = (
            plus_minus([parts[key] for parts in result["updates"][approx]])
            for key in ("fit", "steps")
        )
        share = f"{mean_and_error(seconds)[0] / reference:.0%}"
        timed.append((f"K-FAC-{approx}", plus_minus(seconds), fit, steps, share))
    large = []
    if result["large"] is not None:
        by_batch = {a: parts["batch"] for a, parts in result["large"]["seconds"].items()}
        whole = mean_and_error(by_batch["expand"])[0]
        for approx in APPROXES:
            share = f"{mean_and_error(by_batch[approx])[0] / whole:.0%}"
            once = plus_minus(result["large"]["seconds"][approx]["eigenvalues"], 1)
            large.append((f"K-FAC-{approx}", plus_minus(by_batch[approx]), share, once))
    of = f"{result['data']}, {result['train_images']:,} training images"
    shown = [
        Table(
            f"Test set, mean ± s.e. over seeds ({of}, {result['parameters']:,} parameters)",
            ("weight decays by", "augmented", "NLL", "accuracy", "log marginal likelihood"),
            tuple(tested),
        ),
        Table(
            "Seconds of one update of the weight decays, mean ± s.e.",
            ("", "update", "factors and eigenvalues", "10 steps", "of expand's time"),
            tuple(timed),
        ),
    ]
    if large:
        shown.append(
            Table(
                f"Seconds in the paper's network, Wide ResNet 16-4 ({result['large']['pixels']})",
                ("", f"factors of {LARGE_BATCH} images", "of expand's time", "eigenvalues, once"),
                tuple(large),
            )
        )
    return shown


def draw(result: dict[str, Any], path: Path) -> bool:
    """Learned weight decay of each layer."""
    picture, axes = pictures.figure(2, 1, 9, 3.4)
    fixed = 1 / result["train_images"]
    for axis, augment in zip(axes[0], (False, True), strict=True):
        for shift, approx in ((-0.2, "expand"), (0.2, "reduce")):
            runs = _select(result, approx, augment)
            layers = list(runs[0]["weight_decay"])
            means = [mean_and_error([r["weight_decay"][k] for r in runs])[0] for k in layers]
            places = np.arange(len(layers)) + shift
            axis.bar(places, means, 0.4, color=pictures.COLOURS[approx], label=f"K-FAC-{approx}")
        axis.axhline(fixed, color="grey", linestyle="--", label="start, and fixed")
        axis.set_yscale("log")
        axis.set_xticks(range(len(layers)), layers, rotation=60, ha="right", fontsize=7)
        axis.set_title("with augmentation" if augment else "without augmentation", fontsize=9)
    axes[0][0].set_ylabel("learned weight decay")
    axes[0][0].legend(fontsize=7)
    pictures.save(picture, path)
    return True
