"""Contract the densities of an enumerated run: sums over what the model enumerates, means over
what the guide does.
"""

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from pyro.distributions import Unit
from pyro.ops import packed
from pyro.ops.contract import contract_tensor_tree
from torch import Tensor

from pvi.engine.rings import Packed, StableRing
from pvi.engine.traces import Density, Scale, Site, plates_of, sample_nodes
from pvi.errors import ModelError, ObjectiveError


class EnumeratedRun:
    """One run of a guide and a model with enumerated sites.

    Inside, tensors are Pyro's packed ones; each plate and each enumerated site has a symbol that
    names its dimension.

    Args:
        summed, averaged: names of the sites that the model and the guide enumerate, where they are
            latent in this run.
        nesting: number of plate dimensions.
    """

    def __init__(
        self,
        guide_trace: Any,
        model_trace: Any,
        summed: tuple[str, ...],
        averaged: tuple[str, ...],
        nesting: int,
    ):
        self.plates: dict[str, str] = {}
        guide_trace.symbolize_dims(self.plates)
        model_trace.symbolize_dims(self.plates)
        guide_nodes = sample_nodes(guide_trace)
        self.nodes = guide_nodes | sample_nodes(model_trace)
        self.nesting = nesting
        self.summed, self.averaged = (
            {
                self.nodes[name]["infer"]["_enumerate_symbol"]: name
                for name in names
                if name in self.nodes and "_enumerate_dim" in self.nodes[name]["infer"]
            }
            for names in (summed, averaged)
        )
        self._weights: dict[frozenset[str], Packed] = {}
        self._log_q = {
            symbol: self.pack(name, guide_nodes[name]["fn"].log_prob(guide_nodes[name]["value"]))
            for symbol, name in self.averaged.items()
        }

    def components(self, sites: list[Site]) -> list[list[Site]]:
        """The sites of each sum: those that share dimensions that are summed out."""
        own = {s.name: self._symbols(s.name, s.p) & self.summed.keys() for s in sites}
        for symbol, name in self.summed.items():
            own[name].add(symbol)  # also where it has one value only
        groups: list[set[str]] = []
        for symbols in filter(None, own.values()):
            joined = [group for group in groups if group & symbols]
            groups = [group for group in groups if not group & symbols]
            groups.append(symbols.union(*joined))
        return [[s for s in sites if own[s.name] & group] for group in groups]

    def contracted(self, members: list[Site]) -> list[Site]:
        """The sum as a site, and what is left of the guide's latents in it.

        The prior of a single latent becomes that latent's own `p`; probabilities alone add up to 1.
        """
        stacks = [self.nodes[site.name]["cond_indep_stack"] for site in members]
        outside = frozenset.intersection(*map(frozenset, stacks))
        self._check_sum(members, outside)
        total = self._unpacked(members[0].name, self._mean(self._sum(members)))
        p = _known(total, _prior(members[0]))
        latents = [site for site in members if site.q is not None]
        observed = [site for site in members if site.observed]
        if not latents and not observed:
            return []
        if len(latents) == 1 and not observed and self.frames(latents[0].name) == outside:
            return [replace(latents[0], p=p, members=tuple(members))]
        plates = plates_of({"cond_indep_stack": [f for f in stacks[0] if f in outside]})
        name = listed(observed or summed(members)[:1])
        factor = Site(name, plates, p, None, bool(observed), members=tuple(members))
        return [factor, *(replace(site, p=None) for site in latents)]

    def _sum(self, members: list[Site]) -> Packed:
        tree: OrderedDict = OrderedDict()
        for site in members:
            frames = self.frames(site.name)
            ordinal = frozenset(self.plates[f.name] for f in frames if f.vectorized)
            tree.setdefault(ordinal, []).append(self.log_p(site))
        try:
            found = contract_tensor_tree(tree, set(self.summed), ring=StableRing())
        except NotImplementedError as error:
            raise ObjectiveError(
                f"the sum over '{listed(summed(members))}' couples crossed plates: its cost is "
                "exponential in their sizes. Sample one of these sites in the guide."
            ) from error
        ((factor,),) = found.values()
        return factor

    def log_p(self, site: Site) -> Packed:
        """Log density of a member; masked, unless summed out, as probabilities add up to 1."""
        p, own = _prior(site), site.name in self.summed.values()
        return self.pack(site.name, p.fn.log_prob(p.value) if own else p.log_prob())

    def with_mean(self, site: Site) -> Site:
        """The site, with the mean over the guide's enumerated sites if it depends on any."""
        if len(_shape(site.p, site.q)) <= self.nesting + 1:
            return site
        own = site.name in self.averaged.values()
        if site.q is not None and not own and self._symbols(site.name, site.q):
            self._check_drawn(site)
        p, q = (_widened(side, known=own) for side in (site.p, site.q))
        self._symbols(site.name, p, q)
        return replace(site, p=p, q=q, average=partial(self._average, site.name))

    def _average(self, name: str, x: Tensor) -> Tensor:
        return self._unpacked(name, self._mean(self.pack(name, x)))

    def _mean(self, x: Packed) -> Packed:
        """Mean over the guide's enumerated sites."""
        own = frozenset(self.averaged.keys() & set(x._pyro_dims))
        if not own:
            return x
        if own not in self._weights:
            self._weights[own] = self._weight(own)
        w, x = packed.broadcast_all(self._weights[own], x)
        dims = x._pyro_dims
        x = torch.where(w > 0, x, 0.0)  # 0 * -inf
        mean = (w * x).sum([dims.index(symbol) for symbol in own])
        mean._pyro_dims = "".join(d for d in dims if d not in own)
        return mean

    def _weight(self, own: frozenset[str]) -> Packed:
        """Joint probability of these enumerated dimensions, summed over their ancestors."""
        needed, more = set(), set(own)
        while more:
            needed |= more
            more = {d for s in more for d in self._log_q[s]._pyro_dims} & self.averaged.keys()
            more -= needed
        factors = [self._log_q[symbol] for symbol in sorted(needed)]
        return packed.exp(StableRing().sumproduct(factors, needed - own))

    def frames(self, name: str) -> frozenset:
        """Its plates as Pyro's frames, which tell the turns of a sequential plate apart."""
        return frozenset(self.nodes[name]["cond_indep_stack"])

    def pack(self, name: str, x: Tensor) -> Packed:
        x = x.expand(torch.broadcast_shapes(x.shape, self.sizes(name)))
        return packed.pack(x, self.nodes[name]["infer"]["_dim_to_symbol"])

    def support(self, name: str) -> Tensor:
        """All values of an enumerated site, `(E, *event)`."""
        node = self.nodes[name]
        batch = node["value"].dim() - node["fn"].event_dim
        own = batch + node["infer"]["_enumerate_dim"]
        return node["value"][tuple(slice(None) if d == own else 0 for d in range(batch))]

    def index(self, name: str, value: Tensor) -> Packed:
        """Which of its values an enumerated site has, element by element."""
        support = self.support(name)
        batch = value.dim() + 1 - support.dim()
        same = value == support.reshape(-1, *[1] * batch, *support.shape[1:])
        same = same.reshape(*same.shape[: batch + 1], -1).all(-1)
        return self.pack(name, same.int().argmax(0))

    def sizes(self, name: str) -> list[int]:
        """The shape that the plates give to a site."""
        sizes = {f.dim: f.size for f in self.frames(name) if f.vectorized}
        return [sizes.get(dim, 1) for dim in range(min(sizes, default=0), 0)]

    def _unpacked(self, name: str, x: Packed) -> Tensor:
        dims = self.nodes[name]["infer"]["_dim_to_symbol"]
        return packed.unpack(x, {symbol: dim for dim, symbol in dims.items()})

    def _symbols(self, name: str, *sides: Density | None) -> set[str]:
        """The enumerated dimensions in the log density of a site."""
        shape, dims = _shape(*sides), self.nodes[name]["infer"]["_dim_to_symbol"]
        found = {dims.get(d) for d in range(-len(shape), -1 - self.nesting) if shape[d] > 1}
        for symbol in found:
            owner = (self.summed | self.averaged).get(symbol)
            if owner is None:
                raise ModelError(
                    f"site '{name}' has shape {tuple(shape)} where sites are enumerated, with a "
                    "dimension that is neither a plate's nor an enumerated site's. Index with "
                    "Vindex(x)[..., k], and let operations broadcast."
                )
            missing = {f for f in self.frames(owner) - self.frames(name) if f.vectorized}
            if missing:
                raise ModelError(
                    f"site '{name}' depends on '{owner}', which is enumerated inside plate "
                    f"'{min(f.name for f in missing)}', but is outside of it, so the elements of "
                    "the plate are not independent. Enumerate a site outside of the plate, or "
                    "write the plate as a Python loop."
                )
        return found

    def _check_sum(self, members: list[Site], outside: frozenset) -> None:
        """A sum is scaled as a whole, and what is inside it can't be a subsample."""
        over = listed(summed(members))
        for site in members:
            for f in self.frames(site.name) - outside:
                if f.full_size not in (None, f.size):
                    raise ObjectiveError(
                        f"plate '{f.name}' is subsampled ({f.size} of {f.full_size}) at site "
                        f"'{site.name}' inside the sum over '{over}': a minibatch can't stand for "
                        "the data inside a logarithm. Fit on all the data, or sample "
                        f"'{summed(members)[0].name}' in the guide."
                    )
            if not _same_scale(_prior(site).scale, _prior(members[0]).scale, outside):
                raise ObjectiveError(
                    f"poutine.scale differs between sites '{members[0].name}' and '{site.name}', "
                    f"but the sum over '{over}' is scaled as a whole. Scale all of its sites alike."
                )
            self._check_means(site, outside, over)

    def _check_means(self, site: Site, outside: frozenset, over: str) -> None:
        """What the guide enumerates is the same in all of the sum."""
        for symbol in self._symbols(site.name, site.p) & self.averaged.keys():
            owner = self.averaged[symbol]
            inside = {f for f in self.frames(owner) - outside if f.vectorized}
            if inside:
                raise ObjectiveError(
                    f"the sum over '{over}' runs over plate '{min(f.name for f in inside)}', in "
                    f"which the guide enumerates '{owner}': their mean can't be taken element by "
                    f"element. Remove the mark of '{owner}', or leave it out of the guide too."
                )

    def _check_drawn(self, site: Site) -> None:
        if not getattr(_side(site.q).fn, "has_rsample", False):
            owner = self.averaged[min(self._symbols(site.name, site.q))]
            raise ObjectiveError(
                f"guide site '{site.name}' is drawn for every value of '{owner}', but has no "
                'reparameterised sampler. Mark it infer={"enumerate": "parallel"} as well.'
            )


