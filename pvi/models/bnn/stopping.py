"""Early stopping by the log likelihood of held-out rows."""

import math
from typing import Any

import torch
from torch import Tensor

from pvi.engine.traces import preserved_rng
from pvi.models.bnn.metrics import mixture_log_likelihood
from pvi.models.bnn.predictive import conditional, evaluating, members_first

DRAWS, SEED = 16, 0  # the same noise each time: two looks differ by the parameters alone


class EarlyStopping:
    """A callback of `pvi.fit` that ends it, and restores the parameters of its best look.

    A look scores held-out rows under the mixture of some networks. `validation_data=` of `pvi.fit`
    would score their bound, most of which is here the KL of the weights.

    Args:
        model: the network, of `bayesianize`; the same program and guide that are fitted.
        guide: of the fit.
        x, y: the held-out rows.
        every: steps between two looks.
        patience: looks without a better one that end the fit.

    Attributes:
        best: mean log likelihood of a row at the best look, nats.
        step: of that look.
    """

    def __init__(self, model: Any, guide: Any, x: Any, y: Tensor, every: int, patience: int):
        self._model, self._guide, self._rows = model, guide, (x, y)
        self._every, self._patience = every, patience
        self.best, self.step, self._waited = -math.inf, 0, 0
        self._values: dict[str, Tensor] = {}

    def __call__(self, step: Any) -> str:
        if step.step % self._every:
            return ""
        score = self._score(step.params)
        if score > self.best:
            self.best, self.step, self._waited = score, step.step, 0
            self._values = {k: x.detach().clone() for k, x in step.params.tensors().items()}
        else:
            self._waited += 1
        if self._waited < self._patience:
            return ""
        return f"held-out rows were predicted best after {self.step} steps"

    def on_end(self, fit: Any) -> None:
        """Restore the parameters of the best look."""
        params = fit.posterior.params
        with torch.no_grad():
            for name, x in params.tensors().items():
                if name in self._values:
                    x.copy_(self._values[name])
        params.freeze()

    def _score(self, params: Any) -> float:
        """Mean log density of a held-out row under the mixture, nats."""
        x, y = self._rows
        with preserved_rng(), evaluating(params):
            torch.manual_seed(SEED)
            fn = conditional(self._model, self._guide.sample(DRAWS), x)
            log_lik = members_first(fn.log_prob(y), self._model.copies)
        return float(mixture_log_likelihood(log_lik).mean())
