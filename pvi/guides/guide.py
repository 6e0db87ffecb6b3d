"""What all guides of pvi share."""

from abc import ABCMeta, abstractmethod
from contextlib import ExitStack
from itertools import count
from typing import Any

import pyro
from pyro.nn import PyroModule
from torch import Tensor

from pvi.engine.traces import Program
from pvi.guides.prototype import InitLoc, Latent, latents, prior_median

_NUMBERS = count(1)  # guides in Pyro's global store must not share names, or they share values


class _Abstract(type(PyroModule), ABCMeta):  # type: ignore[misc]
    """Pyro's module metaclass with abstract methods."""


class Guide(PyroModule, metaclass=_Abstract):
    """A guide built from the model: a distribution at each of the model's own latent sites.

    Parameters are created by `setup(*args, **kwargs)` with the model's arguments, or at the first
    call. A guide of sites in a plate owns one row of parameters for each element of the plate.

    Args:
        model: a Pyro program.
        init_loc_fn: from a site (with "name" and "fn") to its starting value in the model's space;
            Pyro's `init_to_*` functions work too.
    """

    def __init__(self, model: Program, init_loc_fn: InitLoc = prior_median):
        super().__init__(f"{type(self).__name__}{next(_NUMBERS)}")
        self._model = (model,)  # in a tuple, so that a module's parameters stay its own
        self.init_loc_fn = init_loc_fn
        self.latents: dict[str, Latent] = {}
        self.plate_sizes: dict[str, int] = {}

    @property
    def model(self) -> Program:
        return self._model[0]

    def setup(self, *args: Any, **kwargs: Any) -> "Guide":
        """Create the parameters for these arguments of the model; a second call starts afresh."""
        self.latents = {
            latent.name: latent for latent in latents(self.model, self.init_loc_fn, args, kwargs)
        }
        self.plate_sizes = {p.name: p.size for lat in self.latents.values() for p in lat.plates}
        for latent in self.latents.values():
            self._create(latent)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site of the model."""
        if not self.latents:
            self.setup(*args, **kwargs)
        plates = self._plates()
        values = {}
        for name, latent in self.latents.items():
            with ExitStack() as stack:
                for plate in latent.plates:
                    stack.enter_context(plates[plate.name])
                values[name] = pyro.sample(name, self._distribution(latent))
        return values

    def _plates(self) -> dict[str, pyro.plate]:
        frames = {p.name: p for latent in self.latents.values() for p in latent.plates}
        plates = {}
        for name, plate in frames.items():
            rows = self.plate_sizes[name]
            subsample_size = rows if rows < plate.full_size else None
            plates[name] = pyro.plate(name, plate.full_size, subsample_size, dim=plate.dim)
        return plates

    @abstractmethod
    def _create(self, latent: Latent) -> None:
        """Create the parameters of one site."""

    @abstractmethod
    def _distribution(self, latent: Latent) -> Any:
        """The distribution of one site, from its parameters."""
