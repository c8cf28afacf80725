"""The submission through AlgoPerf's calls, on a synthetic workload of graphs."""

import copy
import io
import logging

import pytest
import torch
from observed import FisherPasses, state_tensors
from workload import GraphNet, GraphWorkload, Squares, graph_batch

from submission import submission
from submission.algoperf_compat import spec
from submission.batch_structure import kinds_by_probe, likelihood_of, sharing_of, valid_graphs
from submission.hyperparameters import HyperparameterError
from submission.kfac import (
    Bernoulli,
    Categorical,
    Gaussian,
    Preconditioner,
    SharingError,
    kronecker_factors,
)

SIZES = [([3, 1, 4, 2, 5], [4, 0, 6, 2, 7]), ([2, 2, 3, 1, 7], [2, 3, 1, 0, 9])]


def point(**changes):
    return {
        "kfac_approx": "reduce",
        "update_rule": "nesterov",
        "learning_rate": 0.05,
        "schedule": "warmup_linear",
        "factor_update_steps": 2,
        "inverse_update_steps": 2,
        "dropout_rate": 0.0,
        **changes,
    }


class Logger:
    def __init__(self):
        self.rows = []

    def append_scalar_metrics(self, metrics, global_step):
        self.rows.append({"global_step": global_step, **metrics})


def start(hyperparameters, workload=None, seed=0):
    torch.manual_seed(0)
    workload = workload or GraphWorkload()
    model = GraphNet()
    state = submission.init_optimizer_state(workload, model, None, hyperparameters, [seed, seed])
    return workload, model, state


def steps(workload, model, state, hyperparameters, numbers, eval_results=(), batches=None):
    for t in numbers:
        queue = iter([batches[t] if batches else graph_batch(*SIZES[t % 2], seed=t)])
        batch = submission.data_selection(
            workload, queue, state, model, None, hyperparameters, t, [t, 0]
        )
        state, model, _ = submission.update_params(
            workload=workload,
            current_param_container=model,
            current_params_types=None,
            model_state=None,
            hyperparameters=hyperparameters,
            batch=batch,
            loss_type=workload.loss_type,
            optimizer_state=state,
            eval_results=list(eval_results),
            global_step=t,
            rng=[t, 1],
            train_state={},
        )
    return state, model


def mean_loss(model, batches):
    workload, total, valid = GraphWorkload(), 0.0, 0
    for batch in batches:
        loss = workload.loss_fn(
            batch["targets"], model(batch["inputs"], dropout_rate=0.0), batch["weights"]
        )
        total += float(loss["summed"].detach())
        valid += int(loss["n_valid_examples"])
    return total / valid


@pytest.mark.parametrize("update_rule", ["nesterov", "nadamw"])
@pytest.mark.parametrize("kfac_approx", ["none", "expand", "reduce"])
def test_training_lowers_the_loss(kfac_approx, update_rule):
    given = point(kfac_approx=kfac_approx, update_rule=update_rule, learning_rate=0.02, damping=0.1)
    workload, model, state = start(given)
    batches = [graph_batch(*SIZES[t % 2], seed=t) for t in range(2)]
    before = mean_loss(model, batches)
    steps(workload, model, state, given, range(60), batches=batches * 30)
    assert mean_loss(model, batches) < 0.8 * before


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_empirical_factors_come_from_the_backward_pass_of_the_loss(label_smoothing, monkeypatch):
    given = point(fisher_type="empirical", label_smoothing=label_smoothing, damping=0.1)

    def trained():
        workload, model, state = start(given)
        steps(workload, model, state, given, range(5))
        return model.parameters()

    update = Preconditioner.update
    with monkeypatch.context() as patch:
        patch.setattr(
            Preconditioner, "update", lambda *args, loss, **options: update(*args, **options)
        )
        apart = FisherPasses(patch, Preconditioner)
        expected = trained()
    together = FisherPasses(monkeypatch, Preconditioner)
    for p, q in zip(trained(), expected, strict=True):
        torch.testing.assert_close(p, q)
    assert len(apart) == 4  # in steps 0, 1 (early), 2 and 4
    assert len(together) == 0


