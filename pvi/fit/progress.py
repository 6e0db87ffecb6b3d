"""The progress bar of a fit."""

import math
import time
from typing import Any

INTERVAL = 0.2  # seconds between updates of the bound shown


class Progress:
    """A tqdm bar with steps/s, time left and a running mean of the bound; shown after two seconds.

    Args:
        show: `None` shows it on terminals only.
        total: number of steps; `None` where it is open.
    """

    def __init__(self, show: bool | None, total: int | None):
        self._show, self._total = show, total
        self._bar: Any = None
        self._mean: float | None = None
        self._pending, self._shown = 0, 0.0

    def __enter__(self) -> "Progress":
        from tqdm.auto import tqdm

        disable = None if self._show is None else not self._show
        self._bar = tqdm(total=self._total, disable=disable, delay=2, unit="step", desc="fit")
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.update(self._pending)
        self._bar.close()

    def skip(self, steps: int) -> None:
        """Count steps that were done before."""
        self._bar.initial = self._bar.n = steps

    def see(self, bound: float) -> None:
        """Take the bound of a step into the running mean.

        Args:
            bound: nats; left out where it is not finite.
        """
        if math.isfinite(bound):
            self._mean = bound if self._mean is None else 0.98 * self._mean + 0.02 * bound

    def update(self, total: int | None, steps: int = 1) -> None:
        """Count steps.

        Args:
            total: about how many there will be, where their number is open.
            steps: how many.
        """
        self._pending += steps
        if self._bar.disable or time.monotonic() - self._shown < INTERVAL:
            return
        if total is not None:
            self._bar.total = total
        if self._mean is not None:
            self._bar.set_postfix(bound=f"{self._mean:,.5g} nats", refresh=False)
        self._bar.update(self._pending)
        self._pending, self._shown = 0, time.monotonic()
