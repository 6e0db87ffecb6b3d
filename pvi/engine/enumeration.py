"""Discrete sites marked `infer={"enumerate": "parallel"}`: sums instead of draws.

A marked site k that only the model has is *summed out*: all densities that depend on it become one,
$$\\log \\sum_k p(k)\\, p(x, z \\mid k),$$
over the plates that they share. One that the guide has too is *averaged over*: each term t that
depends on it becomes $\\sum_k q(k)\\, t_k$, which needs no score gradient.

Pyro enumerates and contracts; what comes out are ordinary sites, so every bound works unchanged.
"""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pyro.poutine.enum_messenger import EnumMessenger
from torch import Tensor

from pvi.engine.summation import EnumeratedRun, listed, summed
from pvi.engine.terms import Terms
from pvi.engine.traces import Program, Site, particles, replaced, sample_nodes
from pvi.errors import ObjectiveError

EXACT_SUM = "exact sum"  # how the KL of a site is computed that the guide enumerates


@dataclass(frozen=True)
class Enumeration:
    """Which sites of a pair of programs are enumerated, left of the plates and the particles.

    Args:
        summed: sites of the model that the guide lacks.
        averaged: sites of the guide.
        nesting: number of plate dimensions.
        mixed: latents of the guide whose prior is part of a larger sum, each with what is summed.
    """

    summed: tuple[str, ...] = ()
    averaged: tuple[str, ...] = ()
    nesting: int = 0
    mixed: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        return self.summed + self.averaged

    def __bool__(self) -> bool:
        return bool(self.names)

    def guide(self, fn: Program, num_particles: int = 1) -> Program:
        """The guide, to run for so many particles."""
        fn = particles(fn, num_particles, self.nesting)
        return EnumMessenger(-2 - self.nesting)(fn) if self.averaged else fn

    def model(self, fn: Program, num_particles: int = 1) -> Program:
        """The model, to run right after the guide, whose dimensions it continues."""
        fn = particles(fn, num_particles, self.nesting)
        if not self:
            return fn
        return EnumMessenger(None if self.averaged else -2 - self.nesting)(fn)

    def run(self, guide_trace: Any, model_trace: Any) -> EnumeratedRun:
        """What was enumerated in a run of both programs."""
        names = (self.summed, self.averaged)
        return EnumeratedRun(guide_trace, model_trace, *names, self.nesting)


def marks(guide_trace: Any, model_trace: Any, nesting: int, *, average: bool = True) -> Enumeration:
    """Read the marks off the traces of a run without enumeration.

    Args:
        average: whether the guide's marks count; where they don't, its sites are drawn.

    Raises:
        ObjectiveError: a mark that can't be kept.
    """
    inside, nodes = sample_nodes(guide_trace), sample_nodes(model_trace)
    alone = {name: node for name, node in nodes.items() if name not in inside}
    return Enumeration(_marked(alone), _marked(inside) if average else (), nesting)


def _marked(nodes: Mapping[str, Any]) -> tuple[str, ...]:
    latent = {name: node for name, node in nodes.items() if not node["is_observed"]}
    found = {name: node for name, node in latent.items() if node["infer"].get("enumerate")}
    for name, node in found.items():
        if node["infer"]["enumerate"] != "parallel" or node["infer"].get("num_samples"):
            raise ObjectiveError(
                f"site '{name}' is marked {_mark(node['infer'])}, which pvi does not do. Mark it "
                'infer={"enumerate": "parallel"} to sum over all of its values.'
            )
        if not getattr(node["fn"], "has_enumerate_support", False):
            raise ObjectiveError(
                f"site '{name}' is marked for enumeration, but the values of its "
                f"{type(node['fn']).__name__} can't be listed. Remove the mark, or use a finite "
                "distribution, with plates instead of .to_event(...)."
            )
    return tuple(found)


def _mark(infer: Mapping) -> dict:
    return {key: infer[key] for key in ("enumerate", "num_samples") if infer.get(key)}


