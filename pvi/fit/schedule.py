"""How long a fit trains, with which optimiser, and at which rate."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pvi.engine.numbers import whole_number
from pvi.engine.params import Params
from pvi.errors import FitError, GuideError
from pvi.fit.arguments import check_optimizer, check_rate, made_optimizer
from pvi.optim.schedule import Plateau, cosine, still_rising

LR_VARIATIONAL, LR_NETWORK = 0.05, 2e-3
MAX_STEPS, MAX_EPOCHS = 20_000, 100
LATE = 0.2  # share of the steps that a fit needs after its KL schedule
NOTHING_TO_FIT = (
    "the guide and the model have no parameters, so there is nothing to fit. Give the guide some "
    "(pyro.param, or a module), or leave it out: then it is pvi.guides.MeanField."
)
Factory = Callable[[list[Tensor]], torch.optim.Optimizer]


class Schedule:
    """Steps, optimiser and learning rate of one fit.

    With `steps` or `epochs` the rate of "auto" falls along a cosine; without, it falls whenever the
    bound stops rising, and training ends at the last plateau. While KL weights still change, in
    the first `anneal` steps, the bound's course says nothing.

    Raises:
        FitError: options that contradict each other.
    """

    def __init__(
        self,
        per_epoch: int,
        steps: int | None,
        epochs: int | None,
        lr: float | None,
        optimizer: str | Factory,
        anneal: int = 0,
    ):
        steps = None if steps is None else whole_number("steps", steps)
        epochs = None if epochs is None else whole_number("epochs", epochs)
        if steps is not None and epochs is not None:
            raise FitError("give steps= or epochs=, not both")
        check_rate(lr)
        named = isinstance(optimizer, str) and optimizer in ("auto", "adam")
        self._factory = None if named else _factory(optimizer, lr)
        self.free = optimizer == "auto" and lr is None and steps is None and epochs is None
        self._lr = lr
        self.steps = epochs * per_epoch if epochs is not None else steps
        self.limit = self.steps or max(MAX_STEPS, MAX_EPOCHS * per_epoch, 2 * anneal)
        self.anneal = anneal
        self.plateau = None if self.steps else Plateau(max(200, per_epoch))

    def optimizer(self, params: Params) -> torch.optim.Optimizer:
        """The optimiser over everything trainable."""
        named = params.named()
        if not named:
            raise GuideError(NOTHING_TO_FIT)
        if self._factory is not None:
            return made_optimizer(self._factory, list(named.values()))
        return torch.optim.Adam(self.groups(params, named), betas=(0.9, 0.99))

    def groups(self, params: Params, named: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Parameter groups by first learning rate; a user's optimiser has its own rate."""
        if self._factory is not None:
            return [{"params": list(named.values())}] if named else []
        rates: dict[float, list[Tensor]] = {}
        for name, leaf in named.items():
            default = LR_NETWORK if params.is_network(name) else LR_VARIATIONAL
            rates.setdefault(self._lr or default, []).append(leaf)
        return [{"params": p, "lr": rate, "initial_lr": rate} for rate, p in rates.items()]

    def described(self) -> dict[str, Any]:
        """What decides the course of the rate; of an optimiser of the user's own its options do."""
        if self._factory is not None:
            return {"optimizer": "given", "plateau": self.plateau is not None}
        return {"optimizer": "auto", "lr": self._lr, "steps": self.steps}

    def after(self, step: int, gain: float, optimizer: torch.optim.Optimizer) -> None:
        """Adapt the rate of "auto" after a step with minus this loss."""
        if self.plateau is None:
            factor = cosine(step, self.limit)
        else:
            factor = self.plateau.update(gain) if step > self.anneal else self.plateau.factor
        if self._factory is None:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def finished(self, step: int) -> bool:
        return step >= self.limit or (self.plateau is not None and self.plateau.converged)

    def shortfall(self, losses: Sequence[float]) -> str:
        """Why a finished fit has not converged, from the loss at each step; empty if it has."""
        steps = len(losses)
        if steps < self.anneal:
            return f"the KL schedule ends at step {self.anneal}, after the {steps} of this fit"
        if self.anneal and steps - self.anneal < LATE * steps:
            return f"only {steps - self.anneal} of {steps} steps came after the KL schedule's end"
        if self.plateau is not None:
            level = self.plateau.converged
            return "" if level else f"the bound was not level yet after {steps} steps"
        return still_rising([-loss for loss in losses])


def _factory(optimizer: Any, lr: float | None) -> Factory:
    check_optimizer(optimizer)
    if lr is not None:
        raise FitError("lr belongs to optimizer='auto'; give your own optimizer its rate directly")
    return cast(Factory, optimizer)
