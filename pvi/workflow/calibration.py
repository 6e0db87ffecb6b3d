"""What simulation-based calibration has found."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from pvi.diagnostics.uniformity import asymmetry_pvalues, holm, uniformity_pvalues
from pvi.errors import DataError
from pvi.plots.calibration import plot_calibration
from pvi.posterior.arviz import load
from pvi.posterior.psis import khat_threshold
from pvi.text import table
from pvi.workflow.shapes import ADVICE, JOINT_ONLY, shape_of
from pvi.workflow.simulation import LOG_JOINT, Values

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.05  # of all tests together
FEW = 0.05  # the share of simulations that may fail or not converge without a warning
SHOWN = 12  # rows printed
PANELS = 6  # rows drawn
HEADER = ("", "p", "adjusted", "asymmetry", "50 %", "90 %", "z", "contraction", "shape")
PASSED = (
    "Ranks are averages over data from the prior: single data sets may be worse off (see "
    "fit.diagnose()), and with few simulations small errors stay unseen."
)
Row = tuple[str, str, tuple[int, ...]]  # label, site and index of a scalar
PROBS = tuple(np.linspace(0.05, 0.95, 19).round(2).tolist())


@dataclass(frozen=True, repr=False)
class SBC:
    r"""Ranks of simulated truths among draws of their fits, and what they say of the fits.

    The first dimension of all arrays goes over the simulations that ended, `numbers`.

    Attributes:
        numbers: Which simulations these are.
        pit: Share of draws below the truth, `(N, *shape)` for each site and test quantity; uniform
            on [0, 1] if the fits are calibrated.
        truths, means, sds: The simulated value, and mean and sd of the draws.
        num_draws: Draws S of each fit.
        dims: Names of the dimensions of each site.
        khat: Tail index of the importance weights of each fit; NaN without `correct`.
        failures: What went wrong in the simulations that did not end.
        unconverged: Why fits that are counted did not converge.
        notes: What was done on the way.
        seed: Of the whole.
    """

    numbers: np.ndarray
    pit: Values
    truths: Values
    means: Values
    sds: Values
    num_draws: int
    dims: Mapping[str, tuple[str, ...]]
    khat: np.ndarray
    failures: Mapping[int, str] = field(default_factory=dict)
    unconverged: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    seed: int | None = None

    @property
    def ranks(self) -> Values:
        """Ranks of the truths among the draws, 0 to S, ties broken at random, `(N, *shape)`."""
        return {n: np.floor(u * (self.num_draws + 1)).astype(int) for n, u in self.pit.items()}

    @property
    def zscores(self) -> Values:
        """(mean - truth) / sd of each fit, `(N, *shape)`."""
        with np.errstate(divide="ignore", invalid="ignore"):
            return {n: (self.means[n] - x) / self.sds[n] for n, x in self.truths.items()}

    @property
    def contraction(self) -> Values:
        """1 - posterior variance / prior variance, `(N, *shape)`: what the data have taught; the
        prior variance is that of the truths.
        """
        with np.errstate(divide="ignore", invalid="ignore"):
            priors = {n: x.var(0, ddof=1) for n, x in self.truths.items()}
            return {n: 1 - self.sds[n] ** 2 / v for n, v in priors.items()}

    @cached_property
    def pvalues(self) -> Values:
        """P-values of uniformity by the simultaneous ECDF band, `(*shape)`; exact, each for one
        scalar. NaN where a scalar never varies.
        """
        found = {n: uniformity_pvalues(u) for n, u in self.pit.items()}
        return {n: np.where(self._fixed(n), np.nan, p) for n, p in found.items()}

    @cached_property
    def adjusted(self) -> Values:
        """The same, adjusted for the number of scalars by Holm's method."""
        return self._split(holm(self._joined(self.pvalues)))

    @cached_property
    def asymmetry(self) -> Values:
        """P-values of symmetry about 1/2 (Yao et al. 2018), `(*shape)`: small means biased."""
        found = {n: asymmetry_pvalues(u) for n, u in self.pit.items()}
        return {n: np.where(self._fixed(n), np.nan, p) for n, p in found.items()}

    @property
    def pvalue(self) -> float:
        """The smallest adjusted p-value: of all scalars being calibrated."""
        smallest = np.fmin.reduce(self._joined(self.adjusted))
        return 1.0 if np.isnan(smallest) else float(smallest)

    @property
    def calibrated(self) -> bool:
        """Whether no miscalibration was found, at 5 % for all scalars together."""
        return self.pvalue >= LEVEL

    def coverage(self, probs: Sequence[float] = PROBS) -> Values:
        r"""Expected coverage: how often central intervals hold the truth, `(len(probs), *shape)`.

        .. math:: \hat c(\alpha) = \frac1N \sum_i 1\{|2 u_i - 1| \le \alpha\}

        which is :math:`\alpha` up to noise if the fits are calibrated.

        Args:
            probs: of the intervals, by default 0.05, 0.10, ..., 0.95.
        """
        levels = np.asarray(probs, dtype=float)
        if levels.ndim != 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
            raise DataError(f"probs must be a list of numbers from 0 to 1, got {probs!r}")
        far = {n: np.abs(2 * u - 1) for n, u in self.pit.items()}
        return {n: np.stack([(x <= level).mean(0) for level in levels]) for n, x in far.items()}

    def to_datatree(self) -> Any:
        """An `xarray.DataTree` with dims `(chain, draw, *site)`; a draw for each simulation.

        Groups: `prior_sbc` (the PIT values, which `az.plot_ecdf_pit` of arviz 1 opens), `prior`
        (the truths), and `sbc_stats` (ranks, z-scores, and means and sds of the fits).
        """
        import xarray

        stats = {"rank": self.ranks, "zscore": self.zscores, "mean": self.means, "sd": self.sds}
        named = {f"{name}_{key}": x for key, all_ in stats.items() for name, x in all_.items()}
        sites = {f"{name}_{key}": name for key, all_ in stats.items() for name in all_}
        groups = {"prior_sbc": self.pit, "prior": self.truths, "sbc_stats": named}
        made = {}
        for group, values in groups.items():
            dims = {name: ("chain", "draw", *self.dims[sites.get(name, name)]) for name in values}
            arrays = {name: (dims[name], x[None]) for name, x in values.items()}
            sizes = {d: n for ds, x in arrays.values() for d, n in zip(ds, x.shape, strict=True)}
            coords = {d: np.arange(n) for d, n in sizes.items()} | {"draw": self.numbers}
            made[group] = xarray.Dataset(arrays, coords)
        tree = xarray.DataTree.from_dict(made)
        tree.attrs |= {"inference_library": "pvi", "num_draws": self.num_draws}
        return tree

    def to_arviz(self) -> Any:
        """The same for the arviz that is installed: `InferenceData` for 0.x, `DataTree` for 1.x."""
        arviz = load()
        if not arviz.__version__.startswith("0."):
            return self.to_datatree()
        groups = {name: group.to_dataset() for name, group in self.to_datatree().children.items()}
        return arviz.InferenceData(**groups, warn_on_custom_groups=False)

    def plot(self, var_names: Sequence[str] | None = None) -> "Figure":
        """Histogram and ECDF of the PIT values and coverage, with simultaneous 95 % bands.

        Args:
            var_names: sites to draw; by default the six scalars with the smallest p-values.
        """
        for name in var_names or ():
            if name not in self.pit:
                raise DataError(f"var_names: there is no site '{name}'; there are {[*self.pit]}")
        rows = [row for row in self._rows() if not var_names or row[1] in var_names]
        chosen = rows if var_names else rows[:PANELS]
        pits = {label: self.pit[name][(slice(None), *at)] for label, name, at in chosen}
        hidden = len(rows) - len(chosen)
        return plot_calibration(pits, f"{hidden} more with larger p-values" if hidden else "")

    def __repr__(self) -> str:
        return f"SBC({self._verdict()})"

    def _verdict(self) -> str:
        verdict = "no miscalibration found" if self.calibrated else "miscalibrated"
        number = f"{len(self.numbers)} simulations, {self.num_draws} draws each"
        return f"{verdict} in {number}: smallest adjusted p {_p(self.pvalue)}"

    def __str__(self) -> str:
        rows = self._rows()
        found = {label: shape_of(self.pit[n][(slice(None), *at)]) for label, n, at in rows}
        failing = [row for row in rows if self.adjusted[row[1]][row[2]] < LEVEL]
        tests = f"{len(rows)} scalar{'s' * (len(rows) != 1)}, exact ECDF test, Holm's correction"
        lines = [f"{self._verdict()} ({tests})"]
        lines += self._warnings()
        shapes = dict.fromkeys(found[label] for label, name, _ in failing if name != LOG_JOINT)
        lines += [f"- {ADVICE[shape]}" for shape in shapes]
        if failing and not shapes:
            lines.append(f"- {JOINT_ONLY}")
        lines.append(self._table(rows[:SHOWN], found))
        if len(rows) > SHOWN:
            lines.append(f"({len(rows) - SHOWN} more rows, with larger p)")
        return "\n".join([*lines, *([] if failing else [PASSED])])

    def _table(self, rows: Sequence[Row], shapes: Mapping[str, str]) -> str:
        tests = (self.pvalues, self.adjusted, self.asymmetry)
        cover, zscores, contraction = self.coverage([0.5, 0.9]), self.zscores, self.contraction
        cells = []
        for label, name, at in rows:
            every, failed = (slice(None), *at), self.adjusted[name][at] < LEVEL
            numbers = [_p(values[name][at]) for values in tests]
            numbers += [f"{share:.2f}" for share in cover[name][every]]
            numbers += [_median(zscores[name][every], "+.2f")]
            numbers += [_median(contraction[name][every], ".2f")]
            cells.append([label, *numbers, shapes[label] if failed else ""])
        return table(HEADER, cells)

    def _warnings(self) -> list[str]:
        lines, ended = list(map("- {}".format, self.notes)), len(self.numbers)
        for kept, what in ((self.failures, "failed"), (self.unconverged, "did not converge")):
            if not kept:
                continue
            number, reason = next(iter(sorted(kept.items())))
            total = ended + (len(self.failures) if kept is self.failures else 0)
            line = f"{len(kept)} of {total} {what}; number {number}: {reason}"
            if len(kept) > FEW * total:
                warning = (
                    "the ranks are of the rest only, which the data may have chosen"
                    if kept is self.failures
                    else "look at their fits before their ranks"
                )
                line = f"warning: {line}. So many that {warning}."
            lines.append(f"- {line}")
        heavy = int((self.khat > khat_threshold(self.num_draws)).sum())
        if heavy:
            lines.append(
                f"- khat is above {khat_threshold(self.num_draws):.2f} in {heavy} of {ended}: "
                "there the weights correct nothing"
            )
        return lines

    def _fixed(self, name: str) -> np.ndarray:
        """Where a scalar is a constant of the model, `(*shape)`."""
        still = np.ptp(self.truths[name], axis=0) == 0
        return still & (self.sds[name] == 0).all(0)

    def _rows(self) -> list[Row]:
        """Each scalar that varies, the smallest p-value first."""
        rows = [
            (f"{name}[{', '.join(map(str, at))}]" if at else name, name, at)
            for name, p in self.pvalues.items()
            for at in np.ndindex(p.shape)
            if not np.isnan(p[at])
        ]
        return sorted(rows, key=lambda row: self.pvalues[row[1]][row[2]])

    def _joined(self, values: Values) -> np.ndarray:
        return np.concatenate([x.reshape(-1) for x in values.values()])

    def _split(self, joined: np.ndarray) -> Values:
        sizes = np.cumsum([p.size for p in self.pvalues.values()])[:-1]
        parts = np.split(joined, sizes)
        return {
            name: part.reshape(p.shape)
            for part, (name, p) in zip(parts, self.pvalues.items(), strict=True)
        }


def _median(values: np.ndarray, form: str) -> str:
    finite = values[np.isfinite(values)]
    return format(np.median(finite), form) if len(finite) else "-"


def _p(value: float) -> str:
    return f"{value:.2g}" if value >= 1e-3 else f"{value:.0e}"
