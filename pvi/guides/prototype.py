"""A look at the model's latent sites: what every automatic guide is built from."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from pvi.engine.traces import Plate, Program, plates_of, run_hidden, sample_nodes
from pvi.errors import GuideError, ModelError

InitLoc = Callable[[Mapping], Tensor]


@dataclass(frozen=True)
class Latent:
    """A continuous latent site of the model.

    Args:
        loc: its starting point in unconstrained space, rows repeated to the plates' full size.
        event_dim: dimensions of one event in unconstrained space.
    """

    name: str
    support: constraints.Constraint
    plates: tuple[Plate, ...]
    loc: Tensor
    event_dim: int

    @property
    def is_real(self) -> bool:
        return is_real(self.support)

    @property
    def transform(self) -> Any:
        """The bijection from unconstrained space onto the support."""
        return biject_to(self.support)


def is_real(support: constraints.Constraint) -> bool:
    """Whether a support is all of R^n."""
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support in (constraints.real, constraints.real_vector)


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


def _median(fn: Any) -> Tensor:
    while hasattr(fn, "base_dist") and not hasattr(fn, "transforms"):
        fn = fn.base_dist
    return fn.icdf(torch.tensor(0.5))


def _interior(support: Any, value: Tensor) -> bool:
    return bool(support.check(value).all()) and bool(biject_to(support).inv(value).isfinite().all())


def latents(model: Program, init_loc_fn: InitLoc, args: tuple, kwargs: Mapping) -> list[Latent]:
    """Run the model once from its starting point and describe the latents that it does not sum out.

    Raises:
        ModelError: the model has no latent site.
        GuideError: a latent site is discrete, or its start is not a finite point of its support.
    """

    def start(site: Mapping) -> Tensor:
        if site["fn"].support.is_discrete:
            return site["fn"].sample()  # refused below, by name
        return init_loc_fn(site)

    trace = run_hidden(InitMessenger(start)(model), args, kwargs)
    found = [
        _latent(name, node)
        for name, node in sample_nodes(trace).items()
        if not node["is_observed"] and node["infer"].get("enumerate") != "parallel"
    ]
    if not found:
        raise ModelError("the model has no latent site, so there is nothing to build a guide for")
    return found


def _latent(name: str, node: Mapping) -> Latent:
    fn, value = node["fn"], node["value"].detach()
    try:
        loc = biject_to(fn.support).inv(value)
    except NotImplementedError as error:
        raise GuideError(
            f"site '{name}' ({type(fn).__name__}) has no map from unconstrained space (is it "
            'discrete?). This guide needs continuous latents: mark it infer={"enumerate": '
            '"parallel"} in the model, to sum it out, or write your own guide.'
        ) from error
    if not bool(loc.isfinite().all()):
        raise GuideError(
            f"init_loc_fn put site '{name}' at a point that is not inside its support "
            f"{fn.support}. Return a finite value strictly inside."
        )
    event_dim = fn.event_dim + loc.dim() - value.dim()
    plates = tuple(p for p in plates_of(node) if p.dim is not None)
    for plate in plates:
        loc = _repeat(loc, plate, event_dim)
    return Latent(name, fn.support, plates, loc.clone(), event_dim)


def _repeat(loc: Tensor, plate: Plate, event_dim: int) -> Tensor:
    """Repeat the rows of a subsampled plate to its full size."""
    if plate.dim is None or plate.full_size == plate.size:
        return loc
    rows = torch.arange(plate.full_size, device=loc.device) % plate.size
    return loc.index_select(plate.dim - event_dim, rows)
