"""Agreement with an independent implementation, where no formula for the truth exists.

`curvlinops-for-pytorch` 3.0.1 has K-FAC-expand and K-FAC-reduce for `nn.Linear` and `nn.Conv2d`.
Everything is compared in float64 as dense blocks in the layer's own order, through the public
interface (the operator times the identity).

Conversion of scale. Both use a mean for A (over N·R rows in expand, over N examples in reduce).

| their `loss_func.reduction` | their B                                   | ours is theirs times |
|-----------------------------|-------------------------------------------|----------------------|
| "mean"                      | 1/terms Σ g gᵀ, the GGN of the mean loss  | 1                    |
| "sum"                       | Σ g gᵀ, the GGN of the summed loss        | 1 / terms            |

`terms` is what torch's mean reduction divides by: N·T distributions for the cross-entropy, and
N·T·C entries for `MSELoss` and `BCEWithLogitsLoss` (T positions with a loss, C outputs at each).
Our factors do not depend on the reduction of the user's loss; the likelihood "gaussian" is by
default that of `MSELoss`, (f - y)² for each entry, without 1/2.

What is not comparable, and how the settings here avoid it:

- They take the number of examples, for A and for the scale of B, from the first dimension of what
  each layer sees (compare curvlinops#107): wrong where a layer sees examples and positions in one
  dimension. Here N comes first in all layers.
- The mean over the C outputs in `MSELoss` and `BCEWithLogitsLoss` is reported as mis-scaled
  (#108). In 3.0.1 it agrees, for T = 1 and T > 1; both reductions are compared, so that neither
  side's scale can hide behind the other reduction.
- With a loss at every position they propagate one vector for all positions of an example at once
  for "type-2", which adds products of different positions' gradients that are not in the GGN
  where positions share a row: in reduce, where positions interact, and where one row of a
  convolution holds several of the terms. Ours propagates one term of each example at a time. So
  "type-2" is compared with one loss for each example in both approximations, and with a loss at
  each position in expand without interaction; "empirical", a single vector in both
  implementations, everywhere.
- Channel groups share one pair of factors there, with averaged inputs; ours have a pair each. A
  layer that is called twice adds up its calls there; here they are further shared positions.
  Padding modes and sampled labels have no counterpart.
"""

import pytest
import torch
from nets import Mean, SpatialMean
from torch import nn

from submission.kfac import Categorical, kronecker_factors

# Named together with torch: alone, pip would take the newest torchvision, and torch with it.
curvlinops = pytest.importorskip(
    "curvlinops",
    reason="needs curvlinops-for-pytorch: pip install torch==<yours> curvlinops-for-pytorch==3.0.1",
)

AGREE = 1e-10  # relative, of the Frobenius norm; 1e-6 is what is asked for
LOSSES = {
    "categorical": nn.CrossEntropyLoss,
    "gaussian": nn.MSELoss,
    "bernoulli": nn.BCEWithLogitsLoss,
}
APPROXES = ("expand", "reduce")
FISHER_TYPES = ("type-2", "empirical")


class ClassesSecond(nn.Module):
    """[N, T, C] -> [N, C, T], the layout of torch's cross-entropy."""

    def forward(self, x):
        return x.movedim(-1, 1)


class Interacting(nn.Module):
    """Attention without parameters over the positions of an example."""

    def forward(self, x):
        return (x @ x.mT).softmax(-1) @ x


def mlp(bias=True):
    return nn.Sequential(
        nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, 4), nn.Sigmoid(), nn.Linear(4, 3, bias)
    )


def pooled(bias=True):
    return nn.Sequential(
        nn.Linear(4, 5, bias), nn.Tanh(), nn.Linear(5, 4), nn.ReLU(), Mean(), nn.Linear(4, 3)
    )


def tokens(*between):
    return nn.Sequential(
        nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4, bias=False), *between, nn.Linear(4, 3)
    )


def targets_for(likelihood, logits, class_dim):
    if likelihood == "categorical":
        shape = list(logits.shape)
        classes = shape.pop(class_dim)
        return torch.randint(classes, shape)
    if likelihood == "bernoulli":
        return torch.randint(2, logits.shape).to(logits.dtype)
    return torch.randn(logits.shape)


