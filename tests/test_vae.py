"""The VAE as a whole: probabilistic PCA in closed form, shapes, objectives, saving, refusals."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

import pvi
from pvi.errors import CheckpointError, DataError, FitError, ModelError
from pvi.models.vae import (
    VAE,
    Bernoulli,
    ConditionalVAE,
    FlowPosterior,
    FullCovariance,
    Gaussian,
    Vamp,
)
from pvi.nn import ConvDecoder, ConvEncoder
from tests.scenarios import EXACT, randn

pytestmark = pytest.mark.usefixtures("isolated")
DIM = 5


def linear(latents: int = 2) -> VAE:
    """A linear decoder, a linear encoder with a full covariance."""
    posterior = FullCovariance(latents)
    return VAE(
        DIM,
        latents,
        likelihood=Gaussian(),
        posterior=posterior,
        encoder=nn.Linear(DIM, posterior.width),
        decoder=nn.Linear(latents, DIM),
    )


def parameters(model: VAE) -> tuple[Tensor, Tensor, Tensor]:
    """W, b and the noise's variance of a linear model."""
    decoder, likelihood = model.decoder, model.likelihood
    assert isinstance(decoder, nn.Linear) and isinstance(likelihood, Gaussian)
    return decoder.weight.detach(), decoder.bias.detach(), (2 * likelihood.log_scale.detach()).exp()


def exact(model: VAE, x: Tensor) -> Tensor:
    """log N(x; b, W W' + s^2 I), of each datum."""
    w, b, s2 = parameters(model)
    return MultivariateNormal(b, w @ w.T + s2 * torch.eye(DIM)).log_prob(x)


def to_posterior(model: VAE) -> None:
    """Give the encoder the posterior: precision M = I + W'W / s^2, mean M^-1 W'(x - b) / s^2."""
    w, b, s2 = parameters(model)
    cov = torch.linalg.inv(torch.eye(w.shape[1]) + w.T @ w / s2)
    tril, d = torch.linalg.cholesky(cov), w.shape[1]
    rows, columns = torch.tril_indices(d, d)
    raw = tril.clone()
    raw.diagonal().copy_(torch.expm1(tril.diagonal() - 1e-4).log())
    gain, encoder = cov @ w.T / s2, model.encoder
    assert isinstance(encoder, nn.Linear)
    encoder.weight.data.zero_()
    encoder.weight.data[:d] = gain
    encoder.bias.data = torch.cat([-gain @ b, raw[rows, columns]])


def maximum(x: Tensor, latents: int) -> float:
    """The highest mean log likelihood (Tipping and Bishop 1999, eqs. 7 and 8)."""
    values = torch.linalg.eigvalsh(torch.cov(x.T, correction=0)).flip(0)
    s2 = values[latents:].mean()
    log_det = values[:latents].log().sum() + (DIM - latents) * s2.log()
    return float(-0.5 * (DIM * math.log(2 * math.pi) + log_det + DIM))


def pca_data(n: int = 300) -> Tensor:
    w = randn(2, DIM, seed=1).double()
    return 1.0 + randn(n, 2, seed=2).double() @ w + 0.5 * randn(n, DIM, seed=3).double()


@torch.no_grad()
def test_at_the_posterior_all_bounds_are_the_evidence() -> None:
    """With the exact posterior every weight is the evidence: no error is left."""
    model, x = linear(), randn(6, DIM).double()
    to_posterior(model)
    truth = exact(model, x)
    for objective in (pvi.ELBO(3), pvi.IWAE(5), pvi.RenyiELBO(0.5, 4)):
        assert objective.bound(model.model, model.guide, x) == pytest.approx(float(truth.sum()))
    found = model.score_samples(x, num_samples=10, seed=0)
    assert torch.allclose(found.log_evidence, truth, atol=1e-9)
    assert model.score(x, num_samples=10) == pytest.approx(float(truth.mean()))


def bound_and_error(objective: pvi.Objective, model: VAE, x: Tensor) -> tuple[float, float]:
    """Mean and standard error of ten calls, nats a datum."""
    found = torch.tensor([objective.bound(model.model, model.guide, x) for _ in range(10)]) / len(x)
    return float(found.mean()), float(found.std()) / math.sqrt(10)


def test_probabilistic_pca() -> None:
    """Trained from random networks: bound = evidence of its parameters = the highest there is.

    The gap of the first is KL(q || p(z | x)), and what `ELBO` draws is all but constant where
    that is small, so its error is far below the 0.01 nats a datum that are allowed. The ELBO with
    exact KL has the noise of log p(x | z) too. 1e-3 is 30 times what 600 steps leave.
    """
    torch.manual_seed(0)
    model, x = linear(), pca_data()
    model.fit(x, batch_size=len(x), steps=600, lr=0.03, seed=0, progress=False, compile=False)
    with torch.no_grad():
        each = exact(model, x)
        truth, best = float(each.mean()), maximum(x, 2)
        bound, se = bound_and_error(pvi.ELBO(20), model, x)
        mean_field, wide = bound_and_error(pvi.TraceMeanFieldELBO(20), model, x)
    assert se < 1e-3
    assert truth - 0.01 < bound < truth + 4.5 * se
    assert abs(mean_field - bound) < 4.5 * math.hypot(se, wide)
    assert best - 1e-3 < truth <= best + 1e-9
    found = model.score_samples(x[:50], num_samples=500, seed=1)
    assert ((found.log_evidence - each[:50]).abs() < 4.5 * found.se + 1e-6).all()


