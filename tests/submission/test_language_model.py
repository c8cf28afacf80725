"""The submission trains a double of AlgoPerf's language model, by its structure alone."""

import math

import pytest
import torch

from submission import submission
from submission.hyperparameters import SELF_TUNED
from workloads_overrides.language_model import LanguageModel, LanguageWorkload, Shape, token_batch

# Short enough for a test: no warm-up.
POINT = {**SELF_TUNED, "warmup_fraction": 0.0, "training_steps": 10_000}


def train(shape, point, steps, weighted=True):
    torch.manual_seed(0)
    workload, model = LanguageWorkload(), LanguageModel(shape)
    state = submission.init_optimizer_state(workload, model, None, point, [0, 0])
    losses = []
    for t in range(steps):
        batch = token_batch(shape, t, weighted)
        with torch.no_grad():
            result = workload.loss_fn(batch["targets"], model(batch["inputs"]), batch["weights"])
        losses.append(float(result["summed"] / result["n_valid_examples"]))
        state, model, _ = submission.update_params(
            workload, model, None, None, point, batch, workload.loss_type, state, [], t, [t, 1],
        )  # fmt: skip
    return state, model, losses


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_it_trains(tied, fused, weighted):
    state, _, losses = train(Shape(tied=tied, fused=fused), POINT, 40, weighted)
    assert losses[0] == pytest.approx(math.log(50), rel=0.05)
    assert losses[-1] < 0.6 * losses[0]
    rows = state["kfac"].report()
    covered = sum(row.parameters for row in rows if row.preconditioner.startswith("K-FAC"))
    assert covered > 0.97 * sum(row.parameters for row in rows)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_weights_of_tokens_count_in_the_curvature(approx):
    """Tokens of weight zero are as if they were not there: other labels change nothing."""
    shape = Shape(tied=False)
    found = []
    for label in (3, 4):
        torch.manual_seed(0)
        workload, model = LanguageWorkload(), LanguageModel(shape)
        point = {**POINT, "kfac_approx": approx}
        state = submission.init_optimizer_state(workload, model, None, point, [0, 0])
        batch = token_batch(shape, 0, weighted=True)
        batch["targets"] = torch.where(batch["weights"] > 0, batch["targets"], label)
        submission.update_params(
            workload, model, None, None, point, batch, workload.loss_type, state, [], 0, [0, 1]
        )
        found.append(state["kfac"].curvature())
    for name, one in found[0].items():
        torch.testing.assert_close(one.gradient_covariance, found[1][name].gradient_covariance)


@pytest.mark.parametrize("tied", [True, False])
def test_a_vocabulary_of_fifty_thousand_keeps_small_factors(tied):
    """What has a side of the vocabulary keeps a diagonal; no side beyond the limit is built."""
    shape = Shape(vocabulary=50_257, tied=tied)
    state, model, losses = train(shape, POINT, 3)
    assert all(math.isfinite(loss) for loss in losses)
    memory = sum(row.memory for row in state["kfac"].report())
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    assert memory < 3 * parameters


def test_its_batch_size_is_known():
    assert submission.get_batch_size("finewebedu_lm") == 64
