"""`amortised`: the average step when factors and inverses are renewed every k-th step.

Steps with and without an update are timed apart, in turn with steps of the reference optimizer
(the update rule alone), and put together as (update + (k - 1) · other) / k.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.methods import kfac_step, make_kfac, reference_step
from benchmarks.models import TITLES, make_case
from benchmarks.report import make_table, progress_bar, ratio_text
from benchmarks.timing import Spread, Step, race
from submission.kfac import Preconditioner

MODELS = ("graph", "vit")
INTERVALS = {"graph": 10, "vit": 50}
# A step's work grows with the batch, the preconditioning of its gradient does not: AlgoPerf's batch
# of graphs, and as many images as a CPU allows (a GPU of the paper's runs has 128).
BATCH_SIZES = {"graph": 512, "vit": 32}
REFERENCE = "reference"


def measure_amortised(
    model: str,
    batch_size: int,
    interval: int,
    variants: list[tuple[str, str]],
    repeats: int,
    device: torch.device,
    console: Console,
    size: str = "full",
) -> dict[str, Any]:
    """Ratios of K-FAC's average step to the reference step.

    Args:
        variants: (approximation, Fisher type).
    """
    reference = make_case(model, batch_size, device, size)
    steps: dict[str, Step] = {REFERENCE: reference_step(reference)}
    names = [f"{approx} {fisher}" for approx, fisher in variants]
    for name, (approx, fisher) in zip(names, variants, strict=True):
        case = make_case(model, batch_size, device, size)
        kfac = make_kfac(case, approx, fisher, interval)
        cycle = _Cycle(kfac, kfac_step(case, kfac))
        steps[f"{name} update"] = cycle.update
        steps[f"{name} other"] = cycle.other
    title = f"{model} every {interval}"
    with progress_bar(console, title, len(steps) * (repeats + 1)) as tick:
        result = race(steps, repeats, device, tick)
    if result.failures:
        raise RuntimeError(f"steps failed: {result.failures}")
    ratios: dict[str, Any] = {}
    for name in names:
        for clock in ("cpu", "wall"):
            keys = (f"{name} update", f"{name} other", REFERENCE)
            rounds = zip(*(result.samples[key] for key in keys), strict=True)
            values = [
                (getattr(update, clock) + (interval - 1) * getattr(other, clock))
                / (interval * getattr(plain, clock))
                for update, other, plain in rounds
            ]
            ratios.setdefault(name, {})[clock] = asdict(Spread.of(values))
    return {
        "model": model,
        "title": TITLES[model],
        "batch_size": batch_size,
        "interval": interval,
        "update_rule": reference.update_rule,
        "ratios": ratios,
        "seconds": {key: asdict(result.seconds(key, "wall")) for key in steps},
    }


class _Cycle:
    """Steps of one K-FAC, either one that renews everything or one that renews nothing.

    The step counter is set before each, so that no hundreds of other steps have to be waited for.
    """

    def __init__(self, kfac: Preconditioner, step: Step) -> None:
        self._kfac = kfac
        self._step = step

    def update(self) -> None:
        """A step in which factors and inverses are renewed."""
        self._kfac._state.step = 0
        self._step()

    def other(self) -> None:
        """A step in which nothing is renewed."""
        self._kfac._state.step = 1
        self._step()


def amortised_table(result: dict[str, Any]) -> Table:
    """One network's table."""
    table = make_table(
        f"{result['title']}, batch {result['batch_size']}: an update in {result['interval']} steps",
        ["", "average step, CPU / reference", "wall / reference", "update, s", "other, s"],
        f"reference: {result['update_rule']} alone, "
        f"{result['seconds'][REFERENCE]['median']:.3f} s a step; medians (quartiles) over rounds",
    )
    for name, ratios in result["ratios"].items():
        table.add_row(
            name,
            ratio_text(Spread(**ratios["cpu"])),
            ratio_text(Spread(**ratios["wall"])),
            f"{result['seconds'][f'{name} update']['median']:.3f}",
            f"{result['seconds'][f'{name} other']['median']:.3f}",
        )
    return table


def amortised_figure(results: list[dict[str, Any]]) -> Any:
    """Bars of the average step's ratio."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 0.8 + 0.8 * len(results)))
    axes = figure.add_subplot()
    for result in results:
        for name, ratios in result["ratios"].items():
            label = f"{result['model']} every {result['interval']}, {name}"
            spread = ratios["cpu"]
            errors = [[spread["median"] - spread["low"]], [spread["high"] - spread["median"]]]
            axes.barh(label, spread["median"], xerr=errors, color="tab:orange")
    axes.axvline(1, color="tab:blue", label="reference optimizer")
    axes.invert_yaxis()
    axes.set_xlabel("average step / reference step, CPU time")
    axes.legend(fontsize=7)
    figure.tight_layout()
    return figure
