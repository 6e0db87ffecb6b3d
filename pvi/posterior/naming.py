"""Names for the dimensions of sites: plates, `dims=`, `infer={"event_dims": ...}`, as arviz has."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvi.engine.data import is_rows
from pvi.engine.traces import plates_of, run_hidden
from pvi.errors import DataError
from pvi.posterior.draws import Runner

Coords = Mapping[str, Any]
Dims = Mapping[str, Sequence[str]]
Labelled = tuple[tuple[str, ...], np.ndarray]


def plain(name: str) -> str:
    """A name that netCDF, zarr and `xarray.DataTree` take: "/", their path separator, becomes "_".

    >>> plain("encoder/layer.z")
    'encoder_layer.z'
    """
    return name.replace("/", "_")


def unique(names: Sequence[str]) -> None:
    """Refuse names that `plain` makes equal."""
    seen: dict[str, str] = {}
    for name in names:
        other = seen.setdefault(plain(name), name)
        if other != name:
            raise DataError(
                f"'{other}' and '{name}' would both be called '{plain(name)}' in the export, where "
                "'/' becomes '_'. Rename one of them."
            )


class _EventDims(Messenger):
    """Notes `infer={"event_dims": ...}` where the model says it; a replay takes the guide's."""

    def __init__(self) -> None:
        self.found: dict[str, list[str]] = {}

    def _pyro_sample(self, msg: Any) -> None:
        names = msg["infer"].get("event_dims", ())
        self.found[msg["name"]] = [names] if isinstance(names, str) else list(names)


def event_dims(runner: Runner) -> dict[str, list[str]]:
    """The names that the model itself gives to event dimensions, by site."""
    notes = _EventDims()
    run_hidden(notes(runner.model), runner.args, runner.kwargs, runner.guide_trace)
    return notes.found


class Namer:
    """Names of dimensions: plates, then the user's `dims`, else the site's `event_dims`, else
    `site_dim_0`, ... as in arviz.

    Args:
        runner: the model and its data.
        coords: labels of dimensions; without them numbers from `index_origin`.
        dims: names of the dimensions of a site that belong to no plate.
    """

    def __init__(self, runner: Runner, coords: Coords, dims: Dims, index_origin: int = 0):
        self.nodes, self.dims, self._events = runner.nodes, dims, event_dims(runner)
        self.coords, self.origin = {plain(k): v for k, v in coords.items()}, index_origin
        self.plates = {p.name: p.size for node in self.nodes.values() for p in plates_of(node)}
        unique([*self.nodes])
        unique([*self.plates])

    def dataset(
        self, values: Mapping[str, Tensor], *, first: int | None = 0, event: bool = True
    ) -> Any:
        """An `xarray.Dataset` of values `(S, *shape)`, or `(*shape)` without draws.

        Args:
            first: number of the first draw, from 0; `None` for values without draws.
            event: whether the values have the event dimensions of their sites.
        """
        arrays = {}
        for name, value in values.items():
            lead = () if first is None else ("chain", "draw")
            shape = tuple(value.shape[len(lead) // 2 :])
            names, shape = self._site(name, shape, event)
            array = value.detach().cpu().numpy()
            full = shape if first is None else (1, len(array), *shape)
            arrays[name] = (lead + names, array.reshape(full))
        return self._labelled(arrays, first or 0)

    def constants(self, named: Mapping[str, Any], observed: Mapping[str, Tensor]) -> Any:
        """An `xarray.Dataset` of the data arguments that are not observations."""
        arrays = {}
        for name, value in named.items():
            if not isinstance(value, Tensor) or any(_same(value, o) for o in observed.values()):
                continue
            names = [f"{name}_dim_{i}" for i in range(value.dim())]
            plates = [p for p, n in self.plates.items() if is_rows(value) and n == len(value)]
            if len(plates) == 1:
                names[0] = plates[0]
            own = list(self.dims.get(name, ()))
            names[len(names) - len(own) :] = own
            arrays[name] = (tuple(names), value.detach().cpu().numpy())
        return self._labelled(arrays, 0)

    def check_names(self, constants: Mapping[str, Any], groups: Mapping[str, Any]) -> None:
        """Refuse `dims` of no site or argument, and `coords` of no dimension."""
        known = [*self.nodes, *constants]
        for name in self.dims:
            if name not in known:
                raise DataError(f"dims: there is no site '{name}'; there are {known}")
        dims = list(dict.fromkeys(str(d) for group in groups.values() for d in group.dims))
        for dim in self.coords:
            if dim not in dims:
                raise DataError(f"coords: there is no dimension '{dim}'; there are {dims}")

    def _labelled(self, arrays: Mapping[str, Labelled], first: int) -> Any:
        import xarray

        used = {
            plain(d): n
            for names, array in arrays.values()
            for d, n in zip(names, array.shape, strict=True)
        }
        self._check_lengths(used)
        coords = {d: self._labels(d, n, first) for d, n in used.items()}
        variables = {
            plain(name): (
                [plain(d) for d in names],
                array,
                {"site": name} if plain(name) != name else {},
            )
            for name, (names, array) in arrays.items()
        }
        return xarray.Dataset(variables, coords)

    def _labels(self, dim: str, size: int, first: int) -> Any:
        start = self.origin + (first if dim == "draw" else 0)
        return self.coords.get(dim, np.arange(start, start + size))

    def _site(
        self, name: str, shape: tuple[int, ...], event: bool
    ) -> tuple[tuple[str, ...], tuple[int, ...]]:
        """Dimension names of a site's value and its shape without empty batch dimensions."""
        node = self.nodes.get(name.partition(", ")[0])  # "x, y": observations with one density
        event_dim = node["fn"].event_dim if node is not None and event else 0
        if node is None:
            event_dim = len(shape)
        batch = len(shape) - event_dim
        frames = {} if node is None else {p.dim: p.name for p in plates_of(node)}
        names, sizes, free = [], [], 0
        asked, source = self._own(name)
        own = [dim for dim in asked if dim not in frames.values()]
        for i, size in enumerate(shape):
            plate = frames.get(i - batch) if i < batch else None
            if plate is not None and size == self.plates[plate]:
                names.append(plate)
            elif i < batch and size == 1:
                continue
            else:
                names.append(own[free] if free < len(own) else f"{name}_dim_{free}")
                free += 1
            sizes.append(size)
        if event and free < len(own):
            raise DataError(
                f"{source} has {len(own)} names for '{name}', {own}, which has {free} dimensions "
                "besides its plates"
            )
        if len(set(names)) < len(names):
            raise DataError(f"{source} gives two dimensions of '{name}' one name: {names}")
        return tuple(names), tuple(sizes)

    def _own(self, name: str) -> tuple[list[str], str]:
        """The names that the user has given to a site's dimensions, and where."""
        if name in self.dims:
            return list(self.dims[name]), "dims"
        return self._events.get(name, []), 'infer={"event_dims": ...}'

    def _check_lengths(self, used: Mapping[str, int]) -> None:
        for dim, size in used.items():
            labels = self.coords.get(dim)
            if labels is not None and len(labels) != size:
                raise DataError(
                    f"coords has {len(labels)} labels for dimension '{dim}', which has {size} "
                    "elements"
                )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.to(b.dtype), b))
