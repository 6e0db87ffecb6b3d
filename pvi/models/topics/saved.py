"""Fitted topic models in a folder: parameters as JSON and safetensors, no code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pvi.errors import CheckpointError
from pvi.fit.storage import read, write
from pvi.models.topics.programs import TopicPrograms
from pvi.nn import Component, describe
from pvi.nn.component import make

SEEN = ("n_features_in_", "n_documents_", "classes_", "times_", "feature_names_in_")


def save(model: Any, folder: Any) -> None:
    """Write a fitted estimator to a new folder."""
    programs = model.programs_
    parameters = {k: plain(v) for k, v in model.get_params(deep=False).items()}
    tree = {
        "topics": type(model).__name__,
        "options": parameters,
        "seen": {name: plain(getattr(model, name)) for name in SEEN if hasattr(model, name)},
        "programs": describe(programs),
        "parameters": dict(programs.state_dict()),
    }
    write(Path(folder), tree)


def load(folder: Any, kinds: Mapping[str, Any], wanted: type) -> Any:
    """What `save` wrote.

    Args:
        kinds: the classes that may be in a folder, by name.
        wanted: the one that is asked for, or a base class.

    Raises:
        CheckpointError: it is the folder of something else.
    """
    tree = read(Path(folder))
    kind = kinds.get(str(tree.get("topics")))
    if kind is None:
        raise CheckpointError(f"{folder} holds no topic model")
    if not issubclass(kind, wanted):
        raise CheckpointError(f"{folder} holds a {kind.__name__}, no {wanted.__name__}")
    model = kind(**{k: restored(v) for k, v in tree["options"].items()})
    for name, value in tree["seen"].items():
        if name not in SEEN:
            raise CheckpointError(f"{folder} sets {name!r}, which no topic model has")
        setattr(model, name, restored(value))
    programs = make(tree["programs"], {})
    if not isinstance(programs, TopicPrograms):
        raise CheckpointError(f"{folder} holds no programs of a topic model")
    floats = (x.dtype for x in tree["parameters"].values() if x.is_floating_point())
    programs.to(next(floats, None))
    try:
        programs.load_state_dict(tree["parameters"])
    except RuntimeError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    model.programs_ = programs
    return model


def plain(value: Any) -> Any:
    """A parameter as plain data, which `restored` reads."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind in "biuf":
            return {"array": torch.as_tensor(np.ascontiguousarray(value))}
        if value.dtype.kind == "M":
            return {"dates": value.astype(str).tolist(), "dtype": str(value.dtype)}
        return {"names": value.tolist()}
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Component):
        return {"component": describe(value)}
    if isinstance(value, np.random.RandomState):
        return None  # a state that has moved on makes nothing repeatable
    if isinstance(value, list | tuple):
        return {"items": [plain(x) for x in value]}
    return value


def restored(value: Any) -> Any:
    """The inverse of `plain`; sequences are tuples."""
    if not isinstance(value, Mapping):
        return value
    if "array" in value:
        return value["array"].numpy()
    if "names" in value:
        return np.array(value["names"])
    if "dates" in value:
        return np.array(value["dates"], dtype=value["dtype"])
    if "component" in value:
        return make(value["component"], {})
    return tuple(restored(x) for x in value["items"])
