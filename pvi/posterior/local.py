"""Latents of new rows, for guides that own a row of parameters for each row of the data."""

import copy
from collections.abc import Mapping
from typing import Any

import pyro
import torch
from torch import Tensor

from pvi.engine import ELBO
from pvi.engine.data import Data
from pvi.engine.params import Params
from pvi.engine.traces import Program
from pvi.errors import DataError, FitError, GuideError
from pvi.guides import Guide
from pvi.optim.schedule import cosine
from pvi.posterior.rows import row_plates
from pvi.progress import progress

RATE, PARTICLES = 0.1, 4
OF_SITES = ("loc", "scale", "point", "within", "on", "rows", "columns")  # what guides keep by site


def with_rows(
    model: Program, guide: Program, data: Data, args: tuple, kwargs: Mapping, steps: int
) -> tuple[Guide, Params]:
    """A copy of the guide for new rows, everything outside the rows as it was, and its parameters.

    Call it inside the scope of the trained parameters.

    With global latents $\\theta$ and new rows x it maximises over the new rows' parameters alone

    $$E_{q(\\theta)} E_{q(z)}[\\log p(x, z \\mid \\theta) - \\log q(z \\mid \\theta)],$$

    so the new rows tell nothing of $\\theta$.

    Args:
        data: those that the guide was trained on; plates that follow their number of rows are
            the rows'.
        steps: of Adam, its rate falling along a cosine from 0.1.

    Raises:
        GuideError: the guide ties rows together.
        DataError: the new rows lack an observation, or other sites appear.
    """
    if not isinstance(steps, int) or steps < 1:
        raise FitError(f"infer_local must be a whole number of steps >= 1, got {steps!r}")
    if not isinstance(guide, Guide):
        raise GuideError(
            f"infer_local needs one of pvi.guides, which know what belongs to a row; the guide is "
            f"{type(guide).__name__}. Fit it again with the new rows."
        )
    new = copy.deepcopy(guide)
    new.setup(*args, **kwargs)
    if new.latents.keys() != guide.latents.keys():
        other = sorted(new.latents.keys() ^ guide.latents.keys())
        raise DataError(
            f"with these new data the model has other latents ({other}). infer_local learns the "
            "rows' latents from their observations: give them all, leaving single ones out with "
            "obs_mask= or poutine.mask."
        )
    old = guide.plate_sizes
    local = {p for p, size in new.plate_sizes.items() if size != old[p]}
    local |= row_plates(model, data) & new.plate_sizes.keys()
    if local & guide.coupled_plates:
        raise GuideError(
            f"{type(guide).__name__} ties the elements of plate '{min(local)}' together, so new "
            "ones can't be added. Use pvi.guides.Structured, or fit again with the new rows."
        )
    keys = {x.key for x in new.latents.values() if local & {p.name for p in x.plates}}
    values = dict(guide.named_parameters())
    for name, parameter in new.named_parameters():
        if _site(name) not in keys:
            parameter.data = values[name].detach().clone()
            parameter.requires_grad_(False)
    new.eval()  # its networks stay as they are
    buffers = dict(guide.named_buffers())
    for name, buffer in new.named_buffers():  # such as a flow's random order
        buffer.data = buffers[name].clone()
    params = Params(model, new, state=_without(guide))
    with params.scope():
        _train(model, new, args, kwargs, steps)
    params.freeze()
    return new, params


def _without(guide: Guide) -> dict[str, Any]:
    """The current parameters without those of the guide, which its copy replaces."""
    own = f"{guide._pyro_name}."
    state: dict[str, Any] = dict(pyro.get_param_store().get_state())
    return {
        part: {name: value for name, value in state[part].items() if not name.startswith(own)}
        for part in ("params", "constraints")
    }


def _site(name: str) -> str | None:
    """The site that a parameter belongs to: "on.z|theta_unconstrained" is z's; `None` for networks
    and for what all sites share.
    """
    *_, module, last = ["", *name.split(".")]
    if module not in OF_SITES or not last.endswith("_unconstrained"):
        return None
    return last.removesuffix("_unconstrained").split("|")[0]


def _train(model: Program, guide: Guide, args: tuple, kwargs: Mapping, steps: int) -> None:
    leaves: list[Tensor] = [p for p in guide.parameters() if p.requires_grad]
    if not leaves:
        return
    objective = ELBO(PARTICLES, kl="exact")
    optimizer = torch.optim.Adam(leaves, lr=RATE, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, steps))
    with torch.enable_grad():
        for step in progress(range(steps), "infer new rows"):
            optimizer.zero_grad()
            loss = objective.differentiable_loss(model, guide, *args, **kwargs)
            if not bool(loss.isfinite()):
                raise FitError(f"infer_local: the loss is not finite at step {step}")
            loss.backward(inputs=leaves)
            optimizer.step()
            rate.step()
