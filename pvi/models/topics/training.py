"""How topic models are trained by `pvi.fit`."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

import pvi
from pvi.models.topics.counts import Counts
from pvi.models.topics.programs import PLATE, TopicPrograms
from pvi.models.topics.stream import one_pass


@dataclass(frozen=True)
class Recipe:
    """Adam with a rate that stays, as in the papers of these models.

    Args:
        epochs, batch_size, lr: as of `pvi.fit`.
        momentum: Adam's first coefficient.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float

    def fit(
        self, programs: TopicPrograms, data: Any, seed: int | None, options: Mapping[str, Any]
    ) -> pvi.Fit:
        """Train programs.

        Args:
            data: what `pvi.fit` takes.
            seed: of this training.
            options: of `pvi.fit`, which come before the recipe's.
        """
        known: dict[str, Any] = {
            "objective": pvi.TraceMeanFieldELBO(),
            "optimizer": self.optimizer,
            "plate": PLATE,
            "seed": seed,
        }
        if "steps" not in options:
            known["epochs"] = self.epochs
        if isinstance(data, Counts):
            known["batch_size"] = self.batch_size
        return pvi.fit(programs.model, programs.guide, data, **{**known, **options})

    def step(
        self,
        programs: TopicPrograms,
        data: Counts,
        documents: int,
        optimizer: torch.optim.Optimizer,
        seed: int | None,
        options: Mapping[str, Any],
    ) -> pvi.Fit:
        """One pass through some documents of a corpus.

        Args:
            documents: of the whole corpus.
            optimizer: goes on where it was.
        """
        steps = -(-len(data) // self.batch_size)
        known = {"steps": steps, "optimizer": optimizer, **options}
        if documents > len(data):
            stream = one_pass(data, documents, self.batch_size)
            return self.fit(programs, stream.loader(), seed, known)
        return self.fit(programs, data, seed, {"batch_size": len(data) // steps, **known})

    def optimizer(self, parameters: Any) -> torch.optim.Optimizer:
        """Adam over some parameters."""
        return torch.optim.Adam(parameters, self.lr, betas=(self.momentum, 0.999), fused=True)
