"""Parameters of guides, read without Pyro's detours where those would change nothing."""

from functools import cache
from typing import Any

import pyro
from pyro.nn import PyroModule
from pyro.nn.module import _is_module_local_param_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.plate_messenger import PlateMessenger
from pyro.poutine.runtime import _PYRO_STACK
from torch import Tensor
from torch.distributions import constraints, transform_to

from pvi.engine.traces import Tracer


def read(module: PyroModule, key: str) -> Tensor:
    """`getattr(module, key)` for a `PyroParam`.

    Where Pyro's store holds the module's own tensor and no handler looks at `pyro.param`, that is
    the tensor under its constraint.
    """
    leaf = module._parameters.get(f"{key}_unconstrained")
    store, name = pyro.get_param_store(), f"{module._pyro_name}.{key}"
    if leaf is None or store._params.get(name) is not leaf or _is_module_local_param_enabled():
        return getattr(module, key)
    if any(map(_listens, _PYRO_STACK)):
        return getattr(module, key)
    constraint: Any = store._constraints[name]
    if constraint is constraints.real:
        return leaf
    if constraint is constraints.positive:
        return leaf.exp()  # torch's own multiplies by 1 and adds 0
    return transform_to(constraint)(leaf)


def _listens(handler: Any) -> bool:
    """Whether a handler may record, replace or take rows of a parameter."""
    if isinstance(handler, PlateMessenger):
        return handler.subsample_size != handler.size
    return handler.params if isinstance(handler, Tracer) else _reads(type(handler))


@cache
def _reads(kind: type[Messenger]) -> bool:
    general = ("_process_message", "_postprocess_message")
    own = any(getattr(kind, name) is not getattr(Messenger, name) for name in general)
    return own or hasattr(kind, "_pyro_param") or hasattr(kind, "_pyro_post_param")
