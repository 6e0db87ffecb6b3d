"""Several guides side by side."""

from collections.abc import Iterable, Mapping
from types import EllipsisType
from typing import Any

from pyro.nn import PyroModule
from torch import Tensor

from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.guides.guide import Guide
from pvi.guides.init import InitLoc
from pvi.guides.laplace import Laplace
from pvi.guides.mean_field import MeanField
from pvi.guides.prototype import Latent

Part = Guide | type[Guide]


class Group(Guide):
    """A guide for each group of sites, independent of each other.

    $$q(z) = \\prod_g q_g(z_g \\mid x)$$

    Sites are drawn in the model's order, whatever group they are in, so exact KLs stay exact.

    Args:
        parts: from a site's name, or a tuple of names that share one guide, to a guide class or a
            guide made without a model; `...` stands for all sites that are not named, by default
            `MeanField`. One guide object under `...` is shared by all of those; a class too.
        model, init_loc_fn: as in `Guide`; the parts take these starts.

    >>> import pyro, pyro.distributions as dist
    >>> from pvi.guides import FullRank, LowRank
    >>> def model():
    ...     for name in "abcd":
    ...         pyro.sample(name, dist.Normal(0.0, 1.0))
    >>> guide = Group({("a", "b"): FullRank, "c": LowRank(rank=1)}, model=model).setup()
    >>> sorted(guide.sample(3))
    ['a', 'b', 'c', 'd']
    """

    def __init__(
        self,
        parts: Mapping[str | tuple[str, ...] | EllipsisType, Part],
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
    ):
        super().__init__(model, init_loc_fn)
        if not isinstance(parts, Mapping) or not parts:
            raise GuideError(
                "Group needs a dict from site names to guides, such as {'w': FullRank}"
            )
        rest = parts.get(..., MeanField)
        self._sites = [_names(key) for key in parts if key is not ...]
        made = [_made(key, part) for key, part in parts.items() if key is not ...]
        self.parts = PyroModule()
        for i, part in enumerate([*made, _made("...", rest)]):
            setattr(self.parts, f"part{i}", part)
        named = [name for names in self._sites for name in names]
        twice = sorted({name for name in named if named.count(name) > 1})
        if twice:
            raise GuideError(f"Group names site '{twice[0]}' twice")
        if len({id(part) for part in self._parts}) <= len(self._sites):
            raise GuideError("Group has one guide object twice: give each key its own")

    @property
    def _parts(self) -> list[Guide]:
        return [getattr(self.parts, f"part{i}") for i in range(len(self._sites) + 1)]

    def _rows(self) -> dict[str, int]:
        return {}

    def adopt(self, found: Iterable[Latent], args: tuple, kwargs: Mapping) -> None:
        super().adopt(found, args, kwargs)
        for i, part in self._active().items():
            if self.model is not None:
                part.bind(self.model)
            part.adopt([x for n, x in self.latents.items() if self._owner[n] == i], args, kwargs)
            self.plate_sizes |= part.plate_sizes

    def _build(self) -> None:
        """Who has which site; the parameters are the parts'."""
        named = {name: i for i, names in enumerate(self._sites) for name in names}
        for name in named:
            if name not in self.latents:
                raise GuideError(
                    f"Group names site '{name}', which is no latent of the model; they are "
                    f"{sorted(self.latents)}"
                )
        self._owner = {name: named.get(name, len(self._sites)) for name in self.latents}

    def _active(self) -> dict[int, Guide]:
        return {i: self._parts[i] for i in sorted(set(self._owner.values()))}

    @property
    def amortized(self) -> bool:
        return any(part.amortized for part in self._active().values())

    @property
    def coupled_plates(self) -> frozenset[str]:
        return frozenset().union(*(part.coupled_plates for part in self._active().values()))

    def _begin(self, args: tuple, kwargs: Mapping) -> dict[int, Any]:
        return {i: part._begin(args, kwargs) for i, part in self._active().items()}

    def _lengths(self, past: dict[int, Any]) -> dict[str, int]:
        lengths: dict[str, int] = {}
        for i, part in self._active().items():
            lengths |= part._lengths(past[i])
        return lengths

    def _distribution(self, latent: Latent, past: dict[int, Any]) -> Any:
        i = self._owner[latent.name]
        return self._parts[i]._distribution(latent, past[i])

    def _passed(self, latent: Latent, value: Tensor, past: dict[int, Any]) -> None:
        i = self._owner[latent.name]
        self._parts[i]._passed(latent, value, past[i])

    def _infer(self, latent: Latent) -> dict[str, Any]:
        return self._parts[self._owner[latent.name]]._infer(latent)

    def _marginals(self, past: dict[int, Any]) -> dict[str, tuple[Tensor, Tensor]]:
        found: dict[str, tuple[Tensor, Tensor]] = {}
        for i, part in self._active().items():
            found |= part._marginals(past[i])
        return found

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        self._require_setup()
        return sum(
            (p.log_prob(values, *args, **kwargs) for p in self._active().values()),
            start=next(iter(values.values())).new_zeros(()),
        )


def _names(key: Any) -> tuple[str, ...]:
    names = (key,) if isinstance(key, str) else key
    if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
        raise GuideError(f"Group's keys are site names, tuples of them, or ...; got {key!r}")
    return names


def _made(key: Any, part: Any) -> Guide:
    """The guide for one key."""
    made = part() if isinstance(part, type) and issubclass(part, Guide) else part
    if not isinstance(made, Guide):
        raise GuideError(
            f"Group's part for {key!r} must be one of pvi.guides (a class, or an object made "
            f"without a model), got {part!r}. A Pyro program can't be a part: write the sites by "
            "hand, or call both guides from one function."
        )
    if made.init_loc_fn != "median":
        raise GuideError(f"give init_loc_fn to Group: its part for {key!r} takes the start from it")
    if isinstance(made, Laplace):
        raise GuideError("Laplace needs the mode of all sites together, so it can't be a part")
    return made
