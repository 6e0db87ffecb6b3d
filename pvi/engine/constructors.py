"""The named objectives: constructors of one dataclass."""

from typing import Any, Literal

from pvi.engine.custom import GradientRule
from pvi.engine.gradients import Gradient
from pvi.engine.objective import Objective
from pvi.engine.wake import Wake
from pvi.engine.weighting import Beta, Rule


def ELBO(
    num_particles: int = 1,
    *,
    kl: Literal["sample", "exact"] = "sample",
    gradient: Gradient | GradientRule = "auto",
    beta: Beta = 1.0,
    weighting: Rule | None = None,
    vectorize_particles: bool | None = None,
) -> Objective:
    """Evidence lower bound $E_q[\\log p(x, z) - \\log q(z)] \\le \\log p(x)$, in nats.

    Args:
        num_particles: draws averaged in one evaluation.
        kl: "sample" (Kingma and Welling 2014, estimator A) or "exact" (estimator B).
        gradient: "reparam", "path", "score", or "auto": pathwise where possible, else score.
        beta: weight of each KL; see `BetaELBO`.
        weighting: `FreeBits`, `Capacity` or `BetaTC`.
        vectorize_particles: `None` to batch particles where the programs allow it.

    >>> ELBO(num_particles=4).num_particles
    4
    """
    return Objective(
        num_particles,
        kl=kl,
        gradient=gradient,
        beta=beta,
        weighting=weighting,
        vectorize_particles=vectorize_particles,
    )


def TraceMeanFieldELBO(num_particles: int = 1, **options: Any) -> Objective:
    """`ELBO(kl="exact")`: $E_q[\\log p(x|z)] - \\sum_s KL(q_s \\| p_s)$, in nats.

    A site's KL is exact where torch or Pyro registers it and the guide's order makes it right;
    elsewhere it is sampled, which `explain` shows.
    """
    return ELBO(num_particles, kl="exact", **options)


def BetaELBO(beta: Beta, num_particles: int = 1, **options: Any) -> Objective:
    """$E_q[\\log p(x|z)] - \\beta\\,KL(q \\| p)$ (Higgins et al. 2017), in nats; a bound at beta =
    1 only.

    Args:
        beta: one weight >= 0, one of `pvi.schedules`, or a dict from site name to such.
    """
    return ELBO(num_particles, beta=beta, **options)


def IWAE(num_particles: int, **options: Any) -> Objective:
    """Importance-weighted bound $E \\log \\frac1K \\sum_k p(x, z_k) / q(z_k)$ (Burda et al. 2016),
    in nats.

    With latents in a plate the mean over particles is taken datum by datum; latents outside it are
    drawn once per bound, so the value reaches the evidence as K grows only without such globals.
    """
    return RenyiELBO(0.0, num_particles, **options)


def RenyiELBO(
    alpha: float,
    num_particles: int,
    *,
    gradient: Gradient | GradientRule = "auto",
    beta: Beta = 1.0,
    bound: Literal["auto", "per_datum", "joint"] = "auto",
    num_outer: int = 1,
    vectorize_particles: bool | None = None,
) -> Objective:
    """Renyi bound of order alpha (Li and Turner 2016), in nats.

    A lower bound on the evidence in the mean for alpha >= 0; an estimate, not a bound, for alpha <
    0.
    """
    return Objective(
        num_particles,
        alpha=float(alpha),
        gradient=gradient,
        beta=beta,
        bound_scope=bound,
        num_outer=num_outer,
        vectorize_particles=vectorize_particles,
    )


def ReweightedWakeSleep(
    num_particles: int = 2, *, insomnia: float = 1.0, **options: Any
) -> Objective:
    """IWAE whose guide learns in phases of its own (Bornschein and Bengio 2015), in nats; see
    `Wake`.

    The bound reported is IWAE's, and the model's parameters follow its gradient. The guide follows
    the weighted draws ("wake") and, with `insomnia` < 1, latents simulated from the model
    ("sleep").

    Args:
        num_particles: K; with K = 1 the wake phase of the guide has no direction.
        insomnia: weight of wake against sleep.
    """
    return IWAE(num_particles, gradient=Wake(insomnia), **options)
