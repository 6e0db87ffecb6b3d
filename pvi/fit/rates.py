"""Learning rates by parameter, and the user's own optimisers and schedulers."""

import inspect
import math
from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from pvi.engine.params import Params
from pvi.errors import FitError

Rates = float | Mapping[str, float] | None
RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # what torch's schedulers keep in a group


def check_rates(lr: Any) -> None:
    """Refuse rates that are not positive numbers.

    Args:
        lr: as given to `pvi.fit`.
    """
    given = lr if isinstance(lr, Mapping) else {None: lr}
    for pattern, rate in given.items():
        if pattern is not None and not isinstance(pattern, str):
            raise FitError(f"lr= maps patterns of names to rates, but {pattern!r} is no string")
        if rate is None and pattern is None:
            continue
        number = isinstance(rate, Real) and not isinstance(rate, bool)
        if not number or not 0 < float(rate or 0) < math.inf:
            where = "" if pattern is None else f" for {pattern!r}"
            raise FitError(f"lr must be a number > 0, got {rate!r}{where}")


def matched(params: Params, named: Mapping[str, Tensor], lr: Rates) -> dict[str, str | None]:
    """The first pattern of `lr` that fits each parameter, `None` where none does.

    Args:
        params: for the names that are matched: `guide:PATH`, `model:PATH`, `param:NAME`, ...
        named: parameters by another name.
        lr: rates by pattern, as of `fnmatch`.
    """
    if not isinstance(lr, Mapping):
        return dict.fromkeys(named)
    own = {id(x): name for name, x in params.tensors().items()}
    return {
        name: next((p for p in lr if fnmatchcase(own.get(id(x), name), p)), None)
        for name, x in named.items()
    }


def check_patterns(params: Params, named: Mapping[str, Tensor], lr: Rates) -> None:
    """Refuse a pattern that fits no parameter.

    Args:
        params, named, lr: as in `matched`.
    """
    if not isinstance(lr, Mapping):
        return
    own = {id(x): name for name, x in params.tensors().items()}
    names = sorted(own.get(id(x), name) for name, x in named.items())
    for pattern in lr:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise FitError(
                f"lr: the pattern {pattern!r} fits no parameter. Their names are "
                f"{', '.join(names[:8])}{', ...' if len(names) > 8 else ''}; * stands for anything."
            )


def check_optimizer(optimizer: Any, params: Params, *, ready: bool) -> torch.optim.Optimizer:
    """Refuse an optimiser that trains other parameters, or wants to run the loss by itself.

    Args:
        ready: whether the user has made it, rather than a factory.

    Raises:
        FitError: naming the optimiser, or the parameter.
    """
    closure = inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise FitError(
            f"{type(optimizer).__name__} runs the loss several times in a step and compares the "
            "values, but here each is drawn anew, so its line search would follow noise. Use an "
            "optimiser whose step() needs no closure, such as torch.optim.Adam."
        )
    if ready:
        _check_covers(optimizer, params)
    return optimizer


def _check_covers(optimizer: torch.optim.Optimizer, params: Params) -> None:
    named = {id(x): name for name, x in params.tensors().items() if x.requires_grad}
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = sorted(name for key, name in named.items() if key not in held)
    if held - named.keys():
        raise FitError(
            f"the {type(optimizer).__name__} holds {len(held - named.keys())} parameters that are "
            "none of this model or guide. Make it from theirs (a guide of pvi.guides has them "
            "after guide.setup(...)), or pass a callable: optimizer=lambda p: Adam(p, lr=0.01)."
        )
    if missing:
        raise FitError(
            f"the {type(optimizer).__name__} does not train '{missing[0]}'. Add it, or fix it with "
            "requires_grad_(False)."
        )


def make_scheduler(
    factory: Callable[[torch.optim.Optimizer], Any] | None,
    optimizer: torch.optim.Optimizer,
    validated: bool,
) -> Any:
    """One of torch's schedulers, or `None`.

    Args:
        factory: from an optimiser to a scheduler.
        validated: whether there are validation data, for one that reacts to their bound.

    Raises:
        FitError: it is none, or has nothing to react to.
    """
    if factory is None:
        return None
    if not callable(factory) or isinstance(factory, LRScheduler):
        raise FitError(
            "scheduler must be a callable from the optimiser to one of torch's schedulers, such as "
            "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1000); got "
            f"{type(factory).__name__}"
        )
    scheduler = factory(optimizer)
    if not isinstance(scheduler, LRScheduler):
        raise FitError(
            f"scheduler's callable must return a torch scheduler, got {type(scheduler).__name__}"
        )
    if isinstance(scheduler, ReduceLROnPlateau) and not validated:
        raise FitError(
            "ReduceLROnPlateau reacts to a validation bound: give validation_data=, or leave "
            "scheduler= out (optimizer='auto' lowers its rate at plateaus of the training bound)"
        )
    return scheduler


def scale_rates(optimizer: torch.optim.Optimizer, scheduler: Any, factor: float) -> None:
    """Multiply all learning rates, also those that a scheduler starts from.

    Args:
        factor: such as 0.1.
    """
    for group in optimizer.param_groups:
        for key in RATES:
            if key in group:
                group[key] = group[key] * factor
    if hasattr(scheduler, "base_lrs"):
        scheduler.base_lrs = [rate * factor for rate in scheduler.base_lrs]
