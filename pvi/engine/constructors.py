"""The named objectives: constructors of one dataclass."""

from typing import Any, Literal

from pvi.engine.gradients import Gradient
from pvi.engine.objective import Beta, Objective


def ELBO(
    num_particles: int = 1,
    *,
    kl: Literal["sample", "exact"] = "sample",
    gradient: Gradient = "auto",
    beta: Beta = 1.0,
    vectorize_particles: bool | None = None,
) -> Objective:
    """Evidence lower bound $E_q[\\log p(x, z) - \\log q(z)] \\le \\log p(x)$, in nats.

    Args:
        num_particles: draws averaged in one evaluation.
        kl: "sample" (Kingma and Welling 2014, estimator A) or "exact" (estimator B).
        gradient: "reparam", "path", "score", or "auto": pathwise where possible, else score.
        beta: weight of each KL; see `BetaELBO`.
        vectorize_particles: `None` to batch particles where the programs allow it.

    >>> ELBO(num_particles=4).num_particles
    4
    """
    return Objective(
        num_particles, kl=kl, gradient=gradient, beta=beta, vectorize_particles=vectorize_particles
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
        beta: one weight >= 0, or a dict from site name to weight.
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
    gradient: Gradient = "auto",
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
