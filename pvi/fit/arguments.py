"""Arguments of `pvi.fit` and `pvi.check` that are neither data nor run: each with its message."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from difflib import get_close_matches
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import pyro.infer
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from pvi.engine import Objective
from pvi.engine.numbers import check_seed, whole_number
from pvi.errors import DataError, FitError, GuideError, ModelError, ObjectiveError, PviError

P = ParamSpec("P")
R = TypeVar("R")
OTHER_NAMES = {  # of other libraries
    "num_steps": "steps",
    "n_steps": "steps",
    "num_iterations": "steps",
    "iterations": "steps",
    "num_epochs": "epochs",
    "learning_rate": "lr",
    "loss": "objective",
    "elbo": "objective",
    "num_particles": "objective",
    "optim": "optimizer",
    "optimiser": "optimizer",
    "x": "data",
    "dataset": "data",
    "inputs": "args",
    "plates": "plate",
    "verbose": "progress",
    "rng": "seed",
    "random_state": "seed",
}
OURS = {  # objectives of Pyro, and how to write them here
    "RenyiELBO": "pvi.RenyiELBO({alpha}, {k})",
    "TraceMeanField_ELBO": "pvi.TraceMeanFieldELBO({k})",
    "ReweightedWakeSleep": "pvi.ReweightedWakeSleep({k})",
}
OPTIMIZER = (
    "optimizer must be 'auto', 'adam' or a callable from a list of parameters to an optimiser, "
    "such as lambda p: torch.optim.Adam(p, lr=0.01); got "
)


def known_arguments(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function refuse names that it does not have, and say which may be meant.

    Raises:
        FitError: naming the argument.
    """
    names = list(inspect.signature(function).parameters)

    @wraps(function)
    def checked(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in names:
                meant = OTHER_NAMES.get(name) or next(iter(get_close_matches(name, names, 1)), "")
                meant = meant if meant in names else ""
                hint = f"; did you mean {meant}=?" if meant else "."
                called = f"pvi.{function.__name__}"
                raise FitError(
                    f"{called} has no argument '{name}'{hint} It takes {', '.join(names)}."
                )
        return function(*args, **kwargs)

    return checked


def check_options(
    model: Any,
    guide: Any,
    objective: Any = None,
    seed: Any = None,
    device: Any = None,
    callbacks: Any = (),
    plate: Any = None,
    batch_size: Any = None,
) -> Iterator[PviError]:
    """What is wrong with arguments of these names, before anything is run."""
    checks: tuple[tuple[Callable[[Any], object], Any], ...] = (
        (_check_model, model),
        (_check_guide, guide),
        (_check_objective, objective),
        (check_seed, seed),
        (_check_device, device),
        (_check_callbacks, callbacks),
        (_check_plate, plate),
        (check_batch_size, batch_size),
    )
    for check, value in checks:
        try:
            check(value)
        except PviError as error:
            yield error


def _check_model(model: Any) -> None:
    if isinstance(model, type):
        name = model.__name__
        raise ModelError(f"model is the class {name}; pass an instance: {name}()")
    if not callable(model):
        called = " (give it without calling it: model, not model(...))" if model is None else ""
        raise ModelError(
            "model must be a Pyro program (a function or an nn.Module), got "
            f"{'None' if model is None else type(model).__name__}{called}"
        )


def _check_guide(guide: Any) -> None:
    if guide is not None and not callable(guide):
        is_text = isinstance(guide, str) and hasattr(_guides(), guide)
        hint = f"give the class itself: pvi.guides.{guide}" if is_text else "give data as data="
        raise GuideError(
            f"guide must be a Pyro program or a class of pvi.guides, got {type(guide).__name__}; "
            f"{hint}"
        )


def _guides() -> Any:
    from pvi import guides

    return guides


def _check_objective(objective: Any) -> None:
    if objective is None or isinstance(objective, Objective):
        return
    what, instead = f"got {objective!r}", "pvi.ELBO()"
    if isinstance(objective, type):
        what = f"got the class {objective.__module__}.{objective.__name__}"
    elif inspect.isfunction(objective):
        what = f"got the function {objective.__name__}, which makes one: call it"
        ours = getattr(objective, "__module__", "").startswith("pvi.")
        instead = f"pvi.{objective.__name__}()" if ours else instead
    elif isinstance(objective, pyro.infer.ELBO):
        what, instead = f"got Pyro's {type(objective).__name__}", _ours(objective)
    raise ObjectiveError(f"objective must be an objective of pvi, such as {instead}; {what}")


def _ours(objective: Any) -> str:
    """Our objective in the place of one of Pyro's."""
    name = type(objective).__name__.removeprefix("Jit")
    k = objective.num_particles
    form = OURS.get(name, "pvi.ELBO({k})")
    return form.format(k=k, alpha=getattr(objective, "alpha", 0.0))


def _check_device(device: Any) -> None:
    if device is None:
        return
    try:
        torch.zeros((), device=device)
    except (RuntimeError, AssertionError, TypeError) as error:
        found = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
        found += ["mps"] if torch.backends.mps.is_available() else []
        raise FitError(
            f"device {device!r} can't be used; there are {', '.join(found)} "
            f"(cuda is {'there' if torch.cuda.is_available() else 'not there'})"
        ) from error


def _check_callbacks(callbacks: Any) -> None:
    if callable(callbacks) or not isinstance(callbacks, Iterable) or isinstance(callbacks, str):
        name = getattr(callbacks, "__name__", repr(callbacks))
        raise FitError(f"callbacks must be a list of functions: callbacks=[{name}]")
    for callback in list(callbacks):
        if not callable(callback):
            raise FitError(
                f"callbacks must hold functions of a pvi Step, got {callback!r} among them"
            )


def _check_plate(plate: Any) -> None:
    names = [plate] if isinstance(plate, str) else plate
    listed = isinstance(names, Iterable) and all(isinstance(name, str) for name in names)
    if plate is not None and not listed:
        raise ModelError(f"plate must be the name of a plate, or a list of names, got {plate!r}")


def check_batch_size(batch_size: Any) -> int | None:
    """A whole number of rows, or `None`.

    Raises:
        DataError: what came.
    """
    if batch_size is None:
        return None
    return whole_number("batch_size", batch_size, error=DataError)


def check_factory(optimizer: Any) -> None:
    """Refuse what is neither a function from parameters to an optimiser nor one.

    Raises:
        FitError: with the form that it must have.
    """
    if isinstance(optimizer, PyroOptim):
        name = getattr(optimizer.pt_optim_constructor, "__name__", "its own kind")
        raise FitError(
            f"{OPTIMIZER}a PyroOptim ({name}), which pvi.fit "
            "does not take: it trains with torch.optim directly"
        )
    if not (callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer)):
        raise FitError(f"{OPTIMIZER}{optimizer!r}")


def made_optimizer(factory: Callable[[list], Any], given: list, leaves: list[Tensor]) -> Any:
    """The optimiser that a user's function makes.

    Args:
        given: the parameters, or groups of them.
        leaves: the parameters.

    Raises:
        FitError: it is none, or trains other parameters.
    """
    try:
        optimizer = factory(given)
    except ValueError as error:  # torch's word on a rate or another option
        raise FitError(f"the optimizer can't be made: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise FitError(f"optimizer= must return a torch.optim.Optimizer, got {optimizer!r}")
    ours = {id(leaf) for leaf in leaves}
    trained = (p for group in optimizer.param_groups for p in group["params"])
    if not any(id(p) in ours for p in trained):
        raise FitError(
            "the optimizer trains none of the parameters that it was given: make it from the "
            "function's argument, as in lambda p: torch.optim.Adam(p)"
        )
    return optimizer
