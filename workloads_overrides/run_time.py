"""What AlgoPerf allows a run, by hardware and ruleset, and how the submission's schedule fits it.

    python -m workloads_overrides.run_time [--step-times FILE]

prints for every workload the steps that fit, the length of the self-tuning point's schedule
(`submission.pace` decides it from the first steps' speed) and the share of the allowed time that it
takes. Step times are those that AlgoPerf's developers published for PyTorch on 4 A100; FILE is a
table of others: CSV with a column `submission` and one for each workload, seconds per step.
"""

from __future__ import annotations

import argparse
import csv
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from submission.hyperparameters import Hyperparameters
from submission.pace import LAST, Pace
from submission.submission import SELF_TUNING_TIME_FACTOR
from workloads_overrides.errors import LaunchError

RULESETS: Mapping[str, float] = {"external": 1.0, "self": SELF_TUNING_TIME_FACTOR}


@dataclass(frozen=True)
class Allowance:
    """What AlgoPerf allows a run of a workload under the external ruleset.

    Attributes:
        step_hint: in steps.
        seconds: of training time.
    """

    step_hint: int
    seconds: int

    def under(self, ruleset: str) -> float:
        """Seconds of training time under a ruleset."""
        return RULESETS[ruleset] * self.seconds


# AlgoPerf's repository at commit 2c90454f (September 2025).
V100 = {
    "criteo1tb": Allowance(10_666, 7_703),
    "fastmri": Allowance(18_094, 4_430),
    "imagenet_resnet": Allowance(195_999, 66_159),
    "imagenet_vit": Allowance(167_999, 69_768),
    "librispeech_conformer": Allowance(76_000, 58_015),
    "librispeech_deepspeech": Allowance(38_400, 44_405),
    "ogbg": Allowance(52_000, 12_011),
    "wmt": Allowance(120_000, 43_336),
}
# Meta data of runs that were published in 2026; for other workloads there is none at hand.
A100 = {
    "finewebedu_lm": Allowance(72_000, 31_967),
    "imagenet_vit": Allowance(167_999, 64_292),
    "ogbg": Allowance(52_000, 11_303),
}
ALLOWANCES: Mapping[str, Mapping[str, Allowance]] = {"8 V100": V100, "4 A100": A100}

# Seconds per PyTorch step on 4 A100 with an optimizer like NAdamW (AlgoPerf's developers, 2026).
A100_STEP_SECONDS = {
    "criteo1tb": 0.942, "fastmri": 0.376, "finewebedu_lm": 0.409, "imagenet_resnet": 0.300,
    "imagenet_vit": 0.321, "librispeech_conformer": 0.418, "librispeech_deepspeech": 0.557,
    "ogbg": 0.238, "wmt": 0.155,
}  # fmt: skip


@dataclass(frozen=True)
class Fit:
    """How a schedule fits.

    Attributes:
        fits: steps of training in the allowed time.
        length: of the schedule, in steps.
        share: of the allowed time that the schedule takes.
    """

    fits: int
    length: int
    share: float


def fit(allowance: Allowance, seconds_per_step: float, ruleset: str) -> Fit:
    """What the self-tuning point's schedule is cut to, at a constant speed."""
    settings, allowed = Hyperparameters.self_tuned(), allowance.under(ruleset)
    assert settings.runtime_share is not None
    pace = Pace(settings.runtime_share * allowed)
    for step in range(LAST):
        pace.note(step, step * seconds_per_step, torch.device("cpu"))
    shape = settings.schedule_shape(allowance.step_hint, pace.fits)
    share = shape.total * seconds_per_step / allowed
    return Fit(int(allowed / seconds_per_step), shape.total, share)


def allowance_of(workload: str) -> tuple[str, Allowance]:
    """The newest hardware that an allowance is known for, and the allowance."""
    for hardware in reversed(tuple(ALLOWANCES)):
        if workload in ALLOWANCES[hardware]:
            return hardware, ALLOWANCES[hardware][workload]
    raise LaunchError(f"no run time is known for workload {workload!r}")


def read_step_times(path: Path) -> dict[str, dict[str, float]]:
    """Submission -> workload -> seconds per step.

    Raises:
        LaunchError: the file is not such a table.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        found = {
            row.pop("submission"): {name: float(value) for name, value in row.items() if value}
            for row in rows
        }
    except (OSError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise LaunchError(
            f"{path} is no table of step times: CSV with a column 'submission' and one for each "
            f"workload, seconds per step ({error})"
        ) from error
    wrong = [s for times in found.values() for s in times.values() if not 0 < s < math.inf]
    if wrong:
        raise LaunchError(f"{path} has {wrong[0]} seconds per step; they must be above 0")
    return found


def table(step_times: Mapping[str, Mapping[str, float]], ruleset: str) -> Table:
    """One line a submission and workload."""
    found = Table(title=f"schedules under the {ruleset}-tuning ruleset")
    for name in ("speed of", "workload", "limit of", "s / step", "steps that fit", "schedule",
                 "share of time"):  # fmt: skip
        found.add_column(name, justify="left" if name in ("speed of", "workload") else "right")
    for submission, times in step_times.items():
        for workload, seconds in times.items():
            hardware, allowance = allowance_of(workload)
            one = fit(allowance, seconds, ruleset)
            found.add_row(
                submission, workload, hardware, f"{seconds:.3f}", f"{one.fits:,}",
                f"{one.length:,}", f"{one.share:.0%}",
            )  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table."""
    parser = argparse.ArgumentParser(
        prog="python -m workloads_overrides.run_time",
        description=(__doc__ or "").partition("\n")[0],
    )
    parser.add_argument("--step-times", type=Path, help="CSV of other step times")
    parser.add_argument("--ruleset", choices=tuple(RULESETS), default="self")
    options = parser.parse_args(argv)
    try:
        times: Mapping[str, Mapping[str, float]] = {"published": A100_STEP_SECONDS}
        if options.step_times is not None:
            times = read_step_times(options.step_times)
        found = table(times, options.ruleset)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    Console(width=None if sys.stdout.isatty() else 120).print(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
