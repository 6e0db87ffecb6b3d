"""The options of a training step, checked before anything is run."""

import math
from dataclasses import dataclass
from typing import Any, get_args

from pvi.errors import FitError
from pvi.fit.adversary import Adversary
from pvi.fit.precision import Precision

COMPILE = ("auto", False, True, "graph", "inductor")


@dataclass(frozen=True)
class Options:
    """How a step is made, and how validation ends a fit.

    Args:
        accumulate: batches whose mean gradient makes one step.
        clip_norm: the longest gradient; `None` for any.
        precision: "bf16" runs networks in bfloat16; `None` for all in the programs' own dtype.
        validate_every: steps between two validations; `None` for once an epoch.
        patience: validations without a better bound that end the fit; `None` for no end.
        compile: whether steps are run as graphs of tensor operations, and by what.
        adversaries: networks that take steps of their own.

    Raises:
        FitError: options that make no sense.
    """

    accumulate: int = 1
    clip_norm: float | None = None
    precision: Precision | None = None
    validate_every: int | None = None
    patience: int | None = None
    compile: bool | str = "auto"
    adversaries: tuple[Adversary, ...] = ()

    def __post_init__(self) -> None:
        for name in ("accumulate", "validate_every", "patience"):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            if value is not None and not whole:
                raise FitError(f"{name} must be a whole number >= 1, got {value!r}")
        if self.accumulate is None:
            raise FitError("accumulate must be a whole number >= 1, got None")
        norm = self.clip_norm
        if norm is not None and not (isinstance(norm, int | float) and 0 < norm < math.inf):
            raise FitError(f"clip_norm must be a number > 0, got {norm!r}")
        if self.precision is not None and self.precision not in get_args(Precision):
            raise FitError(f"precision must be None or 'bf16', got {self.precision!r}")

        if not any(self.compile is x or self.compile == x for x in COMPILE):
            raise FitError(
                f"compile must be 'auto', False, True, 'graph' or 'inductor', got {self.compile!r}"
            )

    def described(self) -> dict[str, Any]:
        """What decides the course of a fit, as plain data; `None` where it is the default."""
        accumulate = None if self.accumulate == 1 else self.accumulate
        adversaries = [one.described() for one in self.adversaries] or None
        rest = ("clip_norm", "precision", "validate_every", "patience")
        named = {name: getattr(self, name) for name in rest}
        return {"accumulate": accumulate, **named, "adversaries": adversaries}
