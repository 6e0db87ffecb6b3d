"""The generative adversarial network, as a baseline on the same trainer."""

from collections.abc import Sequence
from typing import Any, NoReturn

import pyro
import torch
from torch import Tensor, nn

import pvi
from pvi.errors import DataError, ModelError
from pvi.models.vae.adversarial import Adversarial
from pvi.models.vae.priors import Prior, Standard
from pvi.nn import MLP
from pvi.nn.mlp import Shape, as_shape

NO_DENSITY = (
    "a GAN has no likelihood and no encoder, so it gives data no log evidence and no latents: look "
    "at sample, or fit a VAE"
)


class GAN(Adversarial):
    """$z \\sim p(z)$, $x = \\mathrm{generator}(z)$; the generator plays against a discriminator.

    As programs, model and guide draw the same z, and the only observation is a factor of 1. So the
    bound is 0, the log evidence of no data, and all that is minimised is the adversary's term.
    Nothing of it is a likelihood: `score_samples`, `encode` and `reconstruct` refuse.

    Args:
        shape: of a datum.
        latents: d.
        generator: from `(*batch, d)` to the numbers of a datum; `MLP` by default.
        discriminator: from `(n, *shape)` to `(n, any)` scores; `MLP` by default.
        loss: of the game, as of `pvi.Adversary`.
        lr: the discriminator's rate.
        prior: `Standard` by default.
        hidden: units of the hidden layers of default networks.

    Reference:
        Goodfellow et al. (2014), Generative Adversarial Networks.
    """

    def __init__(
        self,
        shape: Shape,
        latents: int = 20,
        *,
        generator: nn.Module | None = None,
        discriminator: nn.Module | None = None,
        loss: str = "logistic",
        lr: float = 1e-3,
        prior: Prior | None = None,
        hidden: Sequence[int] = (256, 256),
    ):
        super().__init__()
        self.shape, self.latents, self.hidden = as_shape(shape), latents, tuple(hidden)
        self.loss, self.lr = loss, lr
        self.prior = prior or Standard(latents)
        numbers = torch.Size(self.shape).numel()
        self.generator = MLP(latents, numbers, hidden) if generator is None else generator
        network = MLP(self.shape, 1, hidden) if discriminator is None else discriminator
        self.adversary = pvi.Adversary(
            network, name="discriminator", loss=loss, lr=lr, event_dim=len(self.shape)
        )

    def model(self, x: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", self.prior(_no_encoder))
            self.adversary(self.generated(z), x)
            pyro.factor("nothing", x.new_zeros(len(x)))  # a fit needs an observation: one of mass 1

    def guide(self, x: Tensor) -> None:
        self.registered()
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.prior(_no_encoder))

    def generated(self, z: Tensor) -> Tensor:
        """Data from latents: `(*batch, d)` to `(*batch, *shape)`."""
        return self.generator(z).reshape(*z.shape[:-1], *self.shape)

    def decode(self, z: Any, y: Any = None) -> Tensor:
        return self.in_batches(self.generated, self.numbers(z, "z"))

    def sample(
        self, num_samples: int = 1, *given: Any, mean: bool = False, seed: int | None = None
    ) -> Tensor:
        with self.evaluating(seed):
            return self.generated(self.prior(_no_encoder).expand([num_samples]).sample())

    def prior_predictive(self, num_samples: int, *given: Any) -> NoReturn:
        raise ModelError(NO_DENSITY)

    def encode(self, X: Any, y: Any = None) -> NoReturn:
        raise ModelError(NO_DENSITY)

    def score_samples(self, X: Any, y: Any = None, **options: Any) -> NoReturn:
        raise ModelError(NO_DENSITY)

    def beside(self, bound: float) -> str:
        return "no likelihood, so no bound on any evidence"

    def check(self, x: Tensor) -> None:
        if not bool(x.isfinite().all()):
            raise DataError("a GAN needs finite values, but X has others")


def _no_encoder(x: Tensor) -> NoReturn:
    raise ModelError("a GAN has no encoder, so its prior can't be made of posteriors")
