"""Training gives the numbers stored in golden.pt; an older state is refused."""

import pytest
import torch
from golden import (
    CASES,
    FILE,
    STATE_FILE,
    Preconditioner,
    configuration,
    differences,
    run,
    train_step,
)
from observed import assert_same_tensors, curvature_tensors
from torch import Generator

STORED = torch.load(FILE, weights_only=True)


def test_every_case_is_stored():
    assert set(STORED) == set(CASES)


@pytest.mark.parametrize("name", list(CASES))
def test_training_gives_the_stored_numbers(name):
    compared = differences(run(CASES[name]), STORED[name])
    assert len(compared) == 2 * len(STORED[name]["names"])
    wrong = {what: ratio for what, ratio in compared.items() if not ratio <= 1}  # NaN is wrong
    assert not wrong


def test_a_state_of_an_older_version_is_refused():
    case = CASES["perceptron"]
    model, generator = case.model(), Generator().manual_seed(2)
    kfac = Preconditioner(model, configuration(case))
    train_step(case, model, kfac, [case.batch(generator)])
    before = curvature_tensors(kfac)
    with pytest.raises(ValueError, match=r"version 4.*reads 5"):
        kfac.load_state_dict(torch.load(STATE_FILE, weights_only=True))
    assert kfac.step == 1
    assert_same_tensors(curvature_tensors(kfac), before)
