"""Sampled labels have the probabilities of the rows that they are drawn from."""

import pytest
import torch

from submission.kfac.fisher.sampling import sampled_indices

DRAWS = 20_000


def draw(weights):
    """How often each class comes out of many rows with these weights."""
    generator = torch.Generator().manual_seed(1)
    found = sampled_indices(weights.expand(DRAWS, -1), generator)
    assert found.shape == (DRAWS,)
    return torch.bincount(found, minlength=len(weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [1, 2, 3, 7, 10, 16, 17, 100, 1000])
def test_frequencies_are_the_probabilities(classes, dtype):
    weights = torch.rand(classes, dtype=dtype) ** 3
    weights[classes // 2 :: 5] *= 0.01
    counts = draw(weights)
    assert len(counts) == classes
    expected = DRAWS * (weights / weights.sum()).double()
    deviations = (counts - expected) / (expected * (1 - expected / DRAWS)).sqrt().clamp(min=1)
    assert deviations.abs().max() < 5
    chi_square = ((counts - expected).square() / expected).sum()
    assert abs(chi_square - (classes - 1)) < 6 * (2 * classes) ** 0.5 + 1e-9


def test_classes_without_weight_do_not_come_out():
    weights = torch.rand(50)
    weights[[0, 7, 8, 9, 10, 11, 12, 13, 14, 15, 30, 49]] = 0
    assert not draw(weights)[weights == 0].any()
    alone = torch.zeros(1, 33)
    for only in range(33):
        alone.zero_()[0, only] = 1e-30
        assert int(sampled_indices(alone, None)) == only


def test_rows_are_drawn_each_from_its_own_weights():
    weights = torch.eye(40)[torch.randperm(40)]
    assert torch.equal(sampled_indices(weights, None), weights.argmax(1))


def test_sums_of_many_classes_are_as_exact_as_float64(monkeypatch):
    # In float32 the distribution function stops to grow behind the first class.
    weights = torch.full((400_000,), 1e-8, dtype=torch.float32)
    weights[0] = 1.0
    uniform = torch.linspace(0.9961, 0.9999, 20, dtype=torch.float64)[:, None]
    monkeypatch.setattr(torch, "rand", lambda *args, **options: uniform)
    found = sampled_indices(weights.expand(20, -1), None)
    small = float(weights[1])
    expected = (uniform[:, 0] * (1 + 399_999 * small) - 1) / small + 1
    torch.testing.assert_close(found.double(), expected.floor(), rtol=0, atol=1)
