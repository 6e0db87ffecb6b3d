"""A look at the latents after a fit, for models that may learn to do without them."""

import warnings
from dataclasses import replace

import torch

import pvi

ROWS = 1000  # that are looked at


def with_alarm(fit: pvi.Fit) -> pvi.Fit:
    """The fit, with a note and a warning for each site whose latents do nothing.

    Args:
        fit: of a model with latents of single rows.
    """
    data = fit.posterior.data
    if not data.fits:
        return fit
    args, kwargs = data.rows(torch.arange(min(data.size, ROWS)))
    found = pvi.latents(fit.posterior.on(args, args=(), kwargs=kwargs), num_draws=2)
    idle = [s for s in found.sites if not bool(s.active.any()) or s.unused > 0.5]
    notes = tuple(f"latents '{s.name}': {s.findings[0]}" for s in idle)
    for note in notes:
        warnings.warn(note, stacklevel=3)
    return replace(fit, notes=(*fit.notes, *notes))
