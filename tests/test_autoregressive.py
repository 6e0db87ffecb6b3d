"""Autoregressive networks, likelihoods and models, and flows of data: order, densities, draws."""

import math
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import pvi
from pvi.errors import DataError, ModelError
from pvi.models.vae import (
    VAE,
    AutoregressiveLikelihood,
    AutoregressiveModel,
    Bernoulli,
    Categorical,
    FlowModel,
    Gaussian,
)
from pvi.models.vae.flow_model import Cell
from pvi.nn import MADE, PixelCNN
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")

NETWORKS: dict[str, Callable[[], Any]] = {
    "made": lambda: MADE(6, 2, (24, 24)),
    "made, classes": lambda: MADE((2, 3), 1, (30,), features=3, context=2),
    "grey": lambda: PixelCNN((1, 3, 4), 2, 8, 3),
    "colours": lambda: PixelCNN((3, 2, 3), 2, 18, 4, features=2, context=3),
    "wide": lambda: PixelCNN((2, 4, 3), 1, 8, 3, 5),
}


def wild(module: nn.Module) -> Any:
    """Larger weights, so that every dependence shows."""
    with torch.no_grad():
        for p in module.parameters():
            p.mul_(3.0)
    return module


def inputs(network: Any, *batch: int) -> tuple[Tensor, Tensor | None]:
    features = (network.features,) if network.features > 1 else ()
    context = randn(*batch, network.context, *network.shape, seed=3).double()
    return randn(*batch, *network.shape, *features).double(), context if network.context else None


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_follow_the_elements_before_and_only_those(name: str) -> None:
    torch.manual_seed(0)
    network = wild(NETWORKS[name]())
    x, context = inputs(network, 2, 4)
    n, y = math.prod(network.shape), network(x, context)
    assert y.shape == (2, 4, network.width, *network.shape)
    one = network(x[1, 2], None if context is None else context[1, 2])
    assert torch.allclose(one, y[1, 2], atol=EXACT)
    moved = torch.zeros(n, n, dtype=torch.bool)
    for k, j in enumerate(network.order.tolist()):
        other = x.reshape(8, n, -1).clone()
        other[:, j] += 1.0
        change = (network(other.reshape(x.shape), context) != y).reshape(8, network.width, n)
        moved[k] = change.flatten(0, 1).any(0)[network.order]
    assert torch.equal(moved, torch.ones(n, n, dtype=torch.bool).triu(1))


@pytest.mark.parametrize("name", ["made, classes", "colours"])
def test_context_reaches_all_outputs(name: str) -> None:
    torch.manual_seed(0)
    network = NETWORKS[name]()
    x, context = inputs(network, 4)
    assert context is not None
    assert (network(x, context + 1.0) != network(x, context)).any(0).all()
    several = torch.stack([context, context + 1.0])
    assert torch.allclose(network(x, several)[1], network(x, context + 1.0), atol=EXACT)
    with pytest.raises(ModelError, match="got none"):
        network(x)


def test_networks_refuse() -> None:
    with pytest.raises(ModelError, match=r"inputs of shape \(6,\) got a tensor of shape \(2, 5\)"):
        MADE(6)(torch.zeros(2, 5))
    with pytest.raises(ModelError, match=r"context=0 got one of shape \(2, 1, 6\)"):
        MADE(6)(torch.zeros(2, 6), torch.zeros(2, 1, 6))
    with pytest.raises(ModelError, match="hidden layer"):
        MADE(6, hidden=())
    with pytest.raises(ModelError, match="odd kernel"):
        PixelCNN((1, 3, 3), kernel=2)


MODELS: dict[str, Callable[[], AutoregressiveModel]] = {
    "made": lambda: AutoregressiveModel(6, network=MADE(6, 1, (16, 16))),
    "pixels": lambda: AutoregressiveModel((1, 2, 3), network=PixelCNN((1, 2, 3), 1, 8, 2)),
    "colours": lambda: AutoregressiveModel((2, 1, 3), network=PixelCNN((2, 1, 3), 1, 8, 2)),
    "classes": lambda: AutoregressiveModel((2, 2), likelihood=Categorical(3)),
}