@torch.no_grad()
def test_minibatches_add_up() -> None:
    """At the exact posterior a bound has no noise: its mean over halves is that of all data."""
    model, x = linear(), randn(6, DIM).double()
    to_posterior(model)
    whole = pvi.ELBO().bound(model.model, model.guide, x)
    parts = [2 * pvi.ELBO().bound(model.model, model.guide, half) for half in x.split(3)]
    assert float(sum(parts) / 2) == pytest.approx(float(whole))


@pytest.mark.parametrize(
    ("options", "objective"),
    [
        ({"beta": 4.0, "likelihood": Gaussian("optimal")}, None),
        ({"likelihood": Gaussian("optimal")}, pvi.IWAE(3)),
        ({}, pvi.IWAE(3, gradient="path")),
        ({}, pvi.ELBO(weighting=pvi.Capacity(1.0, 5.0))),
        ({}, pvi.ELBO(weighting=pvi.BetaTC(3.0))),
        ({}, pvi.TraceMeanFieldELBO(weighting=pvi.FreeBits(0.1))),
    ],
)
def test_objectives(options: dict, objective: pvi.Objective | None) -> None:
    model = VAE(DIM, 2, **{"likelihood": Gaussian()} | options, hidden=(4,))
    chosen = {} if objective is None else {"objective": objective}
    before = model.encode(randn(3, DIM))
    model.fit(
        randn(40, DIM), batch_size=20, steps=6, seed=0, progress=False, compile=False, **chosen
    )
    history = model.result().history
    assert np.isfinite(np.asarray(history["bound"])).all()
    assert not torch.equal(model.encode(randn(3, DIM)), before)


@torch.no_grad()
def test_looks_leave_the_optimal_scale_alone() -> None:
    """Else a model would differ from run to run, and IWAE could not tell the data apart."""
    likelihood = Gaussian("optimal")
    model, x = VAE(DIM, 2, likelihood=likelihood, hidden=(4,)), 9.0 * randn(6, DIM).double()
    before = likelihood.running.clone()
    assert math.isfinite(pvi.IWAE(3).bound(model.model, model.guide, x))
    assert torch.equal(likelihood.running, before)


@torch.no_grad()
def test_beta_weights_the_divergence() -> None:
    model, x = VAE(DIM, 2, likelihood=Gaussian(1.0), hidden=(4,), beta=3.0), randn(6, DIM).double()
    kl = torch.distributions.kl_divergence(model.encoded(x), model.prior(model.inferred)).sum()
    losses = []
    for objective in (model.objective(), pvi.TraceMeanFieldELBO()):
        torch.manual_seed(4)
        losses.append(objective.loss(model.model, model.guide, x))
    assert float(losses[0] - losses[1]) == pytest.approx(float(2.0 * kl))


def image_vae() -> VAE:
    return VAE(
        (1, 6, 4),
        3,
        encoder=ConvEncoder((1, 6, 4), 6, (4,)),
        decoder=ConvDecoder(3, (1, 6, 4), (4,)),
    )


def test_shapes_of_images() -> None:
    model, x = image_vae(), (randn(5, 1, 6, 4) > 0).float()
    assert model.encode(x).shape == (5, 3)
    for found in (model.reconstruct(x), model.decode(model.encode(x)), model.sample(5)):
        assert found.shape == x.shape
    means = model.sample(5, mean=True, seed=0)
    assert means.min() > 0 and means.max() < 1
    assert torch.equal(model.sample(5, seed=1), model.sample(5, seed=1))
    assert model.training  # as before


class Own(nn.Module):
    """An encoder of one's own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(DIM, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).tanh()


def test_tables_of_numpy_and_pandas() -> None:
    """Double precision, integers and data frames, with a network of one's own in float32."""
    pandas = pytest.importorskip("pandas")
    model = VAE(DIM, 2, likelihood=Gaussian(), encoder=Own(), hidden=(4,)).float()
    x = np.random.default_rng(0).normal(size=(30, DIM))
    frame = pandas.DataFrame(x, columns=list("abcde"))
    model.fit(frame, steps=3, seed=0, progress=False, compile=False)
    assert model.encode(x).dtype == torch.float32
    assert torch.equal(model.encode(x), model.encode(frame))
    assert model.encode(x.round().astype(int)).shape == (30, 2)
    assert model.encode(x.tolist()).shape == (30, 2)
    assert math.isfinite(model.score(x, num_samples=10))


