"""What models that are trained with an adversary share."""

from typing import Any, Self

import numpy as np
from torch import nn

import pvi
from pvi.models.vae.base import LatentVariableModel

NO_BOUND = "the objective is not a bound"


class Adversarial(LatentVariableModel):
    """A model with an adversary, which its `fit` brings along.

    Attributes:
        adversary: it is none of the model's modules, and not saved with them.
    """

    adversary: pvi.Adversary

    @property
    def discriminator(self) -> nn.Module:
        """The adversary's network."""
        return self.adversary.network

    def fit(self, X: Any, y: Any = None, *, batch_size: int = 128, **options: Any) -> Self:
        options.setdefault("adversaries", [self.adversary])
        return super().fit(X, y, batch_size=batch_size, **options)

    def summary(self, window: int = 200) -> str:
        """What was minimised and the ELBO beside it, of the last steps, nats per datum.

        Args:
            window: so many steps.

        Raises:
            FitError: the model was not fitted here.
        """
        fit = self.result()
        rows = fit.posterior.data.size
        names = [f"adversary/{self.adversary.name}/{x}" for x in ("loss", "term", "weight")]
        known = [name for name in names if name in fit.history]
        loss, bound, *rest = (
            float(np.nanmean(fit.history[name][-window:])) for name in ("loss", "bound", *known)
        )
        lines = [
            f"{type(self).__name__}: {NO_BOUND}",
            f"  loss {loss / rows:.4g} a datum: what was minimised, with penalties and weights",
            f"  {self.beside(bound / rows)}",
        ]
        lines += [f"  {name} {value:.4g}" for name, value in zip(known, rest, strict=True)]
        return "\n".join(lines)

    def beside(self, bound: float) -> str:
        """What the summary says of the bound.

        Args:
            bound: nats a datum.
        """
        return f"ELBO at beta = 1 {bound:.4g} nats a datum: a bound on the log evidence"
