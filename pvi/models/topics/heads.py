"""Heads: what else is observed of a document, given its shares of topics."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import Tensor, nn

from pvi.nn import Component


class Head(Component):
    """An observation of each document, one log likelihood for each inside the plate."""

    name: str
    weight: float = 1.0

    @abstractmethod
    def distribution(self, shares: Tensor) -> Any:
        """Of what is observed, given $\\theta$ `(*particles, B, K)`."""

    @abstractmethod
    def observed(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        """Values and which of them are known `(B,)`; `None` if the batch has none."""

    def forward(self, shares: Tensor, batch: Mapping[str, Tensor]) -> None:
        """Observe it; called inside the documents' plate.

        Args:
            shares: $\\theta$ `(*particles, B, K)`.
            batch: arguments of the programs.
        """
        observed = self.observed(batch)
        if observed is not None:
            value, known = observed
            with poutine.scale(scale=self.weight), poutine.mask(mask=known):  # type: ignore[arg-type]
                pyro.sample(self.name, self.distribution(shares), obs=value)

    def log_prob(self, shares: Tensor, batch: Mapping[str, Tensor]) -> Tensor | float:
        """What each document adds to its bound `(*particles, B)`."""
        observed = self.observed(batch)
        if observed is None:
            return 0.0
        value, known = observed
        found = self.weight * self.distribution(shares).log_prob(value)
        return torch.where(known, found, 0.0)

    @abstractmethod
    def predictions(self, shares: Tensor) -> Tensor:
        """Probabilities or means of what is observed `(B, *any)`."""


class Labels(Head):
    """Classes $y \\sim \\mathrm{Categorical}(\\mathrm{softmax}(V \\theta + c))$; -1 where unknown.

    A label counts once for each document, like the log likelihood of all its words:
    $\\log p(x \\mid \\theta) + w \\log p(y \\mid \\theta)$, a model of both for w = 1.

    Args:
        topics: K.
        classes: how many.
        weight: w; another than 1 is a tempered likelihood, whose bound is of no model.

    Reference:
        McAuliffe and Blei (2007), Supervised topic models.
    """

    name = "labels"

    def __init__(self, topics: int, classes: int, weight: float = 1.0):
        super().__init__()
        self.topics, self.classes, self.weight = topics, classes, weight
        self.linear = nn.Linear(topics, classes)

    def distribution(self, shares: Tensor) -> Any:
        return dist.Categorical(logits=self.linear(shares))

    def observed(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor] | None:
        labels = batch.get("labels")
        return None if labels is None else (labels.clamp(min=0), labels >= 0)

    def predictions(self, shares: Tensor) -> Tensor:
        return self.linear(shares).softmax(-1)
