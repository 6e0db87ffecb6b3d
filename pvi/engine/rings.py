"""Sums of products of densities in log space, for Pyro's contraction of packed tensors."""

from typing import Any

from pyro.ops import packed
from pyro.ops.rings import LogRing

Packed = Any  # a tensor without dimensions of size 1, the others named in its `_pyro_dims`


class StableRing(LogRing):
    """Sums of products of densities, which first adds up what has the same dimensions.

    Pyro shifts every factor by its own maximum; factors that disagree by more than the floats'
    range would vanish.
    """

    def sumproduct(self, terms: Any, dims: Any) -> Packed:
        groups: dict[frozenset, list[Packed]] = {}
        for term in sorted(terms, key=lambda term: -term.dim()):
            own = frozenset(term._pyro_dims)
            groups.setdefault(next((g for g in groups if own <= g), own), []).append(term)
        return super().sumproduct([added(group) for group in groups.values()], dims)


def added(tensors: list[Packed]) -> Packed:
    if len(tensors) == 1:
        return tensors[0]
    full: Any = packed.broadcast_all(*tensors)
    total: Any = sum(full[1:], start=full[0])
    total._pyro_dims = full[0]._pyro_dims
    return total
