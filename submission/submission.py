"""K-FAC-expand and K-FAC-reduce as an AlgoPerf training algorithm.

The functions below are AlgoPerf's interface. `update_params` is one step:

    forward        inputs are recorded where this step updates the factors
    factors        would-be gradients, to the layer outputs only      (eq. 7 or 10);
                   empirical ones come out of the backward pass below
    backward       the gradient of the globally normalised loss
    precondition   (A ⊗ B + damping)⁻¹ · gradient
    update         the base rule (Nesterov or NAdamW) on the preconditioned gradient
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .algoperf_compat import spec
from .averaging import TailAverage
from .batch_structure import (
    has_labels,
    is_sum_of_terms,
    likelihood_of,
    logits_of,
    mask_of,
    shared_rows,
    targets_of,
    weights_of,
)
from .hyperparameters import Hyperparameters
from .kfac import Likelihood, OwnGradients, Preconditioner
from .kfac.functional import kept_buffers
from .kfac.ranks.collectives import world_size
from .kfac.updates.adaptive_damping import begin_trial, end_trial
from .optimizers import UPDATE_RULES
from .run import Run
from .schedules import SCHEDULES

BATCH_SIZES = {
    "criteo1tb": 262_144,
    "fastmri": 32,
    "finewebedu_lm": 64,
    "imagenet_resnet": 1024,
    "imagenet_resnet_silu": 512,
    "imagenet_resnet_gelu": 512,
    "imagenet_vit": 1024,
    "imagenet_vit_glu": 512,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "ogbg": 512,
    "wmt": 128,
    "mnist": 1024,
    "cifar": 128,
}
# What AlgoPerf multiplies the allowed run time by under the self-tuning ruleset.
SELF_TUNING_TIME_FACTOR = 1.5


def get_batch_size(workload_name: str) -> int:
    """Global batch size of a workload, or of the base workload of a variant.

    Raises:
        ValueError: the workload is unknown.
    """
    bases = [
        base
        for base in BATCH_SIZES
        if workload_name == base or workload_name.startswith(base + "_")
    ]
    if not bases:
        raise ValueError(
            f"unknown workload '{workload_name}'; known are {', '.join(BATCH_SIZES)} and variants"
        )
    return BATCH_SIZES[max(bases, key=len)]


def init_optimizer_state(
    workload: Any,
    model_params: nn.Module,
    model_state: Any,
    hyperparameters: Any,
    rng: Any,
) -> dict[str, Any]:
    """Optimizer, K-FAC and the run's log; all of them have state_dict and load_state_dict.

    Args:
        hyperparameters: a tuning point; None, under the self-tuning ruleset, takes
            `hyperparameters.SELF_TUNED`.

    Raises:
        HyperparameterError: the tuning point is not valid.
    """
    del model_state
    if hyperparameters is None:  # the self-tuning ruleset
        settings, time_factor = Hyperparameters.self_tuned(), SELF_TUNING_TIME_FACTOR
    else:
        settings, time_factor = Hyperparameters.from_tuning_point(hyperparameters), 1.0
    run = Run(settings, workload, model_params, time_factor)
    optimizer = UPDATE_RULES[settings.update_rule](model_params.parameters(), settings)
    state: dict[str, Any] = {"optimizer": optimizer, "run": run}
    config = settings.kfac_config(seed=int(rng[0]) % 2**31)
    if config is not None:
        state["kfac"] = Preconditioner(model_params, config)
    if settings.average_share is not None:
        state["average"] = TailAverage(model_params, settings.average_share)
    return state


def update_params(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: Mapping[str, Any],
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: Sequence[tuple[int, Mapping[str, float]]],
    global_step: int,
    rng: Any,
    train_state: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], nn.Module, Any]:
    """One training step; returns (optimizer_state, model, model_state)."""
    del current_params_types, hyperparameters
    run = optimizer_state["run"]
    run.note_time(global_step, train_state)
    model = run.rewrapped(current_param_container)
    optimizer, kfac = optimizer_state["optimizer"], optimizer_state.get("kfac")
    average: TailAverage | None = optimizer_state.get("average")
    settings: Hyperparameters = run.settings
    start = time.perf_counter()
    if average is not None:
        average.take_out(model)

    model.train()
    run.remember_buffers(model)
    optimizer.zero_grad(set_to_none=True)

    def forward(
        module: nn.Module,
        inputs: Mapping[str, Any] = batch,
        mode: Any = spec.ForwardPassMode.TRAIN,
        update_batch_norm: bool = True,
    ) -> tuple[Any, Any]:
        output, new_model_state = workload.model_fn(
            params=module,
            augmented_and_preprocessed_input_batch=inputs,
            model_state=model_state,
            mode=mode,
            rng=rng,
            update_batch_norm=update_batch_norm,
            **_dropout_argument(workload, settings),
        )
        return output, new_model_state

    def mean_loss(output: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        loss_dict = workload.loss_fn(
            label_batch=batch["targets"],
            logits_batch=output,
            mask_batch=batch.get("weights"),
            label_smoothing=settings.label_smoothing,
        )
        summed = loss_dict["summed"]
        return summed, *_global_mean(summed, loss_dict["n_valid_examples"])

    random_state = _random_state(model) if settings.adaptive_damping else None
    if kfac is not None and kfac.factors_due:
        probe = partial(forward, mode=spec.ForwardPassMode.EVAL, update_batch_norm=False)
        with (
            shared_rows(model, batch, run.kinds_of_rows, probe) as sharing,
            kfac.record(sharing),
        ):
            output, new_model_state = forward(model)
    else:
        output, new_model_state = forward(model)
    summed, loss, valid, loss_is_finite = mean_loss(output)
    run.log.add("forward", time.perf_counter() - start)

    if kfac is not None and kfac.factors_due:
        logits, mask, given = logits_of(output), mask_of(output, batch), loss
        likelihood = likelihood_of(loss_type, logits, batch, settings.label_smoothing)
        if settings.fisher_type == "empirical" and not has_labels(loss_type):
            likelihood, mask, given = OwnGradients(is_sum=True), weights_of(batch), summed
        if is_sum_of_terms(loss_type):
            likelihood = _scaled(likelihood, likelihood.terms(logits, mask), valid)
        targets = targets_of(logits, batch)
        kfac.update(logits, likelihood, mask=mask, targets=targets, loss=given)
        kfac.reduce_factors()  # in the background of the backward pass

    update_start = time.perf_counter()
    torch.autograd.backward(loss)
    grad_norm = _clip_gradient(model, settings.grad_clip)
    run.log.add("update", time.perf_counter() - update_start)
    trial = None
    if kfac is not None:
        if settings.adaptive_damping and kfac.inverses_due:
            trial = begin_trial(kfac)
        kfac.precondition()

    update_start = time.perf_counter()
    learning_rate = settings.learning_rate * SCHEDULES[settings.schedule](global_step, run.shape)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    accepted = run.accepts(loss_is_finite, grad_norm, _gradient_norm(model), global_step)
    if accepted:
        optimizer.step()
    else:
        run.restore_buffers(model)
    if accepted and kfac is not None and trial is not None:
        with torch.no_grad(), _random_state_of(model, random_state), kept_buffers(model):
            _, after, _, _ = mean_loss(forward(model, update_batch_norm=False)[0])
        end_trial(kfac, trial, _over_ranks(loss), _over_ranks(after))
    if average is not None:
        average.take_in(model, global_step + 1)
    run.log.add("update", time.perf_counter() - update_start)

    run.after_step(
        workload,
        kfac,
        eval_results,
        global_step,
        {"loss": loss, "grad_norm": grad_norm, "learning_rate": learning_rate},
    )
    return optimizer_state, model, new_model_state


def prepare_for_eval(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: Sequence[tuple[int, Mapping[str, float]]],
    global_step: int,
    rng: Any,
) -> tuple[dict[str, Any], nn.Module, Any]:
    """Puts the average of late parameters into the model, where there is one."""
    del workload, current_params_types, hyperparameters, loss_type, eval_results, global_step, rng
    if "average" in optimizer_state:
        optimizer_state["average"].put_in(current_param_container)
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: Any,
    input_queue: Iterator[dict[str, Any]],
    optimizer_state: dict[str, Any],
    current_param_container: nn.Module,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> dict[str, Any]:
    """The next batch of the input queue."""
    del workload, current_param_container, model_state, hyperparameters, global_step, rng
    start = time.perf_counter()
    batch = next(input_queue)
    optimizer_state["run"].log.add("data", time.perf_counter() - start)
    return batch


def _global_mean(summed: Tensor, valid: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The loss whose gradient, averaged over ranks by DDP, is that of the mean over all ranks.

    Also returns what it divides by, the number of valid examples on all ranks, and whether the sum
    of losses is finite on all of them: ranks that judged by their own would drift apart.
    """
    valid = torch.as_tensor(valid, device=summed.device, dtype=summed.dtype)
    bad = (~summed.detach().isfinite()).to(summed.dtype)
    totals = torch.stack([valid, bad])
    ranks = world_size()
    if ranks > 1:
        dist.all_reduce(totals)
    valid = totals[0].clamp(min=1)
    return summed * ranks / valid, valid, totals[1] == 0


