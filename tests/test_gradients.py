"""Every gradient has the mean of a hand-written reference, off the posterior and at it.

Each in every situation is in `test_matrix.py`; here are all orders, particles in a loop, outer
draws and `bound="joint"`, with guides of modules.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Literal

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn

import pvi
from pvi.engine.gradients import leave_one_out

pytestmark = pytest.mark.usefixtures("isolated")

X = [1.0, -0.5, 2.0]
NOISE = 0.7
NUM = 4  # particles
Z = 4.0  # standard errors: of some 60 comparisons none is expected beyond


def local_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


def nested_model(x: Tensor) -> None:
    t = pyro.sample("t", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(t, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


class LocalGuide(nn.Module):
    """q(z_i) = N(a x_i + b, s)."""

    def __init__(self, a: float = 0.3, b: float = 0.1, s: float = 0.8):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([a, b, math.log(s)]))

    def forward(self, x: Tensor) -> None:
        a, b, s = self.raw
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x + b, s.exp()))


class NestedGuide(nn.Module):
    """q(t) = N(m, r), q(z_i | t) = N(a x_i + b t, s)."""

    def __init__(
        self, m: float = 0.2, r: float = 0.5, a: float = 0.3, b: float = 0.4, s: float = 0.8
    ):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([m, math.log(r), a, b, math.log(s)]))

    def forward(self, x: Tensor) -> None:
        m, r, a, b, s = self.raw
        t = pyro.sample("t", dist.Normal(m, r.exp()))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(a * x + b * t, s.exp()))


def order_mean(log_w: Tensor, alpha: float) -> Tensor:
    """Written anew for the reference: order-alpha mean over the first dimension."""
    if alpha == 1.0:
        return log_w.mean(0)
    return ((1 - alpha) * log_w).exp().mean(0).log() / (1 - alpha)


def local_reference(raw: Tensor, alpha: float, draws: int) -> Tensor:
    a, b, s = raw
    x = torch.tensor(X)
    q = dist.Normal(a * x + b, s.exp())
    z = q.rsample((NUM, draws))
    log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(x) - q.log_prob(z)
    return order_mean(log_w, alpha).sum(-1).mean()


def nested_reference(raw: Tensor, alpha: float, draws: int) -> Tensor:
    m, r, a, b, s = raw
    x = torch.tensor(X)
    outer = dist.Normal(m, r.exp())
    t = outer.rsample((draws, 1))
    q = dist.Normal(a * x + b * t, s.exp())
    z = q.rsample((NUM,))
    log_w = dist.Normal(t, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(x) - q.log_prob(z)
    top = (dist.Normal(0.0, 1.0).log_prob(t) - outer.log_prob(t)).squeeze(-1)
    return (top + order_mean(log_w, alpha).sum(-1)).mean()


def reference(value: Callable, raw: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """Mean gradient of the loss and its standard error, from 20 batches of 10,000 draws."""
    return _reference(value, tuple(raw.tolist()), alpha)


@cache
def _reference(value: Callable, raw: tuple[float, ...], alpha: float) -> tuple[Tensor, Tensor]:
    grads = []
    for _ in range(20):
        leaf = torch.tensor(raw).requires_grad_()
        (grad,) = torch.autograd.grad(-value(leaf, alpha, 10_000), leaf)
        grads.append(grad)
    stacked = torch.stack(grads)
    return stacked.mean(0), stacked.std(0) / math.sqrt(len(grads))


def estimate(
    objective: pvi.Objective, model: Callable, guide: nn.Module, x: Tensor, repeats: int
) -> tuple[Tensor, Tensor]:
    """Mean gradient of the loss and its standard error over evaluations."""
    grads = []
    for _ in range(repeats):
        (grad,) = torch.autograd.grad(objective(model, guide)(x), guide.raw)
        grads.append(grad)
    stacked = torch.stack(grads)
    return stacked.mean(0), stacked.std(0) / math.sqrt(repeats)


def assert_same_mean(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    error = (found[1] ** 2 + expected[1] ** 2).sqrt()
    assert (found[0] - expected[0]).abs().le(Z * error).all(), (found, expected)


@pytest.mark.parametrize("gradient", ["reparam", "path", "score"])
@pytest.mark.parametrize(
    ("alpha", "batched"), [(1.0, True), (0.0, True), (0.5, True), (-0.5, True), (0.5, False)]
)
def test_local_gradients(alpha: float, batched: bool, gradient: str) -> None:
    """Many copies of the data in one plate make one evaluation an average over many."""
    guide, copies = LocalGuide(), 2_000
    objective = pvi.RenyiELBO(alpha, NUM, gradient=gradient, vectorize_particles=batched)
    mean, error = estimate(objective, local_model, guide, torch.tensor(X).repeat(copies), 20)
    expected = reference(local_reference, guide.raw, alpha)
    assert_same_mean((mean / copies, error / copies), expected)
    assert expected[0].abs().gt(20 * error / copies).any()  # a zero gradient would fail


@pytest.mark.parametrize(("gradient", "alpha"), [("path", 0.0), ("score", 0.0), ("score", 1.0)])
def test_nested_gradients(gradient: str, alpha: float) -> None:
    """Global and local latents: the local mean inside, the mean of two global draws outside."""
    guide = NestedGuide()
    objective = pvi.RenyiELBO(alpha, NUM, gradient=gradient, num_outer=2)
    found = estimate(objective, nested_model, guide, torch.tensor(X), 200)
    expected = reference(nested_reference, guide.raw, alpha)
    assert_same_mean(found, expected)
    assert expected[0].abs().gt(4 * found[1]).any()


def joint_reference(raw: Tensor, alpha: float, draws: int) -> Tensor:
    """`local_model` with NUM rows, whole draws weighted."""
    a, b, s = raw
    x = torch.tensor([*X, 0.3])
    q = dist.Normal(a * x + b, s.exp())
    z = q.rsample((NUM, draws))
    log_w = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(z, NOISE).log_prob(x) - q.log_prob(z)
    return order_mean(log_w.sum(-1), alpha).mean()


@pytest.mark.parametrize("batched", [True, False], ids=["batched", "looped"])
@pytest.mark.parametrize("gradient", ["reparam", "path", "score"])
@pytest.mark.parametrize("alpha", [0.0, pytest.param(0.5, marks=pytest.mark.slow)])
def test_joint_gradients(alpha: float, gradient: str, batched: bool) -> None:
    """Whole draws are weighted, here of as many rows as particles."""
    repeats = 400 if batched else 100
    options = {"gradient": gradient, "vectorize_particles": batched, "bound": "joint"}
    objective = pvi.RenyiELBO(alpha, NUM, **options)
    found = estimate(objective, local_model, LocalGuide(), torch.tensor([*X, 0.3]), repeats)
    expected = reference(joint_reference, LocalGuide().raw, alpha)
    assert_same_mean(found, expected)
    assert expected[0].abs().gt(4 * found[1]).any()


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5])
def test_path_is_zero_at_the_posterior(alpha: float) -> None:
    """Not only in the mean: every draw's path gradient vanishes where q is the posterior."""
    shrink = 1 / (1 + NOISE**2)
    guide = LocalGuide(shrink, 0.0, math.sqrt(1 - shrink))
    x = torch.tensor(X)
    path = pvi.RenyiELBO(alpha, NUM, gradient="path")
    (grad,) = torch.autograd.grad(path(local_model, guide)(x), guide.raw)
    assert grad.abs().max() < 1e-12
    plain = pvi.RenyiELBO(alpha, NUM, gradient="reparam")
    (noisy,) = torch.autograd.grad(plain(local_model, guide)(x), guide.raw)
    assert noisy.abs().max() > 1e-3


