"""Needs requirements/experiments.txt, which `./run.sh experiments marginal_likelihood` installs."""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

pytest.importorskip("laplace", reason="laplace-torch is missing: see requirements/experiments.txt")

from laplace import Laplace, marglik_training
from laplace.curvature import CurvlinopsGGN

from experiments.laplace_backend import KFACGGN, KFACExpandGGN, KFACReduceGGN

BACKENDS = {"expand": KFACExpandGGN, "reduce": KFACReduceGGN}


def convolutional_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(3, 4, 3, stride=2, bias=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Tanh(),
        nn.Linear(5, 3),
    ).double()


def data(likelihood: str, batch_size: int, n: int = 11) -> DataLoader:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 1, 6, 6, generator=generator, dtype=torch.float64)
    y = torch.randint(3, (n,), generator=generator)
    if likelihood == "regression":
        y = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def fitted(model: nn.Module, loader: DataLoader, likelihood: str, backend: type, **more) -> Laplace:
    posterior = Laplace(
        model, likelihood, "all", "kron", backend=backend, prior_precision=0.7, **more
    )
    posterior.fit(loader)
    return posterior


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
@pytest.mark.parametrize("batch_size", [11, 4])
@pytest.mark.parametrize("approx", ["expand", "reduce"])
def test_same_marginal_likelihood_and_predictions_as_the_packages_own_exact_ggn(
    likelihood: str, batch_size: int, approx: str
) -> None:
    loader = data(likelihood, batch_size)
    ours = fitted(convolutional_net(), loader, likelihood, BACKENDS[approx])
    theirs = fitted(
        convolutional_net(),
        loader,
        likelihood,
        CurvlinopsGGN,
        asdl_fisher_kwargs={"kfac_approx": approx},
    )
    precision = torch.linspace(0.1, 3, 7, dtype=torch.float64)
    torch.testing.assert_close(
        ours.log_marginal_likelihood(precision),
        theirs.log_marginal_likelihood(precision),
        rtol=0,
        atol=1e-5,
    )
    x = loader.dataset.tensors[0][:5]
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=1e-8)


def test_marginal_likelihood_training_of_the_package_runs_unchanged() -> None:
    model = convolutional_net()
    posterior, trained, margliks, losses = marglik_training(
        model,
        data("classification", 4),
        backend=KFACReduceGGN,
        n_epochs=6,
        marglik_frequency=2,
        n_hypersteps=20,
        optimizer_kwargs={"lr": 1e-2},
    )
    assert trained is model
    assert len(losses) == 6
    assert len(margliks) == 60
    assert margliks[-1] < margliks[0]  # negative log marginal likelihoods
    assert posterior.prior_precision.unique().numel() == 7


