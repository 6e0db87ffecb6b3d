"""Model, guide and data as a user gives them, made ready."""

from collections.abc import Mapping
from typing import Any

import torch

from pvi.engine.data import Data, as_data
from pvi.engine.reparam import reparametrized
from pvi.engine.traces import Program
from pvi.errors import GuideError
from pvi.fit.owned import for_guide
from pvi.guides import Guide, MeanField
from pvi.guides.guide import as_guide


def prepare(
    model: Program,
    guide: Program | None,
    data: Any,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    reparam: Any,
    device: Any,
    batch_size: int | None = None,
    num_data: int | None = None,
) -> tuple[Program, Program, Data]:
    """Read the data, put the model in its coordinates, make the guide, move both.

    Raises:
        GuideError: the guide needs all rows, which a loader or a stream does not give.
    """
    wanted = {"batch_size": batch_size, "num_data": num_data}
    rows = as_data(data, args, kwargs, model, device, **wanted)
    if rows.partial and rows.batch_size(batch_size) is None:
        rows = rows.loaded()
    if reparam is not None:
        if isinstance(guide, Guide) and guide.model is not None:
            raise GuideError(
                f"with reparam= the model has other sites than the one that this "
                f"{type(guide).__name__} was made for. Make it without a model."
            )
        model = reparametrized(model, reparam, *rows.probe())
    guide = as_guide(MeanField if guide is None else guide, model)
    if not callable(guide):
        raise GuideError(f"guide must be a Pyro program, got {type(guide).__name__}")
    for program in (model, guide):
        if device is not None and isinstance(program, torch.nn.Module):
            program.to(device)
    return model, guide, rows if not rows.partial else for_guide(rows, model, guide)
