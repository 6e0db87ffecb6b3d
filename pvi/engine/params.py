"""The parameters of one model and guide, kept apart from Pyro's global store."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from pyro.infer.autoguide import AutoGuide
from torch import Tensor, nn


class Params:
    """Everything trainable that a model and a guide reach: `pyro.param`s, `pyro.module`s, own
    modules.

    Run the programs inside `scope()`: the global store is put aside and comes back unchanged. After
    `freeze()` the scope always shows the values of that moment, whatever is trained later.

    Args:
        programs: the model and the guide.
        state: a parameter-store state to start from, such as `pyro.get_param_store().get_state()`.
    """

    def __init__(self, *programs: Any, state: dict | None = None):
        self._modules = _modules_of(programs)
        self._state = state or {"params": {}, "constraints": {}}
        self._frozen: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def scope(self) -> Iterator[None]:
        """Make these parameters the current ones, and keep what is created inside."""
        store = pyro.get_param_store()
        with store.scope(self._state), self._frozen_values():  # type: ignore[arg-type]
            try:
                yield
            finally:
                self._state.update(store.get_state())

    def named(self) -> dict[str, Tensor]:
        """Unconstrained leaves that want gradients, each once, by name."""
        return {name: leaf for name, leaf in self._leaves() if leaf.requires_grad}

    def is_network(self, name: str) -> bool:
        """Whether a parameter is a weight of a neural network rather than a variational one."""
        if name in self._current():
            return "$$$" in name
        index = int(name.split(":")[0].removeprefix("module"))
        if isinstance(self._modules[index], AutoGuide) or hasattr(self._modules[index], "setup"):
            return False
        return not name.endswith("_unconstrained")

    def freeze(self) -> None:
        """Remember the present values of all parameters and buffers of the programs."""
        buffers = [b for module in self._modules for b in module.buffers()]
        leaves = [leaf for _, leaf in self._leaves()]
        self._frozen = [(x, x.detach().clone()) for x in [*leaves, *buffers]]

    def _current(self) -> dict[str, Tensor]:
        """The store's entries: the live ones inside the scope, the kept ones outside."""
        return self._state["params"]

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Put the programs that are modules in evaluation mode (dropout off) for a while."""
        modes = [(m, m.training) for module in self._modules for m in module.modules()]
        try:
            for module in self._modules:
                module.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training

    def created(self) -> int:
        """How many parameters the current store holds; call inside the scope."""
        return len(pyro.get_param_store())

    def sync(self) -> None:
        """Take over parameters that were created since the scope was entered."""
        self._state.update(pyro.get_param_store().get_state())

    def _leaves(self) -> Iterator[tuple[str, Tensor]]:
        seen: set[int] = set()
        named = list(self._current().items())
        for i, module in enumerate(self._modules):
            named += [(f"module{i}:{name}", p) for name, p in module.named_parameters()]
        for name, leaf in named:
            if id(leaf) not in seen:
                seen.add(id(leaf))
                yield name, leaf

    @contextmanager
    def _frozen_values(self) -> Iterator[None]:
        live = [(x, x.data) for x, _ in self._frozen]
        try:
            for x, value in self._frozen:
                x.data = value
            yield
        finally:
            for x, value in live:
                x.data = value


def _modules_of(programs: tuple) -> list[nn.Module]:
    """The programs that are modules, and the modules whose methods they are."""
    owners = [p if isinstance(p, nn.Module) else getattr(p, "__self__", None) for p in programs]
    return list({id(m): m for m in owners if isinstance(m, nn.Module)}.values())


def is_finite(tensors: list[Tensor]) -> Tensor:
    """Whether all entries of all tensors are finite, as a scalar bool tensor."""
    return torch.stack([x.isfinite().all() for x in tensors]).all()
