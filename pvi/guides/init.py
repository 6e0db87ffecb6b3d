"""Where a guide starts."""

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributions import biject_to

from pvi.errors import GuideError

InitLoc = Callable[[Mapping], Tensor]
MODE = "mode"  # needs the model's density: `pvi.guides.mode`


def prior_median(site: Mapping) -> Tensor:
    """A deterministic start that exists for every prior, proper or flat.

    The prior's median where it has one in closed form, else its mean if that is finite and inside
    the support, else the image of 0 under the map from unconstrained space (all that a flat prior
    offers).
    """
    fn = site["fn"]
    for candidate in (_median, lambda f: f.mean):
        try:
            value = candidate(fn).expand(fn.shape()).clone()
        except (NotImplementedError, AttributeError, RuntimeError, ValueError):
            continue
        if bool(value.isfinite().all()) and _interior(fn.support, value):
            return value
    transform = biject_to(fn.support)
    return transform(torch.zeros(transform.inverse_shape(fn.shape())))


def init_to(values: Mapping[str, Any]) -> InitLoc:
    """Start these sites at these values, the others at `prior_median`."""

    def start(site: Mapping) -> Tensor:
        if site["name"] not in values:
            return prior_median(site)
        shape, default = site["fn"].shape(), prior_median(site)
        value = torch.as_tensor(values[site["name"]]).detach().to(default)
        try:
            return value.expand(shape).clone()
        except RuntimeError as error:
            raise GuideError(
                f"init_loc_fn has a value of shape {tuple(value.shape)} for site '{site['name']}', "
                f"whose shape is {tuple(shape)}"
            ) from error

    return start


def init_to_module(module: nn.Module) -> InitLoc:
    """Start sites named like a module's parameters at those parameters (pretrained weights)."""
    return init_to(dict(module.named_parameters()))


def resolve(init: Any, model: Any) -> InitLoc:
    """A function from a site to its start, for everything that `init_loc_fn` may be.

    Raises:
        GuideError: it is none of them.
    """
    if isinstance(init, str) and init in ("median", MODE):
        return prior_median
    if isinstance(init, str) and init == "module":
        module = getattr(model, "module", model)
        if not isinstance(module, nn.Module):
            raise GuideError(
                "init_loc_fn='module' starts sites at the parameters of the model's module, but "
                "the model is no nn.Module and has no attribute `module`. Use "
                "pvi.guides.init_to_module(module)."
            )
        return init_to_module(module)
    if isinstance(init, Mapping):
        return init_to(init)
    if callable(init):
        return cast(InitLoc, init)
    raise GuideError(
        "init_loc_fn must be 'median', 'mode', 'module', a dict from site to value, or a function "
        f"of a site such as pyro.infer.autoguide.init_to_mean; got {init!r}"
    )


def check_names(init: Any, sites: list[str]) -> None:
    """Refuse a dict of starts that names no latent site of the model.

    Raises:
        GuideError: naming it.
    """
    for name in init if isinstance(init, Mapping) else ():
        if name not in sites:
            raise GuideError(
                f"init_loc_fn has a start for '{name}', but the model has no latent site '{name}'. "
                f"Its latent sites are {sites}."
            )


def _median(fn: Any) -> Tensor:
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn.icdf(torch.tensor(0.5))


def _interior(support: Any, value: Tensor) -> bool:
    return bool(support.check(value).all()) and bool(biject_to(support).inv(value).isfinite().all())
