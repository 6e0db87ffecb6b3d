"""What a callback of `pvi.fit` is called with."""

from collections.abc import Callable
from dataclasses import dataclass

from pvi.engine.params import Params


@dataclass(frozen=True)
class Step:
    """One training step: its number from 1, bound and loss in nats, and the parameters so far."""

    step: int
    bound: float
    loss: float
    params: Params


Callback = Callable[[Step], bool | None]
