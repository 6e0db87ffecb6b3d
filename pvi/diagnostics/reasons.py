"""What decides a verdict, each reason with the next step."""

import math
from typing import Any

import torch
from torch.distributions import constraints

from pvi.diagnostics.plates import Elements
from pvi.diagnostics.table import MAX_DIM, Row
from pvi.engine.traces import is_delta
from pvi.posterior.draws import stack_draws
from pvi.posterior.psis import PSIS, khat_threshold, num_not_weights

FEW, MEMORY = 20, 10**8  # draws that are never all equal by chance, and numbers held for them
SMALL = 100  # dimensions that Markov chains explore in minutes
RICHER = "a richer guide (pvi.guides.FullRank for correlations, Flow for curved shapes)"


def judge(smoothed: PSIS, sd_log_ratio: float, rows: tuple[Row, ...]) -> tuple[str, list[str]]:
    """The verdict by the rules of `diagnose`, and what decided it."""
    enough = len(smoothed.log_weights) >= 10  # fewer differ little by chance
    if sd_log_ratio < (0.1 if enough else 1e-3):
        return "good", [f"the log ratios have sd {sd_log_ratio:.2g} nats, below 0.1: use the draws"]
    if failures := _failures(smoothed):
        return "unreliable", failures
    if all(abs(r.shift) < 0.1 and abs(r.sd_ratio - 1) <= 0.1 for r in rows):
        return "good", ["the weights move no mean by 0.1 sd and no sd by 10 %: use the draws"]
    if smoothed.ess < 400:
        need = math.ceil(4 * len(smoothed.log_weights) / smoothed.ess) * 100
        step = f"raise num_draws to {need:,} or more"
        return "unreliable", [f"ESS {smoothed.ess:.0f} is below 400: {step}"]
    worst = max(rows, key=lambda r: max(abs(r.shift), abs(r.sd_ratio - 1)))
    moved = f"the weights move {worst.name} by {worst.shift:+.2f} sd and multiply its sd by"
    return "correctable", [f"{moved} {worst.sd_ratio:.2f}: use PSIS-weighted draws, or {RICHER}"]


def other_modes(target: Any) -> str:
    """What a fit with `restarts` has found elsewhere, if it matters: the weights can't see it."""
    modes = getattr(target, "modes", ())
    elsewhere = 1.0 - modes[0].share if modes else 0.0
    if elsewhere < 0.01:
        return ""
    return (
        f"the posterior has {len(modes)} modes, and about {elsewhere:.0%} of its mass is not at "
        f"this one: use pvi.guides.Mixture({len(modes)}), or make the modes one (order what can be "
        "exchanged)"
    )


def _failures(smoothed: PSIS) -> list[str]:
    """Reasons why the weights cannot even correct the draws, whatever their number."""
    count, khat, ess = len(smoothed.log_weights), smoothed.khat, smoothed.ess
    failures = []
    if math.isinf(khat):
        step = (
            "raise num_draws" if count <= 20 else f"the guide is in the wrong place; try {RICHER}"
        )
        failures.append(f"khat is unknown, the weights' tail has fewer than 5 draws: {step}")
    elif khat >= (limit := khat_threshold(count)):
        failures.append(
            f"khat {khat:.2f} is above {limit:.2f}: the guide's tails are too light or it is in "
            f"the wrong place; try {RICHER} or more steps"
        )
    if ess < 0.1 * count:
        failures.append(
            f"ESS {ess:,.0f} is below 10 % of {count:,} draws: a few draws carry the weight; more "
            "draws do not help, try a richer guide or more steps"
        )
    return failures


