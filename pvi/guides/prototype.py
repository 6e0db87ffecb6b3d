"""A look at the model's latent sites: what every automatic guide is built from."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyro.distributions as dist
import torch
from pyro.infer.autoguide.initialization import InitMessenger
from torch import Tensor
from torch.distributions import ExpTransform, biject_to, constraints

from pvi.engine.checks import is_real
from pvi.engine.traces import Plate, Program, plates_of, run_hidden, sample_nodes
from pvi.errors import GuideError, ModelError
from pvi.guides.init import InitLoc, prior_median

CIRCULAR = (dist.VonMises, dist.SineBivariateVonMises, dist.SineSkewed)


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
        """The bijection from unconstrained space onto the support.

        Positive numbers get the plain exponential of torch's LogNormal, so that the KL against it
        has a closed form; `biject_to` adds a shift by 0, which hides that.
        """
        bound = getattr(self.support, "lower_bound", None)
        above_zero = isinstance(bound, float | int) and bound == 0
        if above_zero and type(self.support) is type(constraints.positive):
            return ExpTransform()
        return biject_to(self.support)

    def unconstrained(self, value: Tensor) -> Tensor:
        return value if self.is_real else self.transform.inv(value)

    @property
    def bounds(self) -> list[Tensor]:
        """What its support is bounded by, where that is no number."""
        return _bounds(self.support)

    @property
    def bounds_differ(self) -> bool:
        """Whether elements of its plates have bounds of their own, such as of U(0, x_i)."""
        return any(b.shape[: max(0, b.dim() - self.event_dim)].numel() > 1 for b in self.bounds)

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


def is_circular(fn: Any) -> bool:
    """Whether a distribution of angles repeats itself on the real line.

    Its declared support is all reals, where its density has no finite integral and a guide's
    entropy no limit: guides keep to one turn, from -pi to pi.
    """
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return isinstance(fn, CIRCULAR)


def _latent(name: str, node: Mapping) -> Latent:
    fn, value = node["fn"], node["value"].detach()
    support = fn.support
    if is_circular(fn):
        support = constraints.interval(-math.pi, math.pi)
        value = torch.remainder(value + math.pi, 2 * math.pi) - math.pi
        if fn.event_dim:
            support = constraints.independent(support, fn.event_dim)
    try:
        loc = biject_to(support).inv(value)
    except NotImplementedError as error:
        raise GuideError(
            f"site '{name}' ({type(fn).__name__}) has no map from unconstrained space (is it "
            'discrete?). This guide needs continuous latents: mark it infer={"enumerate": '
            '"parallel"} in the model, to sum it out, or write your own guide.'
        ) from error
    _check_start(name, support, loc)
    event_dim = fn.event_dim + loc.dim() - value.dim()
    plates = tuple(p for p in plates_of(node) if p.dim is not None)
    for plate in plates:
        loc = _repeat(loc, plate, event_dim)
    return Latent(name, support, plates, loc.clone(), event_dim)


def _check_start(name: str, support: Any, value: Tensor) -> None:
    if not bool(value.isfinite().all()):
        raise GuideError(
            f"init_loc_fn put site '{name}' at a point that is not inside its support "
            f"{support}. Return a finite value strictly inside."
        )


def _repeat(loc: Tensor, plate: Plate, event_dim: int) -> Tensor:
    """Repeat the rows of a subsampled plate to its full size."""
    if plate.dim is None or plate.full_size == plate.size:
        return loc
    rows = torch.arange(plate.full_size, device=loc.device) % plate.size
    return loc.index_select(plate.dim - event_dim, rows)
