"""Tables 1 and 3: time of one K-FAC update step of a Wide ResNet 16-4 (Fixup), by batch size.

One step is everything that training does in it: forward pass, Fisher pass, factors, inverses,
backward pass, preconditioning, and an SGD update; factors and inverses are renewed in every step.
A plain SGD step of the same batch stands beside it. A second pair of columns has this project's
fast ways of computing convolutions' input factors off: patches are materialised, for expand's
products and for reduce's sums. On a CPU the methods take turns.

The paper's size, on a GPU: --batch-sizes 128 256 512 1024 2048 --repeats 10 --data-dir DIR
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import track
from torch import Tensor, nn

from experiments import cifar, photographs, pictures, results
from experiments.models.wide_resnet import WideResNet
from experiments.tables import Table, mean_and_error, plus_minus
from quickstart.errors import QuickstartError
from submission.kfac import KFAC, KFACConfig, convolution, layers

SMALL = ["--batch-sizes", "16", "32", "64", "128", "--repeats", "3"]
PAPER = """
The paper's Tables 1 and 3 have batch sizes 128 to 2048 on a GPU; its numbers could not be read when
this was written, so none stand here. The comparison to make is reduce against expand as the batch
grows: the seconds that reduce saves grow with it; its share of expand's time does not shrink, since
expand's factors no longer come from patches (compare the columns with the fast paths off). At the
paper's size:
`./run.sh experiments update_step_timing --batch-sizes 128 256 512 1024 2048 --repeats 10
--data-dir DIR`
"""
_FULL = ("sgd", "expand", "reduce", "expand, fast paths off", "reduce, fast paths off")


@contextmanager
def fast_convolutions_off() -> Iterator[None]:
    """Convolutions' input factors from materialised patches, whatever their channels."""
    before = layers.MIN_CHANNELS, convolution.FEWEST_SLICED_CHANNELS, convolution.patch_sum
    layers.MIN_CHANNELS = convolution.FEWEST_SLICED_CHANNELS = 1 << 60
    convolution.patch_sum = _sum_of_patches
    try:
        yield
    finally:
        layers.MIN_CHANNELS, convolution.FEWEST_SLICED_CHANNELS, convolution.patch_sum = before


def _sum_of_patches(
    x: Tensor, geometry: tuple[convolution.DimensionGeometry, ...], groups: int
) -> Tensor:
    """What `convolution.patch_sum` computes, from the patches themselves."""
    parts = torch.split(x, 16)  # examples, so that patches need little memory
    summed = torch.cat([convolution.patches(part, geometry).sum(-1) for part in parts])
    return summed.reshape(len(x), groups, -1).movedim(1, 0)