def grid(model: Any, number: int) -> Tensor:
    """All data of so many values for each element."""
    values = product(range(number), repeat=math.prod(model.shape))
    return torch.tensor(list(values), dtype=torch.float64).reshape(-1, *model.shape)


@pytest.mark.parametrize("name", MODELS)
def test_probabilities_sum_to_one_and_draws_follow_them(name: str) -> None:
    torch.manual_seed(1)
    model = wild(MODELS[name]())
    everything = grid(model, 3 if name == "classes" else 2)
    found = model.score_samples(everything)
    p, number = found.log_evidence.exp(), 20_000
    assert abs(float(p.sum()) - 1.0) < EXACT and found.total_se == 0.0
    drawn = model.sample(number, seed=2)
    assert drawn.shape == (number, *model.shape)
    same = (drawn.unsqueeze(1) == everything).flatten(2).all(-1).double()
    assert bool((same.sum(1) == 1.0).all())
    counts = same.sum(0)
    statistic = ((counts - number * p) ** 2 / (number * p)).sum()
    dof = len(p) - 1
    assert statistic < dof + 4.0 * math.sqrt(2.0 * dof), statistic  # four sds of chi-squared
    independent = [x.mean() for x in (drawn > 0).double().flatten(1).T]
    assert name == "classes" or not torch.allclose(p, _products(everything, independent), atol=0.01)


def _products(x: Tensor, means: list[Tensor]) -> Tensor:
    """Probabilities, if the elements were independent."""
    m = torch.stack(means)
    return torch.where(x.flatten(1) > 0, m, 1.0 - m).prod(1)


def test_the_bound_is_the_log_evidence_and_a_fit_finds_its_maximum() -> None:
    """Correlated bits: the best mean log probability is minus the entropy of the frequencies."""
    torch.manual_seed(0)
    first = torch.bernoulli(torch.full((256, 1), 0.4))
    flips = torch.bernoulli(torch.full((256, 2), 0.2))
    x = torch.cat([first, (first + flips) % 2], 1)
    model = AutoregressiveModel(3, network=MADE(3, 1, (32,)))
    model.fit(x, batch_size=256, steps=300, lr=0.02, seed=0)
    shares = torch.unique(x, dim=0, return_counts=True)[1] / len(x)
    entropy = float(torch.special.entr(shares).sum())
    assert -entropy - 0.002 < model.score(x) <= -entropy + EXACT
    fit = model.result()
    bound = pvi.ELBO().bound(model.model, model.guide, x)
    assert bound == pytest.approx(float(model.score_samples(x).total), abs=1e-9)
    assert fit.evidence().total == pytest.approx(bound, abs=1e-9)
    assert "no latent site" in str(fit.diagnose(num_draws=50))
    assert "observed_data" in fit.to_arviz(3).groups()
    halves = [pvi.ELBO().bound(model.model, model.guide, part) for part in x.split(128)]
    assert sum(halves) == pytest.approx(bound, abs=1e-9)


def test_models_without_latents_refuse_what_needs_them() -> None:
    model = AutoregressiveModel(3)
    x = torch.zeros(4, 3)
    for call in (model.encode, model.decode, model.reconstruct):
        with pytest.raises(ModelError, match="has no latents"):
            call(x)
    with pytest.raises(ModelError, match="has no latents"):
        model.sample(2, mean=True)
    with pytest.raises(DataError, match="0 or 1"):
        model.fit(x + 0.5, steps=1)


def decoder(latents: int = 1, **options: Any) -> VAE:
    torch.manual_seed(0)
    likelihood = AutoregressiveLikelihood(
        (1, 2, 2), network=PixelCNN((1, 2, 2), 1, 6, 2, context=1)
    )
    model = VAE((1, 2, 2), latents, likelihood=likelihood, hidden=(8,), **options)
    wild(wild(model.decoder))
    wild(model.likelihood)
    return model