def _known(log_prob: Tensor, side: Density, **options: Any) -> Density:
    """A density of this value, with the scale of `side`."""
    unit = Unit(log_prob, validate_args=False, **options)
    return Density(unit, log_prob.new_empty(0), side.scale, None)


def _widened(side: Density | None, known: bool) -> Density | None:
    """A density whose distribution has the dimensions of its value."""
    if side is None:
        return None
    if known:
        return _known(side.log_prob(), side, has_rsample=True)
    fn = side.fn.expand(_shape(side))
    if fn.has_rsample != side.fn.has_rsample:  # set by hand
        fn.has_rsample = side.fn.has_rsample
    return replace(side, fn=fn)


def _shape(*sides: Density | None) -> torch.Size:
    """The shape of log densities, from those of distribution, value and mask."""
    shapes = []
    for side in filter(None, sides):
        batch = side.value.shape[: side.value.dim() - side.fn.event_dim]
        shapes += [side.fn.batch_shape, batch, getattr(side.mask, "shape", ())]
    return torch.broadcast_shapes(*shapes)


def _same_scale(a: Scale, b: Scale, outside: frozenset) -> bool:
    """Whether two scales are equal, and can be applied to the sum."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
    dims = {f.dim for f in outside}
    fits = all(a.shape[d] == 1 or d in dims for d in range(-a.dim(), 0))
    return fits and a.shape == b.shape and bool(torch.equal(a, b))


def _prior(site: Site) -> Density:
    return _side(site.p)


def _side(side: Density | None) -> Density:
    if side is None:
        raise ValueError("the site is not in both programs")
    return side


def summed(members: Sequence[Site]) -> list[Site]:
    """Those of the sites that are summed out."""
    return [site for site in members if site.q is None and not site.observed]


def listed(sites: Sequence[Site]) -> str:
    """Their names as text."""
    names = [site.name for site in sites]
    return ", ".join(names) if len(names) < 3 else f"{names[0]}, ..., {names[-1]}"
