"""The values of all parameters and buffers as plain data, and back into a model and a guide."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pvi.engine.params import Params
from pvi.errors import CheckpointError, GuideError
from pvi.fit.storage import Tree
from pvi.guides.structure import constraint_of, describe_constraint


def values_of(params: Params) -> Tree:
    """Values by name, and the constraint of each `pyro.param`."""
    values = {name: x.detach().clone() for name, x in params.tensors().items()}
    constraints = {
        name: describe_constraint(constraint)
        for name, constraint in params.constraints().items()
        if f"param:{name}" in values
    }
    return {"values": values, "constraints": constraints}


def create_missing(params: Params, saved: Tree, where: Path) -> None:
    """Make the `pyro.param`s that a program creates only later; call inside the scope."""
    known = params.tensors()
    for name in [name for name in saved["values"] if name not in known]:
        _create(params, name, saved, where)


def put_values(params: Params, saved: Tree, where: Path) -> None:
    """Overwrite all parameters and buffers; call inside the scope, after `create_missing`.

    Raises:
        CheckpointError: names, shapes or dtypes differ; then nothing was overwritten.
    """
    values: Mapping[str, Tensor] = saved["values"]
    here = params.tensors()
    for name, x in here.items():
        if name not in values:
            raise CheckpointError(
                f"{where} has no value of '{name}', which this model or guide has. Pass the "
                f"programs that were fitted; it has {_listed(values)}."
            )
        if (x.shape, x.dtype) != (values[name].shape, values[name].dtype):
            raise CheckpointError(
                f"{where}: '{name}' is {_kind(values[name])} there, but {_kind(x)} in this model "
                "or guide. Pass the programs, data and default dtype of the fit."
            )
    with torch.no_grad():
        for name, x in here.items():
            x.copy_(values[name])


def _create(params: Params, name: str, saved: Tree, where: Path) -> None:
    label, _, own = name.partition(":")
    if label != "param" or "$$$" in own:
        raise CheckpointError(
            f"{where} has a value of '{name}', but this model and guide have no such parameter "
            f"or buffer; they have {_listed(params.tensors())}. Pass the programs that were fitted."
        )
    try:
        constraint = constraint_of(saved["constraints"][own])
    except GuideError:
        raise CheckpointError(
            f"{where}: parameter '{own}' is created only in the course of training, and its "
            f"constraint {saved['constraints'][own]['unknown']} is not one of torch's. Create it "
            "in every call of the program."
        ) from None
    params.create(own, saved["values"][name], constraint)


def _kind(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} of shape {tuple(x.shape)}"


def _listed(names: Mapping[str, Any]) -> str:
    shown = sorted(names)
    return ", ".join(shown[:8]) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "")