@pytest.mark.parametrize("fisher_type", ["mc", "empirical"])
@pytest.mark.parametrize("kfac_approx", ["none", "expand", "reduce"])
@pytest.mark.parametrize("stop", [1, 4, 5])
def test_restored_state_goes_on_bit_for_bit(kfac_approx, stop, fisher_type):
    given = point(kfac_approx=kfac_approx, factor_decay=0.5, fisher_type=fisher_type)
    workload, model, state = start(given)
    steps(workload, model, state, given, range(9))

    _, first_model, first_state = start(given)
    steps(workload, first_model, first_state, given, range(stop))
    file = io.BytesIO()
    saved = {key: value.state_dict() for key, value in first_state.items()}
    torch.save({"model": first_model.state_dict(), "optimizer": saved}, file)
    file.seek(0)
    restored = torch.load(file, weights_only=True)
    _, second_model, second_state = start(given, seed=1)
    second_model.load_state_dict(restored["model"])
    for key in second_state:
        second_state[key].load_state_dict(restored["optimizer"][key])
    steps(workload, second_model, second_state, given, range(stop, 9))
    for p, q in zip(model.parameters(), second_model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_batch_with_nan_is_skipped_and_training_goes_on(caplog):
    given = point()
    workload, model, state = start(given)
    steps(workload, model, state, given, range(3))
    before = copy.deepcopy(model.state_dict())
    bad = graph_batch(*SIZES[0], seed=0)
    bad["inputs"].nodes[0, 0] = float("nan")
    with caplog.at_level(logging.WARNING):
        steps(workload, model, state, given, [4], batches={4: bad})
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert "step 4 is skipped" in caplog.text
    steps(workload, model, state, given, range(5, 9))
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.graph_layer.weight, before["graph_layer.weight"])


def test_an_all_padding_batch_without_labels_changes_nothing_but_momentum():
    given = point(beta1=0.0)
    workload, model, state = start(given)
    steps(workload, model, state, given, range(2))
    before = copy.deepcopy(model.state_dict())
    empty = graph_batch([0, 0, 9], [0, 0, 9], seed=0)
    empty["weights"][:] = False
    steps(workload, model, state, given, [2], batches={2: empty})
    assert state["kfac"].failures["statistics"] == 1
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_steps_to_target_are_logged_once_per_split():
    given = point()
    workload, model, state = start(given)
    workload.metrics_logger = Logger()
    results = [
        (1, {"validation/metric": 0.1, "test/metric": 0.1, "accumulated_submission_time": 1.0}),
        (3, {"validation/metric": 0.6, "test/metric": 0.4, "accumulated_submission_time": 3.5}),
        (5, {"validation/metric": 0.7, "test/metric": 0.4, "accumulated_submission_time": 5.0}),
    ]
    for t in range(6):
        seen = [r for r in results if r[0] <= t]
        steps(workload, model, state, given, [t], eval_results=seen)
    rows = [r for r in workload.metrics_logger.rows if "steps_to_target/validation" in r]
    assert len(rows) == 1
    assert rows[0]["steps_to_target/validation"] == 3
    assert rows[0]["seconds_to_target/validation"] == 3.5
    assert not any("steps_to_target/test" in r for r in workload.metrics_logger.rows)


def test_the_first_row_of_the_log_has_what_a_step_is_made_of():
    given = point()
    workload, model, state = start(given)
    workload.metrics_logger = Logger()
    steps(workload, model, state, given, range(2))
    row = workload.metrics_logger.rows[0]
    expected = {"loss", "grad_norm", "learning_rate", "damping", "global_step"}
    phases = ("data", "forward", "factors", "inverses", "precondition", "update")
    assert expected | {f"time/{phase}" for phase in phases} <= set(row)
    assert all(row[f"time/{phase}"] > 0 for phase in phases)
    assert len(workload.metrics_logger.rows) == 1  # the second step comes within a second


def test_adaptive_damping_judges_the_step_on_the_same_dropout_and_leaves_no_trace():
    given = point(dropout_rate=0.5, learning_rate=1e-3, schedule="warmup_cosine", warmup_fraction=0)
    outcomes = []
    for adaptive in (False, True):
        workload, model, state = start({**given, "adaptive_damping": adaptive})
        torch.manual_seed(3)
        steps(workload, model, state, given, [0])
        outcomes.append((model.state_dict(), torch.get_rng_state(), state["kfac"].damping))
    (plain, rng, damping), (adapted, rng_after, new_damping) = outcomes
    assert all(torch.equal(plain[k], adapted[k]) for k in plain)
    assert torch.equal(rng, rng_after)
    assert damping == 1e-3
    assert new_damping == pytest.approx(1e-3 * 0.95**2)  # a small step goes as predicted


