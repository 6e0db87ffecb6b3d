"""Variational diffusion: T layers of latents, of which one at a time is trained."""

import math
from typing import Any, Self

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

import pvi
from pvi.errors import ModelError
from pvi.models.vae.base import ROWS, LatentVariableModel
from pvi.models.vae.counts import DiscretizedLogistic
from pvi.models.vae.likelihoods import FLOOR, Bernoulli, Gaussian, Likelihood
from pvi.models.vae.vae import VAE
from pvi.nn import Component, DenoisingMLP
from pvi.nn.mlp import Shape, as_shape
from pvi.progress import progress


class NoiseSchedule(Component):
    """The log of noise to signal, $\\gamma(t) = \\log(\\sigma_t^2 / \\alpha_t^2)$, rising in t.

    Args:
        start, end: $\\gamma(0)$ and $\\gamma(1)$, where learning starts.
        learned: ends and shape are parameters; otherwise a straight line.
        units: sigmoids that make the shape.

    Reference:
        Kingma et al. (2021), Variational Diffusion Models, section 3.2 and appendix H.
    """

    def __init__(
        self, start: float = -6.0, end: float = 6.0, learned: bool = True, units: int = 32
    ):
        super().__init__()
        if not end > start:
            raise ModelError(f"end: noise must grow, from start={start} to more, got {end}")
        self.start, self.end, self.learned, self.units = start, end, learned, units
        self.low = nn.Parameter(torch.tensor(float(start)), requires_grad=learned)
        self.width = nn.Parameter(torch.tensor(math.log(end - start)), requires_grad=learned)
        if learned:
            self.slopes = nn.Parameter(torch.full((units,), 3.0))
            self.places = nn.Parameter(torch.linspace(0.0, 1.0, units))
            self.weights = nn.Parameter(torch.full((units + 1,), -3.0))

    def forward(self, t: Tensor) -> Tensor:
        """$\\gamma$ of times in [0, 1], in their shape."""
        return self.low + self.width.exp() * (self._risen(t) if self.learned else t)

    def _risen(self, t: Tensor) -> Tensor:
        """From 0 to 1."""
        first, last = self._sum(torch.zeros_like(t)), self._sum(torch.ones_like(t))
        return (self._sum(t) - first) / (last - first)

    def _sum(self, t: Tensor) -> Tensor:
        weights = softplus(self.weights)
        s = torch.sigmoid(softplus(self.slopes) * (t[..., None] - self.places))
        return t + (weights[1:] * s).sum(-1) + weights[0] * t


