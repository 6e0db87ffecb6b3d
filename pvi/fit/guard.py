"""What an error leaves behind: a note on where it came from, and programs as they were before."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch import nn

from pvi.engine.failures import explained

CONTAINERS = (dict, OrderedDict, list, set)


@dataclass
class Stage:
    """How far a fit has come."""

    data: Any = None
    trainer: Any = None

    def named(self) -> dict[str, Any]:
        """The data arguments by name, once they are read."""
        return {} if self.data is None else self.data.named()

    @property
    def started(self) -> bool:
        """Whether training has begun."""
        return self.trainer is not None and self.trainer.started

    def when(self) -> str:
        """How many steps were done."""
        steps = len(self.trainer.history) if self.started else 0
        return f" after {steps} step{'s' * (steps != 1)} of the fit," if self.started else ""


@contextmanager
def guarded(model: Any, guide: Any, callbacks: Iterable[Any] = ()) -> Iterator[Stage]:
    """Inside, errors are explained; one before the first step leaves the modules as they were.

    Without it, a guide that was set up for bad data would not fit the right ones.
    """
    roles = {f"callback '{getattr(c, '__name__', type(c).__name__)}'": c for c in callbacks}
    roles |= {"model": model, "guide": guide}
    stage, before = Stage(), Outline(model, guide)
    try:
        with explained(roles, stage.named, stage.when):
            yield stage
    except Exception:
        if not stage.started:
            before.restore()
        raise


class Outline:
    """Which attributes and parameters modules have; not their values.

    Args:
        programs: of these, the modules are remembered, with all their parts.
    """

    def __init__(self, *programs: Any):
        modules = {id(m): m for p in programs if isinstance(p, nn.Module) for m in p.modules()}
        self._before = [(m, _copied(m.__dict__)) for m in modules.values()]

    def restore(self) -> None:
        """Take away what was added since, and put back what was taken away."""
        for module, before in self._before:
            module.__dict__.clear()
            module.__dict__.update(before)


def _copied(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy of a module's dict, and of the dicts in it: parameters, modules, sites."""
    return {k: copy(v) if type(v) in CONTAINERS else v for k, v in attributes.items()}