def _scaled(likelihood: Likelihood, terms: Tensor, valid: Tensor) -> Likelihood:
    """The likelihood with the scale of the loss, where that does not divide by its terms.

    A CTC loss has a term for every frame and divides by the number of labels; sigmoid losses may
    add up an example's outputs and divide by the examples.
    """
    if world_size() > 1:
        dist.all_reduce(terms)
    scale = float(terms / valid)
    return replace(likelihood, scale=scale) if scale > 0 else likelihood


def _over_ranks(loss: Tensor) -> float:
    """The mean loss over all ranks, of which each holds its own share times their number."""
    mean = loss.detach().double() / world_size()
    if world_size() > 1:
        dist.all_reduce(mean)
    return float(mean)


def _random_state(model: nn.Module) -> list[Tensor]:
    """The states of the generators that a forward pass draws from: CPU, and the model's GPU."""
    device = next(model.parameters()).device
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


@contextmanager
def _random_state_of(model: nn.Module, states: list[Tensor] | None) -> Iterator[None]:
    """Repeats the draws of an earlier forward pass (its dropout), then puts the state back."""
    device = next(model.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        if states is not None:
            torch.set_rng_state(states[0])
            if len(states) > 1:
                torch.cuda.set_rng_state(states[1], device)
        yield


def _gradient_norm(model: nn.Module) -> Tensor:
    """The norm of all gradients together."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm: Tensor = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    return norm


def _clip_gradient(model: nn.Module, largest_norm: float | None) -> Tensor:
    """Scales the gradient down to the largest norm, if there is one; returns the norm before."""
    norm = _gradient_norm(model)
    if largest_norm is not None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, (largest_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def _dropout_argument(workload: Any, settings: Hyperparameters) -> dict[str, float]:
    """The dropout rate as a keyword of the workload's model_fn, where both know one."""
    if settings.dropout_rate is None:
        return {}
    takes_it = "dropout_rate" in inspect.signature(workload.model_fn).parameters
    return {"dropout_rate": settings.dropout_rate} if takes_it else {}
