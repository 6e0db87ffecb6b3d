"""What a fit returns."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pvi.diagnostics import (
    Diagnosis,
    Evidence,
    Sandwich,
    diagnose,
    posterior_evidence,
    posterior_sandwich,
)
from pvi.engine import Objective
from pvi.engine.traces import Program
from pvi.fit.restarts import Mode
from pvi.posterior import Posterior

ALWAYS = ("bound", "loss", "lr", "grad_norm")


class History:
    """One entry a step, as arrays by name.

    `bound` is that of the objective at weight 1 for every KL and without penalties, whatever was
    minimised as `loss`; `log_likelihood` and `kl/SITE` are its parts, `penalty` the sum of all
    `pvi.penalty`; all in nats. Besides, `lr` and `grad_norm`.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in ALWAYS}
        self._length = 0

    @classmethod
    def of(cls, columns: Mapping[str, Tensor]) -> "History":
        """The inverse of `tensors`."""
        history = cls()
        history._values = {name: column.tolist() for name, column in columns.items()}
        history._length = len(history._values["loss"])
        return history

    def tensors(self) -> dict[str, Tensor]:
        """The columns in double precision, for saving."""
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in self._values.items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Append one step; a name that is new or missing is NaN where it was not recorded."""
        for name in dict.fromkeys([*self._values, *values]):
            column = self._values.setdefault(name, [math.nan] * self._length)
            column.append(values.get(name, math.nan))
        self._length += 1

    def clear(self) -> None:
        """Forget all steps."""
        self.__init__()  # type: ignore[misc]

    @property
    def losses(self) -> list[float]:
        return self._values["loss"]

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self._values:
            raise KeyError(f"'{name}' was not recorded; there are {', '.join(self.keys())}")
        return np.asarray(self._values[name])

    def __len__(self) -> int:
        return self._length

    def __contains__(self, name: object) -> bool:
        return name in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def keys(self) -> tuple[str, ...]:
        return tuple(self._values)


@dataclass(frozen=True)
class Fit:
    """A fitted guide, with the posterior it stands for.

    Args:
        converged: whether the bound was level when the optimisation ended.
        reason: why it did not; empty otherwise.
        modes: what `restarts` has found, the best first; the guide is at the first.
        objective: what was maximised; `None` after `pvi.load` if it held functions or schedules.
    """

    model: Program
    guide: Program
    objective: Objective | None
    posterior: Posterior
    history: History
    converged: bool
    reason: str
    seed: int | None = None
    modes: tuple[Mode, ...] = ()

    def diagnose(self, num_draws: int = 20_000, **options: Any) -> Diagnosis:
        """May this posterior be trusted? See `pvi.diagnose`."""
        return diagnose(self, num_draws, **options)

    def evidence(self, data: Any = None, **options: Any) -> Evidence:
        """Log evidence of the training data or of others, nats. See `pvi.evidence`.

        Args:
            data: as in `pvi.fit`; the guide must be able to read its latents off other data.
            options: num_samples, method, num_outer, num_chains, num_steps, seed, progress.
        """
        posterior = self.posterior if data is None else self.posterior.on(data)
        return posterior_evidence(posterior, **options)

    def sandwich(self, **options: Any) -> Sandwich:
        """Bounds on the log evidence from both sides, on simulated data. See `pvi.sandwich`."""
        return posterior_sandwich(self.posterior, **options)

    def linear_response(self, **options: Any) -> Posterior:
        """The posterior with corrected sds and covariances. See `pvi.linear_response`.

        Args:
            options: num_draws.
        """
        from pvi.fit.linear_response import linear_response

        return linear_response(self.posterior, **options)

    def to_arviz(self, num_draws: int = 1000, **options: Any) -> Any:
        """The posterior as arviz opens it. See `pvi.Posterior.to_arviz`."""
        return self.posterior.to_arviz(num_draws, **options)

    def save(self, folder: Any) -> None:
        """Write parameters, history and verdict to a folder: safetensors and JSON, no code.

        `pvi.load(folder, model, guide, data)` gives it back. The folder is replaced if it holds a
        saved fit already.

        Raises:
            CheckpointError: the folder holds something else.
            OSError: it can't be written.
        """
        from pvi.fit.saved import save

        save(self, folder)

    def __repr__(self) -> str:
        state = "converged" if self.converged else f"not converged: {self.reason}"
        last = self.history["bound"][-max(20, min(200, len(self.history) // 10)) :]
        bound = f"{last.mean():.2f} nats" if len(last) else "none"
        return f"Fit({len(self.history)} steps, {state}, bound about {bound})"
