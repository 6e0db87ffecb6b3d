"""The same model in other coordinates: latents told relative to what they depend on.

In $\\theta \\sim N(\\mu, \\tau)$ with latent $\\mu, \\tau$, posteriors that say little of $\\theta$
are funnels, which no normal fits. Written as $\\theta = \\mu + \\tau\\tilde\\theta$,
$\\tilde\\theta \\sim N(0, 1)$, they are not (Papaspiliopoulos, Roberts, Skold 2007).
"""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from pyro.infer.reparam import LocScaleReparam, TransformReparam
from pyro.infer.reparam.reparam import Reparam
from pyro.nn import PyroModule
from pyro.poutine.reparam_messenger import ReparamMessenger
from torch import Tensor, nn
from torch.distributions import biject_to

from pvi.engine.traces import Program, hidden, replaced, run, run_hidden, sample_nodes
from pvi.errors import ModelError

WRAPPERS = torch.distributions.Independent, torch.distributions.TransformedDistribution
CENTERED = {"noncentered": 0.0, "learned": None}


class _Reparametrized(ReparamMessenger):
    """Pyro's handler; the sites that it rewrites are deterministic afterwards."""

    def _pyro_sample(self, msg: Any) -> None:
        latent = not msg["is_observed"]
        super()._pyro_sample(msg)
        if latent and msg["is_observed"]:
            msg["infer"]["_deterministic"] = True


def reparametrized(model: Program, how: Any, args: tuple, kwargs: Mapping) -> Program:
    """The model with some of its sites reparameterised; they stay as deterministic sites.

    Args:
        how: "noncentered", for every latent of a location-scale family whose location or scale
            depends on another latent; "learned", the same sites with a degree of centring between 0
            and 1 that is fitted (Gorinova, Moore, Hoffman 2020); or what `pyro.poutine.reparam`
            takes: a dict from site to a reparameteriser, or a strategy.
        args, kwargs: arguments to look at the model with.

    Raises:
        ModelError: there is nothing to reparameterise, or `how` names an unknown site.
    """
    if isinstance(how, str):
        if how not in CENTERED:
            raise ModelError(
                f"reparam must be one of {sorted(CENTERED)}, a dict from site to a reparameteriser "
                f"of pyro.infer.reparam, or a strategy; got {how!r}"
            )
        sites = dependent_sites(model, args, kwargs)
        if not sites:
            raise ModelError(
                f"reparam={how!r} has nothing to do: no latent site has a location or scale that "
                "depends on another latent"
            )
        config: Any = {}
        for name, fn in sites.items():
            config |= _config(name, fn, CENTERED[how])
    elif isinstance(how, Mapping):
        config = dict(how)
        _check_names(config, model, args, kwargs)
    elif callable(how):
        config = how
    else:
        raise ModelError(f"reparam must be a string, a dict or a strategy, got {how!r}")
    return _wrapped(model, config)


def dependent_sites(model: Program, args: tuple, kwargs: Mapping) -> dict[str, Any]:
    """Latents of a location-scale family whose location or scale depends on another latent."""
    trace = run_hidden(InitMessenger(_inside)(model), args, kwargs)
    latent = {n: x for n, x in sample_nodes(trace).items() if not x["is_observed"]}
    with hidden(), torch.enable_grad():
        values = {
            name: node["value"].detach().clone().requires_grad_()
            for name, node in latent.items()
            if node["value"].is_floating_point()
        }
        again = sample_nodes(run(model, args, kwargs, replaced(trace, values)))
        found = {}
        for name in latent:
            fn = _loc_scale(again[name]["fn"])
            if fn is not None and _moves([fn.loc, fn.scale], list(values.values())):
                found[name] = again[name]["fn"]
    return found


def _moves(parameters: list[Tensor], values: list[Tensor]) -> bool:
    """Whether a distribution's parameters change with other draws."""
    moving = [x.reshape(-1) for x in parameters if x.requires_grad]
    if not moving:
        return False
    x = torch.cat(moving)
    total = (x * torch.linspace(1.0, 2.0, len(x)).to(x)).sum()  # uneven: contrasts sum to 0
    slopes = torch.autograd.grad(total, values, allow_unused=True, retain_graph=True)
    return any(slope is not None and bool(slope.any()) for slope in slopes)


def _inside(site: Mapping) -> Tensor:
    """A point inside the support of any prior, where no slope vanishes by symmetry."""
    fn = site["fn"]
    if fn.support.is_discrete:
        return fn.sample()
    transform = biject_to(fn.support)
    return transform(torch.full(transform.inverse_shape(fn.shape()), 0.3))


def _loc_scale(fn: Any) -> Any:
    """The location-scale distribution under all wrappers, or `None`."""
    while isinstance(fn, WRAPPERS):
        fn = fn.base_dist
    known = {"loc", "scale"} <= set(fn.arg_constraints)
    return fn if known and not isinstance(fn, dist.Delta) else None


def _config(name: str, fn: Any, centered: float | None) -> dict[str, Reparam]:
    """How to reparameterise one site; a transformed one at its base."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    shape = sorted(set(_loc_scale(fn).arg_constraints) - {"loc", "scale"})
    one = LocScaleReparam(centered=centered, shape_params=shape)
    if isinstance(fn, torch.distributions.TransformedDistribution):
        return {name: TransformReparam(), f"{name}_base": one}
    return {name: one}


def _check_names(config: Mapping, model: Program, args: tuple, kwargs: Mapping) -> None:
    known = [
        name
        for name, node in sample_nodes(
            run_hidden(InitMessenger(_inside)(model), args, kwargs)
        ).items()
        if not node["is_observed"]
    ]
    for name, one in config.items():
        of_base = name.endswith("_base") and name.removesuffix("_base") in config
        if name not in known and not of_base:
            raise ModelError(f"reparam names site '{name}', which is no latent; they are {known}")
        if not isinstance(one, Reparam):
            raise ModelError(
                f"reparam needs a reparameteriser of pyro.infer.reparam for site '{name}', such as "
                f"LocScaleReparam(0.0); got {one!r}"
            )


def _wrapped(model: Program, config: Any) -> Program:
    if isinstance(model, nn.Module):
        kind = PyroModule if isinstance(model, PyroModule) else nn.Module
        return _module(kind)(model, config)
    return wraps(model)(_call(model, config))


def _call(model: Program, config: Any) -> Callable:
    def reparametrized_model(*args: Any, **kwargs: Any) -> Any:
        return _Reparametrized(config)(model)(*args, **kwargs)

    return reparametrized_model


def _module(kind: type[nn.Module]) -> Any:
    class Reparametrized(kind):  # type: ignore[valid-type, misc]
        """A module whose call is reparameterised; its parameters are the module's."""

        def __init__(self, model: nn.Module, config: Any):
            super().__init__()
            self.model, self._config = model, config

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return _Reparametrized(self._config)(self.model)(*args, **kwargs)

    return Reparametrized
