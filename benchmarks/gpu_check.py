"""`gpu-check`: everything that can only be known on a GPU, in parts that can be done one by one.

A part is a command that runs in a process of its own. Its output and result lie in the folder, and
a part that is done for this card, PyTorch and command is not done again; so the check goes on where
it was stopped, or where a part's time was over. `report.json` and `report.md` are written after
each part. Needs no network and no AlgoPerf; a part whose packages are missing says so.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.report import environment, save_json

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 470  # of a part: lent machines stop a command after ten minutes


@dataclass(frozen=True)
class Part:
    """One command.

    Attributes:
        name: also of its files.
        what: in words.
        command: arguments of Python; {device} and {folder} are filled in.
        quick: other arguments for --quick, in place of `command`; None where there are none.
        needs: packages.
    """

    name: str
    what: str
    command: tuple[str, ...]
    quick: tuple[str, ...] | None = None
    needs: tuple[str, ...] = ()


def _benchmark(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", "benchmarks", name, *arguments, "--device", "{device}", "--output", "{folder}")


def _experiment(name: str, *arguments: str) -> tuple[str, ...]:
    return ("-m", "experiments", name, *arguments, "--device", "{device}", "--folder", "{folder}")


_BOTH = ("--fisher", "empirical", "mc")
_TINY = ("--size", "tiny", "--batch-sizes", "4", "--repeats", "1")
_BATCHES = ("128", "256", "512", "1024", "2048")
_SMALL_NET = ("--depth", "10", "--width", "1")

PARTS: tuple[Part, ...] = (
    Part("engine", "the engine's tests on this device: training as on the CPU, exactness, sampled "
         "labels, half precision, compiled, one NCCL rank, no waiting for the device",
         ("-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kfac/test_on_device.py",
          "-k", "{device}"), needs=("pytest",)),
    Part("step_wrn", "a step with factors and inverses, Wide ResNet at batch 128, and peers",
         _benchmark("step", "--models", "wrn", "--batch-sizes", "128"),
         _benchmark("step", "--models", "wrn", *_TINY)),
    Part("step_vit", "the same, ViT-S/16 at batch 128",
         _benchmark("step", "--models", "vit", "--batch-sizes", "128"),
         _benchmark("step", "--models", "vit", *_TINY)),
    Part("step_gpt", "factors of nanoGPT at batch 32, and peers",
         _benchmark("step", "--models", "gpt", "--batch-sizes", "32"),
         _benchmark("step", "--models", "gpt", *_TINY)),
    Part("amortised_graph", "ogbg's GraphNetwork at batch 512, an update every 10 steps",
         _benchmark("amortised", "--models", "graph"),
         _benchmark("amortised", "--models", "graph", *_TINY)),
    Part("amortised_vit", "ViT-S/16 at 128 images, an update every 50 steps",
         _benchmark("amortised", "--models", "vit", "--batch-sizes", "128"),
         _benchmark("amortised", "--models", "vit", *_TINY)),
    Part("every_step", "statistics in every step, compiled, and the longest step",
         _benchmark("every-step", *_BOTH, "--models", "vit", "--batch-sizes", "128"),
         _benchmark("every-step", *_BOTH, "--models", "vit", "--eager", *_TINY)),
    Part("every_step_gpt", "the same, nanoGPT at batch 32",
         _benchmark("every-step", *_BOTH, "--models", "gpt", "--batch-sizes", "32"),
         _benchmark("every-step", *_BOTH, "--models", "gpt", "--eager", *_TINY)),
    Part("every_step_graph", "the same, ogbg's GraphNetwork at batch 512, not compiled",
         _benchmark("every-step", *_BOTH, "--models", "graph"),
         _benchmark("every-step", *_BOTH, "--models", "graph", "--eager", *_TINY)),
    Part("memory", "peak memory, Wide ResNet at batch 2,048, and peers",
         _benchmark("memory", "--models", "wrn", "--batch-sizes", "2048"),
         _benchmark("memory", "--models", "wrn", "--size", "tiny", "--batch-sizes", "4",
                    "--methods", "ours")),
    Part("table_3", "the paper's Tables 1 and 3: an update step by batch size",
         _experiment("update_step_timing", "--depth", "16", "--width", "4",
                     "--batch-sizes", *_BATCHES),
         _experiment("update_step_timing", *_SMALL_NET, "--batch-sizes", "8", "--repeats", "1")),
    Part("table_4", "the paper's Table 4: factors of GPT-2",
         _experiment("gpt_ggn_timing", "--preset", "gpt2", "--batch-size", "8", "--repeats", "1"),
         _experiment("gpt_ggn_timing", "--characters", "20000", "--repeats", "1")),
    Part("table_5", "the paper's Table 5, shortened: an update of the marginal likelihood",
         _experiment("marginal_likelihood", "--depth", "16", "--width", "4", "--epochs", "10"),
         _experiment("marginal_likelihood", *_SMALL_NET, "--epochs", "5", "--train-images", "64",
                     "--methods", "reduce", "--seeds", "0", "--repeats", "1"),
         needs=("laplace",)),
)  # fmt: skip


def check(
    folder: Path,
    device: torch.device,
    console: Console,
    *,
    names: Sequence[str],
    quick: bool,
    again: bool,
    seconds: float,
) -> int:
    """Does the parts that are not done; returns the exit code.

    Args:
        names: of the parts, in the order of PARTS.
        again: whether parts that are done are done again.
        seconds: that each part may take.
    """
    folder.mkdir(parents=True, exist_ok=True)
    here = environment(device)
    failed = []
    for part in PARTS:
        if part.name not in names:
            continue
        arguments = _arguments(part, folder, device, quick)
        record = None if again else _read(folder, part, here, arguments)
        if record is None or record["status"] != "done":
            console.print(f"{part.name}: {part.what}", markup=False)
            record = _do(part, folder, arguments, here, seconds)
            save_json(folder / "parts", part.name, record)
            took = f"{record['seconds']:.0f} s"
            console.print(f"{part.name}: {record['status']} in {took}", markup=False)
        if record["status"] != "done":
            failed.append(part.name)
        _write_report(folder, here)
    console.print(f"report: {folder / 'report.md'}", markup=False)
    if failed:
        console.print(f"not done: {', '.join(failed)}; the same command goes on", markup=False)
    return 1 if failed else 0


def _arguments(part: Part, folder: Path, device: torch.device, quick: bool) -> list[str]:
    """The part's command line, after Python's name."""
    chosen = part.quick if quick and part.quick is not None else part.command
    filled = {"{device}": device.type, "{folder}": str(folder / part.name)}
    return [filled.get(argument, argument) for argument in chosen]


def _read(
    folder: Path, part: Part, here: dict[str, Any], arguments: list[str]
) -> dict[str, Any] | None:
    """What was found before, on this card, with this PyTorch and this command."""
    try:
        record: dict[str, Any] = json.loads((folder / "parts" / f"{part.name}.json").read_text())
    except (OSError, ValueError):
        return None
    same = record.get("arguments") == arguments and all(
        record.get(key) == here[key] for key in ("device_name", "torch")
    )
    return record if same else None


def _do(
    part: Part, folder: Path, arguments: list[str], here: dict[str, Any], seconds: float
) -> dict[str, Any]:
    record = {"arguments": arguments, "device_name": here["device_name"], "torch": here["torch"]}
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing:
        return {**record, "status": f"not run: {', '.join(missing)} is missing", "seconds": 0.0,
                "output": ""}  # fmt: skip
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "110"}
    start = time.monotonic()
    log = folder / "parts" / f"{part.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w", encoding="utf-8") as file:
        try:
            done = subprocess.run(
                [sys.executable, *arguments], cwd=ROOT, env=variables, stdout=file,
                stderr=subprocess.STDOUT, timeout=seconds, check=False,
            )  # fmt: skip
            status = "done" if done.returncode == 0 else f"failed (exit {done.returncode})"
        except subprocess.TimeoutExpired:
            status = f"stopped after {seconds:.0f} s"
    took = time.monotonic() - start
    output = log.read_text(encoding="utf-8", errors="replace")
    return {**record, "status": status, "seconds": took, "output": output[-20000:]}


def _write_report(folder: Path, here: dict[str, Any]) -> None:
    """report.json and report.md, of all parts that there are."""
    records = {}
    for part in PARTS:
        try:
            records[part.name] = json.loads((folder / "parts" / f"{part.name}.json").read_text())
        except (OSError, ValueError):
            continue
    parts = {part.name: asdict(part) for part in PARTS}
    save_json(folder, "report", {"environment": here, "parts": records})
    lines = [
        f"# GPU check: {here['device_name']}",
        "",
        f"torch {here['torch']}, Python {here['python']}, {here['time']}. "
        "`./run.sh gpu-check` writes this page.",
        "",
        "| part | what | result | s |",
        "|---|---|---|---:|",
        *(
            f"| {name} | {parts[name]['what']} | {record['status']} | {record['seconds']:.0f} |"
            for name, record in records.items()
        ),
    ]
    for name, record in records.items():
        lines += ["", f"## {name}", "", f"`python {' '.join(record['arguments'])}`", ""]
        lines += [f"![{name}]({file.relative_to(folder)})\n"
                  for file in sorted((folder / name).rglob("*.png"))]  # fmt: skip
        lines += ["```", record["output"].strip() or record["status"], "```"]
    partial = folder / "report.md.partial"
    partial.write_text("\n".join(lines) + "\n", encoding="utf-8")
    os.replace(partial, folder / "report.md")
