"""What a guide knows of its model's sites as plain data, so that it can be saved and come back."""

import inspect
import json
from collections.abc import Mapping
from typing import Any

import pyro.distributions.constraints as pyro_constraints
import torch
from torch import Tensor
from torch.distributions import constraints

from pvi.engine.traces import Plate
from pvi.errors import GuideError
from pvi.guides.prototype import Latent

MODULES = {"torch": constraints, "pyro": pyro_constraints}


def describe(latent: Latent) -> dict[str, Any]:
    """A site as numbers, strings and lists; its starting point is left out."""
    return {
        "name": latent.name,
        "support": describe_constraint(latent.support),
        "plates": [[p.name, p.dim, p.size, p.full_size] for p in latent.plates],
        "shape": list(latent.loc.shape),
        "dtype": str(latent.loc.dtype).removeprefix("torch."),
        "event_dim": latent.event_dim,
    }


def latent_of(description: Mapping[str, Any], device: Any = None) -> Latent:
    """The inverse of `describe`; the site starts at 0."""
    d = description
    dtype = getattr(torch, d["dtype"])
    plates = tuple(Plate(*plate) for plate in d["plates"])
    loc = torch.zeros(d["shape"], dtype=dtype, device=device)
    return Latent(d["name"], constraint_of(d["support"]), plates, loc, d["event_dim"])


def describe_constraint(constraint: Any) -> dict[str, Any]:
    """A constraint as plain data; {"unknown": ...} if it is none of torch's or Pyro's."""
    if isinstance(constraint, constraints.independent):
        base, count = constraint.base_constraint, constraint.reinterpreted_batch_ndims
        return {"independent": describe_constraint(base), "dims": count}
    for module, names in MODULES.items():
        for name, value in vars(names).items():
            if value is constraint:
                return {"module": module, "name": name}
        kind = type(constraint)
        if vars(names).get(kind.__name__) is kind:
            fields = [name for name in inspect.signature(kind).parameters if name != "self"]
            values = {name: getattr(constraint, name, None) for name in fields}
            if all(isinstance(value, int | float | Tensor) for value in values.values()):
                return {"module": module, "class": kind.__name__, "values": _plain(values)}
    return {"unknown": str(constraint)}


def constraint_of(description: Mapping[str, Any]) -> Any:
    """The inverse of `describe_constraint`."""
    d = description
    if "independent" in d:
        return constraints.independent(constraint_of(d["independent"]), d["dims"])
    if "unknown" in d:
        raise GuideError(
            f"the support {d['unknown']} can't be made from a saved state: call setup(...) with "
            "the model's arguments before load_state_dict"
        )
    names = vars(MODULES[d["module"]])
    if "name" in d:
        return names[d["name"]]
    values = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in d["values"].items()}
    return names[d["class"]](**values)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.tolist() if isinstance(x, Tensor) else x for name, x in values.items()}


def pack(structure: Mapping[str, Any]) -> Tensor:
    """Plain data as a tensor of bytes, which every format of parameters can hold."""
    return torch.tensor(list(json.dumps(structure).encode()), dtype=torch.uint8)


def unpack(packed: Tensor) -> dict[str, Any]:
    return json.loads(bytes(packed.tolist()))