def make_step(model: nn.Module, images: Tensor, classes: Tensor, method: str) -> Callable[[], None]:
    """A function that does one training step with "sgd", "expand" or "reduce"."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    kfac = None
    if method != "sgd":
        config = KFACConfig(kfac_approx=method, factor_update_steps=1, inverse_update_steps=1)
        kfac = KFAC(model, config)

    def step() -> None:
        optimizer.zero_grad()
        if kfac is None:
            F.cross_entropy(model(images), classes).backward()  # type: ignore[no-untyped-call]
        else:
            with kfac.record():
                logits = model(images)
            kfac.update(logits, "categorical")
            F.cross_entropy(logits, classes).backward()  # type: ignore[no-untyped-call]
            kfac.precondition()
        optimizer.step()

    return step


def time_steps(step: Callable[[], None], repeats: int, device: torch.device) -> list[float]:
    """Seconds of each of `repeats` calls, after one that is not counted."""
    step()
    return [second for _ in range(repeats) for second in _time_once(step, device)]


def unless_out_of_memory(work: Callable[[], list[float]]) -> list[float] | None:
    """The result of `work`, or None where memory did not suffice; any other error passes."""
    try:
        return work()
    except (MemoryError, torch.OutOfMemoryError):
        pass
    except RuntimeError as error:
        if "not enough memory" not in str(error) and "allocate memory" not in str(error):
            raise
    # Only now, out of the handlers, do the frames that hold the tensors go.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Sizes, data, device."""
    add = parser.add_argument
    add("--batch-sizes", type=int, nargs="+", default=[16, 32, 64, 128], metavar="N")
    add("--repeats", type=int, default=3, help="timed steps of each (default: 3)")
    add("--depth", type=int, default=16)
    add("--width", type=int, default=4)
    add("--data-dir", type=Path, help="CIFAR-10; default: crops of photographs of its shape")
    add("--device", default=results.default_device())


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Times all methods at all batch sizes."""
    del folder
    if min(options.batch_sizes) < 1 or options.repeats < 1:
        raise QuickstartError("--batch-sizes and --repeats must be 1 or more")
    device = torch.device(options.device)
    images, classes, data = _batch(options.data_dir, max(options.batch_sizes), device)
    seconds: dict[str, dict[str, list[float] | None]] = {kind: {} for kind in _FULL}
    for size in track(options.batch_sizes, "timing", console=console, transient=True):
        batch = images[:size], classes[:size]
        # Taking turns needs the memory of all methods at once, and on a GPU memory is in question.
        measure = _one_by_one if device.type == "cuda" else _in_turns
        for kind, measured in measure(options, *batch, device).items():
            seconds[kind][str(size)] = measured
    return {"data": data, "batch_sizes": options.batch_sizes, "seconds": seconds}


def _prepare(
    options: argparse.Namespace, images: Tensor, classes: Tensor, kind: str, device: torch.device
) -> Callable[[], None]:
    """The training step of a column."""
    torch.manual_seed(0)
    model = WideResNet(options.depth, options.width, fixup_zeros=False).to(device)
    method, _, off = kind.partition(", ")
    step = make_step(model, images, classes, method)

    def slow_step() -> None:
        with fast_convolutions_off():
            step()

    return slow_step if off else step


def _one_by_one(
    options: argparse.Namespace, images: Tensor, classes: Tensor, device: torch.device
) -> dict[str, list[float] | None]:
    def work(kind: str) -> list[float]:
        step = _prepare(options, images, classes, kind, device)
        return time_steps(step, options.repeats, device)

    return {kind: unless_out_of_memory(partial(work, kind)) for kind in _FULL}


def _in_turns(
    options: argparse.Namespace, images: Tensor, classes: Tensor, device: torch.device
) -> dict[str, list[float] | None]:
    """Every method does one step, then every method the next: what disturbs one disturbs all."""
    steps = {kind: _prepare(options, images, classes, kind, device) for kind in _FULL}
    seconds: dict[str, list[float] | None] = {kind: [] for kind in _FULL}
    for number in range(options.repeats + 1):
        for kind, step in steps.items():
            so_far = seconds[kind]
            if so_far is None:
                continue
            taken = unless_out_of_memory(partial(_time_once, step, device))
            if taken is None:
                seconds[kind] = None
            elif number:  # the first is not counted
                so_far += taken
    return seconds


def _time_once(step: Callable[[], None], device: torch.device) -> list[float]:
    results.synchronize(device)
    start = time.perf_counter()
    step()
    results.synchronize(device)
    return [time.perf_counter() - start]


def _batch(data_dir: Path | None, size: int, device: torch.device) -> tuple[Tensor, Tensor, str]:
    if data_dir is None:
        try:
            return *photographs.crops(size, device), photographs.DATA
        except ValueError as error:
            raise QuickstartError(f"{error}: give CIFAR-10 with --data-dir") from error
    data = cifar.load(data_dir)
    if len(data.splits["train"]) < size:
        raise QuickstartError(f"{data_dir} has fewer than {size} training images")
    members = np.asarray(data.splits["train"][:size])
    return *cifar.tensors(data, members, device), f"images of {data.name}"


def tables(result: dict[str, Any]) -> list[Table]:
    """Seconds per step by batch size, and the ratio of reduce to expand."""

    def cell(kind: str, size: int) -> str:
        seconds = result["seconds"][kind][str(size)]
        return "OOM" if seconds is None else plus_minus(seconds)

    def ratio(size: int) -> str:
        both = [result["seconds"][k][str(size)] for k in ("expand", "reduce")]
        if None in both:
            return "-"
        expand, reduce = (mean_and_error(seconds)[0] for seconds in both)
        return f"{reduce / expand:.2f} ({expand - reduce:.2f} s less)"

    rows = tuple(
        (str(size), *(cell(kind, size) for kind in _FULL[:3]), ratio(size),
         *(cell(kind, size) for kind in _FULL[3:]))
        for size in result["batch_sizes"]
    )  # fmt: skip
    header = ("batch size", *_FULL[:3], "reduce / expand", *_FULL[3:])
    return [Table(f"Seconds per update step, mean ± s.e. ({result['data']})", header, rows)]


def draw(result: dict[str, Any], path: Path) -> bool:
    """Seconds against the batch size."""
    picture, axes = pictures.figure(1, 1, 6, 3.6)
    axis = axes[0][0]
    for kind in _FULL:
        known = {int(size): s for size, s in result["seconds"][kind].items() if s is not None}
        means = [mean_and_error(seconds)[0] for seconds in known.values()]
        colour = pictures.COLOURS.get(kind.split(",")[0], "grey")
        style = "--" if "off" in kind else "-"
        axis.plot(list(known), means, style, color=colour, marker=".", label=kind)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(result["batch_sizes"], [str(size) for size in result["batch_sizes"]])
    axis.set_xlabel("batch size")
    axis.set_ylabel("seconds per update step")
    axis.legend(fontsize=8)
    pictures.save(picture, path)
    return True