def test_bad_hyperparameters_stop_before_training():
    with pytest.raises(HyperparameterError, match="'damping' is -1"):
        start(point(damping=-1))


@pytest.mark.parametrize("variant", ["", "_gelu", "_anything"])
def test_batch_sizes_of_variants(variant):
    assert submission.get_batch_size("ogbg" + variant) == 512
    assert submission.get_batch_size("imagenet_vit_map") == 1024
    assert submission.get_batch_size("imagenet_vit_glu") == 512
    with pytest.raises(ValueError, match="unknown workload 'ogb'"):
        submission.get_batch_size("ogb")


# ---- structure of the batch -------------------------------------------------------------------


def test_likelihood_follows_loss_type_and_shapes():
    kind = spec.LossType
    logits = torch.zeros(4, 3)
    labels, multi = torch.zeros(4, dtype=int), torch.zeros(4, 3)
    cases = [
        (kind.SOFTMAX_CROSS_ENTROPY, {"targets": labels}, Categorical()),
        (kind.SOFTMAX_CROSS_ENTROPY, {"targets": labels, "weights": torch.ones(4)}, Categorical()),
        (kind.SOFTMAX_CROSS_ENTROPY, {"targets": multi, "weights": torch.ones(4)}, Categorical()),
        (kind.SOFTMAX_CROSS_ENTROPY, {"targets": multi, "weights": torch.ones(4, 3)}, Bernoulli()),
        (kind.SIGMOID_CROSS_ENTROPY, {"targets": multi}, Bernoulli()),
        (kind.MEAN_SQUARED_ERROR, {"targets": multi}, Gaussian()),
        (kind.MEAN_ABSOLUTE_ERROR, {"targets": multi}, Gaussian(variance=1.0)),
        (kind.CTC_LOSS, {"targets": labels}, Categorical()),
    ]
    for loss_type, batch, expected in cases:
        assert likelihood_of(loss_type, logits, batch) == expected
    with pytest.raises(ValueError, match="no likelihood"):
        likelihood_of("hinge", logits, {})


def test_padding_graphs_are_found_and_real_last_graphs_kept():
    n_node = torch.tensor([3, 0, 2, 4, 0, 0])
    none = torch.zeros(6, 5)
    assert valid_graphs(n_node, none).tolist() == [True, True, True, False, False, False]
    labelled = none.clone()
    labelled[3, 2] = 1
    assert valid_graphs(n_node, labelled).tolist() == [True, True, True, True, False, False]


@pytest.mark.parametrize("kfac_approx", ["expand", "reduce"])
def test_padding_changes_nothing(kfac_approx):
    model = GraphNet().double().eval()
    small = graph_batch(*SIZES[0], seed=0, padded=False)
    graph = small["inputs"]
    small["inputs"] = graph._replace(nodes=graph.nodes.double(), edges=graph.edges.double())
    more = torch.full((6, 4), 50.0).double()
    padded = {
        "inputs": small["inputs"]._replace(
            nodes=torch.cat([small["inputs"].nodes, more]),
            n_node=torch.cat([graph.n_node, torch.tensor([6, 0])]),
            n_edge=torch.cat([graph.n_edge, torch.tensor([0, 0])]),
        ),
        "targets": torch.cat([small["targets"], torch.zeros(2, 5)]),
        "weights": torch.cat([small["weights"], torch.zeros(2, 5, dtype=torch.bool)]),
    }
    results = []
    for batch in (small, padded):
        results.append(
            kronecker_factors(
                model,
                batch["inputs"],
                likelihood="bernoulli",
                kfac_approx=kfac_approx,
                fisher_type="type-2",
                mask=batch["weights"],
                sharing=sharing_of(model, batch, {}),
            )
        )
    for name, block in results[0].items():
        torch.testing.assert_close(block.input_covariance, results[1][name].input_covariance)
        torch.testing.assert_close(block.gradient_covariance, results[1][name].gradient_covariance)


KINDS = {"edge_layer": "edges", "node_layer": "nodes", "graph_layer": "graphs"}