class DiffusionVAE(LatentVariableModel):
    """A VAE of T layers, each the one below with less signal and more noise.

    With y the datum (or the latents of an autoencoder), $\\alpha_t^2 + \\sigma_t^2 = 1$ and s the
    layer below t, $q(z_t \\mid x) = N(\\alpha_t y, \\sigma_t^2)$ and the model is
    $p(z_s \\mid z_t) = q(z_s \\mid z_t, y = \\hat y(z_t))$, with the guess of a network:

    $$\\mathcal L = E[\\log p(x \\mid z_0)] - \\mathrm{KL}(q(z_1 \\mid x) \\| N(0, 1))
    - T\\, E_{i}\\, E\\,\\mathrm{KL}(q(z_s \\mid z_t, y) \\| p(z_s \\mid z_t)), \\quad t = i / T$$

    `model` and `guide` estimate this with one i for each datum: unbiased, at the cost of a VAE.
    `unrolled_model` and `unrolled_guide` have all T + 1 latents and the same ELBO; evaluation by
    importance sampling needs them.

    Args:
        shape: of a datum.
        steps: T.
        network: from z `(*batch, *shape)` and a noise level `(*batch)` in [0, 1] to v, of which
            $\\hat y = \\alpha z - \\sigma v$; `pvi.nn.DenoisingMLP` by default, `pvi.nn.UNet` for
            images.
        likelihood: $p(x \\mid z_0)$, `Bernoulli` by default. For `Bernoulli` what Bayes' rule says
            under even chances; `Gaussian`, `Laplace` and `DiscretizedLogistic` get the datum that
            fits z_0 best, and its sd if they decode one; others need a decoder.
        decoder: from z_0 to the likelihood's numbers.
        autoencoder: a trained `VAE`, which is frozen: its latents are what is diffused (latent
            diffusion), and its decoder and likelihood give the data.
        latent_scale: sd of the autoencoder's latents, by which they are divided.
        schedule: of the noise.

    Reference:
        Kingma, Salimans, Poole, Ho (2021), Variational Diffusion Models, equations 11 to 15;
        Salimans and Ho (2022), Progressive Distillation, for v; Vahdat et al. (2021), Score-based
        Generative Modeling in Latent Space.
    """

    def __init__(
        self,
        shape: Shape,
        steps: int = 1000,
        *,
        network: nn.Module | None = None,
        likelihood: Likelihood | None = None,
        decoder: nn.Module | None = None,
        autoencoder: VAE | None = None,
        latent_scale: float = 1.0,
        schedule: NoiseSchedule | None = None,
    ):
        super().__init__()
        self.shape, self.steps, self.latent_scale = as_shape(shape), steps, latent_scale
        self.autoencoder, self.decoder = autoencoder, decoder
        if autoencoder is None:
            self.likelihood = likelihood or Bernoulli()
            self.diffused = tuple(self._embedded(torch.zeros(1, *self.shape)).shape[1:])
        else:
            self._check_autoencoder(autoencoder, likelihood, decoder)
            self.likelihood = autoencoder.likelihood
            self.diffused = getattr(autoencoder, "latent_shape", (autoencoder.latents,))
            autoencoder.requires_grad_(False).eval()
        if not isinstance(steps, int) or steps < 1:
            raise ModelError(f"steps: expected a whole number >= 1, got {steps}")
        if decoder is None and autoencoder is None and not self._has_rule():
            raise ModelError(
                f"{type(self.likelihood).__name__} needs decoder=, from z_0 of shape "
                f"{self.diffused} to {self.likelihood.width} numbers for each element"
            )
        self.network = DenoisingMLP(self.diffused) if network is None else network
        self.schedule = schedule or NoiseSchedule()

    def get_params(self, deep: bool = False) -> dict[str, Any]:
        found = super().get_params(deep)
        if self.autoencoder is not None:  # its likelihood is none of the arguments
            found = {k: v for k, v in found.items() if not k.startswith("likelihood__")}
            found["likelihood"] = None
        return found

    def train(self, mode: bool = True) -> Self:
        """As of `nn.Module`, but for the autoencoder, which stays as it is."""
        super().train(mode)
        if self.autoencoder is not None:
            self.autoencoder.eval()
        return self

    def model(self, x: Tensor) -> None:
        self.registered()
        time = pyro.sample("time", self._time(x))
        with pyro.plate("data", len(x)):
            y, noise_0, noise = self._auxiliary(x)
            gamma_0, gamma_1 = self.schedule(x.new_tensor([0.0, 1.0]))
            z_0 = _alpha(gamma_0) * y + _sigma(gamma_0) * noise_0
            i = self._steps_of(time, len(x))
            gamma = self._wide(self.schedule(i / self.steps))
            z_t = _alpha(gamma) * y + _sigma(gamma) * noise
            pvi.kl("z_1", self._event(_alpha(gamma_1) * y, _sigma(gamma_1)), self._top(x))
            pvi.kl("z_t", *self._both(z_t, y, i), scale=self.steps)
            if self.autoencoder is None:
                fn = self.decoded(z_0)
                self.likelihood.learn(fn, x)
                pyro.sample("x", fn, obs=x)
            else:
                z = self.latent_scale * y.flatten(-len(self.diffused))
                given = self._given(z_0).log_prob(z)
                pyro.factor("prior", given - self.autoencoder.encoded(x).log_prob(z))
                pyro.sample("x", self.autoencoder.decoded(z), obs=x)

    def guide(self, x: Tensor) -> None:
        self.registered()
        pyro.sample("time", self._time(x))
        with pyro.plate("data", len(x)):
            self._auxiliary(x)

    def unrolled_model(self, x: Tensor) -> None:
        """All latents as sites `z_T`, ..., `z_0`, for any ELBO, importance sampling and SBC."""
        self.registered()
        with pyro.plate("data", len(x)):
            z = pyro.sample(f"z_{self.steps}", self._top(x))
            for i in range(self.steps, 0, -1):
                z = pyro.sample(f"z_{i - 1}", self._below(z, self._guess(z, _at(i, z)), _at(i, z)))
            if self.autoencoder is not None:
                z = pyro.sample("z", self._given(z))
            pyro.sample("x", self.decoded(z), obs=x)

    def unrolled_guide(self, x: Tensor) -> None:
        """As `unrolled_model`: $q(z_T \\mid x)$, then each layer given the one above and x."""
        self.registered()
        with pyro.plate("data", len(x)):
            y = self._observed(x)
            gamma = self.schedule(x.new_ones(()))
            z = pyro.sample(f"z_{self.steps}", self._event(_alpha(gamma) * y, _sigma(gamma)))
            for i in range(self.steps, 0, -1):
                z = pyro.sample(f"z_{i - 1}", self._below(z, y, _at(i, z)))

    def bound(
        self, X: Any, *, num_samples: int = 10, seed: int | None = None
    ) -> tuple[float, float]:
        """The ELBO of a datum by the estimator that trains, nats, and its standard error.

        Args:
            X: data, as in `fit`.
            num_samples: estimates that are averaged, at least 2.
            seed: makes it repeatable.
        """
        x, objective = self.data(X), self.objective()
        if num_samples < 2:
            raise ModelError(f"num_samples must be >= 2, got {num_samples}")
        with self.evaluating(seed):
            sums = [
                sum(objective.bound(self.model, self.guide, part) for part in x.split(ROWS))
                for _ in progress(range(num_samples), "estimates")
            ]
        found = torch.tensor(sums) / len(x)
        return float(found.mean()), float(found.std() / math.sqrt(num_samples))

    def score_samples(
        self,
        X: Any,
        y: Any = None,
        *,
        num_samples: int = 1000,
        seed: int | None = None,
        **options: Any,
    ) -> pvi.Evidence:
        programs = (self.unrolled_model, self.unrolled_guide)
        return pvi.evidence(
            *programs, *self.rows(X, y), num_samples=num_samples, seed=seed, **options
        )

    def encode(self, X: Any, y: Any = None) -> Tensor:
        """What is diffused: the autoencoder's means, or the means of z_0, `(N, d)`."""
        if self.autoencoder is not None:
            return self.autoencoder.encode(X, y)
        x = self.data(X)
        return self.in_batches(
            lambda x: (_alpha(self.schedule(x.new_zeros(()))) * self._embedded(x)).flatten(1), x
        )

    def decode(self, z: Any, y: Any = None) -> Tensor:
        if self.autoencoder is not None:
            return self.autoencoder.decode(z, y)
        z = self.numbers(z, "z").reshape(-1, *self.diffused)
        return self.in_batches(lambda z: self.likelihood.mean(self.decoded(z)), z)

    def prior_predictive(self, num_samples: int, *given: Any) -> Any:
        z = self._top(self.schedule.low).expand([num_samples]).sample()
        for i in progress(range(self.steps, 0, -1), "steps"):
            z = self._below(z, self._guess(z, _at(i, z)), _at(i, z)).sample()
        return self.decoded(z if self.autoencoder is None else self._given(z).sample())

    def decoded(self, z: Tensor) -> Any:
        """$p(x \\mid z_0)$, or the autoencoder's $p(x \\mid z)$."""
        if self.autoencoder is not None:
            return self.autoencoder.decoded(z)
        if self.decoder is not None:
            return self.likelihood(self.decoder(z), self.shape, z.shape[: -len(self.diffused)])
        gamma = self.schedule(z.new_zeros(()))
        if isinstance(self.likelihood, Bernoulli):
            return self.likelihood(2 * _alpha(gamma) / _sigma(gamma) ** 2 * z, self.shape)
        best, sd = z / _alpha(gamma), _sigma(gamma) / _alpha(gamma)
        if self.likelihood.width == 1:
            return self.likelihood(best, self.shape)
        if isinstance(self.likelihood, DiscretizedLogistic):
            sd = math.sqrt(3) / math.pi * sd  # the scale of a logistic distribution of this sd
        raw = (sd - FLOOR).clamp(min=FLOOR).expm1().log().expand(best.shape)
        n = len(self.shape)
        return self.likelihood(torch.stack([best, raw], -1 - n), self.shape)

    def _has_rule(self) -> bool:
        known = isinstance(self.likelihood, Bernoulli | Gaussian | DiscretizedLogistic)
        return known and self.likelihood.width <= 2 and self.diffused == self.shape

    def _check_autoencoder(
        self, autoencoder: VAE, likelihood: Likelihood | None, decoder: nn.Module | None
    ) -> None:
        if autoencoder.shape != self.shape:
            raise ModelError(
                f"the autoencoder is of data of shape {autoencoder.shape}, this of {self.shape}"
            )
        if likelihood is not None or decoder is not None:
            raise ModelError("likelihood and decoder are the autoencoder's: leave them out")

    def _embedded(self, x: Tensor) -> Tensor:
        """A datum as real numbers around 0."""
        y = self.likelihood.features(x)
        return 2 * y - 1 if isinstance(self.likelihood, Bernoulli) else y

    def _observed(self, x: Tensor) -> Tensor:
        """What is diffused: the datum, or a draw of the autoencoder's latents."""
        if self.autoencoder is None:
            return self._embedded(x)
        z = pyro.sample("z", self.autoencoder.encoded(x))
        return z.reshape(*z.shape[:-1], *self.diffused) / self.latent_scale

    def _auxiliary(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Draws over which the bound is an expectation: the same in both programs, so that their
        KL is 0.
        """
        y = self._observed(x)
        return y, pyro.sample("noise_0", self._top(x)), pyro.sample("noise", self._top(x))

    def _time(self, like: Tensor) -> Any:
        """Standard normal, since the KL of uniforms can't be compiled."""
        return dist.Normal(like.new_zeros(()), 1.0)

    def _steps_of(self, time: Tensor, rows: int) -> Tensor:
        """A step from 1 to T for each datum, spread evenly (Kingma et al. 2021, appendix I.1)."""
        place = torch.arange(rows, device=time.device) / rows
        place = (torch.special.ndtr(time) + place) % 1
        return 1 + (self.steps * place).floor().clamp(max=self.steps - 1)

    def _both(self, z: Tensor, y: Tensor, i: Tensor) -> tuple[Any, Any]:
        """Guide's and model's distribution of the layer below z, less what their means share."""
        gamma_s, gamma_t = (self._wide(self.schedule((i - j) / self.steps)) for j in (1, 0))
        share = -torch.expm1(gamma_s - gamma_t)
        sd = share.sqrt() * _sigma(gamma_s)
        means = (_alpha(gamma_s) * share * each for each in (y, self._guess(z, i)))
        first, second = (self._event(mean, sd) for mean in means)
        return first, second

    def _below(self, z: Tensor, y: Tensor, i: Tensor) -> Any:
        """$q(z_s \\mid z_t, y)$ for t = i / T."""
        gamma_s, gamma_t = (self._wide(self.schedule((i - j) / self.steps)) for j in (1, 0))
        share = -torch.expm1(gamma_s - gamma_t)
        kept = _alpha(gamma_s) / _alpha(gamma_t) * (1 - share)
        return self._event(kept * z + _alpha(gamma_s) * share * y, share.sqrt() * _sigma(gamma_s))

    def _guess(self, z: Tensor, i: Tensor) -> Tensor:
        """$\\hat y = \\alpha z - \\sigma v$ with v from the network."""
        risen = i / self.steps
        gamma = self._wide(self.schedule(risen))
        v = self.network(z, risen.expand(z.shape[: z.dim() - len(self.diffused)]))
        return _alpha(gamma) * z - _sigma(gamma) * v

    def _given(self, z_0: Tensor) -> Any:
        """The autoencoder's latents given z_0."""
        gamma = self.schedule(z_0.new_zeros(()))
        mean = self.latent_scale * z_0.flatten(-len(self.diffused)) / _alpha(gamma)
        sd = self.latent_scale * _sigma(gamma) / _alpha(gamma)
        return dist.Normal(mean, sd.expand(mean.shape)).to_event(1)

    def _top(self, like: Tensor) -> Any:
        return self._event(like.new_zeros(self.diffused), like.new_ones(()))

    def _event(self, mean: Tensor, sd: Tensor) -> Any:
        return dist.Normal(mean, sd.expand(mean.shape)).to_event(len(self.diffused))

    def _wide(self, x: Tensor) -> Tensor:
        """`(*batch)` to `(*batch, 1, ...)`."""
        return x.reshape(*x.shape, *[1] * len(self.diffused))


def _alpha(gamma: Tensor) -> Tensor:
    return torch.sigmoid(-gamma).sqrt()


def _sigma(gamma: Tensor) -> Tensor:
    return torch.sigmoid(gamma).sqrt()


def _at(i: int, like: Tensor) -> Tensor:
    return like.new_tensor(float(i))
