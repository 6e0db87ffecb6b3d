"""May this posterior be trusted, why not, and what to do next."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from pvi.diagnostics.causes import LEVEL, at_rest, centred, correlated, heavy
from pvi.diagnostics.evidence import MAX_BAD
from pvi.diagnostics.plates import Element, Elements, elements
from pvi.diagnostics.reasons import (
    escalation,
    frozen,
    given_others,
    judge,
    judge_elements,
    other_modes,
    outside,
    stopped,
    unweightable,
)
from pvi.diagnostics.table import COLUMNS, MAX_DIM, Row, make_table, scalars
from pvi.errors import DataError
from pvi.posterior.psis import khat_threshold, num_not_weights, psis
from pvi.text import table as text_table

MAX_SHOWN = 12  # rows printed
ENOUGH = 20_000  # draws: khat is noisy below
MODES = "Draws from the guide cannot see modes that the guide misses."


@dataclass(frozen=True)
class Diagnosis:
    """A verdict on a posterior with its reasons; numbers that were not computed are NaN.

    Attributes:
        verdict: "good", "correctable" (weight the draws by `psis(log_p - log_q)`), "unreliable"
            or "not assessed".
        reasons: What decided it, each with the next step.
        num_draws: Draws S that the numbers come from.
        table: One row per scalar, at most 1,000.
        elements: Where latents factorise over plates, the weights of single elements of these, at
            most 500 evenly spaced ones; see `Element`.
        khat: Tail index of the weights, see `PSIS`; where all latents factorise over plates, of
            weights of single elements, and 95 % of these are not above it.
        ess: Absolute effective sample size of the weights, in draws; likewise.
        bound: Mean of log p - log q over the draws, nats.
        bound_se: Its standard error, nats.
        evidence: PSIS estimate of log Z, nats; NaN where the verdict is "unreliable".
        sd_log_ratio: Standard deviation of log p - log q, nats.
    """

    verdict: str
    reasons: tuple[str, ...]
    num_draws: int
    table: tuple[Row, ...]
    elements: tuple[Element, ...] = ()
    khat: float = math.nan
    ess: float = math.nan
    bound: float = math.nan
    bound_se: float = math.nan
    evidence: float = math.nan
    sd_log_ratio: float = math.nan

    def to_pandas(self) -> Any:
        """The table as a pandas DataFrame indexed by parameter name."""
        import pandas as pd

        return pd.DataFrame([asdict(r) for r in self.table], columns=COLUMNS).set_index("name")

    def __str__(self) -> str:
        """Verdict and key numbers, reasons, the rows with the largest shifts, the caveat."""
        numbers = {
            "khat": f"khat {self.khat:.2f} (usable below {khat_threshold(self.num_draws):.2f})",
            "ess": f"ESS {self.ess:,.0f} of {self.num_draws:,} draws",
            "bound": f"bound {self.bound:.2f} +- {self.bound_se:.2g} nats",
            "evidence": f"log evidence {self.evidence:.2f}",
            "sd_log_ratio": f"sd of log ratio {self.sd_log_ratio:.2g}",
        }
        known = [text for name, text in numbers.items() if not math.isnan(getattr(self, name))]
        lines = [": ".join(filter(None, [self.verdict, ", ".join(known)]))]
        lines += [f"- {reason}" for reason in self.reasons]
        weighted = not math.isnan(self.khat)
        header = COLUMNS if weighted else COLUMNS[:3]
        ranked = sorted(self.table, key=lambda row: -abs(row.shift)) if weighted else self.table
        cells = [
            [row.name, *(f"{getattr(row, name): .4g}" for name in header[1:])]
            for row in ranked[:MAX_SHOWN]
        ]
        lines += [text_table(header, cells)] if cells else []
        hidden = len(ranked) - len(cells)
        note = ", none with a larger shift" if weighted else ""
        lines += [f"({hidden} more rows{note})"] if hidden else []
        return "\n".join([*lines, MODES])


def diagnose(target: Any, num_draws: int = ENOUGH, *, seed: int = 0) -> Diagnosis:
    r"""Judge a posterior by the weights :math:`\log p(x, z_s) - \log q(z_s)` of its own draws.

    - good: sd of the log ratios < 0.1 (0.001 if S < 10); or khat < `khat_threshold(S)`, ESS >=
      S/10, every :math:`|\text{shift}| < 0.1`, every sd within 10 %, and no pair of scalars
      correlated under the weights but not in the guide.
    - correctable: khat < `khat_threshold(S)`, ESS >= S/10 and ESS >= 400.
    - unreliable: otherwise.
    - not assessed: the posterior has caveats (Delta guide, subsampled plate, tempered, ...), more
      than 1,000 latent dimensions, a continuous scalar that is the same in all draws, or log ratios
      that are NaN or `+inf`, or all `-inf`.

    Where all latents factorise over plates (a VAE), the same is asked of the weights of every
    element, in any number of dimensions, and the verdict is that of at least 95 % of the elements.
    Beside other latents, elements are looked at given three draws of these: above 1,000 dimensions
    a posterior is unreliable if more than 5 % of them fail.

    Shifts and sds have a Monte Carlo error, about :math:`1/\sqrt{\text{ESS}}` sd each: small
    beside the limits at 20,000 draws, as large as these at a few hundred. A fit that stopped
    before converging keeps the verdict of its weights, and the reasons say that it stopped.

    Args:
        target: A `Posterior`, or anything with a `.posterior` (a `Fit`, whose `.converged` and
            `.reason` are read).
        num_draws: Draws S; khat is noisy below 20,000.
        seed: Of the draws.

    Returns:
        The verdict and its numbers; `print` it.

    Raises:
        DataError: `num_draws` is below 2.

    Reference:
        Yao, Vehtari, Simpson, Gelman (2018), Yes, but Did It Work?: Evaluating Variational
        Inference, ICML; Vehtari, Simpson, Gelman, Yao, Gabry (2024), JMLR 25(72).
    """
    if num_draws < 2:
        raise DataError(f"diagnose needs num_draws >= 2, got {num_draws}; 20_000 is usual.")
    posterior = getattr(target, "posterior", target)
    if caveats := posterior.caveats() or frozen(posterior, seed):
        count = _affordable(1000, _size(posterior.sample(1, seed=seed)))
        rows = make_table(posterior.sample(count, seed=seed))
        return Diagnosis("not assessed", (*stopped(target), *caveats), count, rows)
    found = elements(posterior, num_draws, seed)
    if found and not found.nested:
        return _by_element(target, found)
    dim = _size(posterior.draws(2, seed=seed).values)
    count = num_draws if dim <= MAX_DIM else min(num_draws, _affordable(200, dim))
    draws = posterior.draws(count, seed=seed)
    ratios = draws.log_p.detach().cpu().double() - draws.log_q.detach().cpu().double()
    if why := unweightable(ratios, dim):
        rows, within = make_table(draws.values), found.items if found else ()
        reasons = (*stopped(target), *given_others(found), *why)
        fails = found and found.many(found.failing)
        verdict = "unreliable" if fails else "not assessed"
        return Diagnosis(verdict, reasons, count, rows, within, **_moments(ratios))
    return _weigh(target, posterior, draws.values, ratios, found)


def _by_element(target: Any, found: Elements) -> Diagnosis:
    """The diagnosis where every element of the plates has a posterior of its own."""
    verdict, reasons = judge_elements(found)
    if missed := other_modes(target):
        verdict, reasons = "unreliable", [missed, *reasons]
    good = verdict == "good"
    early = stopped(target, harmless=good)
    numbers = found.numbers or {}
    last = 1 - MAX_BAD  # of the elements; the rest may fail
    khat = torch.tensor([e.khat for e in found.items], dtype=torch.float64)
    ess = torch.tensor([e.ess for e in found.items], dtype=torch.float64)
    return Diagnosis(
        verdict=verdict,
        reasons=tuple(reasons + early if good else early + reasons),
        num_draws=found.num_draws,
        table=found.rows,
        elements=found.items,
        khat=khat.quantile(last, interpolation="lower").item(),
        ess=ess.quantile(1 - last, interpolation="higher").item() * found.num_draws,
        **{**numbers, **({"evidence": math.nan} if verdict == "unreliable" else {})},
    )


def _size(values: Mapping[str, torch.Tensor]) -> int:
    return sum(value[0].numel() for value in values.values())


def _affordable(num_draws: int, size: int) -> int:
    """At most so many draws of `size` numbers each, fewer if they would fill the memory."""
    return max(2, min(num_draws, 10**8 // max(size, 1)))


def _weigh(
    target: Any,
    posterior: Any,
    values: Mapping[str, torch.Tensor],
    ratios: torch.Tensor,
    found: Elements | None,
) -> Diagnosis:
    """The diagnosis by joint weights of all latents."""
    smoothed, moments = psis(ratios), _moments(ratios)
    rows = make_table(values, smoothed)
    names, x = scalars(values, MAX_DIM)
    verdict, reasons = judge(smoothed, moments["sd_log_ratio"], rows)
    pair = correlated(names, x, smoothed)
    if verdict == "good" and pair:
        verdict, reasons = "correctable", ["the marginals are right: use PSIS-weighted draws"]
    if missed := other_modes(target):
        verdict, reasons = "unreliable", [missed, *(reasons if verdict == "unreliable" else [])]
    good, early = verdict == "good", stopped(target, harmless=verdict == "good")
    reasons += outside(ratios)
    if not good:
        rest = at_rest(posterior, values, ratios)
        reasons += rest + (heavy(names, x, smoothed) if rest == [LEVEL] else [])
        reasons += pair + given_others(found) + centred(posterior)
    if verdict == "unreliable":
        reasons += escalation(len(names))
    if len(ratios) < ENOUGH:
        reasons.append(f"khat is noisy at {len(ratios):,} draws: use num_draws={ENOUGH:_} or more")
    return Diagnosis(
        verdict=verdict,
        reasons=tuple(reasons + early if good else early + reasons),
        num_draws=len(ratios),
        table=rows,
        elements=found.items if found else (),
        khat=smoothed.khat,
        ess=smoothed.ess,
        evidence=math.nan if verdict == "unreliable" else smoothed.log_mean,
        **moments,
    )


def _moments(ratios: torch.Tensor) -> dict[str, float]:
    """Mean, its standard error and sd of the ratios `(S,)`, nats; none if one is NaN or +inf."""
    if num_not_weights(ratios):
        return {}
    mean = ratios.mean().item()
    sd = ratios.std().item() if math.isfinite(mean) else math.inf
    return {"bound": mean, "bound_se": sd / math.sqrt(len(ratios)), "sd_log_ratio": sd}
