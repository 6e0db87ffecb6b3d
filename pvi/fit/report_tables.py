"""The sections of a report that are words and numbers."""

import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import kl_divergence

from pvi.diagnostics.diagnosis import MODES
from pvi.engine.describe import site_rows
from pvi.engine.explain import Explanation
from pvi.engine.traces import plates_of
from pvi.errors import PviError
from pvi.fit.history import WINDOW, smoothed
from pvi.page import Bar, Items, Numbers, Section, Table
from pvi.posterior.psis import khat_threshold

if TYPE_CHECKING:
    from pvi.fit.report import Material

ROWS = 50  # of a table
COLLAPSED = 0.01  # nats: the guide of such a number is its prior
SENTENCES = {
    "good": "Use the draws: the importance weights see no difference that matters between them and "
    "the posterior.",
    "correctable": "Use this posterior with importance weights: the guide is close enough for them "
    "to correct it.",
    "unreliable": "Do not rely on this posterior: the guide is too far from it, and weights can't "
    "correct that.",
    "not assessed": "Nobody knows whether this posterior may be trusted: the importance weights "
    "that would tell mean nothing here.",
}
QUANTILES = (0.03, 0.5, 0.97)


def verdict(m: "Material") -> Section:
    """The badge, a sentence, and the reasons with their next steps."""
    d = m.diagnosis
    parts = [SENTENCES.get(d.verdict, ""), Items(d.reasons), MODES]
    return Section("May it be trusted?", parts, d.verdict)


def numbers(m: "Material") -> Section:
    """Bound, evidence, weights and the fit in a grid."""
    d, history = m.diagnosis, m.fit.history
    bound, se, remark = d.bound, d.bound_se, f"{d.num_draws:,} draws"
    if math.isnan(bound):
        course = m.fit.course().attrs
        bound, se, remark = course["bound"], course["bound_se"], "last steps of the fit"
    rows = [("Bound", f"{bound:,.2f}", f"+- {se:.2g} nats; {remark}")]
    if not math.isnan(d.evidence):
        rows.append(("Log evidence", f"{d.evidence:,.2f}", "nats, by the weights"))
    if not math.isnan(d.khat):
        limit = khat_threshold(d.num_draws)
        rows.append(("khat", f"{d.khat:.2f}", f"usable below {limit:.2f}"))
        rows.append(("ESS", f"{d.ess:,.0f}", f"of {d.num_draws:,} draws"))
    if not math.isnan(d.sd_log_ratio):
        rows.append(("sd of log weights", f"{d.sd_log_ratio:.2g}", "nats"))
    rows.append(("Converged", "yes" if m.fit.converged else "no", m.fit.reason))
    rows.append(("Steps", f"{len(history):,}", ""))
    if not math.isnan(m.fit.seconds):
        rows.append(("Time of the fit", f"{m.fit.seconds:,.1f} s", ""))
    count = sum(sizes(m).values())
    rows.append(("Latent numbers", f"{count:,}", f"in {len(sizes(m)):,} sites"))
    return Section("Key numbers", [Numbers(rows)])


def sizes(m: "Material") -> dict[str, int]:
    """Numbers in each latent site, for all rows of the data."""
    runner = m.fit.posterior.runner
    found = {}
    for name in runner.latent:
        node = runner.nodes[name]
        rows = math.prod(p.full_size / p.size for p in plates_of(node))
        found[name] = round(node["value"].numel() * rows)
    return found


