"""A fit as a page that says first whether its posterior may be trusted: see `Fit.report`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from pvi.diagnostics import Diagnosis
from pvi.errors import DataError
from pvi.figures import check_matplotlib
from pvi.fit import report_pictures as pictures
from pvi.fit import report_tables as tables
from pvi.fit.report_code import name_of, reproduction
from pvi.page import Picture, Section, write_page
from pvi.progress import progress

if TYPE_CHECKING:
    from pvi.fit.result import Fit

KEPT = 1000  # draws in the pictures of the posterior
HELD = 20_000_000  # numbers that these draws may have
NAMED = 1000  # scalars that have names of their own; more are told by site


@dataclass(frozen=True)
class Material:
    """What the sections of a report are made from.

    Args:
        fit: with a posterior that names its scalars.
        values: the draws that the diagnosis has judged, name -> `(S, *shape)`; of scalars, where
            there are at most 1,000.
        ratios: log p - log q of these draws, `(S,)`, nats; `None` where there are none.
        tree: a few draws with deterministic sites and predictions; `None` if data are not in
            memory.
    """

    fit: "Fit"
    diagnosis: Diagnosis
    values: Mapping[str, Tensor]
    ratios: Tensor | None
    tree: Any
    seed: int


@dataclass(frozen=True)
class Report:
    """The sections of a page on one fit.

    Args:
        diagnosis: what the page starts with.
    """

    title: str
    lead: str
    sections: tuple[Section, ...]
    diagnosis: Diagnosis

    def write(self, path: Any) -> Path:
        """Write the page."""
        write_page(path, self.title, self.lead, self.sections)
        return Path(path)

    @property
    def pictures(self) -> list[Picture]:
        return [picture for section in self.sections for picture in section.pictures]


def make_report(fit: "Fit", num_draws: int = 20_000, *, title: str = "", **options: Any) -> Report:
    """Judge a fit and tell what there is to see.

    Args:
        fit: to judge.
        num_draws, title, options: as in `Fit.report`.
    """
    return compose(gather(fit, num_draws, **options), title)


def compose(found: Material, title: str = "") -> Report:
    """All sections, in the order in which they are read.

    Args:
        found: by `gather`.
        title: of the page.
    """
    makers: tuple[Callable[[Material], Section], ...] = (
        tables.verdict,
        tables.numbers,
        pictures.course,
        tables.divergences,
        tables.parameters,
        pictures.posterior,
        pictures.predictive,
        pictures.diagnostics,
        tables.model,
        tables.notes,
        reproduction,
    )
    sections = tuple(make(found) for make in progress(makers, "report"))
    name = f"{name_of(found.fit.model)}, {name_of(found.fit.guide)}"
    lead = "May this posterior be trusted, and what does it say?"
    return Report(title or name, lead, sections, found.diagnosis)


def gather(
    fit: "Fit",
    num_draws: int = 20_000,
    *,
    seed: int = 0,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Any] | None = None,
) -> Material:
    """Draw from the posterior and judge it; the arguments are those of `Fit.report`."""
    check_matplotlib()
    tree = _tree(fit, seed, coords, dims)
    recorder: Any = _Recorder(fit.posterior, {} if tree is None else labels(tree))
    diagnosis = replace(fit, posterior=recorder).diagnose(num_draws, seed=seed)
    return Material(fit, diagnosis, recorder.values, recorder.ratios, tree, seed)


def _tree(fit: "Fit", seed: int, coords: Any, dims: Any) -> Any:
    """Draws for the pictures, as many as memory allows; `None` where data are too large for it."""
    runner = fit.posterior.runner
    sizes = {name: node["value"].numel() for name, node in runner.nodes.items()}
    size = sum(sizes.values()) + sum(sizes[name] for name in runner.observed)
    predictive = size <= HELD // 4
    options = {"coords": coords, "dims": dims, "seed": seed}
    count = max(2, min(KEPT, HELD // max(size, 1)))
    try:
        return fit.posterior.to_datatree(
            count, predictive=predictive, log_likelihood=False, **options
        )
    except DataError:
        if fit.posterior.data.fits:
            raise
        return None


def labels(tree: Any) -> dict[str, list[str]]:
    """Site -> names of its scalars, such as `beta[bmi]`, in the order of its numbers."""
    found = {}
    groups = tree["posterior"].data_vars if "posterior" in tree.children else {}
    for name, values in groups.items():
        own = values[0, 0]
        if own.size <= NAMED:
            where = (
                ", ".join(str(own[d].values[i]) for d, i in zip(own.dims, index, strict=True))
                for index in np.ndindex(*own.shape)
            )
            found[str(name)] = [f"{name}[{text}]" if own.dims else str(name) for text in where]
    return found


class _Recorder:
    """A posterior whose scalars have names, and which keeps the draws that it was asked for last.

    Args:
        posterior: to draw from.
        names: of the scalars of its sites.
    """

    def __init__(self, posterior: Any, names: Mapping[str, list[str]]):
        self._posterior, self._names = posterior, names
        self.values: Mapping[str, Tensor] = {}
        self.ratios: Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._posterior, name)

    def sample(self, num_draws: int, **options: Any) -> Mapping[str, Tensor]:
        self.values = self._named(self._posterior.sample(num_draws, **options))
        return self.values

    def draws(self, num_draws: int, **options: Any) -> Any:
        draws = self._posterior.draws(num_draws, **options)
        self.values = self._named(draws.values)
        self.ratios = (draws.log_p.double() - draws.log_q.double()).detach().cpu()
        return replace(draws, values=self.values)

    def _named(self, values: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        sizes = {name: prod(x.shape[1:]) for name, x in values.items()}
        if sum(sizes.values()) > NAMED or any(
            len(self._names.get(name, ())) != size for name, size in sizes.items()
        ):
            return values
        return {
            label: column
            for name, x in values.items()
            for label, column in zip(self._names[name], x.reshape(len(x), -1).T, strict=True)
        }
