"""Which parameters of a module are random."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import Size, Tensor, nn
from torch.nn.parameter import UninitializedParameter

from pvi.errors import ModelError

NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)

Predicate = Callable[[str, nn.Module, nn.Parameter], Any]


@dataclass(frozen=True)
class Weight:
    """One random tensor of a module.

    Args:
        name: as in `module.named_parameters()`, the name of its site.
        owner: the submodule that holds it.
        shape: of the tensor.
    """

    name: str
    owner: nn.Module
    shape: Size

    @property
    def value(self) -> Tensor:
        """The tensor in the module."""
        return getattr(self.owner, self.name.split(".")[-1]).detach()

    @property
    def fan_in(self) -> int:
        """How many of its numbers are summed in one output: 1 for vectors and embeddings."""
        single = len(self.shape) < 2 or isinstance(self.owner, nn.Embedding | nn.EmbeddingBag)
        if single:
            return 1
        if isinstance(self.owner, nn.modules.conv._ConvTransposeNd):  # (inputs, outputs / groups)
            inputs = self.shape[0] // self.owner.groups * self.shape[2:].numel()
            return max(1, inputs // math.prod(self.owner.stride))  # the mean over positions
        return self.shape[1:].numel()

    @property
    def centre(self) -> float:
        """What it is about where it does nothing: 1 for the gain of a norm, else 0."""
        is_gain = isinstance(self.owner, NORMS) and self.name.split(".")[-1] == "weight"
        return 1.0 if is_gain else 0.0


def select(module: nn.Module, where: Any) -> dict[str, Weight]:
    """The random tensors of a module by name, tied ones once.

    Args:
        where: as of `bayesianize`.

    Raises:
        ModelError: it selects nothing, or what it selects has no shape yet.
    """
    chosen = _predicate(where)
    found: dict[str, Weight] = {}
    for name, parameter in module.named_parameters():
        names = [n for n, p in module.named_parameters(remove_duplicate=False) if p is parameter]
        if not any(chosen(n, _owner(module, n), parameter) for n in names):
            continue
        if isinstance(parameter, UninitializedParameter):
            raise ModelError(f"parameter '{name}' has no shape yet: run the module once before")
        found[name] = Weight(name, _owner(module, name), parameter.shape)
    if not found:
        known = [name for name, _ in module.named_parameters()]
        raise ModelError(f"where={where!r} selects no parameter of the module, which has {known}")
    return found


def _owner(module: nn.Module, name: str) -> nn.Module:
    return module.get_submodule(name.rpartition(".")[0])


def _predicate(where: Any) -> Predicate:
    if where is None:
        return lambda name, owner, parameter: True
    if isinstance(where, str):
        return lambda name, owner, parameter: fnmatchcase(name, where)
    kinds = where if isinstance(where, tuple) else (where,)
    if all(isinstance(kind, type) and issubclass(kind, nn.Module) for kind in kinds):
        return lambda name, owner, parameter: isinstance(owner, kinds)
    if callable(where):
        return where
    raise ModelError(
        "where must be None, a pattern of names such as 'head.*', a type of submodules or a tuple "
        f"of them, or a function of (name, submodule, parameter); got {where!r}"
    )


def weights(name: str, owner: nn.Module, parameter: nn.Parameter) -> bool:
    """A `where` that leaves biases and norms out."""
    return parameter.dim() > 1 and not isinstance(owner, NORMS)


def last_layer(module: nn.Module) -> Predicate:
    """A `where` for the last submodule with parameters of its own, in the order they were made.

    Args:
        module: the one that `bayesianize` is given.
    """
    owners = [m for m in module.modules() if next(_own(m), None) is not None]
    if not owners:
        raise ModelError(f"the module {type(module).__name__} has no parameters")
    return lambda name, owner, parameter: owner is owners[-1]


def _own(module: nn.Module) -> Iterator[nn.Parameter]:
    return module.parameters(recurse=False)