def frozen(posterior: Any, seed: int) -> list[str]:
    """A reason if rounding makes all draws of a scalar the same: such weights are equal, wherever
    the guide is.
    """
    if getattr(posterior, "guide", None) is None:  # draws alone
        return []
    with posterior.drawing(seed) as runner:
        size = sum(runner.nodes[name]["value"].numel() for name in runner.latent)
        count = max(3, min(FEW, MEMORY // max(size, 1)))
        draws = stack_draws([run.draws() for run in runner.runs(count)]).values
    for name, value in draws.items():
        fn = runner.nodes[name]["fn"] if name in runner.nodes else None
        if fn is None or is_delta(fn) or not value.is_floating_point() or not _by_itself(fn):
            continue
        still = (value == value[:1]).all(0)
        if count := int(still.sum()):
            at = value[0][still][0].item()
            return [
                f"{count:,} of {still.numel():,} numbers of '{name}' are the same in all draws: "
                f"the guide's sd is below the spacing of {value.dtype} numbers near {at:.4g}, so "
                "the weights tell nothing of it. Centre and scale the data, or use float64"
            ]
    return []


def _by_itself(fn: Any) -> bool:
    """Whether each number of a draw can move alone: not in simplices and Cholesky factors."""
    support = fn.support
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    return support.event_dim == 0 and not support.is_discrete


def unweightable(ratios: torch.Tensor, dim: int) -> list[str]:
    """Reasons why these ratios give no weights."""
    reasons = []
    if dim > MAX_DIM:
        reasons.append(
            f"the latent space has {dim:,} dimensions: above {MAX_DIM:,} weights say nothing; "
            "use predictive checks on held-out data"
        )
    if bad := num_not_weights(ratios):
        reasons.append(
            f"{bad:,} of {len(ratios):,} log ratios are NaN or +inf: look for an overflow, a log "
            "of 0 or a division by 0 in the model or the guide"
        )
    elif ratios.isneginf().all():
        reasons.append("no draw is inside the model's support: constrain the guide to it")
    return reasons


def outside(ratios: torch.Tensor) -> list[str]:
    """A reason if some draws have zero density under the model."""
    count = int(ratios.isneginf().sum())
    what = f"{count:,} of {len(ratios):,} draws are outside the model's support"
    return [f"{what}, so the bound is -inf: constrain the guide to it"] if count else []


def stopped(target: Any, *, harmless: bool = False) -> list[str]:
    """A reason if the fit says that it has not converged."""
    if getattr(target, "converged", None) is not False:
        return []
    why = getattr(target, "reason", "") or "no reason given"  # and the next step
    return [f"stopped before converging: {why}{'; the weights see no harm in it' * harmless}"]


def judge_elements(found: Elements) -> tuple[str, list[str]]:
    """The verdict where every element of the plates has a posterior of its own."""
    failing, moved, limit = found.failing, found.moved, khat_threshold(found.num_draws)
    what = f"khat above {limit:.2f} or ESS below 10 %"
    reasons = [f"{found.share(failing)} have {what}: {RICHER}, or more steps"] if failing else []
    if found.many(failing):
        return "unreliable", [reasons[0], *_unlooked(found)]
    changed = f"the weights move a mean by 0.1 sd or an sd by 10 % in {found.share(moved)}"
    if found.many(moved):
        step = f"use draws weighted element by element, or {RICHER}"
        return "correctable", [f"{changed}: {step}", *reasons, *_unlooked(found)]
    return "good", [f"{changed}: use the draws", *reasons, *_unlooked(found)]


def _unlooked(found: Elements) -> list[str]:
    if found.num_draws >= 2000:
        return []
    return [
        f"{found.num_draws:,} draws of so many rows, so khat and shifts are noisy: diagnose fewer, "
        "pvi.diagnose(fit.posterior.on(rows))"
    ]


def given_others(found: Elements | None) -> list[str]:
    """Where the fault lies, if the elements' posteriors depend on latents outside their plates."""
    if found is None:
        return []
    failing = found.failing
    if found.many(failing):
        return [
            f"given the other latents, {found.share(failing)} have khat above "
            f"{khat_threshold(found.num_draws):.2f} or ESS below 10 %: these latents need "
            f"{RICHER}, or one that knows how they go with the others (pvi.guides.Structured)"
        ]
    return [
        f"given the other latents, {found.share(failing)} fail: there the guide fits, so look at "
        "the latents outside the plates, or at how they go with those inside"
    ]


def escalation(dim: int) -> list[str]:
    """The last resort, where it is cheap."""
    step = "the model is small: pvi.nuts(fit) draws by Markov chains that start from this guide"
    return [step] if dim <= SMALL else []
