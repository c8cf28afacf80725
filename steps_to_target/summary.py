"""Per method, workload and target: statistics, ratios to a reference, warnings about unlike runs.

Runs on one workload with different targets are in different tables: steps to one target are never
divided by steps to another.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches

from steps_to_target.differences import Caution, comparison_warnings, grouped
from steps_to_target.errors import CompareError
from steps_to_target.leaderboard import Entry, leaderboard_rows
from steps_to_target.model import Run, Status
from steps_to_target.paper import PaperRow, paper_reference, paper_row, paper_rows
from steps_to_target.statistics import Ratio, Stat, describe, median_with_misses, ratio_of_means
from steps_to_target.targets import Target, builtin_target

_SEED_NAMES = {"seed", "rng_seed", "random_seed"}
_MISS = math.inf


@dataclass(frozen=True)
class Group:
    """One method on one workload, to one target.

    Attributes:
        table: name of the table that it stands in: the workload, with its target where the
            workload's runs have several.
        target: what all of its runs had to reach (None: not known).
        repetitions: what mean and standard error are over, in words.
        steps, seconds: statistics of steps and submission seconds to the validation target.
        ratio_steps, ratio_seconds: to the reference (None: the reference itself, or not to be had).
        algoperf_steps, algoperf_seconds: as AlgoPerf scores: fastest trial of each study, median
            over studies, infinity where no trial of the median study reached.
        published: a row of the paper or of a leaderboard; then ``runs`` is empty.
        statuses: how many runs ended how.
    """

    workload: str
    table: str
    target: Target | None
    method: str
    runs: tuple[Run, ...]
    repetitions: str
    steps: Stat
    seconds: Stat
    step_values: tuple[float, ...] = ()
    second_values: tuple[float, ...] = ()
    ratio_steps: Ratio | None = None
    ratio_seconds: Ratio | None = None
    algoperf_steps: float = math.nan
    algoperf_seconds: float = math.nan
    is_reference: bool = False
    published: bool = False
    statuses: dict[str, int] = field(default_factory=dict)

    @property
    def reached(self) -> int:
        """Runs that reached the validation target."""
        return sum(run.reached for run in self.runs)


@dataclass(frozen=True)
class Summary:
    """All groups, sorted by table with the reference first and published rows last.

    ``warnings`` has one line for each kind; ``cautions`` every single one.
    """

    reference: str | None
    groups: tuple[Group, ...]
    warnings: tuple[str, ...]
    cautions: tuple[str, ...] = ()
    paper_notes: tuple[str, ...] = ()

    @property
    def workloads(self) -> list[str]:
        """Names of the workloads, in order."""
        return list(dict.fromkeys(group.workload for group in self.groups))

    @property
    def tables(self) -> list[str]:
        """Names of the tables, in order: one for each workload and target."""
        return list(dict.fromkeys(group.table for group in self.groups))

    def of(self, name: str) -> list[Group]:
        """Groups of one table, or of all tables of a workload."""
        return [group for group in self.groups if name in (group.table, group.workload)]


def _settings(run: Run) -> str:
    kept = {key: value for key, value in run.hparams.items() if key not in _SEED_NAMES}
    return json.dumps(kept, sort_keys=True, default=str)


def step_to_target(run: Run) -> float:
    """Steps at the crossing; infinity for a run that did not reach or counts other steps."""
    return run.crossing.step if run.crossing and run.steps_comparable else _MISS


def seconds_to_target(run: Run) -> float:
    """Seconds at the crossing; infinity for a run that did not reach or logged no time."""
    if run.crossing is None or math.isnan(run.crossing.seconds):
        return _MISS
    return run.crossing.seconds


def by_study(runs: Iterable[Run]) -> dict[str, list[Run]]:
    """Runs of one method and workload by study."""
    studies: dict[str, list[Run]] = defaultdict(list)
    for run in runs:
        studies[run.study].append(run)
    return dict(studies)


def is_tuned(runs: Sequence[Run]) -> bool:
    """Whether some study tried several hyperparameter settings, so that only its best counts."""
    return any(len({_settings(run) for run in trials}) > 1 for trials in by_study(runs).values())


def repetitions(runs: Sequence[Run]) -> list[list[Run]]:
    """Runs bundled into repetitions: studies if trials were tuned within them, else single runs."""
    return list(by_study(runs).values()) if is_tuned(runs) else [[run] for run in runs]


def representative(bundle: Sequence[Run]) -> Run:
    """The run that stands for a repetition: the fastest to the target, else the longest."""
    return min(
        bundle,
        key=lambda run: (seconds_to_target(run), step_to_target(run), -len(run.steps)),
    )


def _group(table: str, method: str, runs: Sequence[Run]) -> Group:
    bundles = repetitions(runs)
    steps = [min(map(step_to_target, bundle)) for bundle in bundles]
    seconds = [min(map(seconds_to_target, bundle)) for bundle in bundles]
    studies = by_study(runs)
    if is_tuned(runs):
        sizes = sorted({len(trials) for trials in studies.values()})
        trials = "-".join(str(size) for size in dict.fromkeys((sizes[0], sizes[-1])))
        noun = "study" if len(studies) == 1 else "studies"
        words = f"{len(studies)} {noun}, fastest of {trials} trials"
    else:
        words = f"{len(runs)} {'run' if len(runs) == 1 else 'runs'}"
    statuses = {str(s): sum(run.status is s for run in runs) for s in Status}
    return Group(
        workload=runs[0].workload,
        table=table,
        target=runs[0].target,
        method=method,
        runs=tuple(runs),
        repetitions=words,
        steps=describe(steps),
        seconds=describe(seconds),
        step_values=tuple(steps),
        second_values=tuple(seconds),
        algoperf_steps=median_with_misses(
            [min(map(step_to_target, trials)) for trials in studies.values()]
        ),
        algoperf_seconds=median_with_misses(
            [min(map(seconds_to_target, trials)) for trials in studies.values()]
        ),
        statuses={name: count for name, count in statuses.items() if count},
    )


def _published(beside: Group, row: PaperRow | Entry) -> Group:
    """A row as published, in the table of a group."""
    if isinstance(row, Entry):
        steps, seconds = (Stat(1, mean, math.nan, math.nan, 1) for mean in (row.steps, row.seconds))
        base, hours = None, math.nan
    else:
        steps = Stat(1, row.steps, row.steps_stderr, math.nan, 1)
        seconds = Stat(1, row.hours * 3600, row.hours_stderr * 3600, math.nan, 1)
        base, hours = paper_reference(beside.workload, row), row.hours
    other = None if base is row else base  # a reference has no ratio to itself
    return Group(
        workload=beside.workload,
        table=beside.table,
        target=beside.target,
        method=row.label,
        runs=(),
        repetitions="as published",
        steps=steps,
        seconds=seconds,
        ratio_steps=Ratio(row.steps / other.steps, None, None) if other else None,
        ratio_seconds=Ratio(hours / other.hours, None, None) if other else None,
        is_reference=base is row,
        published=True,
    )


def _with_ratios(group: Group, reference: Group | None) -> Group:
    if reference is None:
        return group
    if group.method == reference.method:
        return replace(group, is_reference=True)
    return replace(
        group,
        ratio_steps=ratio_of_means(group.step_values, reference.step_values),
        ratio_seconds=ratio_of_means(group.second_values, reference.second_values),
    )


def _paper_note(group: Group) -> str:
    """Whether the paper's ratio lies within this method's interval."""
    row = paper_row(group.workload, group.method)
    if row is None or group.ratio_steps is None:
        return ""
    base, ratio = paper_reference(group.workload, row), group.ratio_steps
    expected = row.steps / base.steps
    text = (
        f"{group.workload}: {group.method} takes {ratio.value:.3f} of the reference's steps, "
        f"the paper's K-FAC-{row.kind} {expected:.3f}"
    )
    if ratio.low is None or ratio.high is None:
        return f"{text} (no interval: fewer than two repetitions on a side)"
    inside = ratio.low <= expected <= ratio.high
    side = "inside" if inside else ("below" if ratio.low > expected else "above")
    return f"{text}, {side} the 95 % interval [{ratio.low:.3f}, {ratio.high:.3f}]"


def by_table(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """Runs by workload and target; the name has the target where a workload has several."""
    found: dict[tuple[str, str], list[Run]] = defaultdict(list)
    for run in runs:
        found[run.workload, run.target.text if run.target else "no target known"].append(run)
    names = [workload for workload, _ in found]
    return {
        workload if names.count(workload) == 1 else f"{workload} ({target})": found[
            workload, target
        ]
        for workload, target in sorted(found)
    }


def summarize(
    runs: Sequence[Run],
    reference: str | None = None,
    *,
    paper: bool = True,
    leaderboard: bool = False,
    notes: Sequence[str] = (),
) -> Summary:
    """Compare methods.

    Args:
        runs: from ``load_runs``.
        reference: name of the method that ratios are taken to; None for no ratios.
        paper: add the paper's rows on the workloads that the paper has.
        leaderboard: add published entries of AlgoPerf's leaderboards.
        notes: further warnings, e.g. what ``load`` passed over.

    Returns:
        Groups and warnings.

    Raises:
        CompareError: no run has that method's name; the message lists the names there are.
    """
    methods = sorted({run.method for run in runs})
    if reference is not None and reference not in methods:
        close = get_close_matches(reference, methods, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise CompareError(
            f"no method is called {reference!r}{hint}; these runs have: {', '.join(methods)}"
        )
    cautions: list[Caution] = []
    paper_notes: list[str] = []
    groups: list[Group] = []
    for table, members in by_table(runs).items():
        own = [
            _group(table, method, [run for run in members if run.method == method])
            for method in sorted({run.method for run in members})
        ]
        base = next((group for group in own if group.method == reference), None)
        if reference is not None and base is None:
            cautions.append(Caution(f"no run of the reference {reference!r}, so no ratios", table))
        elif base is not None and not base.reached:
            cautions.append(
                Caution(
                    f"the reference {reference!r} never reached the target, so no ratios", table
                )
            )
        own = [_with_ratios(group, base) for group in own]
        own.sort(key=lambda group: (not group.is_reference, group.method))
        cautions += comparison_warnings(table, {group.method: group.runs for group in own})
        cautions += _censored(own)
        groups += own
        workload = own[0].workload
        papers = paper_rows(workload, [group.method for group in own]) if paper else []
        rows = [*papers, *(leaderboard_rows(workload) if leaderboard else ())]
        if rows and _is_algoperfs(own[0]):
            groups += [_published(own[0], row) for row in rows]
            paper_notes += [note for note in map(_paper_note, own) if note and papers]
        elif rows and own[0].target is not None:
            cautions.append(Caution("published rows are for another target", table))
    cautions += _several_targets(groups)
    return Summary(
        reference,
        tuple(groups),
        (*notes, *grouped(cautions)),
        tuple(map(str, cautions)),
        tuple(paper_notes),
    )


def _is_algoperfs(group: Group) -> bool:
    """Whether a group's target is AlgoPerf's own, which the paper's and the entries' runs have."""
    own = builtin_target(group.workload)
    return (
        own is not None
        and group.target is not None
        and group.target.metric == own.metric
        and math.isclose(group.target.validation, own.validation)
    )


def _several_targets(groups: Iterable[Group]) -> list[Caution]:
    """Say where a workload's runs are in several tables."""
    tables: dict[str, list[str]] = defaultdict(list)
    for group in groups:
        if group.table not in tables[group.workload]:
            tables[group.workload].append(group.table)
    kind = "targets differ, so there is a table for each"
    return [
        Caution(kind, workload, "; ".join(names))
        for workload, names in tables.items()
        if len(names) > 1
    ]


def _censored(groups: Iterable[Group]) -> list[Caution]:
    """Say where a mean leaves out repetitions that missed."""
    return [
        Caution(
            "means are over the repetitions that reached the target; misses are not in them",
            f"{group.table}: {group.method}",
            f"{group.seconds.n} of {group.seconds.total}",
        )
        for group in groups
        if 0 < group.seconds.n < group.seconds.total
    ]
