"""Trains one net whose weight decays the marginal likelihood learns, by laplace-torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from experiments import cifar
from experiments.models.wide_resnet import WideResNet
from quickstart import images
from quickstart.errors import QuickstartError
from quickstart.images import ImageData

APPROXES = ("expand", "reduce")
METHODS = (*APPROXES, "fixed")
FREQUENCY = 5  # epochs between updates of the weight decays
HYPERSTEPS = 10
OPTIMIZERS: dict[str, tuple[type[torch.optim.Optimizer], dict[str, float]]] = {
    "adam": (torch.optim.Adam, {}),
    "sgd": (torch.optim.SGD, {"momentum": 0.9}),
}


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
    laplace, backends = load_laplace()
    device = torch.device(options.device)
    torch.manual_seed(seed)
    model = make_model(options, data).to(device)
    batches = Batches(data, options.batch_size, seed, augment, device)
    optimizer, own = OPTIMIZERS[options.optimizer]
    start = 1.0  # the precision of the prior
    if options.weight_decay is not None:
        start = options.weight_decay * len(batches.dataset)
    posterior, _, margliks, losses = laplace.marglik_training(
        model,
        batches,
        backend=backends["reduce" if method == "fixed" else method],
        optimizer_cls=optimizer,
        optimizer_kwargs={"lr": options.learning_rate, **own},
        scheduler_cls=torch.optim.lr_scheduler.CosineAnnealingLR,
        scheduler_kwargs={
            "T_max": options.epochs * len(batches),
            "eta_min": options.last_learning_rate,
        },
        prior_prec_init=start,
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


def make_model(options: argparse.Namespace, data: ImageData) -> WideResNet:
    """The net of the options, with as many outputs as the data have classes.

    Raises:
        QuickstartError: no such depth.
    """
    try:
        return WideResNet(
            options.depth,
            options.width,
            num_classes=int(data.classes.max()) + 1,
            channels=data.images.shape[1],
        )
    except ValueError as error:
        raise QuickstartError(f"--depth: {error}") from error


def load_laplace() -> tuple[Any, dict[str, type]]:
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
