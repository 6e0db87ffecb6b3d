"""What models without latents share: their log density is exact."""

from abc import abstractmethod
from typing import Any, NoReturn

import torch
from torch import Tensor

import pvi
from pvi.errors import ModelError
from pvi.models.vae.base import LatentVariableModel

NO_LATENTS = "{0} has no latents, so there is nothing to {1}: look at score_samples and sample"


class ExactModel(LatentVariableModel):
    """A model $p(x)$ whose density is known, with a guide that draws nothing.

    The bound of a fit is then the log evidence itself, and what would be an estimate elsewhere is
    exact. `encode`, `decode` and `reconstruct` refuse.
    """

    def guide(self, *rows: Tensor) -> None:
        self.registered()

    @abstractmethod
    def log_density(self, x: Tensor) -> Tensor:
        """$\\log p(x)$ of data `(B, *shape)`: `(B,)`, nats."""

    @abstractmethod
    def draws(self, num_samples: int) -> Tensor:
        """New data `(num_samples, *shape)`."""

    def sample(
        self, num_samples: int = 1, *given: Any, mean: bool = False, seed: int | None = None
    ) -> Tensor:
        """New data from the model, `(num_samples, *shape)`.

        Args:
            num_samples: how many.
            mean: has no meaning here: there are no latents to be given.
            seed: makes it repeatable.
        """
        if mean:
            raise ModelError(NO_LATENTS.format(type(self).__name__, "take a mean given"))
        with self.evaluating(seed):
            return self.draws(num_samples)

    def score_samples(
        self,
        X: Any,
        y: Any = None,
        *,
        num_samples: int = 1,
        seed: int | None = None,
        **options: Any,
    ) -> pvi.Evidence:
        """Log density of each datum, nats, exactly; `num_samples` and `seed` change nothing.

        Args:
            X: data, as in `fit`.
        """
        found = self.in_batches(self.log_density, self.data(X)).double()
        zero, one = torch.zeros_like(found), torch.ones_like(found)
        total = float(found.sum())
        return pvi.Evidence(found, zero, one, zero, total, 0.0, (), "exact: no latent sites", 1)

    def prior_predictive(self, num_samples: int, *given: Any) -> NoReturn:
        raise ModelError(NO_LATENTS.format(type(self).__name__, "draw a prior of"))

    def encode(self, X: Any, y: Any = None) -> Tensor:
        raise ModelError(NO_LATENTS.format(type(self).__name__, "encode"))

    def decode(self, z: Any, y: Any = None) -> Tensor:
        raise ModelError(NO_LATENTS.format(type(self).__name__, "decode"))
