from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from quickstart.workloads import ImagesWorkload, MoleculesWorkload
from submission.algoperf_compat import spec

TRAIN, EVAL = spec.ForwardPassMode.TRAIN, spec.ForwardPassMode.EVAL


@pytest.fixture
def molecules(data_dir: Path) -> MoleculesWorkload:
    return MoleculesWorkload(data_dir, width=16)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_masked_loss(molecules: MoleculesWorkload, smoothing: float) -> None:
    logits = torch.randn(5, 3, requires_grad=True)
    labels = torch.randint(0, 2, (5, 3)).float()
    mask = torch.rand(5, 3) < 0.5
    mask[0, 0] = True
    labels[~mask] = float("nan")
    loss = molecules.loss_fn(labels, logits, mask, smoothing)
    targets = (1 - smoothing) * labels[mask] + smoothing / 3
    p = logits[mask].sigmoid()
    expected = -(targets * p.log() + (1 - targets) * (1 - p).log())
    torch.testing.assert_close(loss["per_example"][mask], expected)
    assert not loss["per_example"][~mask].any()
    torch.testing.assert_close(loss["summed"], expected.sum())
    assert loss["n_valid_examples"] == mask.sum()
    loss["summed"].backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()
    assert not logits.grad[~mask].any()


def test_loss_without_mask_counts_examples(molecules: MoleculesWorkload) -> None:
    loss = molecules.loss_fn(torch.ones(5, 3), torch.zeros(5, 3))
    assert loss["n_valid_examples"] == 5
    torch.testing.assert_close(loss["summed"], torch.tensor(15 * np.log(2), dtype=torch.float32))
    with pytest.raises(ValueError, match=r"labels \(5, 3\), logits \(5, 2\)"):
        molecules.loss_fn(torch.ones(5, 3), torch.zeros(5, 2))


def test_model_fn_modes(molecules: MoleculesWorkload) -> None:
    model, state = molecules.init_model_fn([3, 4])
    batch = next(molecules._build_input_queue([0, 1], "train", None, 16))
    assert batch["targets"].shape == batch["weights"].shape == (17, 3)
    logits, _ = molecules.model_fn(model, batch, state, TRAIN, [0, 0], True, dropout_rate=0.5)
    assert logits.requires_grad
    assert logits.shape == (17, 3)
    first, _ = molecules.model_fn(model, batch, state, EVAL, [0, 0], False)
    second, _ = molecules.model_fn(model, batch, state, EVAL, [0, 0], False, dropout_rate=0.5)
    assert not first.requires_grad
    assert torch.equal(first, second)
    with pytest.raises(ValueError, match="model_state must be None"):
        molecules.model_fn(model, batch, {"a": 1}, EVAL, [0, 0], False)


def test_initial_model_depends_on_the_key_alone(molecules: MoleculesWorkload) -> None:
    first, again, other = (molecules.init_model_fn([seed, 0])[0] for seed in (1, 1, 2))
    assert torch.equal(first.decoder.weight, again.decoder.weight)
    assert not torch.equal(first.decoder.weight, other.decoder.weight)
    assert molecules.is_output_params("decoder.bias")
    assert not molecules.is_output_params("node_embedder.bias")
    assert molecules.param_shapes["decoder.weight"].shape_tuple == (3, 16)
    assert molecules.model_params_types.keys() == molecules.param_shapes.keys()


def test_evaluation_sees_every_molecule_once(molecules: MoleculesWorkload) -> None:
    model, state = molecules.init_model_fn([3, 4])
    by_small, by_large = (
        molecules.eval_model(size, model, state, [0, 0], None, None, 0) for size in (5, 100)
    )
    assert by_small.keys() == by_large.keys()
    for name, value in by_small.items():
        assert value == pytest.approx(by_large[name], rel=1e-4), name
    assert by_small["validation/num_examples"] == 16
    known = molecules.data.graphs.labels[molecules.splits["validation"]] >= 0
    batches = molecules._eval_batches["validation", 5]
    assert sum(int(batch["weights"].sum()) for batch in batches) == known.sum()


def test_targets(molecules: MoleculesWorkload) -> None:
    molecules.set_targets(0.7, None)
    assert molecules.validation_target_value == 0.7
    assert molecules.test_target_value == molecules.default_targets["test"]
    reached = {"validation/mean_average_precision": 0.71, "test/mean_average_precision": 0.1}
    assert molecules.has_reached_validation_target(reached)
    assert not molecules.has_reached_test_target(reached)


def test_properties_before_the_model_is_built(molecules: MoleculesWorkload) -> None:
    with pytest.raises(ValueError, match="init_model_fn"):
        _ = molecules.param_shapes
    with pytest.raises(ValueError, match="'train', not 'test'"):
        molecules._build_input_queue([0, 1], "test", None, 16)


def test_images_train_and_evaluate() -> None:
    images = ImagesWorkload()
    model, state = images.init_model_fn([0, 0])
    queue = images._build_input_queue([0, 1], "train", None, 32)
    batch = next(queue)
    logits, _ = images.model_fn(model, batch, state, TRAIN, [0, 0], True, dropout_rate=0.0)
    loss = images.loss_fn(batch["targets"], logits, batch.get("weights"), 0.1)
    assert loss["n_valid_examples"] == 32
    assert loss["per_example"].shape == (32,)
    loss["summed"].backward()
    result = images.eval_model(128, model, state, [0, 0], None, None, 0)
    assert result["test/num_examples"] == 180
    assert result["validation/loss"] == pytest.approx(np.log(10), rel=1e-5)
    masked = images.loss_fn(batch["targets"], logits, torch.zeros(32))
    assert masked["summed"] == 0
    assert masked["n_valid_examples"] == 0


def test_image_queue_position() -> None:
    images = ImagesWorkload()
    first, second = (images._build_input_queue([0, 1], "train", None, 512) for _ in range(2))
    for _ in range(4):  # into the second epoch
        next(first)
    second.skip_to(4)
    assert torch.equal(next(first)["inputs"], next(second)["inputs"])
    with pytest.raises(ValueError, match="do not fill one batch"):
        images._build_input_queue([0, 1], "train", None, 10_000)