def exact_nested_guide() -> NestedGuide:
    """The posterior of the nested model, which has the guide's form."""
    variance = 1 + NOISE**2
    precision = 1 + len(X) / variance
    shrink = 1 / variance
    mean = sum(X) / variance / precision
    return NestedGuide(mean, precision**-0.5, shrink, 1 - shrink, math.sqrt(1 - shrink))


@pytest.mark.parametrize("alpha", [1.0, 0.0, 0.5])
def test_nested_path_is_zero_at_the_posterior(alpha: float) -> None:
    guide = exact_nested_guide()
    objective = pvi.RenyiELBO(alpha, NUM, gradient="path")
    (grad,) = torch.autograd.grad(objective(nested_model, guide)(torch.tensor(X)), guide.raw)
    assert grad.abs().max() < 1e-12


def coin_model(x: Tensor) -> None:
    with pyro.plate("data", len(x)):
        k = pyro.sample("k", dist.Bernoulli(0.4))
        z = pyro.sample("z", dist.Normal(2 * k, 1.0))
        pyro.sample("x", dist.Normal(z, NOISE), obs=x)


class CoinGuide(nn.Module):
    """A discrete site with score gradients above a reparameterised one."""

    def __init__(self) -> None:
        super().__init__()
        self.raw = nn.Parameter(torch.tensor([0.2, 0.3, 0.5, -0.2]))

    def forward(self, x: Tensor) -> None:
        logit, a, b, s = self.raw
        with pyro.plate("data", len(x)):
            k = pyro.sample("k", dist.Bernoulli(logits=logit * x))
            pyro.sample("z", dist.Normal(a * x + b * k, s.exp()))