def divergences(m: "Material") -> Section:
    """Where the bound pays for information, and which numbers the guide leaves at their prior."""
    title, kl = "KL by site", m.fit.history.kl()
    last = {name: float(smoothed(x, WINDOW)[0][-1]) for name, x in kl.items() if len(x)}
    known = {name: value for name, value in last.items() if math.isfinite(value)}
    if not known:
        return Section(title, ["The fit has recorded no KL."])
    count, collapsed = sizes(m), dict(_collapsed(m))
    total = sum(max(x, 0.0) for x in known.values()) or 1.0
    ranked = sorted(known, key=lambda name: -known[name])
    rows: list[list[Any]] = []
    for name in ranked[:ROWS]:
        each = known[name] / count[name] if name in count else math.nan
        share, prior = Bar(known[name] / total), collapsed.get(name, "-")
        rows.append([name, known[name], share, count.get(name, "-"), each, prior])
    if rest := ranked[ROWS:]:
        rows.append([f"{len(rest)} more sites", sum(known[n] for n in rest), "", "", "", ""])
    header = ("site", "KL (nats)", "share", "numbers", "KL a number", "at the prior")
    text = (
        "What the data say of each site, as the guide has it: its divergence from the prior, "
        f"averaged over the last steps. At the prior are numbers with less than {COLLAPSED} nats "
        "(for vectors within plates: entries, averaged over the plates); - where no closed form "
        "tells."
    )
    if any("point (Delta)" in reason for reason in m.diagnosis.reasons):
        text += " Of a point it is minus its log prior density, not a divergence."
    return Section(title, [text, Table(header, rows)])


def _collapsed(m: "Material") -> Iterator[tuple[str, str]]:
    """Sites with an independent closed-form KL for each number, and how many of these are at 0."""
    with m.fit.posterior.drawing(m.seed) as runner:
        for name in runner.latent:
            guide = runner.guide_trace.nodes.get(name)
            if guide is None:
                continue
            q, p = (_single(node["fn"]) for node in (guide, runner.model_trace.nodes[name]))
            with suppress(NotImplementedError, ValueError):
                kl = kl_divergence(q, p)
                shape, event = guide["value"].shape, guide["fn"].event_dim
                if kl.numel() < math.prod(shape) or kl.dim() > len(shape):
                    continue
                kl = kl.expand(shape)
                if event:
                    kl = kl.reshape(-1, *shape[len(shape) - event :]).mean(0)
                yield name, f"{int((kl < COLLAPSED).sum()):,} of {kl.numel():,}"


def _single(fn: Any) -> Any:
    """The distribution of each number, where an event is many independent ones."""
    while type(fn).__name__ == "Independent":
        fn = fn.base_dist
    return fn


def parameters(m: "Material") -> Section:
    """Each scalar with its interval and what the weights make of it; the rest by site."""
    table = {row.name: row for row in m.diagnosis.table}
    weighted = not math.isnan(m.diagnosis.khat)
    draws = scalars(m)
    ranked = list(draws)
    if weighted and len(ranked) > ROWS:
        ranked.sort(key=lambda name: -_moved(table.get(name)))
    header = ["name", "mean", "sd", "3 %", "median", "97 %"]
    header += ["weighted mean", "weighted sd", "shift (sd)", "sd ratio"] * weighted
    rows = [_row(name, draws[name], table.get(name), weighted) for name in ranked[:ROWS]]
    if not rows:
        return Section("Parameters", ["The model has no latent sites."])
    text = "Draws of the guide"
    if weighted:
        text += (
            ", and what the importance weights make of them: the shift is of the mean, in sds of "
            "the guide; deterministic sites have none"
        )
    parts: list[Any] = [f"{text}.", Table(header, rows)]
    total = sum(sizes(m).values())
    if total > len(rows) or len(ranked) > len(rows):
        order = "that the weights move most" if weighted else "of each site, the first ones"
        caption = f"All latent numbers by site (above are at most {ROWS} of them, {order})"
        parts.append(Table(*_by_site(m), caption=caption))
    return Section("Parameters", parts)


def _moved(row: Any) -> float:
    return -1.0 if row is None else max(abs(row.shift), abs(row.sd_ratio - 1.0))


def _row(name: str, x: Tensor, row: Any, weighted: bool) -> list[Any]:
    quantiles = torch.quantile(x, torch.tensor(QUANTILES, dtype=x.dtype)).tolist()
    moments = [x.mean().item(), x.std(correction=0).item()]
    cells = [name, *moments, *quantiles]
    if weighted:
        names = ("psis_mean", "psis_sd", "shift", "sd_ratio")
        cells += [math.nan if row is None else getattr(row, n) for n in names]
    return cells


