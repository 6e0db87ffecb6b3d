"""Random numbers of a step: the same stream in its graph as in the program.

A graph draws in the order of its nodes, and a program may go back: `gradient="path"` draws the same
numbers twice, and some looks at a program restore the random state after them. So a step is run
once to see which of its draws move the stream from its start to its end; only these stay draws.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from pvi.compiled.errors import NotCompilable
from pvi.engine.traces import rng_state

DRAW, HOLD = -1, -2


@dataclass(frozen=True)
class Drawn:
    """One random operation: the random state around it, its kind, and what it returned."""

    before: int
    after: int
    kind: tuple
    value: Any


class Recorder(TorchDispatchMode):
    """Notes the random operations that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.start, self.drawn = state(), []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        before = state()
        value = func(*args, **kwargs)
        kept = tree_map(lambda x: x.detach().clone() if isinstance(x, Tensor) else x, value)
        self.drawn.append(Drawn(before, state(), _kind(func, args, kwargs), kept))
        return value

    def roles(self) -> list[int]:
        """Of each operation: `DRAW`, the number of an earlier one whose value it repeats, or
        `HOLD`: it is off the stream, so that any value that was drawn will do.

        Raises:
            NotCompilable: the program moves the random state by itself.
        """
        by_after: dict[int, int] = {}
        for i, drawn in enumerate(self.drawn):
            if drawn.before != drawn.after:
                by_after.setdefault(drawn.after, i)
        on, now = set(), state()
        while now != self.start:
            i = by_after.pop(now, None)
            if i is None:
                raise NotCompilable(
                    "the program sets the random state, or draws numbers that torch does not see"
                )
            on.add(i)
            now = self.drawn[i].before
        roles = []
        first: dict[tuple, int] = {}
        for i, drawn in enumerate(self.drawn):
            key = (drawn.before, drawn.kind)
            if i in on or drawn.before == drawn.after:
                first.setdefault(key, i)
                roles.append(DRAW)
            else:
                roles.append(first.get(key, HOLD))
        return roles


class Replayer(TorchDispatchMode):
    """Runs a program whose random operations have these roles.

    Args:
        drawn: from an earlier run of the same program.
        roles: from `Recorder.roles`.
    """

    def __init__(self, drawn: Sequence[Drawn], roles: Sequence[int]):
        super().__init__()
        self._drawn, self._roles = drawn, roles
        self._wanted, self._kept, self._next = set(roles), {}, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if not is_random(func):
            return func(*args, **kwargs)
        i, self._next = self._next, self._next + 1
        if i >= len(self._roles) or self._drawn[i].kind != _kind(func, args, kwargs):
            raise NotCompilable("the program draws other random numbers each time it is run")
        role = self._roles[i]
        if role == DRAW:
            value = func(*args, **kwargs)
            if i in self._wanted:
                self._kept[i] = _each(torch.clone, value)
            return value
        value = self._drawn[i].value if role == HOLD else self._kept[role]
        if func._schema.is_mutable:
            return args[0].copy_(value)
        return _each(torch.clone, value)

    def held(self) -> list[Any]:
        """The values that stand for draws off the stream."""
        return [d.value for d, role in zip(self._drawn, self._roles, strict=True) if role == HOLD]


def is_random(func: Any) -> bool:
    """Whether an operation draws from torch's random state."""
    return torch.Tag.nondeterministic_seeded in getattr(func, "tags", ())


def state() -> int:
    """A number that stands for the random state."""
    return hash(tuple(x.numpy().tobytes() for x in rng_state()))


def _kind(func: Any, args: tuple, kwargs: Mapping) -> tuple:
    """What decides how an operation draws, but for the values of tensors."""

    def plain(x: Any) -> Any:
        return (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else str(x)

    return str(func), tuple(map(plain, args)), tuple((k, plain(v)) for k, v in kwargs.items())


def _each(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    return tree_map(lambda x: function(x) if isinstance(x, Tensor) else x, value)
