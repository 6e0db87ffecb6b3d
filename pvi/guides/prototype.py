"""A look at the model's latent sites: what every automatic guide is built from."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import biject_to, constraints

from pvi.engine.checks import is_real
from pvi.engine.traces import Plate, Program, plates_of, run_hidden, sample_nodes
from pvi.errors import GuideError, ModelError
from pvi.guides.init import InitLoc, prior_median


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
    def key(self) -> str:
        """Its name as an attribute: modules forbid dots."""
        return self.name.replace(".", "/")

    @property
    def batch_shape(self) -> torch.Size:
        return self.loc.shape[: self.loc.dim() - self.event_dim]

    @property
    def event_shape(self) -> torch.Size:
        """Of one event in unconstrained space."""
        return self.loc.shape[self.loc.dim() - self.event_dim :]

    @property
    def is_real(self) -> bool:
        return is_real(self.support)

    @cached_property
    def transform(self) -> Any:
        """The bijection from unconstrained space onto the support."""
        return biject_to(self.support)

    def unconstrained(self, value: Tensor) -> Tensor:
        return value if self.is_real else self.transform.inv(value)

    @property
    def bounds(self) -> list[Tensor]:
        """What its support is bounded by, where that is no number."""
        return _bounds(self.support)

    @property
    def value_dim(self) -> int:
        """Dimensions of one event in the model's own space."""
        return self.event_dim + self.transform.codomain.event_dim - self.transform.domain.event_dim


def _bounds(support: Any) -> list[Tensor]:
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return [x for x in vars(support).values() if isinstance(x, Tensor)]


def latents(model: Program, init_loc_fn: InitLoc, args: tuple, kwargs: Mapping) -> list[Latent]:
    """Run the model once from its starting point and describe the latents that it does not sum out.

    Raises:
        ModelError: the model has no latent site.
        GuideError: a latent site is discrete, or its start is not a finite point of its support.
    """

    def start(site: Mapping) -> Tensor:
        if site["fn"].support.is_discrete:
            return site["fn"].sample()  # refused below, by name
        value = init_loc_fn(site)
        _check_start(site["name"], site["fn"], value)
        return value

    trace = run_hidden(InitMessenger(start)(model), args, kwargs)
    found = [
        _latent(name, node)
        for name, node in sample_nodes(trace).items()
        if not node["is_observed"] and node["infer"].get("enumerate") != "parallel"
    ]
    if not found:
        raise ModelError("the model has no latent site, so there is nothing to build a guide for")
    if any(latent.bounds for latent in found):
        _check_bounds(model, found, args, kwargs)
    return found


def _check_bounds(model: Program, found: list[Latent], args: tuple, kwargs: Mapping) -> None:
    """Refuse supports that move with other latents: the guide's stay where they are.

    Raises:
        GuideError: naming the site.
    """
    known = {latent.name: latent for latent in found}

    def elsewhere(site: Mapping) -> Tensor:
        if site["name"] not in known:
            return site["fn"].sample()
        transform = biject_to(site["fn"].support)
        return transform(transform.inv(prior_median(site)) + 0.5)

    nodes = sample_nodes(run_hidden(InitMessenger(elsewhere)(model), args, kwargs))
    for name, latent in known.items():
        pairs = zip(latent.bounds, _bounds(nodes[name]["fn"].support), strict=True)
        if not all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs):
            raise GuideError(
                f"the support of site '{name}' depends on another latent ({latent.support}), so "
                "no guide of pvi.guides stays inside it. Sample a fraction on a fixed support, "
                "such as Uniform(0, 1), and make the site from it with pyro.deterministic."
            )


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
    _check_start(name, fn, loc)
    event_dim = fn.event_dim + loc.dim() - value.dim()
    plates = tuple(p for p in plates_of(node) if p.dim is not None)
    for plate in plates:
        loc = _repeat(loc, plate, event_dim)
    return Latent(name, fn.support, plates, loc.clone(), event_dim)


def _check_start(name: str, fn: Any, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise GuideError(
            f"init_loc_fn put site '{name}' at a point that is not inside its support "
            f"{fn.support}. Return a finite value strictly inside."
        )


def _repeat(loc: Tensor, plate: Plate, event_dim: int) -> Tensor:
    """Repeat the rows of a subsampled plate to its full size."""
    if plate.dim is None or plate.full_size == plate.size:
        return loc
    rows = torch.arange(plate.full_size, device=loc.device) % plate.size
    return loc.index_select(plate.dim - event_dim, rows)
