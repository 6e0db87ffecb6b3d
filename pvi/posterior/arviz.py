"""A posterior as an `xarray.DataTree`, and in the form that the installed arviz opens."""

import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvi.engine.numbers import whole_number
from pvi.errors import DataError
from pvi.posterior.draws import Runner, stack
from pvi.posterior.groups import LOO, NO_EVENTS, Groups, Wanted, weight_stats
from pvi.posterior.naming import Coords, Dims, Namer
from pvi.posterior.psis import PSIS
from pvi.posterior.resample import check_correct, choose, chosen_runs
from pvi.posterior.store import add, opened, part_of, write

if TYPE_CHECKING:
    from pvi.posterior.posterior import Posterior


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
    index_origin: int = 0,
    predictive: bool = True,
    log_likelihood: bool = True,
    log_prior: bool = True,
    prior: bool = False,
    predictions: Any = None,
    pred_coords: Coords | None = None,
    pred_dims: Dims | None = None,
    correct: str | None = None,
    path: Any = None,
    seed: int | None = None,
    course: Course | None = None,
) -> Any:
    """The posterior as an `xarray.DataTree` with dims (chain, draw, *plates, *event).

    Args:
        posterior: what to draw from.
        course: of the fit, for the group `fit_history` and the attributes of `posterior`.
        num_draws: and the other options are as in `Posterior.to_arviz`.
    """
    import xarray

    check_correct(correct)
    num_draws = whole_number("num_draws", num_draws, error=DataError)
    seed = int(torch.randint(2**31, ())) if seed is None else seed
    places = None if path is None else part_of(path)
    data = posterior.data.kept()
    with posterior.drawing(seed) as runner:
        namer = Namer(runner, coords or {}, dims or {}, index_origin)
        new, fresh = (None, {}) if predictions is None else posterior.on_new(predictions, runner)
        later = new and _later(namer, new, data.size, pred_coords or {}, pred_dims)
        psis, chosen = choose(posterior, num_draws, seed, new) if correct else (None, None)
        wanted = Wanted(predictive, log_likelihood, log_prior, prior, new)
        runs = chosen_runs(runner, num_draws, chosen, new)
        parts = (wanted.of(run, keep) for run, keep in runs)
        observed = {name: runner.nodes[name]["value"] for name in runner.observed}
        small = {
            "observed_data": namer.dataset(observed, first=None),
            "constant_data": namer.constants(data.named(), observed),
        }
        if later:
            small["predictions_constant_data"] = later.constants(fresh, {})
        if course is not None:
            small["fit_history"] = course.dataset()
        export = _Export(posterior, namer, later or namer, psis, course.attrs if course else {})
        if places is None:
            large = export.named(export.joined(parts))
        else:
            large = _write(export.pieces(parts), places[0])
        small["sample_stats"] = export.stats()
        groups = {n: g for n, g in (large | small).items() if g.data_vars}
        namer.check_names(data.named() | fresh, groups)
        if places is None:
            return xarray.DataTree.from_dict(groups)
        add({n: g for n, g in groups.items() if n not in large}, places[0])
        os.replace(*places)
    return opened(places[1])


def dataset(posterior: "Posterior", values: Mapping[str, Tensor]) -> Any:
    """Draws `(S, *site shape)` of sites as an `xarray.Dataset` with dims as in `to_datatree`."""
    return Namer(posterior.runner, {}, {}, 0).dataset(values)


def _write(pieces: Iterator[Mapping[str, Any]], path: Any) -> dict[str, Any]:
    """Write the pieces; what the last one was, for its names."""
    last: dict[str, Any] = {}

    def watched() -> Iterator[Mapping[str, Any]]:
        for piece in pieces:
            last.update(piece)
            yield piece

    try:
        write(watched(), path)
    except BaseException:
        path.unlink(missing_ok=True)
        raise
    return last


def _later(namer: Namer, new: Runner, rows: int, coords: Coords, dims: Dims | None) -> Namer:
    """Names for new data: labels of the training rows are not theirs."""
    own = {name for name, size in namer.plates.items() if size == rows}
    kept = {dim: labels for dim, labels in namer.coords.items() if dim not in own}
    return Namer(new, kept | dict(coords), namer.dims if dims is None else dims, namer.origin)


@dataclass
class _Export:
    """Draws as they come, under their names.

    Args:
        namer, later: names of the training data's dimensions, and of the new data's.
        psis: the weights by which the draws were chosen, if they were.
        course: how the fit went.
    """

    posterior: "Posterior"
    namer: Namer
    later: Namer
    psis: PSIS | None
    course: Mapping[str, Any]
    log_p: list[Tensor] = field(default_factory=list)
    log_q: list[Tensor] = field(default_factory=list)

    def named(self, groups: Groups, first: int = 0) -> dict[str, Any]:
        """Datasets by group, without those that are empty."""
        found = {}
        for group, values in groups.items():
            namer = self.later if group == "predictions" else self.namer
            if values:
                found[group] = namer.dataset(values, first=first, event=group not in NO_EVENTS)
                found[group].attrs.update(self._attrs(group))
        return found

    def joined(self, parts: Iterator[Groups]) -> Groups:
        """All draws at once."""
        every = [self._kept(part) for part in parts]
        return {group: stack([part[group] for part in every]) for group in every[0]}

    def pieces(self, parts: Iterator[Groups]) -> Iterator[dict[str, Any]]:
        """Piece by piece."""
        first = 0
        for part in parts:
            yield self.named(self._kept(part), first)
            first += len(self.log_p[-1])

    def stats(self) -> Any:
        """The group `sample_stats`, of all draws so far."""
        log_p, log_q = torch.cat(self.log_p), torch.cat(self.log_q)
        more, attrs = weight_stats(self.posterior, log_p - log_q, self.psis)
        values = {"log_p": log_p, "log_q": log_q, **more}
        return self.namer.dataset(values, event=False).assign_attrs(attrs)

    def _kept(self, part: Groups) -> Groups:
        stats = part.pop("sample_stats")
        self.log_p.append(stats["log_p"])
        self.log_q.append(stats["log_q"])
        return part

    def _attrs(self, group: str) -> dict[str, Any]:
        if group == "log_likelihood":
            return {"warning": LOO}
        if group != "posterior":
            return {}
        how = "independent draws from the guide"
        if self.psis is not None:
            how = "draws from the guide, resampled by their PSIS weights (systematic resampling)"
        return {"inference_library": "pvi", "sampling": how, **self.course}
