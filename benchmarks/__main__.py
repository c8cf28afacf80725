"""Command line: python -m benchmarks COMMAND."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import amortised, coverage, every_step, gpu_check, memory, phases, step, sweep
from benchmarks.architectures import ARCHITECTURES
from benchmarks.methods import APPROXES, FISHERS
from benchmarks.models import SIZES
from benchmarks.report import environment, save_figure, save_json
from benchmarks.rows import METHODS, Row, choose_rows, make_step
from benchmarks.timing import Step
from quickstart.allocator import keep_freed_memory

MODELS = ("wrn", "vit", "gpt")
GPU_PARTS = tuple(part.name for part in gpu_check.PARTS)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="./run.sh benchmarks",
        description="Speed and memory of K-FAC steps, beside other libraries and plain SGD.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("step", "one step with factors and inverses renewed in it, against an SGD step"),
        ("memory", "peak memory of one step above the loaded model, each in its own process"),
        ("sweep", "time and memory over batch sizes, with the slope in log-log"),
        ("amortised", "a training step on average when updates are 10 or 50 steps apart"),
        ("every-step", "statistics in every step, compiled, and the longest step to the median"),
        ("profile", "phases of our own step"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        _common(command, name)
    text = "all that can only be known on a GPU: tests and figures, in parts that can be resumed"
    checked = commands.add_parser("gpu-check", help=text, description=text)
    checked.add_argument("--parts", nargs="+", metavar="PART", default=list(GPU_PARTS),
        choices=GPU_PARTS, help=f"of {', '.join(GPU_PARTS)} (default: all)")  # fmt: skip
    checked.add_argument("--quick", action="store_true", help="tiny sizes: whether all of it runs")
    checked.add_argument("--again", action="store_true", help="also what is done already")
    checked.add_argument("--seconds", type=float, default=gpu_check.SECONDS,
        help="that a part may take (default: %(default)s)")  # fmt: skip
    checked.add_argument("--device", default="cuda", help="cuda (default), or cpu to try it out")
    checked.add_argument("--folder", type=Path, default=Path("runs/gpu_check"))
    text = "which share of public architectures' parameters gets Kronecker factors"
    covered = commands.add_parser("coverage", help=text, description=text)
    covered.add_argument("names", nargs="*", metavar="NAME", help=", ".join(ARCHITECTURES))
    covered.add_argument("--markdown", action="store_true", help="print a table for the docs")
    covered.add_argument("--steps", type=int, metavar="N",
        help="instead: the loss after N steps on one batch with KFAC's defaults")  # fmt: skip
    text = "one measurement of `memory` or, with --every-step, of `every-step`, printed as JSON"
    probe = commands.add_parser("probe", help=text)
    probe.add_argument("row")
    probe.add_argument("model")
    probe.add_argument("batch_size", type=int)
    probe.add_argument("--device", default="cpu")
    probe.add_argument("--every-step", action="store_true")
    probe.add_argument("--eager", action="store_true")
    probe.add_argument("--threads", type=int, default=2)
    probe.add_argument("--size", choices=SIZES, default="full")
    return parser


def _common(command: argparse.ArgumentParser, name: str) -> None:
    models = {
        "amortised": amortised.MODELS,
        "every-step": every_step.MODELS,
        "profile": (*MODELS, "graph"),
        "sweep": ("wrn", "vit"),
    }
    allowed = models.get(name, MODELS)
    default = list(allowed[:1]) if name == "sweep" else list(allowed)
    command.add_argument("--models", nargs="+", choices=allowed, default=default)
    if name not in ("profile", "amortised", "every-step"):
        command.add_argument("--methods", nargs="+", choices=METHODS, default=_methods(name))
    if name != "every-step":
        command.add_argument("--approx", nargs="+", choices=APPROXES, default=list(APPROXES))
    else:
        command.add_argument("--eager", action="store_true", help="compile nothing")
    if name in ("step", "memory", "amortised", "every-step"):
        only = {"memory": ["mc"], "every-step": ["empirical"]}
        default_fishers = only.get(name, list(FISHERS))
        command.add_argument("--fisher", nargs="+", choices=FISHERS, default=default_fishers)
    if name == "amortised":
        text = "steps between updates (default: 10 for graph, 50 for vit)"
        command.add_argument("--intervals", nargs="+", type=int, default=None, help=text)
    default_batches = [16, 32, 64, 128, 256] if name == "sweep" else None
    command.add_argument("--batch-sizes", nargs="+", type=int, default=default_batches)
    if name != "memory":
        command.add_argument("--repeats", type=int, default=3 if name == "sweep" else 7)
    if name == "profile":
        command.add_argument("--operators", type=int, default=0, metavar="N",
                             help="also show the N most expensive operators")  # fmt: skip
    command.add_argument("--threads", type=int, default=2)
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    command.add_argument("--size", choices=SIZES, default="full",
                         help="tiny checks that everything runs")  # fmt: skip
    command.add_argument("--output", type=Path, default=Path("runs/benchmarks"))


def _methods(name: str) -> list[str]:
    return ["ours"] if name == "sweep" else list(METHODS)


def _run_step(options: Any, device: torch.device, console: Console) -> list[dict[str, Any]]:
    rows = choose_rows(options.methods, options.approx, options.fisher)
    results = []
    for model in options.models:
        for batch_size in step.batch_sizes(model, options.batch_sizes):
            result = step.measure_step(
                model, batch_size, rows, options.repeats, device, console, options.size
            )
            console.print(step.step_table(result, rows))
            results.append(result)
    save_figure(options.output, "step", step.step_figure(results))
    return results


def _run_memory(options: Any, device: torch.device, console: Console) -> list[dict[str, Any]]:
    rows = choose_rows(options.methods, options.approx, options.fisher)
    results = []
    for model in options.models:
        for batch_size in step.batch_sizes(model, options.batch_sizes)[-1:]:
            result = memory.measure_memory(model, batch_size, rows, device, options.size)
            console.print(memory.memory_table(result, rows))
            results.append(result)
    save_figure(options.output, "memory", memory.memory_figure(results))
    return results


def _run_sweep(options: Any, device: torch.device, console: Console) -> list[dict[str, Any]]:
    rows = choose_rows(options.methods, options.approx, ["mc"])
    results = []
    for model in options.models:
        result = sweep.measure_sweep(
            model, options.batch_sizes, rows, options.repeats, device, console,
            options.size,
        )  # fmt: skip
        console.print(sweep.sweep_table(result))
        results.append(result)
    save_figure(options.output, "sweep", sweep.sweep_figure(results))
    return results


def _run_amortised(options: Any, device: torch.device, console: Console) -> list[dict[str, Any]]:
    variants = [(approx, fisher) for fisher in options.fisher for approx in options.approx]
    results = []
    for model in options.models:
        for batch_size in options.batch_sizes or [amortised.BATCH_SIZES[model]]:
            for interval in options.intervals or [amortised.INTERVALS[model]]:
                result = amortised.measure_amortised(
                    model, batch_size, interval, variants, options.repeats, device, console,
                    options.size,
                )  # fmt: skip
                console.print(amortised.amortised_table(result))
                results.append(result)
    save_figure(options.output, "amortised", amortised.amortised_figure(results))
    return results


def _run_every_step(options: Any, device: torch.device, console: Console) -> list[dict[str, Any]]:
    results = []
    for model in options.models:
        for batch_size in options.batch_sizes or [every_step.BATCH_SIZES[model]]:
            result = every_step.measure_every_step(
                model, batch_size, options.fisher, options.repeats, device, console, options.size,
                compiled=not options.eager,
            )  # fmt: skip
            console.print(every_step.every_step_table(result))
            results.append(result)
    save_figure(options.output, "every-step", every_step.every_step_figure(results))
    return results


def _run_profile(options: Any, device: torch.device, console: Console) -> list[dict[str, Any]]:
    results = []
    for model in options.models:
        for batch_size in step.batch_sizes(model, options.batch_sizes)[-1:]:
            for approx in options.approx:
                arguments = model, batch_size, approx
                result = phases.measure_phases(*arguments, options.repeats, device, options.size)
                console.print(phases.phases_table(result))
                if options.operators:
                    result["operators"] = phases.operator_table(
                        *arguments, device, options.size, options.operators
                    )
                    console.print(result["operators"], markup=False, soft_wrap=True)
                results.append(result)
    save_figure(options.output, "profile", phases.phases_figure(results))
    return results


def _probed(options: Any, device: torch.device) -> Step:
    of = options.model, options.batch_size, device, options.size
    if options.every_step:
        return every_step.warm_step(options.row, *of, compiled=not options.eager)
    return make_step(Row.parse(options.row), *of)


def _run_coverage(names: Sequence[str], markdown: bool, steps: int | None) -> int:
    unknown = [name for name in names if name not in ARCHITECTURES]
    if unknown:
        known = ", ".join(ARCHITECTURES)
        print(f"error: no architecture '{unknown[0]}'; there are {known}", file=sys.stderr)
        return 2
    results = [coverage.coverage_of(name) for name in names or ARCHITECTURES]
    if steps is not None:
        installed = [one.name for one in results if not one.missing]
        ratios = {name: coverage.first_steps(name, steps) for name in installed}
        print(coverage.first_steps_markdown(ratios, steps))
    elif markdown:
        print(coverage.coverage_markdown(results))
    else:
        Console(width=160).print(coverage.coverage_table(results))
    return 0


_COMMANDS = {
    "step": _run_step,
    "memory": _run_memory,
    "sweep": _run_sweep,
    "amortised": _run_amortised,
    "every-step": _run_every_step,
    "profile": _run_profile,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.command == "coverage":
        return _run_coverage(options.names, options.markdown, options.steps)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("error: --device cuda, but torch finds no GPU: use --device cpu", file=sys.stderr)
        return 2
    console = Console()
    if not console.is_terminal:
        console = Console(width=100)
    if options.command == "gpu-check":
        return gpu_check.check(
            options.folder, device, console, names=options.parts, quick=options.quick,
            again=options.again, seconds=options.seconds,
        )  # fmt: skip
    torch.set_num_threads(options.threads)
    if options.command not in ("probe", "memory"):
        keep_freed_memory()
    if options.command == "probe":
        memory.print_probe(lambda: _probed(options, device), device)
        return 0
    results = _COMMANDS[options.command](options, device, console)
    saved = {"environment": environment(device), "results": results}
    path = save_json(options.output, options.command, saved)
    console.print(f"figures: {path} and {path.with_suffix('.png').name}", markup=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
