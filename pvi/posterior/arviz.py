"""A posterior as an `xarray.DataTree`, and in the form that the installed arviz opens."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvi.engine.data import is_rows
from pvi.engine.traces import plates_of
from pvi.errors import DataError
from pvi.posterior.draws import stack, stack_draws

if TYPE_CHECKING:
    from pvi.posterior.posterior import Posterior

Coords = Mapping[str, Any]
Dims = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class Course:
    """How a fit went, for the group `fit_history`.

    Args:
        columns: one number a step, by name.
        kl: of each latent site at each step, nats.
        attrs: what the fit ended with: numbers and strings.
    """

    columns: Mapping[str, np.ndarray]
    kl: Mapping[str, np.ndarray]
    attrs: Mapping[str, Any]

    def dataset(self) -> Any:
        """An `xarray.Dataset` with dims `step` (from 1) and, for the KLs, `site`."""
        import xarray

        arrays: dict[str, Any] = {n.replace("/", "_"): ("step", x) for n, x in self.columns.items()}
        steps = len(next(iter(self.columns.values()), ()))
        coords: dict[str, Any] = {"step": np.arange(1, steps + 1)}
        if self.kl:
            arrays["kl"] = (("step", "site"), np.stack(list(self.kl.values()), 1))
            coords["site"] = list(self.kl)
        return xarray.Dataset(arrays, coords, attrs=dict(self.attrs))


def load() -> Any:
    """arviz, without the notice of its refactoring that 0.23 gives once a day."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"\s*ArviZ is undergoing", FutureWarning)
        import arviz
    return arviz


def to_arviz(posterior: "Posterior", num_draws: int = 1000, **options: Any) -> Any:
    """`to_datatree` for arviz 1.x; the same as `arviz.InferenceData` for arviz 0.x."""
    arviz = load()
    tree = to_datatree(posterior, num_draws, **options)
    if arviz.__version__.startswith("0."):
        return arviz.InferenceData.from_datatree(tree)
    return tree


def to_datatree(
    posterior: "Posterior",
    num_draws: int = 1000,
    *,
    coords: Coords | None = None,
    dims: Dims | None = None,
    predictive: bool = True,
    log_likelihood: bool = True,
    seed: int | None = None,
    course: Course | None = None,
) -> Any:
    """The posterior as an `xarray.DataTree` with dims (chain, draw, *plates, *event).

    Args:
        posterior: what to draw from.
        num_draws, coords, dims, predictive, log_likelihood, seed: as in `Posterior.to_arviz`.
        course: of the fit, for the group `fit_history` and the attributes of `posterior`.
    """
    import xarray

    data = posterior.data.kept()
    with posterior.drawing(seed) as runner:
        namer = _Namer(runner.nodes, coords or {}, dims or {})
        parts: dict[str, list] = {"posterior": [], "posterior_predictive": [], "log_likelihood": []}
        chunks = []
        for run in runner.runs(num_draws):
            chunks.append(run.draws())
            parts["posterior"].append(run.sample())
            if predictive:
                parts["posterior_predictive"].append(run.predictive(runner.observed))
            if log_likelihood:
                parts["log_likelihood"].append(run.log_likelihood())
        draws = stack_draws(chunks)
        groups = {
            name: namer.dataset(stack(part), event=name != "log_likelihood")
            for name, part in parts.items()
        }
    stats = {"log_p": draws.log_p, "log_q": draws.log_q}
    groups["sample_stats"] = namer.dataset(stats)
    observed = {name: runner.nodes[name]["value"] for name in runner.observed}
    groups["observed_data"] = namer.dataset(observed, draws=False)
    groups["constant_data"] = namer.constants(data.named(), observed)
    namer.check_names(data.named(), groups)
    attrs: dict[str, Any] = {"inference_library": "pvi"}
    attrs["sampling"] = "independent draws from the guide"
    if course is not None:
        groups["fit_history"] = course.dataset()
        attrs |= course.attrs
    groups = {name: group for name, group in groups.items() if group.data_vars}
    tree = xarray.DataTree.from_dict(groups)
    if "posterior" in tree.children:
        tree["posterior"].attrs.update(attrs)
    return tree


def dataset(posterior: "Posterior", values: Mapping[str, Tensor]) -> Any:
    """Draws `(S, *site shape)` of sites as an `xarray.Dataset` with dims as in `to_datatree`."""
    return _Namer(posterior.runner.nodes, {}, {}).dataset(values)


class _Namer:
    """Names of dimensions: plates, then the user's `dims`, else `site_dim_0`, ... as in arviz."""

    def __init__(self, nodes: Mapping[str, dict], coords: Coords, dims: Dims):
        self.nodes, self.coords, self.dims = nodes, coords, dims
        self.plates = {p.name: p.size for node in nodes.values() for p in plates_of(node)}

    def dataset(
        self, values: Mapping[str, Tensor], *, draws: bool = True, event: bool = True
    ) -> Any:
        """An `xarray.Dataset` of values `(S, *shape)`, or `(*shape)` without draws."""
        import xarray

        arrays = {}
        for name, value in values.items():
            lead = ("chain", "draw") if draws else ()
            names, shape = self._site(name, tuple(value.shape[1:] if draws else value.shape), event)
            array = value.detach().cpu().numpy()
            arrays[name] = (
                lead + names,
                array.reshape((1, len(array), *shape) if draws else shape),
            )
        used = {
            d: n for dims, array in arrays.values() for d, n in zip(dims, array.shape, strict=True)
        }
        self._check_lengths(used)
        coords = {d: self.coords.get(d, np.arange(n)) for d, n in used.items()}
        return xarray.Dataset(arrays, coords)

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
        own = [dim for dim in self.dims.get(name, ()) if dim not in frames.values()]
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
                f"dims has {len(own)} names for '{name}', {own}, which has {free} dimensions "
                "besides its plates"
            )
        return tuple(names), tuple(sizes)

    def _check_lengths(self, used: Mapping[str, int]) -> None:
        for dim, size in used.items():
            labels = self.coords.get(dim)
            if labels is not None and len(labels) != size:
                raise DataError(
                    f"coords has {len(labels)} labels for dimension '{dim}', which has {size} "
                    "elements"
                )

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

    def constants(self, named: Mapping[str, Any], observed: Mapping[str, Tensor]) -> Any:
        """The data arguments that are not observations."""
        import xarray

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
            arrays[name] = (names, value.detach().cpu().numpy())
        coords = {d: v for d, v in self.coords.items() if any(d in a[0] for a in arrays.values())}
        return xarray.Dataset(arrays, coords)


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.equal(a.to(b.dtype), b))