def coin_elbo(raw: Tensor, alpha: float, draws: int) -> Tensor:
    """The coin summed out by hand."""
    logit, a, b, s = raw
    x = torch.tensor(X)
    total = torch.zeros(())
    for k in (torch.zeros(()), torch.ones(())):
        q = dist.Normal(a * x + b * k, s.exp())
        z = q.rsample((draws,))
        coin = dist.Bernoulli(logits=logit * x).log_prob(k.expand_as(x))
        log_w = dist.Bernoulli(0.4).log_prob(k) + dist.Normal(2 * k, 1.0).log_prob(z)
        log_w = log_w + dist.Normal(z, NOISE).log_prob(x) - q.log_prob(z) - coin
        total = total + (coin.exp() * log_w.mean(0)).sum()
    return total


@pytest.mark.parametrize("kl", ["sample", "exact"])
@pytest.mark.parametrize("num_particles", [1, NUM])
def test_auto_mixes_score_and_reparam(num_particles: int, kl: Literal["sample", "exact"]) -> None:
    guide, copies = CoinGuide(), 2_000
    objective = pvi.ELBO(num_particles, kl=kl)
    x = torch.tensor(X).repeat(copies)
    objective(coin_model, guide)(x)  # the first step sets the moving baseline of one particle
    mean, error = estimate(objective, coin_model, guide, x, 20)
    assert_same_mean((mean / copies, error / copies), reference(coin_elbo, guide.raw, 1.0))


def test_explain_says_which_gradient_a_site_gets() -> None:
    rows = pvi.ELBO(2).explain(coin_model, CoinGuide(), torch.tensor(X)).rows
    assert {row[0]: row[4] for row in rows} == {"k": "score", "z": "reparam", "x": "-"}


@pytest.mark.parametrize("gradient", ["reparam", "path"])
def test_discrete_sites_need_score(gradient: str) -> None:
    with pytest.raises(pvi.ObjectiveError, match=r"'k'.*gradient='auto'"):
        pvi.ELBO(2, gradient=gradient)(coin_model, CoinGuide())(torch.tensor(X))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: pvi.ELBO(kl="exact", gradient="path"), "delete the gradient"),
        (lambda: pvi.ELBO(beta={"z": 0.5}, gradient="path"), "one common beta"),
        (lambda: pvi.ELBO(gradient="magic"), "gradient must be one of"),
    ],
)
def test_rejected_combinations(make: Callable, message: str) -> None:
    with pytest.raises(pvi.ObjectiveError, match=message):
        make()


def test_leave_one_out_at_alpha_one_is_reinforce() -> None:
    log_w = torch.randn(5, 3)
    others = (log_w.sum(0) - log_w) / 4
    torch.testing.assert_close(leave_one_out(log_w, 1.0), (log_w - others) / 5)


def test_a_zeroed_gradient_is_noticed() -> None:
    """The comparison has teeth: a gradient of zero does not pass for the reference."""
    guide = LocalGuide()
    expected = reference(local_reference, guide.raw, 0.0)
    with pytest.raises(AssertionError):
        assert_same_mean((torch.zeros(3), expected[1]), expected)


def test_path_sees_parameters_that_pyro_does_not() -> None:
    """A guide may hold its parameters in a closure: they are frozen all the same."""
    raw = torch.tensor([0.3, 0.1, -0.2], requires_grad=True)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(raw[0] * x + raw[1], raw[2].exp()))

    module = LocalGuide(0.3, 0.1, math.exp(-0.2))
    objective = pvi.IWAE(NUM, gradient="path")
    x = torch.tensor(X)
    torch.manual_seed(1)
    (closure,) = torch.autograd.grad(objective(local_model, guide)(x), raw)
    torch.manual_seed(1)
    (held,) = torch.autograd.grad(objective(local_model, module)(x), module.raw)
    torch.testing.assert_close(closure, held)
    assert raw.requires_grad


def test_path_with_dropout_uses_the_same_mask() -> None:
    """The second run of the guide repeats the first one's random numbers."""
    dropout = nn.Dropout(0.5)
    guide = LocalGuide()

    def noisy(x: Tensor) -> None:
        a, b, s = guide.raw
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(dropout(a * x + b), s.exp()))

    for gradient in ("reparam", "path"):
        torch.manual_seed(3)
        value = pvi.ELBO(gradient=gradient)(local_model, noisy)(torch.tensor(X))
        if gradient == "reparam":
            expected = value.detach()
    torch.testing.assert_close(value.detach(), expected)
