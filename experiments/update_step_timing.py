"""Tables 1 and 3: time of one K-FAC update step of a Wide ResNet 16-4 (Fixup), by batch size.

One step is everything that training does in it: forward pass, Fisher pass, factors, inverses,
backward pass, preconditioning, and an SGD update; factors and inverses are renewed in every step.
A plain SGD step of the same batch stands beside it. A second pair of columns has this project's
fast ways of computing convolutions' input factors off: patches are materialised, for expand's
products and for reduce's sums, as in the paper's implementation. On a CPU the methods take turns.

The paper's size, on a GPU: --paper --data-dir DIR
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Callable, Iterator, Sequence
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
from experiments.paper import numbers
from experiments.paper.sizes import PaperSize, missing_cifar
from experiments.tables import Table, mean_and_error, plus_minus
from quickstart.errors import QuickstartError
from submission.kfac import KFACConfig, Preconditioner, tuning
from submission.kfac.linalg.convolution import patches

SMALL = ["--batch-sizes", "16", "32", "64", "128", "--repeats", "3"]
PAPER_SIZE = PaperSize(
    table="Tables 1 and 3: an update step of a Wide ResNet 16-4 (Fixup) on CIFAR-10",
    flags=("--batch-sizes", "128", "256", "512", "1024", "2048", "--epochs", "10"),
    runs="5 methods x 5 batch sizes x 10 epochs",
    hardware="one V100",
    time="not told; at its seconds a step, 1.4 for expand and reduce together",
    missing=missing_cifar,
)
PAPER = """
The paper's seconds are those of one V100, mean ± s.e. over 10 epochs. Its implementation
materialises patches, so its columns compare with ours whose fast paths are off. The comparison to
make is reduce against expand as the batch grows: the seconds that reduce saves grow with it; its
share of expand's time does not shrink, since expand's factors no longer come from patches. At the
paper's size: `./run.sh experiments update_step_timing --paper --data-dir DIR`
"""
Batch = tuple[Tensor, Tensor]  # images and classes
Step = Callable[[Tensor, Tensor], None]
_FULL = ("sgd", "expand", "reduce", "expand, fast paths off", "reduce, fast paths off")


@contextmanager
def fast_convolutions_off() -> Iterator[None]:
    """Convolutions' input factors from materialised patches, whatever their channels."""
    before = tuning.FEWEST_SHIFTED_CHANNELS, tuning.FEWEST_SLICED_CHANNELS, patches.patch_sum
    tuning.FEWEST_SHIFTED_CHANNELS = tuning.FEWEST_SLICED_CHANNELS = 1 << 60
    patches.patch_sum = _sum_of_patches
    try:
        yield
    finally:
        tuning.FEWEST_SHIFTED_CHANNELS, tuning.FEWEST_SLICED_CHANNELS, patches.patch_sum = before


def _sum_of_patches(
    x: Tensor, geometry: tuple[patches.DimensionGeometry, ...], groups: int
) -> Tensor:
    """What `patches.patch_sum` computes, from the patches themselves."""
    parts = torch.split(x, 16)  # examples, so that patches need little memory
    summed = torch.cat([patches.patches(part, geometry).sum(-1) for part in parts])
    return summed.reshape(len(x), groups, -1).movedim(1, 0)


