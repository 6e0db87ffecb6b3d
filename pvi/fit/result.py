"""What a fit returns."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pvi.diagnostics import Diagnosis, diagnose
from pvi.engine import Objective
from pvi.engine.traces import Program
from pvi.posterior import Posterior

FIELDS = ("bound", "loss", "lr", "grad_norm")


@dataclass
class History:
    """One entry a step: `bound` (unweighted, nats), `loss`, `lr` and `grad_norm`, as arrays."""

    _values: dict[str, list[float]] = field(default_factory=lambda: {name: [] for name in FIELDS})

    def add(self, *values: float) -> None:
        for name, value in zip(FIELDS, values, strict=True):
            self._values[name].append(value)

    @property
    def bounds(self) -> list[float]:
        return self._values["bound"]

    def __getitem__(self, name: str) -> np.ndarray:
        return np.asarray(self._values[name])

    def __len__(self) -> int:
        return len(self._values["loss"])

    def keys(self) -> tuple[str, ...]:
        return FIELDS


@dataclass(frozen=True)
class Fit:
    """A fitted guide, with the posterior it stands for.

    Args:
        converged: whether the bound was level when the optimisation ended.
        reason: why it did not; empty otherwise.
    """

    model: Program
    guide: Program
    objective: Objective
    posterior: Posterior
    history: History
    converged: bool
    reason: str
    seed: int | None = None

    def diagnose(self, num_draws: int = 20_000, **options: Any) -> Diagnosis:
        """May this posterior be trusted? See `pvi.diagnose`."""
        return diagnose(self, num_draws, **options)

    def to_arviz(self, num_draws: int = 1000, **options: Any) -> Any:
        """The posterior as arviz opens it. See `pvi.Posterior.to_arviz`."""
        return self.posterior.to_arviz(num_draws, **options)

    def __repr__(self) -> str:
        state = "converged" if self.converged else f"not converged: {self.reason}"
        last = self.history["bound"][-200:]
        bound = f"{last.mean():.2f} nats" if len(last) else "none"
        return f"Fit({len(self.history)} steps, {state}, bound about {bound})"
