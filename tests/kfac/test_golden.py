"""Training gives the numbers stored in golden.pt, and a state of the first format loads."""

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


def test_a_state_of_the_first_format_is_loaded():
    """That of the first case after three steps: the run goes on as if it had not been stopped."""
    case = CASES["perceptron"]
    model, generator = case.model(), Generator().manual_seed(2)
    kfac = Preconditioner(model, configuration(case))
    for _ in range(3):
        train_step(case, model, kfac, [case.batch(generator)])
    loaded = Preconditioner(model, configuration(case))
    loaded.load_state_dict(torch.load(STATE_FILE, weights_only=True))
    assert loaded.step == kfac.step == 3
    batch, start = [case.batch(generator)], [p.detach().clone() for p in model.parameters()]
    expected = train_step(case, model, kfac, batch)
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), start, strict=True):
            parameter.copy_(value)
    for name, gradient in train_step(case, model, loaded, batch).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-12)