def test_autoregressive_likelihood_in_a_vae() -> None:
    """The log evidence by quadrature over one latent: above the bound, found by its weights."""
    model = decoder()
    x = grid(model, 2)[[0, 5, 9, 15]]
    z = torch.linspace(-8.0, 8.0, 4001).unsqueeze(-1)
    with torch.no_grad():
        fn = model.decoded(z.unsqueeze(1))
        assert fn.batch_shape == (4001, 1)
        log_p = fn.log_prob(x) + torch.distributions.Normal(0.0, 1.0).log_prob(z)
        exact = log_p.logsumexp(0) + math.log(16.0 / 4000)
        everything = model.decoded(z[2000:2001]).log_prob(grid(model, 2)).exp().sum()
        assert abs(float(everything) - 1.0) < EXACT
        bounds = []
        for objective in (pvi.ELBO(2000), pvi.TraceMeanFieldELBO(2000), pvi.IWAE(2000)):
            torch.manual_seed(3)
            bounds.append(objective.bound(model.model, model.guide, x))
        torch.manual_seed(3)
        z = model.encoded(x).rsample((2000,))
        ratio = model.decoded(z).log_prob(x) + model.prior(model.inferred).log_prob(z)
        ratio = ratio - model.encoded(x).log_prob(z)
    assert bounds[0] == pytest.approx(float(ratio.sum(1).mean()), abs=1e-8)
    se = float(ratio.sum(1).std()) / math.sqrt(2000)
    assert bounds[1] == pytest.approx(bounds[0], abs=4 * se)
    assert bounds[0] + 4 * se < float(exact.sum()) - 0.01
    found = model.score_samples(x, num_samples=4000, seed=1)
    assert bool(((found.log_evidence - exact).abs() < 4 * found.se + 1e-6).all())
    assert bounds[2] > bounds[0]


def test_reconstructions_and_samples_are_draws() -> None:
    model = decoder()
    x = grid(model, 2)
    assert model.encode(x).shape == (16, 1)
    shown = model.sample(200, mean=True, seed=0)
    assert shown.shape == (200, 1, 2, 2) and set(shown.unique().tolist()) <= {0.0, 1.0}
    assert model.reconstruct(x).shape == x.shape


def test_collapse_is_noted() -> None:
    """A decoder that needs no latents under a large beta; and one whose latents do something."""
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((64, 1, 2, 2), 0.5))
    model = decoder()
    options = {"batch_size": 64, "lr": 0.02, "seed": 0}
    with pytest.warns(UserWarning, match="latents 'z': collapsed"):
        model.fit(x, steps=150, objective=pvi.BetaELBO(20.0, kl="exact"), **options)
    assert any("collapsed" in note for note in model.result().notes)
    plain = VAE((1, 2, 2), 1, likelihood=Bernoulli())
    plain.fit(x, steps=1, **options)
    assert not plain.likelihood.watched and not plain.result().notes
    other = decoder()
    wild(wild(other.encoder))
    assert not other.fit(x, steps=1, batch_size=64, seed=0).result().notes


def test_parts_that_are_no_elements() -> None:
    with pytest.raises(ModelError, match="scale='learned'"):
        AutoregressiveModel(3, likelihood=Gaussian("optimal"))
    with pytest.raises(ModelError, match="likelihood of an element"):
        AutoregressiveLikelihood(3, AutoregressiveLikelihood(3))
    with pytest.raises(ModelError, match="it must end in 3 numbers"):
        AutoregressiveLikelihood(3)(torch.zeros(2, 4), (3,))


FLOW = {"transforms": 1, "hidden_features": (16,)}


