"""Bayesian linear regression by other packages, each as its documentation trains a network.

A function per package: the parameters that it ends at and the bound that it reports, for the rows
x `(N, p)`, y `(N,)`, noise of a known sd, weights and bias N(0, 1) a priori. All take the same
number of steps of Adam.
"""

import importlib.metadata
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

STEPS, RATE = 600, 0.05
LAST = 150  # losses of which the reported bound is the mean


@dataclass(frozen=True)
class Found:
    """Means and sds of weights and bias `(p + 1,)`, and the bound that was reported, nats."""

    mean: Tensor
    sd: Tensor
    reported: float


def negative_log_density(noise: float) -> Callable[[Tensor, Tensor], Tensor]:
    def loss(f: Tensor, y: Tensor) -> Tensor:
        return -torch.distributions.Normal(f.squeeze(-1), noise).log_prob(y).sum()

    return loss


def descend(parameters: Any, loss: Callable[[], Tensor]) -> float:
    """Adam with a rate that falls along a cosine; minus the mean of the last losses."""
    optimizer = torch.optim.Adam(parameters, lr=RATE)
    rates = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        rates.step()
        losses.append(float(value))
    return -sum(losses[-LAST:]) / LAST


def bayesian_torch(x: Tensor, y: Tensor, noise: float, particles: int) -> Found:
    """`dnn_to_bnn` of a linear layer; `get_kl_loss` is added to the summed log densities."""
    from bayesian_torch.models.dnn_to_bnn import dnn_to_bnn, get_kl_loss

    options = {
        "prior_mu": 0.0,
        "prior_sigma": 1.0,
        "posterior_mu_init": 0.0,
        "posterior_rho_init": -3.0,
        "type": "Reparameterization",
        "moped_enable": False,
        "moped_delta": 0.5,
    }
    net, density = nn.Sequential(nn.Linear(x.shape[1], 1)), negative_log_density(noise)
    dnn_to_bnn(net, options)

    def loss() -> Tensor:
        terms = [density(net(x), y) for _ in range(particles)]
        return torch.stack(terms).mean() + get_kl_loss(net)

    reported = descend(net.parameters(), loss)
    layer: Any = net[0]
    mean = torch.cat([layer.mu_weight[0], layer.mu_bias])
    rho = torch.cat([layer.rho_weight[0], layer.rho_bias])
    return Found(mean.detach(), torch.log1p(rho.exp()).detach(), reported)


def blitz(x: Tensor, y: Tensor, noise: float, particles: int) -> Found:
    """`sample_elbo` of a `BayesianLinear`, with the complexity cost in full."""
    from blitz.modules import BayesianLinear
    from blitz.utils import variational_estimator

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = BayesianLinear(x.shape[1], 1, prior_sigma_1=1.0, prior_pi=1.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)

    net: Any = variational_estimator(Net)()
    given = {"inputs": x, "labels": y, "criterion": negative_log_density(noise)}

    def loss() -> Tensor:
        return net.sample_elbo(**given, sample_nbr=particles, complexity_cost_weight=1.0)

    reported = descend(net.parameters(), loss)
    mean = torch.cat([net.layer.weight_mu[0], net.layer.bias_mu])
    rho = torch.cat([net.layer.weight_rho[0], net.layer.bias_rho])
    return Found(mean.detach(), torch.log1p(rho.exp()).detach(), reported)


def tyxe(x: Tensor, y: Tensor, noise: float, particles: int, local: bool = False) -> Found:
    """`VariationalBNN.fit` with `AutoNormal`, an iid prior and a homoscedastic likelihood."""
    from functools import partial

    import pyro
    import tyxe as package

    pyro.clear_param_store()
    net = nn.Sequential(nn.Linear(x.shape[1], 1))
    likelihood = package.likelihoods.HomoskedasticGaussian(len(x), scale=noise)
    guide = partial(package.guides.AutoNormal, init_scale=0.05)
    prior = package.priors.IIDPrior(pyro.distributions.Normal(0.0, 1.0))
    bnn = package.VariationalBNN(net, prior, likelihood, guide)
    decay = {"lr": RATE, "lrd": 1e-3 ** (1 / STEPS)}
    elbos: list[float] = []

    def record(_: Any, epoch: int, loss: float) -> None:
        elbos.append(-loss)

    batches = [((x,), y[:, None])]
    with package.poutine.local_reparameterization() if local else nothing():
        optimizer = pyro.optim.ClippedAdam(decay)
        bnn.fit(batches, optimizer, STEPS, record, num_particles=particles)
    fitted: Any = bnn.net_guide
    parts = [(fitted.get_loc(n), fitted.get_scale(n)) for n in ("0.weight", "0.bias")]
    mean, sd = (torch.cat([part.flatten() for part in each]) for each in zip(*parts, strict=True))
    pyro.clear_param_store()
    return Found(mean.detach(), sd.detach(), sum(elbos[-LAST:]) / LAST)


@contextmanager
def nothing() -> Iterator[None]:
    yield


PEERS: dict[str, tuple[str, Callable[..., Found]]] = {
    "bayesian-torch": ("bayesian-torch", bayesian_torch),
    "blitz": ("blitz-bayesian-pytorch", blitz),
    "TyXe": ("tyxe", tyxe),
    "TyXe, local reparam": ("tyxe", lambda *given: tyxe(*given, local=True)),
}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(name: str, x: Tensor, y: Tensor, noise: float, particles: int) -> Found | str:
    """What a peer finds, or why it does not: not installed, or the error it ends with."""
    package, function = PEERS[name]
    if version(package) is None:
        return "not installed"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(x.float(), y.float(), noise, particles)
    except Exception as error:  # a peer's failure is a result
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:100]
