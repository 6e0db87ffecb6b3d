"""How long a fit trains, with which optimiser, and at which rate."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from pvi.engine.numbers import whole_number
from pvi.engine.params import Params
from pvi.errors import FitError, GuideError
from pvi.fit.arguments import check_factory, made_optimizer
from pvi.fit.rates import (
    Rates,
    check_optimizer,
    check_patterns,
    check_rates,
    make_scheduler,
    matched,
    scale_rates,
)
from pvi.optim.schedule import Plateau, Stages, cosine, still_rising

LR_VARIATIONAL, LR_NETWORK = 0.05, 2e-3
MAX_STEPS, MAX_EPOCHS = 20_000, 100
TOLERANCE = 0.02  # nats, times the root of the number of latents; for one it is 0.2 posterior sds
LATE = 0.2  # share of the steps that a fit needs after its KL schedule
NOTHING_TO_FIT = (
    "the guide and the model have no parameters, so there is nothing to fit. Give the guide some "
    "(pyro.param, or a module), or leave it out: then it is pvi.guides.MeanField."
)
Factory = Callable[[list[Any]], torch.optim.Optimizer]


class Schedule:
    """Steps, optimiser and learning rate of one fit.

    With `steps` or `epochs` the rate of "auto" falls along a cosine; without, training goes through
    stages of one rate, until averages over them are no better than before. An optimiser or
    scheduler of the user's own trains until the bound stops rising. While KL weights still change,
    in the first `anneal` steps, the bound's course says nothing.

    Args:
        per_epoch: steps in an epoch.
        steps, epochs, lr, optimizer, scheduler: as in `pvi.fit`.
        anneal: steps until the last KL schedule ends.
        latents: numbers in the model's latents; `None` where two sets of parameters can't be
            compared on the same rows, so that the rate falls whenever the bound stops rising.

    Raises:
        FitError: options that contradict each other.
    """

    def __init__(
        self,
        per_epoch: int,
        steps: int | None,
        epochs: int | None,
        lr: Rates,
        optimizer: Any,
        anneal: int = 0,
        scheduler: Any = None,
        latents: int | None = 1,
    ):
        steps = None if steps is None else whole_number("steps", steps)
        epochs = None if epochs is None else whole_number("epochs", epochs)
        if steps is not None and epochs is not None:
            raise FitError("give steps= or epochs=, not both")
        check_rates(lr)
        self._ready = optimizer if isinstance(optimizer, torch.optim.Optimizer) else None
        named = isinstance(optimizer, str) and optimizer in ("auto", "adam")
        self._factory = None if named else _factory(optimizer, lr)
        automatic = optimizer == "auto" if named else False
        self.free = automatic and lr is None and steps is None and epochs is None and not scheduler
        self._lr, self._scheduler = lr, scheduler
        self.damping = 1.0  # factor on the rates of "adam" after faults
        self.steps = epochs * per_epoch if epochs is not None else steps
        self.limit = self.steps or max(MAX_STEPS, MAX_EPOCHS * per_epoch, 2 * anneal)
        self.anneal = anneal
        self.plateau, self.stages = None, None
        if self.steps is None and self.automatic and latents is not None:
            tolerance = TOLERANCE * math.sqrt(max(latents, 1))
            self.stages = Stages(max(200, per_epoch), self.limit, tolerance, anneal)
        elif self.steps is None:
            self.plateau = Plateau(max(200, per_epoch))

    @property
    def automatic(self) -> bool:
        """Whether the rate is ours to set."""
        return self._factory is None and self._scheduler is None

    def optimizer(self, params: Params) -> torch.optim.Optimizer:
        """The optimiser over everything trainable.

        Args:
            params: of model and guide.
        """
        named = params.named()
        if not named:
            raise GuideError(NOTHING_TO_FIT)
        check_patterns(params, named, self._lr)
        if self._ready is not None:
            return check_optimizer(self._ready, params, ready=True)
        if self._factory is None:
            adam = torch.optim.Adam(self.groups(params, named), betas=(0.9, 0.99))
            adam.register_step_pre_hook(_in_order)
            return adam
        leaves, rated = list(named.values()), isinstance(self._lr, Mapping)
        made = made_optimizer(
            self._factory, self.groups(params, named) if rated else leaves, leaves
        )
        return check_optimizer(made, params, ready=False)

    def scheduler(self, optimizer: torch.optim.Optimizer, validated: bool) -> Any:
        """The user's scheduler of torch, or `None`.

        Args:
            optimizer: whose rates it sets.
            validated: whether there are validation data.
        """
        return make_scheduler(self._scheduler, optimizer, validated)

    def groups(self, params: Params, named: Mapping[str, Tensor]) -> list[dict[str, Any]]:
        """Parameter groups by pattern and first rate; a user's optimiser may have its own rate.

        Args:
            params: of model and guide.
            named: the parameters to group.
        """
        rated = isinstance(self._lr, Mapping)
        if self._factory is not None and not rated:
            return [{"params": list(named.values())}] if named else []
        found: dict[tuple[str | None, float | None], list[Tensor]] = {}
        patterns = matched(params, named, self._lr)
        for name, leaf in named.items():
            rate = self._rate(params, name, patterns[name])
            found.setdefault((patterns[name], rate), []).append(leaf)
        groups = []
        for (pattern, rate), leaves in found.items():
            first: dict[str, Any] = {} if rate is None else {"lr": rate}
            if self._factory is None:
                first |= {"initial_lr": rate, "fused": _fusable(leaves)}
            groups.append({"params": leaves, **first, **({"name": pattern} if pattern else {})})
        return groups

    def _rate(self, params: Params, name: str, pattern: str | None) -> float | None:
        """The first rate of a parameter; `None` for that of the user's optimiser."""
        if isinstance(self._lr, Mapping):
            if pattern is not None:
                return self._lr[pattern]
        elif self._lr is not None:
            return self._lr
        if self._factory is not None:
            return None
        return LR_NETWORK if params.is_network(name) else LR_VARIATIONAL

    def described(self) -> dict[str, Any]:
        """What decides the course of the rate; of an optimiser of the user's own its options do."""
        lr = list(map(list, self._lr.items())) if isinstance(self._lr, Mapping) else self._lr
        scheduler = None if self._scheduler is None else "given"
        if self._factory is not None:
            plateau = self.plateau is not None
            return {"optimizer": "given", "plateau": plateau, "lr": lr, "scheduler": scheduler}
        return {"optimizer": "auto", "lr": lr, "steps": self.steps, "scheduler": scheduler}

    def see(self, step: int, loss: float) -> None:
        """Take the loss of a step, to tell when the bound has stopped rising.

        Args:
            step: its number, from 1.
            loss: nats; where it is not finite, it says nothing.
        """
        if self.plateau is not None and step > self.anneal and math.isfinite(loss):
            self.plateau.update(-loss)

    def adapt(self, step: int, optimizer: torch.optim.Optimizer) -> None:
        """Set the rate of "auto" for the next step.

        Args:
            step: how many are done.
            optimizer: whose rates are set.
        """
        if self.automatic:
            factor = self.factor(step)
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    def factor(self, step: int) -> float:
        """On the first rates of "auto", for the next step.

        Args:
            step: how many are done.
        """
        open_ended = self.stages or self.plateau
        return self.damping * (open_ended.factor if open_ended else cosine(step, self.limit))

    def lower(self, factor: float, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Make all further steps shorter.

        Args:
            factor: on every learning rate.
            optimizer, scheduler: whose rates are set.
        """
        if self.automatic:
            self.damping *= factor
            for group in optimizer.param_groups:
                group["lr"] *= factor
        else:
            scale_rates(optimizer, scheduler, factor)

    def finished(self, step: int) -> bool:
        """Whether so many steps are enough.

        Args:
            step: how many are done.
        """
        if self.stages is not None and self.stages.finished is not None:
            return step >= self.stages.finished
        return step >= self.limit or (self.plateau is not None and self.plateau.converged)

    def expected(self, step: int) -> int | None:
        """About how many steps there will be, where their number is open; at least.

        Args:
            step: how many are done.
        """
        if self.stages is not None:
            return self.stages.finished or self.stages.end
        return (
            None if self.plateau is None else step + self.plateau.length * self.plateau.stages_left
        )

    def shortfall(self, losses: Sequence[float]) -> str:
        """Why a finished fit has not converged, from the loss at each step; empty if it has."""
        steps = len(losses)
        if steps < self.anneal:
            return (
                f"the KL schedule ends at step {self.anneal}, after the {steps} of this fit; raise "
                "steps, or shorten the schedule"
            )
        if self.anneal and steps - self.anneal < LATE * steps:
            return (
                f"only {steps - self.anneal} of {steps} steps came after the KL schedule's end; "
                "raise steps, or shorten the schedule"
            )
        if self.stages is not None:
            if self.stages.converged:
                return ""
            if abs(self.stages.gain) <= self.stages.tolerance:
                return (
                    f"after {steps} steps the averages of two stages agree, but no step was left "
                    "to confirm it; raise steps"
                )
            return (
                f"after {steps} steps the averages of two stages still differ by "
                f"{self.stages.gain:.2g} nats, more than {self.stages.tolerance:.2g}; scale or "
                "centre the data, take larger batches, or another guide"
            )
        if self.plateau is not None:
            level = self.plateau.converged
            return "" if level else f"the bound was not level yet after {steps} steps; raise steps"
        return still_rising([-loss for loss in losses if math.isfinite(loss)])


def _fusable(leaves: Sequence[Tensor]) -> bool | None:
    """Whether Adam may update them in one pass (`None` leaves it to torch).

    Torch's goes wrong on gaps between numbers, and keeps its counters elsewhere on a GPU.
    """
    floats = all(p.dtype in (torch.float32, torch.float64) for p in leaves)
    here = all(p.is_contiguous() and p.device.type == "cpu" for p in leaves)
    return True if floats and here else None


def _in_order(adam: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    """Lay gradients out as their parameters: compiled ones may be transposed."""
    for p in (p for group in adam.param_groups if group["fused"] for p in group["params"]):
        if p.grad is not None and not (p.grad.is_sparse or p.grad.is_contiguous()):
            p.grad = p.grad.contiguous()


def _factory(optimizer: Any, lr: Rates) -> Factory:
    check_factory(optimizer)
    if lr is not None and not (callable(optimizer) and isinstance(lr, Mapping)):
        raise FitError(
            "a rate lr= belongs to optimizer='auto'; give your own optimizer its rate directly, or "
            "a callable the rates by name: lr={'guide:*': 0.05, 'model:*': 0.001}"
        )
    return cast(Factory, optimizer)