def their_blocks(model, loss, batches, joint_bias, **options):
    """Layer name -> dense block in the order of the flattened matrix [P_out, P_in (+1)]."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    operator = curvlinops.KFACLinearOperator(
        model,
        loss,
        parameters,
        batches,
        check_deterministic=False,
        separate_weight_and_bias=not joint_bias,
        **options,
    )
    size = sum(p.numel() for p in parameters)
    dense = (operator @ torch.eye(size)).detach()
    index, start = {}, 0
    for name, parameter in model.named_parameters():
        index[name] = start + torch.arange(parameter.numel()).reshape(parameter.shape)
        start += parameter.numel()
    blocks = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Conv2d):
            continue
        order = index[f"{name}.weight"].flatten(1)
        if module.bias is not None:
            order = torch.cat([order, index[f"{name}.bias"].unsqueeze(1)], 1)
        blocks[name] = dense[order.flatten()][:, order.flatten()]
    return blocks


def check(model, x, likelihood, kfac_approx, fisher_type, joint_bias, reduction, class_dim=-1):
    logits = model(x)
    targets = targets_for(likelihood, logits, class_dim)
    ours = kronecker_factors(
        model,
        x,
        likelihood=Categorical(class_dim=class_dim) if likelihood == "categorical" else likelihood,
        kfac_approx=kfac_approx,
        fisher_type=fisher_type,
        targets=targets,
        bias="joint" if joint_bias else "separate",
    )
    # Two batches of different sizes there, one here: the factors are those of all the data.
    batches = [(x[:2], targets[:2]), (x[2:], targets[2:])]
    theirs = their_blocks(
        model,
        LOSSES[likelihood](reduction=reduction),
        batches,
        joint_bias,
        kfac_approx=kfac_approx,
        fisher_type=fisher_type,
    )
    scale = 1 / targets.numel() if reduction == "sum" else 1.0  # one label for each term
    assert ours.keys() == theirs.keys()
    for name, block in theirs.items():
        expected = block * scale
        assert float(expected.norm()) > 0
        error = (ours[name].to_dense() - expected).norm() / expected.norm()
        assert float(error) <= AGREE, name


reductions = pytest.mark.parametrize("reduction", ["mean", "sum"])
biases = pytest.mark.parametrize("joint_bias", [True, False], ids=["joint", "separate"])
fishers = pytest.mark.parametrize("fisher_type", FISHER_TYPES)
losses = pytest.mark.parametrize("likelihood", list(LOSSES))
approxes = pytest.mark.parametrize("kfac_approx", APPROXES)


@approxes
@fishers
@losses
@biases
@reductions
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_linear_layers_on_vectors(
    kfac_approx, fisher_type, likelihood, joint_bias, reduction, bias
):
    check(mlp(bias), torch.randn(5, 4), likelihood, kfac_approx, fisher_type, joint_bias, reduction)


@approxes
@fishers
@losses
@biases
@reductions
@pytest.mark.parametrize("sharing", [(3,), (2, 3)], ids=["3-d", "4-d"])
def test_linear_layers_with_shared_positions_and_one_loss_for_each_example(
    kfac_approx, fisher_type, likelihood, joint_bias, reduction, sharing
):
    x = torch.randn(5, *sharing, 4)
    check(pooled(), x, likelihood, kfac_approx, fisher_type, joint_bias, reduction)


@fishers
@losses
@biases
@reductions
def test_expand_with_a_loss_at_every_position(fisher_type, likelihood, joint_bias, reduction):
    model, class_dim = tokens(nn.Tanh()), -1
    if likelihood == "categorical":
        model, class_dim = model.append(ClassesSecond()), 1
    x = torch.randn(5, 3, 4)
    check(model, x, likelihood, "expand", fisher_type, joint_bias, reduction, class_dim)


@approxes
@losses
@biases
@reductions
def test_empirical_with_a_loss_at_every_one_of_interacting_positions(
    kfac_approx, likelihood, joint_bias, reduction
):
    model, class_dim = tokens(Interacting()), -1
    if likelihood == "categorical":
        model, class_dim = model.append(ClassesSecond()), 1
    x = torch.randn(5, 3, 4)
    check(model, x, likelihood, kfac_approx, "empirical", joint_bias, reduction, class_dim)


CONVOLUTIONS = {
    "padding": {"kernel_size": 3, "padding": 1},
    "stride": {"kernel_size": 3, "stride": 2, "padding": 1},
    "dilation": {"kernel_size": 2, "dilation": 2},
    "same": {"kernel_size": 3, "padding": "same", "dilation": 2},
    "all": {"kernel_size": (3, 2), "stride": (1, 2), "padding": (2, 1), "dilation": (2, 1)},
    "no bias": {"kernel_size": 2, "padding": 1, "bias": False},
}


@approxes
@fishers
@losses
@biases
@pytest.mark.parametrize("options", list(CONVOLUTIONS))
@pytest.mark.parametrize("reduction", ["mean"])
@pytest.mark.parametrize("head", ["flatten", "pool"])
def test_convolutions(kfac_approx, fisher_type, likelihood, joint_bias, reduction, options, head):
    x = torch.randn(4, 2, 5, 4)
    convolution = nn.Conv2d(2, 3, **CONVOLUTIONS[options])
    body = nn.Sequential(convolution, nn.ReLU(), nn.Conv2d(3, 2, 2, padding=1), nn.Tanh())
    features = body(x)
    if head == "pool":
        model = nn.Sequential(*body, SpatialMean(), nn.Linear(2, 3))
    else:
        model = nn.Sequential(*body, nn.Flatten(), nn.Linear(features[0].numel(), 2))
    check(model, x, likelihood, kfac_approx, fisher_type, joint_bias, reduction)


@approxes
@losses
@reductions
def test_empirical_with_a_loss_at_every_pixel(kfac_approx, likelihood, reduction):
    model = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.ReLU(), nn.Conv2d(3, 2, 2))
    class_dim = 1 if likelihood == "categorical" else -1
    x = torch.randn(4, 2, 4, 5)
    check(model, x, likelihood, kfac_approx, "empirical", True, reduction, class_dim)
