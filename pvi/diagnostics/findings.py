"""What a predictive check has found wrong with a site, each with the next step."""

from collections.abc import Iterator
from typing import Any

LIMIT = 3.0  # standard errors
EXTREME = 0.005  # of a p-value, on either side


def findings(site: Any) -> Iterator[str]:
    """Sentences on a `SiteCheck`."""
    if site.bad_khat > 0.05:
        yield (
            f"leave-one-out weights are unreliable (khat) for {site.bad_khat:.0%} of the data: "
            "check on held-out data instead; PITs and scores here may be those of the weights"
        )
    if site.band is not None and not site.band.inside:
        yield from _pits(site)
    for name, (data, replicated, p) in site.statistics.items():
        if min(p, 1 - p) < EXTREME:
            yield (
                f"the {name} of the data is {data:.4g}, that of replicated data {replicated:.4g} "
                f"on average (p = {p:.3g}): the likelihood can't make it; change its family or "
                "add what drives it"
            )
    r = site.reliability
    if r is not None and r.ece > r.ece_limit:
        yield (
            f"probabilities are off by {r.ece:.3f} on average, calibrated ones by "
            f"{r.ece_calibrated:.3f} (ECE): look at plot_reliability; recalibrate on held-out data "
            "or add covariates"
        )
    if site.bad_log_score > 0.05:
        yield (
            f"the log densities of {site.bad_log_score:.0%} of the data rest on fewer than 10 "
            "draws, so the log score is too low: more num_draws, or pvi.evidence"
        )


def _pits(site: Any) -> Iterator[str]:
    """How PITs differ from uniform ones, by their mean (1/2) and spread (1/12)."""
    u, n = site.pit, len(site.pit)
    bias = float((u - 0.5).mean()) / (1 / 12 / n) ** 0.5
    spread = float((u - 0.5).square().mean() - 1 / 12) / (1 / 180 / n) ** 0.5
    if abs(bias) > LIMIT:
        side = "low" if bias > 0 else "high"
        yield f"predictions are biased, too {side}: look for a missing term or offset"
    if spread > LIMIT:
        yield (
            "predictions are too narrow (the data are overdispersed): a likelihood with more "
            "spread, such as NegativeBinomial for Poisson, StudentT for Normal, or a latent for "
            "each row"
        )
    if spread < -LIMIT:
        yield (
            "predictions are too wide (the data are underdispersed): a smaller or a learnt noise "
            "scale"
        )
    if max(abs(bias), abs(spread)) <= LIMIT:
        yield "PITs are not uniform: the likelihood has another shape; look at plot_pit"
