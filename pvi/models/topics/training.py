"""How topic models are trained by `pvi.fit`."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.optim.lr_scheduler import CosineAnnealingLR

import pvi
from pvi.models.topics.counts import Counts
from pvi.models.topics.programs import PLATE, TopicPrograms
from pvi.models.topics.stream import one_pass

STEPS, FEWEST = 5, 20  # of an epoch, unless a step would have fewer documents than this


@dataclass(frozen=True)
class Recipe:
    """Adam, by default with a rate that falls: else the end is a sample of the steps' noise.

    Args:
        epochs, lr: as of `pvi.fit`.
        batch_size: documents in a step; fewer of a small corpus, so that an epoch has five steps.
        momentum: Adam's first coefficient.
        decay: whether the rate falls along a cosine.
    """

    epochs: int
    batch_size: int
    lr: float
    momentum: float
    decay: bool = True

    def fit(
        self,
        programs: TopicPrograms,
        data: Any,
        seed: int | None,
        options: Mapping[str, Any],
        rows: int | None = None,
    ) -> pvi.Fit:
        """Train programs.

        Args:
            data: what `pvi.fit` takes.
            seed: of this training.
            options: of `pvi.fit`, which come before the recipe's.
            rows: documents, where the data don't say.
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
            known["batch_size"] = min(self.batch_size, max(len(data) // STEPS, FEWEST))
        known |= options
        if self.decay and not {"scheduler", "optimizer"} & options.keys():
            known["scheduler"] = partial(
                CosineAnnealingLR, T_max=self._steps(known, rows or len(data))
            )
        return pvi.fit(programs.model, programs.guide, data, **known)

    def _steps(self, known: Mapping[str, Any], rows: int) -> int:
        """How many there are, for options of `pvi.fit` and so many rows."""
        if "steps" in known:
            return known["steps"]
        batch = known.get("batch_size") or self.batch_size
        return known["epochs"] * max(rows // batch, 1)

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