def scalars(m: "Material") -> dict[str, Tensor]:
    """Draws `(S,)` of the judged scalars, then of those of deterministic sites; some of each site.

    All where there are no more than 1,000.
    """
    found: dict[str, Tensor] = {}
    share = max(1, 1000 // max(len(m.values), 1))
    for name, x in {**m.values, **_computed(m)}.items():
        flat = x.detach().reshape(len(x), -1)[:, :share].cpu().double()
        names = [f"{name}[{i}]" for i in range(flat.shape[1])] if x.dim() > 1 else [name]
        found |= zip(names, flat.T, strict=True)
    return found


def _computed(m: "Material") -> dict[str, Tensor]:
    """Scalars of the deterministic sites, and of latents that the model sums out."""
    from pvi.fit.report import labels

    if m.tree is None:
        return {}
    sites = {name.partition("[")[0] for name in m.values}
    found = {}
    for name, names in labels(m.tree).items():
        if name not in sites and len(names) <= ROWS:
            draws = m.tree["posterior"][name].values[0]
            columns = torch.as_tensor(draws).double().reshape(len(draws), -1).T
            found |= zip(names, columns, strict=True)
    return found


def _by_site(m: "Material") -> tuple[list[str], list[list[Any]]]:
    """A row for each site: how many numbers, where they are and how far the weights move them."""
    weighted = not math.isnan(m.diagnosis.khat)
    header = ["site", "numbers", "smallest mean", "largest mean", "smallest sd", "largest sd"]
    header += ["largest shift (sd)"] * weighted
    rows = []
    for name, x in _sites(m).items():
        mean, sd = x.double().mean(0), x.double().std(0, correction=0)
        cells = [f(y).item() for y in (mean, sd) for f in (torch.min, torch.max)]
        shifts = [r.shift for r in m.diagnosis.table if r.name.partition("[")[0] == name]
        largest = [max(shifts, key=abs, default=math.nan)] * weighted
        rows.append([name, x[0].numel(), *cells, *largest])
    return header, rows[:ROWS]


def _sites(m: "Material") -> Mapping[str, Tensor]:
    """The judged draws by site again."""
    groups: dict[str, list[Tensor]] = {}
    for name, x in m.values.items():
        site = name.partition("[")[0] if x.dim() == 1 else name
        groups.setdefault(site, []).append(x.detach().cpu())
    return {name: xs[0] if len(xs) == 1 else torch.stack(xs, 1) for name, xs in groups.items()}


def model(m: "Material") -> Section:
    """The sites of model and guide, and what the objective does at each."""
    with m.fit.posterior.drawing(m.seed) as runner:
        told = _explained(m)
        found = {} if told is None else {row[0]: row for row in told.rows}
        kinds = {name: row[1] for name, row in found.items() if row[1] == "summed out"}
        how = {name: row[3] for name, row in found.items() if row[3] != "-"}
        sites = list(site_rows(runner.model_trace, runner.guide_trace, kinds, how))
    header = ("site", "kind", "distribution", "batch", "event", "plates", "support", "guide", "KL")
    rows = [[*row, found[row[0]][4] if row[0] in found else "-"] for row in sites]
    parts: list[Any] = [Table((*header, "gradient"), rows[:ROWS])]
    if len(rows) > ROWS:
        parts.append(f"And {len(rows) - ROWS:,} more sites.")
    if told is not None:
        parts.append(Items(told.notes))
    if not m.fit.posterior.data.fits:
        parts.append("The data are not in memory: shapes are those of the first rows.")
    return Section("Model", parts)


def _explained(m: "Material") -> Explanation | None:
    """What the objective does at each site; `None` where it is not known, or no longer runs."""
    runner, fit = m.fit.posterior.runner, m.fit
    if fit.objective is None:
        return None
    with suppress(PviError):
        return fit.objective.explain(fit.model, fit.guide, *runner.args, **runner.kwargs)
    return None


def notes(m: "Material") -> Section:
    """What was done to the fit on its way, and why it ended."""
    lines = list(m.fit.notes)
    if not m.fit.converged:
        lines.insert(0, f"not converged: {m.fit.reason or 'no reason given'}")
    return Section("Notes of the fit", [Items(lines) if lines else "None."])