class WithBareParameters(nn.Module):
    """A net with a scalar, a vector, a LayerNorm and an embedding beside a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(6, 4)
        self.scale = nn.Parameter(torch.tensor([1.3]))
        self.shift = nn.Parameter(torch.randn(4))
        self.norm = nn.LayerNorm(4)
        self.out = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.embed(x) * self.scale + self.shift)
        return self.out(self.norm(y)).mean(1)


def exact_diagonal(model: nn.Module, x: Tensor, likelihood: str) -> dict[str, Tensor]:
    """Diagonal of the summed GGN by Jacobians of the whole batch."""
    names = [name for name, _ in model.named_parameters()]

    def outputs(*values: Tensor) -> Tensor:
        return torch.func.functional_call(model, dict(zip(names, values, strict=True)), (x,))

    values = tuple(p.detach() for p in model.parameters())
    jacobians = torch.func.jacrev(outputs, tuple(range(len(values))))(*values)
    p = model(x).detach().softmax(-1)
    hessian = torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)
    if likelihood == "regression":
        hessian = torch.eye(3, dtype=p.dtype).expand(len(x), 3, 3)
    return {
        name: torch.einsum("nip,nij,njp->p", j.flatten(2), hessian, j.flatten(2))
        for name, j in zip(names, jacobians, strict=True)
    }


@pytest.mark.parametrize("likelihood", ["classification", "regression"])
def test_parameters_outside_layers_get_the_exact_diagonal(likelihood: str) -> None:
    model = WithBareParameters().double()
    x = torch.randint(6, (37, 5), generator=torch.Generator().manual_seed(0))
    y = torch.randn(37, 3).double() if likelihood == "regression" else torch.randint(3, (37,))
    kron = KFACReduceGGN(model, likelihood).kron(x, y, N=37)[1]
    expected = exact_diagonal(model, x, likelihood)
    names = [name for name, _ in model.named_parameters()]
    for name in ("scale", "shift", "norm.weight", "norm.bias"):
        (block,) = kron.kfacs[names.index(name)]
        torch.testing.assert_close(block, torch.diag(expected[name]))
    # The order of an embedding's factors is that of its weight.
    assert [f.shape for f in kron.kfacs[names.index("embed.weight")]] == [(6, 6), (4, 4)]
    assert all(p.requires_grad for p in model.parameters())


def test_an_embeddings_factors_are_its_block_of_the_ggn() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()
    x = torch.arange(5)[:, None].repeat(3, 1)  # one position: expand and reduce are the same

    class Squeezed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = model

        def forward(self, tokens: Tensor) -> Tensor:
            return self.net(tokens).squeeze(1)

    kron = KFACExpandGGN(Squeezed(), "regression").kron(x, torch.zeros(15, 3).double(), N=15)[1]
    # Every token equally often and a linear net: Kronecker-factored exactly.
    weight = model[1].weight.detach()
    expected = torch.kron(3 * torch.eye(5, dtype=torch.float64), weight.mT @ weight)
    torch.testing.assert_close(torch.kron(*kron.kfacs[0]), expected)


def test_other_parameters_can_be_left_to_the_prior() -> None:
    model = WithBareParameters().double()
    x, y = torch.randint(6, (4, 5)), torch.randint(3, (4,))
    kron = KFACReduceGGN(model, "classification", other_parameters="zero").kron(x, y, N=4)[1]
    for (name, _), factors in zip(model.named_parameters(), kron.kfacs, strict=True):
        zero = all(not factor.any() for factor in factors)
        assert zero == (not name.startswith(("embed", "out"))), name


def test_sampled_labels_approach_the_exact_ggn_and_differ_between_calls() -> None:
    loader = data("classification", 11)
    x, y = loader.dataset.tensors
    model = convolutional_net()
    exact = KFACExpandGGN(model, "classification").kron(x, y, N=11)[1]
    sampled = KFACExpandGGN(model, "classification", stochastic=True, num_samples=250)
    first, second = (sampled.kron(x, y, N=11)[1] for _ in range(2))
    for e, a, b in zip(exact.kfacs, first.kfacs, second.kfacs, strict=True):
        assert (a[0] - e[0]).norm() < 0.3 * e[0].norm()
        assert not torch.equal(a[0], b[0])


def test_last_layer_and_frozen_parameters() -> None:
    loader = data("classification", 4)
    models = []
    for _ in range(2):
        model = convolutional_net()
        model[0].requires_grad_(False)
        models.append(model)
    ours = fitted(models[0], loader, "classification", KFACExpandGGN)
    theirs = fitted(models[1], loader, "classification", CurvlinopsGGN)
    torch.testing.assert_close(ours.log_marginal_likelihood(), theirs.log_marginal_likelihood())
    last = [
        Laplace(convolutional_net(), "classification", "last_layer", "kron", backend=backend)
        for backend in (KFACExpandGGN, CurvlinopsGGN)
    ]
    for posterior in last:
        posterior.fit(loader)
    torch.testing.assert_close(
        last[0].log_marginal_likelihood(), last[1].log_marginal_likelihood(), rtol=0, atol=1e-5
    )


def test_what_does_not_fit_is_refused_with_advice() -> None:
    x, y = torch.randn(2, 4, 5, 5), torch.randint(4, (2,))
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NotImplementedError, match=r"layer '0' has groups.*Freeze it"):
        KFACExpandGGN(grouped, "classification").kron(x, y, N=2)
    transposed = nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(NotImplementedError, match="is a transposed convolution"):
        KFACExpandGGN(transposed, "classification").kron(x, y, N=2)
    with pytest.raises(ValueError, match="take KFACExpandGGN or KFACReduceGGN"):
        KFACGGN(grouped, "classification")
    with pytest.raises(ValueError, match="'diagonal' or 'zero', not 'none'"):
        KFACExpandGGN(grouped, "classification", other_parameters="none")


def test_a_bare_matrix_becomes_a_product_with_a_warning() -> None:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(1, 5, 4).double())
            self.out = nn.Linear(4, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.out(torch.tanh(x + self.positions)).mean(1)

    model = Positions()
    x, y = torch.randn(3, 5, 4).double(), torch.randint(3, (3,))
    with pytest.warns(UserWarning, match="'positions'.*product of its row and column sums"):
        kron = KFACReduceGGN(model, "classification").kron(x, y, N=3)[1]
    first, second = kron.kfacs[0]
    expected = exact_diagonal(model, x, "classification")["positions"]
    torch.testing.assert_close(torch.kron(first, second).diagonal(), expected)  # one row: exact
