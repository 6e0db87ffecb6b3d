"""What a callback of `pvi.fit` is called with, and what it may answer."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from pvi.engine.params import Params
from pvi.fit.history import History


@dataclass(frozen=True)
class Step:
    """One training step, after its update.

    Numbers are read from the history when they are asked for: a callback that asks for none costs
    no waiting for a GPU.

    Args:
        step: its number, from 1.
        params: the parameters so far.
        history: everything recorded so far.
    """

    step: int
    params: Params
    history: History

    @property
    def bound(self) -> float:
        """The bound of this step at weight 1 for every KL, nats."""
        return self.history.value("bound", self.step - 1)

    @property
    def loss(self) -> float:
        """What this step minimised, nats."""
        return self.history.value("loss", self.step - 1)

    @property
    def lr(self) -> float:
        """The learning rate of this step (of the first group of parameters)."""
        return self.history.value("lr", self.step - 1)

    @property
    def grad_norm(self) -> float:
        """The norm of this step's gradient, before clipping."""
        return self.history.value("grad_norm", self.step - 1)

    @property
    def validation_bound(self) -> float | None:
        """The bound of the validation data, nats; `None` where it was not evaluated after it."""
        value = self.history.value("validation_bound", self.step - 1)
        return None if math.isnan(value) else value


class Callback(Protocol):
    """Anything that can be called with a `Step`: a function, or an object.

    An object may also have a method `on_end(fit)`. It is called once with the finished `Fit`,
    however it ended, also where an error is raised after it.
    """

    def __call__(self, step: Step, /) -> Any:
        """Look at a step; `True` ends the fit, and so does a string, which tells the reason.

        Args:
            step: the step that was just done.
        """
        ...


def ask(callbacks: Iterable[Callback], step: Step) -> str:
    """Call all callbacks; why the fit should end, or "".

    Args:
        callbacks: called in their order, all of them.
        step: what they are called with.
    """
    answers = [callback(step) for callback in callbacks]
    for answer in answers:
        if answer is True:
            return "stopped by a callback"
        if isinstance(answer, str) and answer:
            return f"stopped by a callback: {answer}"
    return ""


def tell_end(callbacks: Iterable[Callback], fit: Any) -> None:
    """Call `on_end` of the callbacks that have one.

    Args:
        callbacks: as given to `pvi.fit`.
        fit: the finished `Fit`.
    """
    for callback in callbacks:
        on_end = getattr(callback, "on_end", None)
        if on_end is not None:
            on_end(fit)
