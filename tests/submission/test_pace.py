"""A schedule that ends within the allowed run time."""

import copy
import logging
from dataclasses import replace

import pytest
import torch
import torch.multiprocessing as mp
from processes import joined
from workload import GraphNet, GraphWorkload, graph_batch

from submission import pace, submission
from submission.hyperparameters import SELF_TUNED, HyperparameterError, Hyperparameters
from submission.kfac import KFAC
from submission.pace import FIRST, LAST, Pace, steps_that_fit
from submission.run import Run

CPU = torch.device("cpu")


class Slow(GraphWorkload):
    """Allows 1,000 s."""

    max_allowed_runtime_sec = 1000
    step_hint = 10_000


def settings(**changes):
    return Hyperparameters.from_tuning_point({**SELF_TUNED, **changes})


def told(run, seconds_per_step, begin=0, until=LAST, compiling=0.0):
    """Tells a run the time before each of some steps; the very first one compiles."""
    for step in range(begin, until):
        late = compiling if step else 0.0
        run.note_time(step, {"accumulated_submission_time": late + step * seconds_per_step})


def test_steps_that_fit():
    assert steps_that_fit(allowed=100.0, used=10.0, step=20, seconds_per_step=0.5) == 200
    assert steps_that_fit(allowed=100.0, used=130.0, step=20, seconds_per_step=0.5) == 20


def test_a_schedule_that_would_not_end_in_time_is_cut_once_and_for_all(caplog):
    run = Run(settings(), Slow(), GraphNet())
    assert (run.shape.total, run.shape.warmup) == (7500, 375)
    with caplog.at_level(logging.INFO, "submission.run"):
        told(run, 0.5, until=LAST - 1)
        assert run.shape.total == 7500
        told(run, 0.5, begin=LAST - 1)
    assert (run.shape.total, run.shape.warmup) == (1900, 95)
    assert "1900 steps fit into 950 s: the schedule has 1900 steps (it had 7500)" in caplog.text
    told(run, 50.0, begin=LAST, until=2 * LAST)
    assert run.shape.total == 1900


@pytest.mark.parametrize("compiling", [0.0, 40.0])
def test_what_compiling_took_counts_as_time_but_not_as_speed(compiling):
    run = Run(settings(), Slow(), GraphNet())
    told(run, 0.25, compiling=compiling)
    assert run.shape.total == pytest.approx((950 - compiling) / 0.25, abs=1)
    assert run.shape.warmup == pytest.approx(0.05 * run.shape.total, abs=1)


def test_a_schedule_that_ends_in_time_keeps_its_length():
    run = Run(settings(), Slow(), GraphNet())
    told(run, 0.01)
    assert (run.shape.total, run.shape.warmup) == (7500, 375)


def test_a_run_slower_than_all_it_is_allowed_still_has_a_schedule():
    run = Run(settings(), Slow(), GraphNet())
    told(run, 30.0)
    assert run.shape.total == LAST - 1
    assert run.shape.warmup < run.shape.total


def test_an_absolute_warm_up_stays():
    run = Run(settings(warmup_steps=100), Slow(), GraphNet())
    told(run, 0.5)
    assert run.shape.total == pytest.approx(1900, abs=1)
    assert run.shape.warmup == 100


def test_without_a_share_of_the_run_time_the_schedule_is_in_steps_alone():
    run = Run(settings(runtime_share=None), GraphWorkload(), GraphNet())
    told(run, 1e6)
    assert run.shape.total == int(0.75 * GraphWorkload.step_hint)


@pytest.mark.parametrize("share", [0.0, 1.5, "most", True])
def test_a_share_is_checked(share):
    with pytest.raises(HyperparameterError, match=r"runtime_share.*must be"):
        settings(runtime_share=share)


def test_a_resumed_run_keeps_the_length_or_measures_from_its_own_beginning():
    first = Run(settings(), Slow(), GraphNet())
    told(first, 0.5)
    again = Run(settings(), Slow(), GraphNet())
    again.load_state_dict(copy.deepcopy(first.state_dict()))
    assert again.shape == first.shape
    told(again, 5.0, begin=LAST, until=3 * LAST)
    assert again.shape == first.shape

    halfway = Run(settings(), Slow(), GraphNet())
    told(halfway, 0.5, until=FIRST + 50)
    resumed = Run(settings(), Slow(), GraphNet())
    resumed.load_state_dict(halfway.state_dict())
    told(resumed, 0.5, begin=FIRST + 50, until=FIRST + 49 + LAST)
    assert resumed.shape.total == 7500
    told(resumed, 0.5, begin=FIRST + 49 + LAST, until=FIRST + 50 + LAST)
    assert resumed.shape.total == pytest.approx(1900, abs=1)


def train(hyperparameters, workload, steps, seconds_per_step):
    torch.manual_seed(0)
    model = GraphNet()
    state = submission.init_optimizer_state(workload, model, None, hyperparameters, [0, 0])
    rates = []
    for t in range(steps):
        state, model, _ = submission.update_params(
            workload, model, None, None, hyperparameters,
            graph_batch([3, 1, 4, 2, 5], [4, 0, 6, 2, 7], seed=t), workload.loss_type, state, [],
            t, [t, 1], {"accumulated_submission_time": t * seconds_per_step},
        )  # fmt: skip
        rates.append(state["optimizer"].param_groups[0]["lr"])
    return state, model, rates


def test_the_self_tuning_ruleset_has_a_point_and_half_as_much_time_again(monkeypatch):
    monkeypatch.setattr(pace, "FIRST", 10)
    monkeypatch.setattr(pace, "LAST", 30)
    state, model, rates = train(None, Slow(), 40, 0.5)
    assert state["run"].settings == Hyperparameters.self_tuned()
    total = state["run"].shape.total
    assert total == pytest.approx(0.95 * 1500 / 0.5, abs=1)
    expected = [SELF_TUNED["learning_rate"] * t / int(0.05 * total) for t in range(30, 40)]
    assert rates[30:] == pytest.approx(expected)
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_self_tuning_point_is_the_engines_defaults():
    """But for when inverses are renewed: as it was studied."""
    config = Hyperparameters.self_tuned().kfac_config(seed=0)
    engine = KFAC(torch.nn.Linear(2, 2)).preconditioner.config
    assert engine.renewal == "in_turns"
    assert config == replace(engine, renewal="together")


def worker(rank, folder):
    with joined(rank, 2, folder):
        mine = Pace(1000.0)
        for step in range(LAST):
            mine.note(step, step * (0.5 + rank), CPU)
        assert mine.fits == pytest.approx(1000 / 1.5, abs=1)


def test_ranks_of_unequal_speed_agree_on_the_slowest(tmp_path):
    mp.spawn(worker, (str(tmp_path),), nprocs=2)
