"""`every-step`: what factors in every step cost, with K-FAC-reduce and the shipped settings.

Three questions, each of one network, in turns with the same network without K-FAC: what do the
statistics cost, compiled where AlgoPerf compiles; what do they add to the peak of memory; and how
much longer than the median is the longest step, where inverses are renewed every 10 steps, in turns
or together.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from benchmarks.memory import probe
from benchmarks.methods import LEARNING_RATE
from benchmarks.models import TITLES, Case, make_case
from benchmarks.report import make_table, progress_bar, ratio_text
from benchmarks.timing import Spread, Step, measure, race
from submission.kfac import KFAC

MODELS = ("vit", "gpt", "graph")
BATCH_SIZES = {"vit": 32, "gpt": 8, "graph": 512}
BACKENDS = {"vit": "inductor", "gpt": "inductor", "graph": None}  # AlgoPerf runs graphs eagerly
RENEWALS = ("in_turns", "together")
PLAIN, FORWARD, TO_OUTPUTS = "without", "forward", "to outputs"
INTERVAL = 10
WARM = 3  # steps: seen, seen with all blocks known, compiled


def _case(model: str, batch_size: int, device: torch.device, size: str, compiled: bool) -> Case:
    case = make_case(model, batch_size, device, size)
    backend = BACKENDS[model] if compiled else None
    if backend is None:
        return case
    return replace(case, model=torch.compile(case.model, backend=backend))  # type: ignore[arg-type]


def _plain_step(case: Case) -> Step:
    def step() -> None:
        case.model.zero_grad(set_to_none=True)
        torch.autograd.backward(case.loss(case.model(case.inputs)))

    return step


def _to_outputs_step(case: Case, backwards: bool) -> Step:
    """A forward pass and, or not, the gradients of its layers' outputs: what one label drawn for
    each term costs at least. Never compiled."""
    outputs: list[Tensor] = []

    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        del module, inputs
        outputs.append(output)

    for module in case.model.modules():
        if not list(module.children()) and list(module.parameters()):
            module.register_forward_hook(keep)

    def step() -> None:
        outputs.clear()
        loss = case.loss(case.model(case.inputs))
        if backwards:
            torch.autograd.grad(loss, outputs)

    return step


def _kfac(case: Case, renewal: str, **settings: Any) -> KFAC:
    return KFAC(
        case.model, LEARNING_RATE, factor_update_steps=1, inverse_update_steps=INTERVAL,
        renewal=renewal, early_updates=False, **settings,
    )  # fmt: skip


def _pass(case: Case, kfac: KFAC) -> None:
    case.model.zero_grad(set_to_none=True)
    with kfac.record(case.sharing()):
        logits = case.model(case.inputs)
    loss = case.loss(logits)
    kfac.update(logits, case.likelihood, mask=case.weights, targets=case.targets, loss=loss)
    torch.autograd.backward(loss)


def _statistics_step(case: Case, fisher: str) -> Step:
    """Statistics go into the averages; nothing is inverted, nothing updated."""
    kfac = _kfac(case, "together", fisher_type=fisher)

    def step() -> None:
        _pass(case, kfac)
        kfac.preconditioner.state.inverses_stale = False
        kfac.preconditioner.refresh()
        kfac.preconditioner.state.step = 1

    return step


def warm_step(
    statistics: str, model: str, batch_size: int, device: torch.device, size: str, *, compiled: bool
) -> Step:
    """A pass with statistics ("mc" or "empirical") or without, after `WARM` of them.

    What is kept from pass to pass is in memory then: factors, compiled code.
    """
    case = _case(model, batch_size, device, size, compiled)
    step = _plain_step(case) if statistics == PLAIN else _statistics_step(case, statistics)
    for _ in range(WARM):
        step()
    return step


def measure_every_step(
    model: str,
    batch_size: int,
    fishers: list[str],
    repeats: int,
    device: torch.device,
    console: Console,
    size: str = "full",
    *,
    compiled: bool = True,
) -> dict[str, Any]:
    """Ratios of steps with statistics to those without, and the longest step to the median."""
    kinds = [PLAIN, *fishers]
    eager = [] if compiled else ["--eager"]
    memory = {
        name: probe(name, model, batch_size, device, size, "--every-step", *eager)
        for name in kinds
    }
    steps: dict[str, Step] = {
        name: warm_step(name, model, batch_size, device, size, compiled=compiled) for name in kinds
    }
    if "mc" in fishers:
        for name, backwards in ((FORWARD, False), (TO_OUTPUTS, True)):
            case = _case(model, batch_size, device, size, compiled=False)
            steps[name] = _to_outputs_step(case, backwards)
    with progress_bar(console, f"{model} {batch_size}", len(steps) * (repeats + 1)) as tick:
        result = race(steps, repeats, device, tick)
    if result.failures:
        raise RuntimeError(f"steps failed: {result.failures}")
    longest = {renewal: _longest(model, batch_size, renewal, device, size, compiled)
               for renewal in RENEWALS}  # fmt: skip
    return {
        "model": model,
        "title": TITLES[model],
        "batch_size": batch_size,
        "backend": (BACKENDS[model] if compiled else None) or "eager",
        "ratios": {
            fisher: {clock: asdict(result.ratio(fisher, PLAIN, clock)) for clock in ("cpu", "wall")}
            for fisher in fishers
        },
        "seconds": {name: asdict(result.seconds(name, "wall")) for name in steps},
        "memory": memory,
        "longest": longest,
    }


def _longest(
    model: str, batch_size: int, renewal: str, device: torch.device, size: str, compiled: bool
) -> dict[str, float]:
    """Seconds of whole steps after the first interval."""
    case = _case(model, batch_size, device, size, compiled)
    kfac = _kfac(case, renewal)

    def step() -> None:
        _pass(case, kfac)
        kfac.step()

    for _ in range(INTERVAL):
        step()
    seconds = [measure(step, device).wall for _ in range(INTERVAL if size == "full" else 2)]
    spread = Spread.of(seconds)
    return {"median": spread.median, "longest": max(seconds), "ratio": max(seconds) / spread.median}


def every_step_table(result: dict[str, Any]) -> Table:
    """One network's table."""
    plain = result["seconds"][PLAIN]["median"]
    table = make_table(
        f"{result['title']}, batch {result['batch_size']}, {result['backend']}",
        ["statistics of", "wall / step without", "CPU / step without", "s", "MiB"],
        f"a step without: {plain:.3f} s (forward and backward pass), "
        f"{_mib(result['memory'][PLAIN])} MiB above what is kept; medians (quartiles)\n"
        + "\n".join(
            f"longest of {INTERVAL} whole steps, inverses {renewal}: {one['longest']:.3f} s, "
            f"{one['ratio']:.2f} times the median"
            for renewal, one in result["longest"].items()
        ),
    )
    if TO_OUTPUTS in result["seconds"]:
        forward, whole = (result["seconds"][name]["median"] for name in (FORWARD, TO_OUTPUTS))
        table.caption = (
            f"{table.caption}\nthe gradients of all layers' outputs, not compiled, which one drawn "
            f"label takes besides: {(whole - forward) / plain:.2f} of a step without"
        )
    for fisher, ratios in result["ratios"].items():
        table.add_row(
            fisher, ratio_text(Spread(**ratios["wall"])), ratio_text(Spread(**ratios["cpu"])),
            f"{result['seconds'][fisher]['median']:.3f}", _mib(result["memory"][fisher]),
        )  # fmt: skip
    return table


def _mib(probed: dict[str, Any]) -> str:
    return f"{probed['mib']:.0f}" if "mib" in probed else f"none: {probed['failure']}"


def every_step_figure(results: list[dict[str, Any]]) -> Any:
    """Bars of ratios: statistics, and the longest step."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1 + 0.8 * len(results)))
    axes = figure.add_subplot()
    for place, result in enumerate(results):
        bars = {f"{result['model']}: statistics ({fisher})": ratios["wall"]["median"]
                for fisher, ratios in result["ratios"].items()}  # fmt: skip
        bars |= {f"{result['model']}: longest step, {renewal}": one["ratio"]
                 for renewal, one in result["longest"].items()}  # fmt: skip
        axes.barh(list(bars), list(bars.values()), color=f"C{place}")
    axes.axvline(1, color="k", lw=0.8)
    axes.invert_yaxis()
    axes.set_xlabel("times a step without statistics, or the median step")
    figure.tight_layout()
    return figure
