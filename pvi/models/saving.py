"""Fitted models in a folder: what they are made of as JSON, parameters as safetensors."""

from pathlib import Path
from typing import Any, Self

from torch import nn

from pvi.errors import CheckpointError
from pvi.fit.storage import read, write
from pvi.nn import Component, describe
from pvi.nn.component import argument_names, make


class Saved(Component):
    """A model that can be saved."""

    def save(self, folder: Any) -> None:
        """Write the model to a new folder; nothing in it is code.

        Args:
            folder: its name.
        """
        state = {name: value for name, value in self.state_dict().items()}
        write(Path(folder), {"model": describe(self), "parameters": state})

    @classmethod
    def load(cls, folder: Any, **modules: nn.Module) -> Self:
        """The model that `save` wrote, with its parameters.

        Args:
            folder: its name.
            modules: networks of one's own among the constructor's arguments, of the same shapes.

        Raises:
            CheckpointError: it is the folder of something else, or a module is missing or differs.
        """
        tree = read(Path(folder))
        if "model" not in tree:
            raise CheckpointError(f"{folder} holds no model of pvi.models; use pvi.load for a fit")
        unknown = sorted(set(modules) - argument_names(tree["model"]))
        if unknown:
            raise CheckpointError(f"the model in {folder} has no argument {unknown[0]}=")
        model = make(tree["model"], modules)
        if not isinstance(model, cls):
            raise CheckpointError(f"{folder} holds a {type(model).__name__}, no {cls.__name__}")
        floats = (x.dtype for x in tree["parameters"].values() if x.is_floating_point())
        model.to(next(floats, None))
        try:
            model.load_state_dict(tree["parameters"])
        except RuntimeError as error:
            raise CheckpointError(f"{folder}: {error}") from None
        return model
