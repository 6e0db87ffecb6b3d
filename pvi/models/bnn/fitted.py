"""A trained network with the units of its data, as scikit-learn's estimators keep it."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

import pvi
from pvi.models.bnn.bayesian import BayesianModule
from pvi.models.bnn.linear import LinearPosterior
from pvi.models.bnn.predictive import Latents, draw_networks, members_first, predicted
from pvi.nn import MLP

HELD = 4_000_000  # numbers of activations and weights at once


@dataclass(frozen=True)
class Units:
    """The means and sds by which inputs, and targets, are standardised.

    Attributes:
        x_mean, x_sd: `(d)`.
        y_mean, y_sd: 0 and 1 for targets that have no units, such as counts.
    """

    x_mean: np.ndarray
    x_sd: np.ndarray
    y_mean: float = 0.0
    y_sd: float = 1.0

    @classmethod
    def of(cls, x: np.ndarray, y: np.ndarray | None = None) -> "Units":
        """The units of the rows x `(N, d)` and, where they are given, of targets y `(N,)`."""
        mean, sd = x.mean(0), _positive(x.std(0))
        if y is None:
            return cls(mean, sd)
        return cls(mean, sd, float(y.mean()), float(_positive(y.std())))

    def inputs(self, x: np.ndarray, dtype: torch.dtype | None = None) -> Tensor:
        """Standardised inputs, `(N, d)`."""
        dtype = torch.get_default_dtype() if dtype is None else dtype
        return torch.as_tensor((x - self.x_mean) / self.x_sd, dtype=dtype)

    def targets(self, y: np.ndarray) -> Tensor:
        """Standardised targets, `(N,)`."""
        return torch.as_tensor((y - self.y_mean) / self.y_sd, dtype=torch.get_default_dtype())


def _positive(sd: Any) -> np.ndarray:
    """Scales of constants are 1."""
    return np.where(np.isfinite(sd) & (sd > 1e-12), sd, 1.0)


@dataclass
class Fitted:
    """What prediction needs.

    Attributes:
        fit: of the weights.
        units: of the data.
        head: the exact posterior of the last layer, where that was asked for.
        factor: on predicted sds, chosen on held-out rows.
    """

    fit: pvi.Fit
    units: Units
    head: LinearPosterior | None = None
    factor: float = 1.0
    _drawn: dict[tuple[int, int], Latents] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> BayesianModule:
        """The model without its handlers."""
        program: Any = self.fit.model
        return getattr(program, "__wrapped__", program)

    @cached_property
    def _program(self) -> BayesianModule:
        """The model that predicts: in double precision, so that a row does not depend on its batch
        by rounding; networks of one's own may have tensors inside that are not double.
        """
        if not isinstance(self.model.module, MLP):
            return self.model
        return copy.deepcopy(self.model).double()

    @property
    def _dtype(self) -> torch.dtype:
        return torch.get_default_dtype() if self._program is self.model else torch.double

    def _inputs(self, x: np.ndarray) -> Tensor:
        return self.units.inputs(x, self._dtype)

    def networks(self, num_draws: int, seed: int) -> Latents:
        """Draws of the weights; those of one seed are kept."""
        key = num_draws, seed
        if key not in self._drawn:
            each = -(-num_draws // self.model.copies)
            drawn = draw_networks(self.fit.posterior, each, seed)
            self._drawn = {key: {name: value.to(self._dtype) for name, value in drawn.items()}}
        return self._drawn[key]

    def distributions(self, x: np.ndarray, num_draws: int, seed: int) -> Iterator[Any]:
        """Of the standardised targets given some networks at a time, `(S, N, [copies])` each."""
        networks = self.networks(num_draws, seed)
        inputs, copies = self._inputs(x), self.model.copies
        if copies > 1:
            inputs = inputs.unsqueeze(1).expand(-1, copies, *inputs.shape[1:])
        total = len(next(iter(networks.values())))
        size = sum(v[0].numel() for v in networks.values()) + len(inputs) * copies * 64
        few = max(1, HELD // size)
        for k in range(0, total, few):
            part = {name: value[k : k + few] for name, value in networks.items()}
            yield predicted(self.fit.posterior, part, inputs, self._program)

    def stacked(self, x: np.ndarray, num_draws: int, seed: int, *of: Any) -> list[Tensor]:
        """Functions of the distributions, members as draws: `(S, N, ...)` each.

        Args:
            of: functions from a distribution to a tensor `(S, N, [copies], ...)`.
        """
        found: list[list[Tensor]] = [[] for _ in of]
        for fn in self.distributions(x, num_draws, seed):
            for values, function in zip(found, of, strict=True):
                values.append(members_first(function(fn), self.model.copies))
        return [torch.cat(values) for values in found]

    def features(self, x: np.ndarray) -> Tensor:
        """Activations before the last layer at the mean weights, and 1: `(N, p + 1)`."""
        with self.fit.posterior.drawing(None), torch.no_grad():
            weights = self.fit.guide.mean()  # type: ignore[union-attr]
            module: Any = self.model.module
            own = {n: w.to(self._dtype) for n, w in weights.items() if n in self.model.sites}
            seen: list[Tensor] = []
            last = [m for m in module.modules() if isinstance(m, torch.nn.Linear)][-1]
            hook = last.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
            try:
                torch.func.functional_call(module, own, (self._inputs(x),))
            finally:
                hook.remove()
        return torch.cat([seen[0], torch.ones_like(seen[0][:, :1])], 1)