def reduced(
    sites: list[Site], guide_trace: Any, model_trace: Any, enumeration: Enumeration
) -> list[Site]:
    """Ordinary sites for those of an enumerated run.

    Sites that share a sum become one, which lists them as its `members`; sites that depend on
    enumerated ones of the guide know how to `average` over them.

    Raises:
        ModelError, ObjectiveError: the sum does not factorise as the plates and scales say.
    """
    run = enumeration.run(guide_trace, model_trace)
    components = run.components(sites)
    gone = {site.name for members in components for site in members if site.q is None}
    new = {site.name: site for members in components for site in run.contracted(members)}
    kept = [run.with_mean(new.pop(site.name, site)) for site in sites if site.name not in gone]
    return kept + list(new.values())


def labels(sites: list[Site], enumeration: Enumeration) -> dict[str, str]:
    """How the KLs of latents are computed whose densities are no plain ones."""
    what = {True: "joint prior", False: "prior"}
    priors = {
        site.name: f"sample: {what[site.q is None]} summed over '{listed(summed(site.members))}'"
        for site in sites
        if site.members
    }
    return priors | dict.fromkeys(enumeration.averaged, EXACT_SUM)


def mixed(terms: Terms) -> dict[str, str]:
    """The latents whose prior is part of a sum that is a term of its own."""
    sites = [term.sites[0] for term in terms if term.sites and term.sites[0].q is None]
    return {
        member.name: listed(summed(site.members))
        for site in sites
        for member in site.members
        if member.q is not None
    }


def mode(args: tuple, kwargs: Mapping) -> Hashable:
    """What may give another plan to another call: what is left out, flags, and single rows."""
    return tuple((key, _kind(value)) for key, value in [*enumerate(args), *kwargs.items()])


def _kind(value: Any) -> Hashable:
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Tensor):  # one row can't show whether rows depend on each other
        return tuple(size > 1 for size in value.shape)
    return type(value)


def check_drawn(guide_trace: Any, names: Iterable[str]) -> None:
    """Refuse to draw what is marked: the first look at these programs saw no mark.

    Raises:
        ObjectiveError: naming the site.
    """
    for name in names:
        if guide_trace.nodes[name]["infer"].get("enumerate"):
            raise ObjectiveError(
                f"site '{name}' is marked for enumeration, but was not in the first run of these "
                "programs. Let an argument that is None, a bool or a string tell such calls apart, "
                "or use an objective of its own for each."
            )


def check_objective(objective: Any, enumeration: Enumeration) -> None:
    """Refuse objectives that have no exact sum over these sites.

    Raises:
        ObjectiveError: naming the sites, and what to use instead.
    """
    o = objective
    for name in enumeration.averaged[:1]:
        simple = o.gradient in ("auto", "reparam") and o.weighting is None
        if o.alpha != 1.0 or o.mean is not None or not simple:
            raise ObjectiveError(
                f"the guide enumerates site '{name}': its mean is exact for an ELBO with "
                "gradient='auto' or 'reparam' and plain KL weights only. Mark it in the model and "
                "leave it out of the guide, or use such an ELBO, or remove the mark to draw it."
            )
    weights = o.beta if isinstance(o.beta, Mapping) else dict.fromkeys(enumeration.mixed, o.beta)
    for name, over in enumeration.mixed.items():
        if weights.get(name, 1.0) != 1.0 or o.weighting is not None:
            raise ObjectiveError(
                f"site '{name}' has no KL of its own that a weight could multiply: its prior is "
                f"part of the sum over '{over}', with other sites. Use weight 1, or draw "
                f"'{over}' in the guide."
            )


def with_sites(guide_trace: Any, model_trace: Any, names: Iterable[str]) -> Any:
    """The guide's trace, with these sites of the model's added as if they were its own."""
    names = tuple(names)
    if not names:
        return guide_trace
    joined: Any = replaced(guide_trace, {})
    joined.effects = guide_trace.effects
    for name in names:
        joined.add_node(name, **{**model_trace.nodes[name], "infer": {}})
    return joined