def test_kinds_of_rows_are_probed_where_the_counts_are_ambiguous():
    model = GraphNet().train()
    batch = graph_batch([2, 3, 0, 4, 2, 1, 2, 3], [2] * 7 + [3], seed=0)  # 17 nodes, 17 edges
    assert batch["inputs"].nodes.shape[0] == batch["inputs"].edges.shape[0]
    known: dict[str, str] = {}
    rng = torch.get_rng_state()
    assert kinds_by_probe(model, batch["inputs"]) == KINDS
    assert model.training
    assert torch.equal(rng, torch.get_rng_state())
    rule = sharing_of(model, batch, known)
    for layer, kind in KINDS.items():
        rows = 8 if kind == "graphs" else 17
        assert torch.equal(rule.resolve(layer, rows).ids, rule.kinds[kind].ids)
    assert known == KINDS
    with pytest.raises(SharingError, match="layer 'edge_layer' was applied to 5 rows"):
        rule.resolve("edge_layer", 5)


def test_ambiguous_batches_train_like_the_sharing_said_by_hand():
    model = GraphNet().eval()
    batch = graph_batch([2, 3, 0, 4, 2, 1, 2, 3], [2] * 7 + [3], seed=0)
    options = {
        "likelihood": "bernoulli", "kfac_approx": "reduce", "fisher_type": "type-2",
        "mask": batch["weights"],
    }  # fmt: skip
    rule = sharing_of(model, batch, {})
    by_hand = {layer: rule.kinds[kind] for layer, kind in KINDS.items()}
    probed = kronecker_factors(model, batch["inputs"], sharing=rule, **options)
    said = kronecker_factors(model, batch["inputs"], sharing=by_hand, **options)
    for name, block in said.items():
        assert torch.equal(block.input_covariance, probed[name].input_covariance)
        assert torch.equal(block.gradient_covariance, probed[name].gradient_covariance)


# ---- steps that must not count -----------------------------------------------------------------


def regression_batch(t, faulty=False, largest=1e21):
    generator = torch.Generator().manual_seed(t)
    x, y = (torch.randn(16, n, generator=generator) for n in (4, 2))
    if faulty:
        y[0, 0] = largest
    return {"inputs": x, "targets": y}


def regress(given, faulty_step, total=12, spoil=None):
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(4, 5), torch.nn.BatchNorm1d(5), torch.nn.Tanh(), torch.nn.Linear(5, 2)
    ).float()
    workload = Squares()
    state = submission.init_optimizer_state(workload, model, None, given, [0, 0])
    for t in range(total):
        batch = regression_batch(t, t == faulty_step)
        batch = {key: value.float() for key, value in batch.items()}
        if t == faulty_step and spoil is not None:
            batch["inputs"][0, 0] = spoil
        submission.update_params(
            workload, model, None, None, given, batch, workload.loss_type, state, [], t, [t, 1], {}
        )
    return model, state


@pytest.mark.parametrize("spoil", [None, float("nan"), float("inf")])
@pytest.mark.parametrize(
    "update_rule", ["nesterov", "nadamw", "eigenbasis_adam", "eigenbasis_polar"]
)
def test_one_step_that_overflows_costs_one_step(update_rule, spoil):
    given = point(update_rule=update_rule, learning_rate=0.01)
    model, state = regress(given, faulty_step=5, spoil=spoil)
    assert state["run"].skipped == 1
    for tensor in (*model.parameters(), *model.buffers()):
        assert tensor.isfinite().all()
    assert all(tensor.isfinite().all() for tensor in state_tensors(state["kfac"]))


def test_a_skipped_step_leaves_parameters_and_running_statistics():
    before, _ = regress(point(learning_rate=0.01), faulty_step=None, total=5)
    after, state = regress(point(learning_rate=0.01), faulty_step=5, total=6, spoil=float("nan"))
    assert state["run"].skipped == 1
    for p, q in zip(before.state_dict().values(), after.state_dict().values(), strict=True):
        assert torch.equal(p, q)


def test_an_update_that_is_not_finite_is_skipped(monkeypatch):
    given = point(learning_rate=0.01)

    make, models = Preconditioner.__init__, []

    def made(self, model, *args, **options):
        models.append(model)
        make(self, model, *args, **options)

    def spoiled(self):
        self.refresh()
        for p in models[-1].parameters():
            p.grad.fill_(float("nan"))

    monkeypatch.setattr(Preconditioner, "__init__", made)
    monkeypatch.setattr(Preconditioner, "precondition", spoiled)
    model, state = regress(given, faulty_step=None, total=3)
    assert state["run"].skipped == 3
    assert all(p.isfinite().all() for p in model.parameters())
