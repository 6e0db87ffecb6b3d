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
from pvi.guides.init import InitLoc


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
    def value_dim(self) -> int:
        """Dimensions of one event in the model's own space."""
        return self.event_dim + self.transform.codomain.event_dim - self.transform.domain.event_dim


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
