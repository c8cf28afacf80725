"""The submission on other structures than graphs: speech, text, clicks, images."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from structures import (
    ClickNet,
    ClickWorkload,
    ReconstructionWorkload,
    SpeechNet,
    SpeechWorkload,
    TextNet,
    TextWorkload,
    Workload,
    reconstruction_net,
    speech_batch,
    text_batch,
)
from torch import nn

from submission import submission
from submission.algoperf_compat import spec
from submission.batch_structure import (
    likelihood_of,
    logits_of,
    mask_of,
    shared_rows,
    targets_of,
)
from submission.kfac import KFACConfig, Preconditioner
from submission.padding import paddings_in, segmented_fields


def point(**changes):
    return {
        "kfac_approx": "expand", "update_rule": "nadamw", "learning_rate": 0.01, "damping": 0.01,
        "schedule": "warmup_cosine", "warmup_fraction": 0.0, "factor_update_steps": 2,
        "inverse_update_steps": 2, **changes,
    }  # fmt: skip


def train(workload, model, batch, hyperparameters, steps, first=0, state=None):
    """Steps on one batch; the losses before each of them, and the state."""
    state = state or submission.init_optimizer_state(workload, model, None, hyperparameters, [0, 0])
    losses = []
    trained = model
    for step in range(first, first + steps):
        with torch.no_grad():
            kept = copy.deepcopy(trained.state_dict())
            output = workload.call(trained, batch)
            loss = workload.loss_fn(batch["targets"], output, batch.get("weights"))
            trained.load_state_dict(kept)
        losses.append(float(loss["summed"] / loss["n_valid_examples"]))
        state, trained, _ = submission.update_params(
            workload=workload, current_param_container=trained, current_params_types=None,
            model_state=None, hyperparameters=hyperparameters, batch=batch,
            loss_type=workload.loss_type, optimizer_state=state, eval_results=[],
            global_step=step, rng=[step, 0], train_state={},
        )  # fmt: skip
    return losses, state


def click_batch():
    generator = torch.Generator().manual_seed(0)
    return {
        "inputs": torch.randint(100, (16, 3), generator=generator),
        "targets": (torch.rand(16, 1, generator=generator) > 0.5).float(),
        "weights": torch.ones(16, 1),
    }


def image_batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(4, 6, 6, generator=generator)
    return {"inputs": images, "targets": images.cumsum(1), "weights": torch.ones(4)}


CASES = {
    "speech": (SpeechWorkload, SpeechNet, speech_batch),
    "text": (TextWorkload, TextNet, text_batch),
    "clicks": (ClickWorkload, ClickNet, click_batch),
    "reconstruction": (ReconstructionWorkload, reconstruction_net, image_batch),
}


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
@pytest.mark.parametrize("case", CASES)
def test_training_lowers_the_loss(case, kfac_approx, fisher_type):
    workload, model, batch = CASES[case]
    torch.manual_seed(0)
    given = point(kfac_approx=kfac_approx, fisher_type=fisher_type)
    losses, state = train(workload(), model(), batch(), given, 20)
    assert losses[-1] < 0.9 * losses[0]
    assert sum(state["kfac"].failures.values()) == 0
    assert state["kfac"].config.fisher_type == fisher_type


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_true_labels_of_transcripts_are_the_gradients_of_the_loss(kfac_approx):
    """With the scale of the loss, which divides by the number of labels."""
    workload, batch = SpeechWorkload(), speech_batch((8, 8, 8))
    torch.manual_seed(0)
    model = SpeechNet()
    output = model(batch["inputs"])
    logits = output[0]
    loss = workload.loss_fn(batch["targets"], output)
    rows = torch.autograd.grad(loss["summed"], logits)[0]
    rows = rows.flatten(0, 1) if kfac_approx == "expand" else rows.sum(1)
    given = point(kfac_approx=kfac_approx, fisher_type="empirical", learning_rate=1e-6)
    _, state = train(workload, model, batch, given, 1)
    found = state["kfac"].curvature()["head"]
    scale = found.input_covariance[-1, -1]  # of ragged rows A has a part of it
    torch.testing.assert_close(
        scale * found.gradient_covariance, rows.T @ rows / loss["n_valid_examples"]
    )


@pytest.mark.parametrize("case", CASES)
def test_every_parameter_trains_and_is_reported(case):
    workload, model, batch = CASES[case]
    torch.manual_seed(0)
    model = model()
    before = copy.deepcopy(model.state_dict())
    _, state = train(workload(), model, batch(), point(), 3)
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    reported = sum(row.parameters for row in state["kfac"].report())
    assert reported == sum(p.numel() for p in model.parameters())


# ---- padding ------------------------------------------------------------------------------------


def factors_of(workload, model, batch, approx, known=None):
    """Curvature of one batch, exact, in float64."""
    known = {} if known is None else known
    kfac = Preconditioner(model, KFACConfig(kfac_approx=approx, fisher_type="type-2"))

    def forward(module, inputs):
        return workload.model_fn(module, inputs, None, spec.ForwardPassMode.EVAL, None, False)

    with shared_rows(model, batch, known, forward) as sharing, kfac.record(sharing):
        output = workload.call(model, batch)
    logits = logits_of(output)
    kfac.update(
        logits, likelihood_of(workload.loss_type, logits, batch), mask=mask_of(output, batch)
    )
    kfac.precondition()
    return kfac.curvature()


def assert_same_factors(first, second):
    assert first.keys() == second.keys()
    compared = 0
    for name, block in first.items():
        if hasattr(block, "input_covariance"):
            other = second[name]
            torch.testing.assert_close(block.input_covariance, other.input_covariance)
            torch.testing.assert_close(block.gradient_covariance, other.gradient_covariance)
            compared += 1
    assert compared >= 2


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_padding_of_speech_changes_no_factor(approx):
    torch.manual_seed(0)
    model = SpeechNet(batch_norm=False).double()
    results = []
    for total in (8, 14):
        batch = speech_batch(total=total)
        batch["inputs"] = (batch["inputs"][0].double(), batch["inputs"][1])
        results.append(factors_of(SpeechWorkload(), model, batch, approx))
    assert_same_factors(*results)


@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_padding_of_text_changes_no_factor_where_both_fields_have_one_length(approx):
    torch.manual_seed(0)
    model = TextNet().double()
    results = [
        factors_of(TextWorkload(), model, text_batch(total=total), approx) for total in (6, 9)
    ]
    assert_same_factors(*results)


def test_which_layer_works_on_which_field_is_found_out_once():
    model, known = TextNet(), {}
    assert model.training
    factors_of(TextWorkload(), model, text_batch(), "expand", known)
    assert known == {
        "embedding": "inputs,targets", "encode": "inputs", "memory": "inputs",
        "decode": "targets", "head": "targets",
    }  # fmt: skip
    assert model.training

    def refuse(model, batch):
        raise AssertionError("a second probe")

    with shared_rows(model, text_batch(seed=1), known, refuse) as rule:
        TextWorkload().call(model, text_batch(seed=1))
    assert torch.equal(rule["memory"].mask, text_batch()["inputs_segmentation"] > 0)


def test_a_model_that_needs_equal_lengths_counts_padding_and_says_so(caplog):
    class Both(TextNet):
        def forward(self, source, target, source_mask):
            return self.head(self.embedding(source) + self.embedding(target))

    with caplog.at_level(logging.WARNING):
        known = {}
        for _ in range(2):
            factors_of(TextWorkload(), Both().double(), text_batch(), "expand", known)
    assert caplog.text.count("padding tokens count as tokens") == 1


def test_without_paddings_no_rule_is_made():
    batch = {"inputs": torch.zeros(4, 3), "targets": torch.zeros(4), "weights": torch.ones(4)}
    with shared_rows(nn.Linear(3, 2), batch, {}, lambda *_: None) as rule:
        assert rule is None


def test_pairs_that_are_no_paddings():
    rows = torch.zeros(2, 5, 3)
    good = torch.tensor([[0, 0, 0, 1, 1], [0, 0, 0, 0, 0]])
    assert paddings_in((rows, good)) is good
    for bad in (torch.full((2, 5), 0.5), torch.zeros(2, 4), torch.zeros(3, 5), torch.zeros(5)):
        assert paddings_in((rows, bad)) is None
    assert paddings_in(rows) is None
    assert segmented_fields({"a": rows[:, :, 0], "a_segmentation": torch.zeros(2, 4)}) == {}


def test_an_output_that_is_no_logits_is_an_error():
    with pytest.raises(TypeError, match="pair of logits"):
        logits_of((torch.zeros(2, 3), "state"))


# ---- scale, masks -------------------------------------------------------------------------------


def test_ctc_curvature_is_that_of_the_loss_as_it_is_divided():
    # 4 + 3 + 2 frames exist and 6 labels; the loss divides by the labels.
    torch.manual_seed(0)
    batch, model = speech_batch(), SpeechNet(batch_norm=False)
    _, state = train(SpeechWorkload(), model, batch, point(fisher_type="type-2"), 1)
    torch.manual_seed(0)
    plain = factors_of(SpeechWorkload(), SpeechNet(batch_norm=False), batch, "expand")
    trained = state["kfac"].curvature()
    for name in ("body", "head"):
        torch.testing.assert_close(
            trained[name].gradient_covariance, plain[name].gradient_covariance * 9 / 6
        )


def test_masks_and_targets_get_the_shape_of_the_logits():
    logits = torch.zeros(4, 1)
    assert mask_of(logits, {"weights": torch.ones(4)}).shape == (4, 1)
    assert targets_of(logits, {"targets": torch.ones(4)}).shape == (4, 1)
    assert targets_of(logits, {"targets": (torch.ones(4), torch.ones(4))}) is None
    images = torch.zeros(4, 6, 6)
    assert mask_of(images, {"weights": torch.ones(4)}).shape == (4,)
    assert mask_of(images, {}) is None
    paddings = torch.tensor([[0, 0, 1], [0, 1, 1]])
    pair = (torch.zeros(2, 3, 5), paddings)
    assert torch.equal(mask_of(pair, {}), paddings == 0)
    assert mask_of(pair, {"weights": torch.tensor([1.0, 0.0])}).tolist() == [[1, 1, 0], [0, 0, 0]]


# ---- what extra passes must leave alone ---------------------------------------------------------


def test_extra_passes_leave_running_statistics_alone():
    outcomes = []
    for adaptive in (False, True):
        torch.manual_seed(0)
        model = SpeechNet()
        train(SpeechWorkload(), model, speech_batch(), point(adaptive_damping=adaptive), 1)
        outcomes.append(model.norm.running_mean)
    assert torch.equal(*outcomes)
    assert outcomes[0].abs().sum() > 0


class Classifier(Workload):
    """Softmax cross-entropy of vectors."""

    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY

    def loss_fn(self, label_batch, logits_batch, mask_batch=None, label_smoothing=0.0):
        losses = F.cross_entropy(logits_batch, label_batch, reduction="none")
        return {"summed": losses.sum(), "n_valid_examples": len(losses), "per_example": losses}


SELF_TUNED = {"kfac_approx": "reduce", "update_rule": "eigenbasis_adam", "fisher_type": "empirical",
              "factor_decay": 0.9, "renewal": "in_turns"}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("changes", [{}, SELF_TUNED], ids=["uncompiled", "with statistics inside"])
def test_a_compiled_model_trains_like_the_plain_one(changes):
    generator = torch.Generator().manual_seed(0)
    batch = {
        "inputs": torch.randn(8, 5, generator=generator),
        "targets": torch.randint(3, (8,), generator=generator),
    }
    outcomes = []
    for compiled in (False, True):
        torch.manual_seed(0)
        plain = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        model = torch.compile(plain, backend="eager") if compiled else plain
        _, state = train(Classifier(), model, batch, point(**changes), 7)
        inside = state["kfac"]._seen._compiled.compiled
        can_be = compiled and bool(changes) and hasattr(torch.compiler, "set_stance")
        assert inside == int(can_be)
        outcomes.append(torch.cat([p.detach().flatten() for p in plain.parameters()]))
    torch.testing.assert_close(*outcomes)
