"""A small submission for tests: SGD, and a list of the calls it received."""

import os
import time

import torch

from submission.algoperf_compat import spec

CALLS = []


def get_batch_size(workload_name):
    raise ValueError(workload_name)


def init_optimizer_state(workload, model_params, model_state, hyperparameters, rng):
    CALLS.append(("init_optimizer_state", None))
    if hyperparameters.learning_rate <= 0:
        raise ValueError(f"learning_rate is {hyperparameters.learning_rate}; it must be > 0")
    optimizer = torch.optim.SGD(
        model_params.parameters(), lr=hyperparameters.learning_rate, momentum=0.9
    )
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 5)
    return {"optimizer": optimizer, "scheduler": scheduler}


def update_params(
    workload,
    current_param_container,
    current_params_types,
    model_state,
    hyperparameters,
    batch,
    loss_type,
    optimizer_state,
    eval_results,
    global_step,
    rng,
    train_state=None,
):
    CALLS.append(("update_params", global_step))
    assert train_state is not None
    assert set(current_params_types) == {n for n, _ in current_param_container.named_parameters()}
    if os.environ.get("TEST_INTERRUPT_AT") == str(global_step):
        raise KeyboardInterrupt
    time.sleep(float(os.environ.get("TEST_SLEEP", "0")))
    optimizer_state["optimizer"].zero_grad()
    logits, model_state = workload.model_fn(
        current_param_container,
        batch,
        model_state,
        spec.ForwardPassMode.TRAIN,
        rng,
        update_batch_norm=True,
        dropout_rate=hyperparameters.dropout_rate,
    )
    loss = workload.loss_fn(batch["targets"], logits, batch.get("weights"))
    (loss["summed"] / loss["n_valid_examples"]).backward()
    optimizer_state["optimizer"].step()
    optimizer_state["scheduler"].step()
    workload.metrics_logger.append_scalar_metrics({"loss": loss["summed"].item()}, global_step)
    return optimizer_state, current_param_container, model_state


def prepare_for_eval(
    workload,
    current_param_container,
    current_params_types,
    model_state,
    hyperparameters,
    loss_type,
    optimizer_state,
    eval_results,
    global_step,
    rng,
):
    CALLS.append(("prepare_for_eval", global_step))
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload,
    input_queue,
    optimizer_state,
    current_param_container,
    model_state,
    hyperparameters,
    global_step,
    rng,
):
    CALLS.append(("data_selection", global_step))
    return next(input_queue)
