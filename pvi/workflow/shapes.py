"""What the shape of a rank histogram says, and what to do about it."""

import numpy as np

CLEAR = 2.5  # standard errors
NARROW, WIDE = "U: too narrow", "inverse U: too wide"
LOW, HIGH = "slope: too low", "slope: too high"
UNEVEN = "uneven"

_BIASED = (
    "{shape} (biased): the guide's draws are {where} than the truth. Look at fit.converged and "
    "restarts=; a skewed posterior needs a richer guide (Flow), and a model that differs from the "
    "simulator will always do this"
)
ADVICE = {
    NARROW: "U (too narrow): the truth is in the guide's tails too often, so its intervals are too "
    "short. Take FullRank or Structured for correlations, Flow for curved shapes; "
    'fit.linear_response() widens MeanField; correct="psis" says whether weights mend it',
    WIDE: "inverse U (too wide): the truth is near the guide's middle too often. Was the fit ended "
    "too early (steps, converged)? Is the fitted prior wider than that of the simulations?",
    LOW: _BIASED.format(shape="rising slope", where="lower"),
    HIGH: _BIASED.format(shape="falling slope", where="higher"),
    UNEVEN: "uneven, neither slope nor U: look at the histogram, .plot(). Steps come from several "
    "modes, peaks at the ends from a guide that lacks a tail",
}
JOINT_ONLY = (
    "only log_joint is uneven: each scalar looks right alone, but not together. The guide lacks "
    "dependence (try FullRank, Structured, Flow), or does not read all of the data"
)


def shape_of(pit: np.ndarray) -> str:
    """The plainest word for how values differ from uniform ones: in mean, in spread, or else.

    Args:
        pit: `(N,)` in [0, 1].

    >>> shape_of(np.array([0.01, 0.02, 0.98, 0.99] * 25))
    'U: too narrow'
    """
    far = pit - 0.5
    slope = far.mean() * np.sqrt(12 * len(pit))
    spread = ((far**2).mean() - 1 / 12) * np.sqrt(180 * len(pit))
    if max(abs(slope), abs(spread)) < CLEAR:
        return UNEVEN
    if abs(slope) > abs(spread):
        return LOW if slope > 0 else HIGH
    return NARROW if spread > 0 else WIDE
