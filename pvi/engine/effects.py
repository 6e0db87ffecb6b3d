"""What a program may add to its objective besides sample sites: `kl` and `penalty`.

Both are messages to the objective that runs the program, like `pyro.sample`, and know the plates,
scales and masks around them. Without a pvi objective around they do nothing.
"""

from typing import Any

import torch
from pyro.poutine.runtime import apply_stack
from torch import Tensor
from torch.distributions import kl_divergence

from pvi.errors import ModelError

TYPE = "pvi_effect"


def kl(name: str, q: Any, p: Any, *, scale: float | Tensor = 1.0) -> Tensor:
    """An analytic term of the bound: subtract $\\mathrm{scale} \\cdot KL(q \\| p)$, in nats.

    For a latent that is integrated out in closed form instead of being sampled: a one-term
    diffusion estimator (`scale` is then the number of terms T), an inclusion weight. It counts in
    every ELBO, `.bound()` included, and the objective's `beta` weights it under its name.

    Args:
        name: unlike that of any site.
        q, p: distributions whose batch shape fits the plates around, between which torch or Pyro
            knows the divergence.
        scale: multiplies the divergence; a number or one for each element of the plates.

    Returns:
        The divergence without the scale, `(*batch)`.

    Raises:
        ModelError: no closed form; wrong shape; the name is taken.
        ObjectiveError: in an objective with alpha != 1, whose weights need draws.
    """
    try:
        value = kl_divergence(q, p)
    except NotImplementedError:
        raise ModelError(
            f"pvi.kl('{name}') needs a closed form, but none is known for {type(q).__name__} and "
            f"{type(p).__name__}. Sample the latent with pyro.sample instead."
        ) from None
    _send(name, "kl", value * scale)
    return value


def penalty(name: str, value: Tensor | float) -> None:
    """Something to minimise besides the negative bound, never part of the bound.

    Commitment, perceptual or adversarial losses, weight decay. It is added to the loss, averaged
    over particles, and summed and scaled over the plates around it; the bound, evidence and
    log weights don't see it. `history["penalty"]` records the sum of all penalties.

    Args:
        name: unlike that of any site.
        value: a number, or inside a plate one for each of its elements.

    Raises:
        ModelError: wrong shape; the name is taken.
    """
    _send(name, "penalty", torch.as_tensor(value))


def _send(name: str, kind: str, value: Tensor) -> None:
    message: Any = {
        "type": TYPE,
        "name": name,
        "kind": kind,
        "fn": None,
        "args": (),
        "kwargs": {},
        "value": value,
        "is_observed": False,
        "scale": 1.0,
        "mask": None,
        "cond_indep_stack": (),
        "done": True,
        "stop": False,
        "continuation": None,
        "infer": {},
    }
    apply_stack(message)