def test_a_flow_finds_a_normal() -> None:
    x = randn(400, 2, seed=1).double() @ torch.tensor([[1.0, 0.8], [0.0, 0.6]]).double() + 3.0
    torch.manual_seed(0)
    model = FlowModel(2, options=FLOW, loc=3.0, scale=2.0)
    model.fit(x, batch_size=400, steps=300, lr=0.02, seed=0)
    best = MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0)).log_prob(x).mean()
    # the network may bend where the normal does not: 16 units gain less than this on 400 points
    assert -0.005 < model.score(x) - float(best) < 0.05
    side = torch.linspace(-4.0, 10.0, 281)
    points = torch.cartesian_prod(side, side)
    mass = model.score_samples(points).log_evidence.exp().sum() * 0.05**2
    assert abs(float(mass) - 1.0) < 1e-3
    assert torch.allclose(model.decode(model.encode(x)), x, atol=1e-8)
    drawn = model.sample(4000, seed=0)
    assert bool(((drawn.mean(0) - x.mean(0)).abs() < 5.0 * x.std(0) / math.sqrt(4000) + 0.02).all())


def test_uniform_dequantisation_is_a_bound() -> None:
    """One number, so that the probability of a cell is a sum over a fine grid."""
    torch.manual_seed(0)
    model = FlowModel(1, "NSF", {"transforms": 1, "hidden_features": (8,)}, levels=4)
    model.loc, model.scale = 2.0, 0.5  # dense in few cells: the bound is not tight
    x = torch.arange(4.0).unsqueeze(1)
    fine = (x + (torch.arange(2000) + 0.5) / 2000).unsqueeze(-1)
    with torch.no_grad():
        log_p = model.density.log_prob(fine)
        exact, elbo = log_p.logsumexp(1) - math.log(2000), log_p.mean(1)
        spread = log_p.std(1)
        bounds = [
            objective.bound(model.model, model.guide, x)
            for objective in (pvi.ELBO(4000), pvi.IWAE(4000))
        ]
    se = float(spread.square().sum().sqrt()) / math.sqrt(4000)
    assert bounds[0] == pytest.approx(float(elbo.sum()), abs=4 * se)
    assert bounds[0] < bounds[1] and float(elbo.sum()) < float(exact.sum()) - 0.1
    found = model.score_samples(x, num_samples=4000, seed=1)
    assert bool(((found.log_evidence - exact).abs() < 4 * found.se + 1e-3).all())
    drawn = model.sample(4000, seed=0)[:, 0]
    shares = torch.stack([(drawn == k).double().mean() for k in range(4)])
    p = exact.exp()
    assert bool(((shares - p).abs() < 4.5 * (p * (1 - p) / 4000).sqrt() + 1e-4).all())


def test_cells_stay_inside_when_rounded() -> None:
    cell = Cell(torch.tensor(255.0).float(), torch.tensor(256.0).float())
    torch.manual_seed(0)
    drawn = cell.expand([2, 500_000]).rsample()
    assert drawn.dtype == torch.float32 and bool((drawn.floor() == 255.0).all())


def test_flow_of_levels() -> None:
    torch.manual_seed(0)
    model = FlowModel((1, 2, 2), options=FLOW, levels=8)
    x = torch.randint(8, (64, 1, 2, 2))
    fit = model.fit(x, batch_size=32, steps=20, seed=0).result()
    assert np.isfinite(fit.history["bound"]).all()
    assert torch.equal(model.decode(model.encode(x)), x.double())
    with pytest.raises(DataError, match="whole numbers from 0 to 7"):
        model.fit(x + 1, steps=1)
    with pytest.raises(DataError, match="finite values"):
        FlowModel(2, options=FLOW).fit(torch.tensor([[0.0, math.nan]]), steps=1)
    with pytest.raises(ModelError, match="levels >= 2"):
        FlowModel(2, levels=1)


SAVED: dict[str, Callable[[], Any]] = {
    "pixels": MODELS["pixels"],
    "classes": MODELS["classes"],
    "decoder": decoder,
    "flow": lambda: FlowModel((1, 2, 3), options=FLOW, levels=2),
}


@pytest.mark.parametrize("name", SAVED)
def test_saved_without_code(name: str, tmp_path: Path) -> None:
    model = SAVED[name]()
    model.save(tmp_path / "model")
    again = type(model).load(tmp_path / "model")
    x = grid(model, 2)[:5]
    scores = [m.score_samples(x, num_samples=10, seed=0).log_evidence for m in (model, again)]
    assert torch.equal(*scores)
