"""The parameters of one model and guide, kept apart from Pyro's global store."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from types import FunctionType
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor, nn

from pvi.errors import GuideError


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
        self._owners = _labelled(programs)
        self._reached = _reached_by(programs)
        _check_names(self._modules)
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

    def names(self) -> set[str]:
        """Names of all parameters that exist by now."""
        return {name for name, _ in self._leaves()}

    def is_network(self, name: str) -> bool:
        """Whether a parameter is a weight of a neural network rather than a variational one.

        A weight is registered by `pyro.module`, or belongs to one of torch's layers or a submodule
        of a plain module; parameters of guides and a program's own ones are variational.
        """
        if "$$$" in name:
            return True
        leaf = dict(self._leaves())[name]
        for program in self._modules:
            for path, module in program.named_modules():
                if any(p is leaf for p in module.parameters(recurse=False)):
                    return _is_layer(module) or (bool(path) and not isinstance(program, PyroModule))
        return False

    def freeze(self) -> None:
        """Remember the present values of all parameters and buffers of the programs."""
        buffers = [b for module in self._reached for b in module.buffers()]
        leaves = [leaf for _, leaf in self._leaves()]
        self._frozen = [(x, x.detach().clone()) for x in [*leaves, *buffers]]

    def _current(self) -> dict[str, Tensor]:
        """The store's entries: the live ones inside the scope, the kept ones outside."""
        return self._state["params"]

    def modules(self) -> Iterator[nn.Module]:
        """The programs that are modules, others that they use, and all their parts."""
        for module in self._reached:
            yield from module.modules()

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Put the programs that are modules in evaluation mode (dropout off) for a while."""
        modes = [(m, m.training) for m in self.modules()]
        try:
            for module in self._reached:
                module.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training

    def tensors(self) -> dict[str, Tensor]:
        """All parameters (unconstrained) and buffers, each once.

        The names are the same in another process: `model:PATH` and `guide:PATH` in a program that
        is a module, `param:NAME` of a `pyro.param`, `moduleI:PATH` in other modules that are used.
        """
        found: dict[int, tuple[str, Tensor]] = {}
        others = {f"module{i}": module for i, module in enumerate(self._reached)}
        pyro_modules = {k: m for k, m in others.items() if isinstance(m, PyroModule)}
        for label, module in (*self._owners.items(), *pyro_modules.items()):
            for path, x in module.named_parameters():
                found.setdefault(id(x), (f"{label}:{path}", x))
        for name, leaf in self._current().items():
            found.setdefault(id(leaf), (f"param:{name}", leaf))
        for label, module in (*self._owners.items(), *others.items()):
            for path, x in module.named_buffers():
                found.setdefault(id(x), (f"{label}:{path}", x))
        return dict(found.values())

    def constraints(self) -> dict[str, Any]:
        """The constraint of each `pyro.param`, by its name in the store."""
        return dict(self._state["constraints"])

    def create(self, name: str, value: Tensor, constraint: Any) -> Tensor:
        """A `pyro.param` that its program has yet to make, from its unconstrained value."""
        leaf = value.detach().clone().requires_grad_()
        self._state["params"][name] = leaf
        self._state["constraints"][name] = constraint
        pyro.get_param_store().set_state(self._state)  # type: ignore[arg-type]
        return leaf

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


def check_trained(new: set[str], instead: str) -> None:
    """Refuse parameters that were only created now: they hold their starting values.

    Args:
        instead: what to do.
    """
    new = {name for name in new if "$$$" not in name}  # a registered network has its own values
    if new:
        raise GuideError(
            f"parameter '{min(new)}' has no trained value: it was created only now. {instead}"
        )


def _modules_of(programs: tuple) -> list[nn.Module]:
    """The programs that are modules, and the modules whose methods they are."""
    owners = [p if isinstance(p, nn.Module) else getattr(p, "__self__", None) for p in programs]
    return list({id(m): m for m in owners if isinstance(m, nn.Module)}.values())


def _labelled(programs: tuple) -> dict[str, nn.Module]:
    """The programs that are modules, by what they are."""
    labels = ("model", "guide", *(f"program{i}" for i in range(2, len(programs))))
    owners = {k: _modules_of((p,)) for k, p in zip(labels, programs, strict=False)}
    return {label: found[0] for label, found in owners.items() if found}


def _is_layer(module: nn.Module) -> bool:
    """Whether a module is one of torch's own kinds, made a PyroModule or not."""
    kinds = (kind for kind in type(module).__mro__ if kind is not nn.Module)
    return any(kind.__module__.startswith("torch.nn.modules") for kind in kinds)


def _check_names(modules: list[nn.Module]) -> None:
    """Refuse two PyroModules with a parameter of one name: Pyro would make them share it."""
    owners: dict[str, Tensor] = {}
    for module in modules:
        if isinstance(module, PyroModule):
            for name, leaf in module.named_parameters(prefix=module._pyro_name):
                if owners.setdefault(name, leaf) is not leaf:
                    raise GuideError(
                        f"model and guide both have a parameter '{name}', and Pyro would make them "
                        "share one value. Rename one of them."
                    )


def _reached_by(programs: tuple) -> list[nn.Module]:
    """The modules that programs are, are methods of, or name in their code."""
    found: dict[int, nn.Module] = {}
    seen: set[int] = set()
    stack = list(programs)
    while stack:
        item = stack.pop()
        if id(item) in seen:
            continue
        seen.add(id(item))
        if isinstance(item, nn.Module):
            found[id(item)] = item
            continue
        stack += [getattr(item, key, None) for key in ("__self__", "__wrapped__", "func", "fn")]
        stack += getattr(item, "args", ()) if isinstance(item, partial) else ()
        if isinstance(item, FunctionType):
            stack += [c.cell_contents for c in item.__closure__ or () if _is_set(c)]
            named = (item.__globals__.get(name) for name in item.__code__.co_names)
            stack += [x for x in named if isinstance(x, nn.Module | FunctionType)]
    return list(found.values())


def _is_set(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # a name that is not bound yet
        return False