SCRIPT = """
import sys, torch
from pvi.models.vae import VAE
model = VAE.load(sys.argv[1])
x = torch.load(sys.argv[2], weights_only=True)
found = model.score_samples(x, num_samples=20, seed=0).log_evidence
torch.save([model.encode(x), model.sample(3, seed=1), found], sys.argv[3])
"""


def test_saved_and_loaded_elsewhere(tmp_path: Path) -> None:
    """The same numbers, bit by bit, in a process whose default precision is another."""
    prior, posterior = Vamp(DIM, 3), FlowPosterior(2, 4, options={"hidden_features": [8]})
    model = VAE(DIM, 2, likelihood=Gaussian("optimal"), prior=prior, posterior=posterior, beta=2.0)
    x = randn(30, DIM).double()
    model.fit(x, steps=3, seed=0, progress=False, compile=False)
    model.save(tmp_path / "model")
    torch.save(x, tmp_path / "x")
    names = [str(tmp_path / name) for name in ("model", "x", "out")]
    subprocess.run([sys.executable, "-W", "ignore", "-c", SCRIPT, *names], check=True)
    found = torch.load(tmp_path / "out", weights_only=True)
    score = model.score_samples(x, num_samples=20, seed=0).log_evidence
    for a, b in zip(found, [model.encode(x), model.sample(3, seed=1), score], strict=True):
        assert a.dtype == torch.float64 and torch.equal(a, b)
    assert VAE.load(tmp_path / "model").beta == 2.0


def test_saved_with_a_network_of_ones_own(tmp_path: Path) -> None:
    model, x = VAE(DIM, 2, likelihood=Gaussian(), encoder=Own()), randn(4, DIM)
    model.save(tmp_path / "model")
    with pytest.raises(CheckpointError, match="encoder="):
        VAE.load(tmp_path / "model")
    assert torch.equal(VAE.load(tmp_path / "model", encoder=Own()).encode(x), model.encode(x))
    with pytest.raises(CheckpointError, match="holds a VAE, no ConditionalVAE"):
        ConditionalVAE.load(tmp_path / "model", encoder=Own())


def test_clone() -> None:
    clone = pytest.importorskip("sklearn.base").clone
    options = {"hidden_features": (8,)}
    model = VAE((DIM,), 2, posterior=FlowPosterior(2, options=options), hidden=(8,), beta=2.0)
    other = clone(model)
    assert other is not model and other.beta == 2.0 and other.posterior.options == options
    assert other.encoder is not model.encoder and other.hidden == model.hidden
    assert model.get_params(deep=True)["encoder__hidden"] == (8,)


class Careless(nn.Module):
    """A decoder that forgets particles, or the batch."""

    def forward(self, z: Tensor) -> Tensor:
        return z.new_zeros(z.shape[-2], 1, 1)


def test_refusals() -> None:
    model = VAE(DIM, 2, likelihood=Gaussian(), hidden=(4,))
    with pytest.raises(FitError, match="call fit first"):
        model.result()
    x = randn(6, DIM)
    x[2, 1] = math.nan
    with pytest.raises(DataError, match=r"X\[2, 1\] = nan. Drop or impute"):
        model.fit(x)
    with pytest.raises(DataError, match=r"shape \(N, 5\).*got \(6, 4\)"):
        model.score_samples(randn(6, 4))
    with pytest.raises(DataError, match="X must hold numbers, got an array of object"):
        model.fit(np.array([["a", None]] * 3, dtype=object))
    with pytest.raises(ModelError, match=r"inputs of shape \(2,\).*\(6, 3\)"):
        model.decode(torch.zeros(6, 3))
    careless = VAE(1, 2, likelihood=Bernoulli(), decoder=Careless())
    with pytest.raises(ModelError, match="after the batch dimensions"):
        careless.decoded(torch.zeros(3, 6, 2))
    assert careless.decoded(torch.zeros(6, 2)).batch_shape == (6,)


def test_conditions_that_are_not_finite() -> None:
    model = ConditionalVAE(DIM, conditions=2, likelihood=Gaussian(), hidden=(4,))
    y = torch.zeros(6, 2)
    y[4, 1] = math.nan
    with pytest.raises(DataError, match=r"y\[4\].*not finite"):
        model.fit(randn(6, DIM), y)


def test_conditional_prior_is_learned_and_used() -> None:
    model = ConditionalVAE(DIM, 3, likelihood=Gaussian(), latents=2, hidden=(4,))
    c = torch.eye(3)
    assert not torch.equal(model.prior(c).mean[0], model.prior(c).mean[1])
    plain = ConditionalVAE(DIM, 3, likelihood=Gaussian(), latents=2, learned_prior=False)
    z = randn(3, 2).double()
    want = -0.5 * z.square().sum(1) - math.log(2 * math.pi)
    assert torch.allclose(plain.prior(c).log_prob(z), want, atol=EXACT)
