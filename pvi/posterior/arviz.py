"""A posterior as an `xarray.DataTree`, and in the form that the installed arviz opens."""

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from pvi.posterior.draws import Runner, stack
from pvi.posterior.groups import LOO, NO_EVENTS, Groups, Wanted, weight_stats
from pvi.posterior.naming import Coords, Dims, Namer
from pvi.posterior.psis import PSIS
from pvi.posterior.resample import check_correct, choose, chosen_runs, seeded
from pvi.posterior.store import add, opened, replacing, write

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
    with seeded(seed) as seed, replacing(path) as part:
        psis, chosen = choose(posterior, num_draws, seed) if correct else (None, None)
        with posterior.drawing(seed) as runner:
            namer = Namer(runner, coords or {}, dims or {}, index_origin)
            new, fresh = (
                (None, {}) if predictions is None else posterior.on_new(predictions, runner)
            )
            size = posterior.data.size
            later = _later(namer, new, size, pred_coords or {}, pred_dims) if new else namer
            export = _Export(posterior, namer, later, psis, course)
            known = posterior.data.kept().named()
            fixed = export.fixed(runner.observed, known, fresh)
            wanted = Wanted(predictive, log_likelihood, log_prior, prior, new)
            runs = chosen_runs(runner, num_draws, chosen)
            parts = (wanted.of(run, keep) for run, keep in runs)
            parts = export.checked(parts, known | fresh, fixed)
            if part is None:
                groups = export.named(export.joined(parts)) | fixed
                return xarray.DataTree.from_dict(groups | {"sample_stats": export.stats()})
            write(export.pieces(parts), part)
            add(fixed | {"sample_stats": export.stats()}, part)
    return opened(path)


def dataset(posterior: "Posterior", values: Mapping[str, Tensor]) -> Any:
    """Draws `(S, *site shape)` of sites as an `xarray.Dataset` with dims as in `to_datatree`."""
    return Namer(posterior.runner, {}, {}, 0).dataset(values)


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
    course: Course | None
    log_p: list[Tensor] = field(default_factory=list)
    log_q: list[Tensor] = field(default_factory=list)

    def fixed(
        self, observed: list[str], known: Mapping[str, Any], fresh: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The groups without draws, of the data's arguments and the new data's."""
        values = {name: self.namer.nodes[name]["value"] for name in observed}
        found = {
            "observed_data": self.namer.dataset(values, first=None),
            "constant_data": self.namer.constants(known, values),
            "predictions_constant_data": self.later.constants(fresh, {}),
        }
        if self.course is not None:
            found["fit_history"] = self.course.dataset()
        return {name: group for name, group in found.items() if group.data_vars}

    def checked(
        self, parts: Iterable[Groups], known: Mapping[str, Any], fixed: Mapping[str, Any]
    ) -> Iterator[Groups]:
        """The parts; the user's names are checked at the first, before the long work."""
        for number, part in enumerate(parts):
            if number == 0:
                self.namer.check_names(known, self.named(part) | dict(fixed))
            yield part

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
        attrs = self.course.attrs if self.course else {}
        how = "independent draws from the guide"
        if self.psis is not None:
            how = "draws from the guide, resampled by their PSIS weights (systematic resampling)"
        return {"inference_library": "pvi", "sampling": how, **attrs}