def make_step(model: nn.Module, method: str) -> Step:
    """A function that does one training step with "sgd", "expand" or "reduce" on a batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    kfac = None
    if method != "sgd":
        config = KFACConfig(kfac_approx=method, factor_update_steps=1, inverse_update_steps=1)
        kfac = Preconditioner(model, config)

    def step(images: Tensor, classes: Tensor) -> None:
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


def time_steps(
    step: Step, batches: Sequence[Batch], repeats: int, device: torch.device
) -> list[float]:
    """Seconds of a step, one value for each pass over the batches, after an uncounted step."""
    step(*batches[0])
    return [_time_once(step, batches, device) for _ in range(repeats)]


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
    add("--epochs", type=int, metavar="N",
        help="instead, N passes over all training images of --data-dir")  # fmt: skip
    add("--depth", type=int, default=16)
    add("--width", type=int, default=4)
    add("--data-dir", type=Path, help="CIFAR-10; default: crops of photographs of its shape")
    add("--device", default=results.default_device())


def run(options: argparse.Namespace, folder: Path, console: Console) -> dict[str, Any]:
    """Times all methods at all batch sizes."""
    del folder
    if min(options.batch_sizes) < 1 or min(options.repeats, options.epochs or 1) < 1:
        raise QuickstartError("--batch-sizes, --repeats and --epochs must be 1 or more")
    if options.epochs is not None and options.data_dir is None:
        raise QuickstartError("--epochs needs --data-dir")
    device = torch.device(options.device)
    images, classes, data = _images(options, device)
    seconds: dict[str, dict[str, list[float] | None]] = {kind: {} for kind in _FULL}
    for size in track(options.batch_sizes, "timing", console=console, transient=True):
        count = 1 if options.epochs is None else len(images) // size
        batches = [
            (images[i * size : (i + 1) * size], classes[i * size : (i + 1) * size])
            for i in range(count)
        ]
        # Taking turns needs the memory of all methods at once, and on a GPU memory is in question.
        measure = _one_by_one if device.type == "cuda" else _in_turns
        for kind, measured in measure(options, batches, device).items():
            seconds[kind][str(size)] = measured
    return {"data": data, "batch_sizes": options.batch_sizes, "seconds": seconds}


def _prepare(options: argparse.Namespace, kind: str, device: torch.device) -> Step:
    """The training step of a column."""
    torch.manual_seed(0)
    model = WideResNet(options.depth, options.width, fixup_zeros=False).to(device)
    method, _, off = kind.partition(", ")
    step = make_step(model, method)

    def slow_step(images: Tensor, classes: Tensor) -> None:
        with fast_convolutions_off():
            step(images, classes)

    return slow_step if off else step


def _one_by_one(
    options: argparse.Namespace, batches: Sequence[Batch], device: torch.device
) -> dict[str, list[float] | None]:
    def work(kind: str) -> list[float]:
        step = _prepare(options, kind, device)
        return time_steps(step, batches, options.epochs or options.repeats, device)

    return {kind: unless_out_of_memory(partial(work, kind)) for kind in _FULL}


def _in_turns(
    options: argparse.Namespace, batches: Sequence[Batch], device: torch.device
) -> dict[str, list[float] | None]:
    """Every method does one pass, then every method the next: what disturbs one disturbs all."""
    steps = {kind: _prepare(options, kind, device) for kind in _FULL}
    seconds: dict[str, list[float] | None] = {kind: [] for kind in _FULL}
    for number in range((options.epochs or options.repeats) + 1):
        for kind, step in steps.items():
            so_far = seconds[kind]
            if so_far is None:
                continue
            some = batches if number else batches[:1]  # the first is not counted
            taken = unless_out_of_memory(partial(_time_pass, step, some, device))
            if taken is None:
                seconds[kind] = None
            elif number:
                so_far += taken
    return seconds


def _time_pass(step: Step, batches: Sequence[Batch], device: torch.device) -> list[float]:
    return [_time_once(step, batches, device)]


def _time_once(step: Step, batches: Sequence[Batch], device: torch.device) -> float:
    """Mean seconds of a step over all batches."""
    results.synchronize(device)
    start = time.perf_counter()
    for images, classes in batches:
        step(images, classes)
    results.synchronize(device)
    return (time.perf_counter() - start) / len(batches)


def _images(options: argparse.Namespace, device: torch.device) -> tuple[Tensor, Tensor, str]:
    """As many images as the largest batch has, or all for training; their classes; their name."""
    size = max(options.batch_sizes)
    if options.data_dir is None:
        try:
            return *photographs.crops(size, device), photographs.DATA
        except ValueError as error:
            raise QuickstartError(f"{error}: give CIFAR-10 with --data-dir") from error
    data = cifar.load(options.data_dir)
    members = np.concatenate([data.splits["train"], data.splits["validation"]])
    if len(members) < size:
        raise QuickstartError(f"{options.data_dir} has fewer than {size} training images")
    if options.epochs is None:
        members = members[:size]
    return *cifar.tensors(data, members, device), f"images of {data.name}"


def tables(result: dict[str, Any]) -> list[Table]:
    """Seconds per step by batch size, the ratio of reduce to expand, and the paper's seconds."""
    published = numbers.UPDATE_STEP_SECONDS

    def cell(kind: str, size: int) -> str:
        if size not in result["batch_sizes"]:
            return "-"
        seconds = result["seconds"][kind][str(size)]
        return "OOM" if seconds is None else plus_minus(seconds)

    def ratio(size: int) -> str:
        both = [result["seconds"][k].get(str(size)) for k in ("expand", "reduce")]
        if None in both:
            return "-"
        expand, reduce = (mean_and_error(seconds)[0] for seconds in both)
        return f"{reduce / expand:.2f} ({expand - reduce:.2f} s less)"

    def paper(kind: str, size: int) -> str:
        return numbers.shown(published[kind][size]) if size in published[kind] else "-"

    rows = tuple(
        (str(size), *(cell(kind, size) for kind in _FULL[:3]), ratio(size),
         *(cell(kind, size) for kind in _FULL[3:]),
         *(paper(kind, size) for kind in ("expand", "reduce")))
        for size in sorted({*result["batch_sizes"], *published["expand"]})
    )  # fmt: skip
    header = (
        *("batch size", *_FULL[:3], "reduce / expand", *_FULL[3:]),
        *("the paper's expand", "the paper's reduce"),
    )
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
