"""Seconds of updates of the weight decays, and of what they take in the paper's network."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from experiments import cifar, photographs, results
from experiments.marginal_likelihood.training import APPROXES, HYPERSTEPS, Batches, load_laplace
from experiments.models.wide_resnet import WideResNet
from quickstart.images import ImageData

LARGE_BATCH = 32


def time_update(model: nn.Module, batches: Batches, approx: str) -> dict[str, float]:
    """Seconds of one update of the weight decays, in parts."""
    laplace, backends = load_laplace()
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
    _, backends = load_laplace()
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
