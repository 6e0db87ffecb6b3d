"""What all guides of pvi share."""

import copy
from abc import ABCMeta, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count
from typing import Any, Self

import pyro
import torch
from pyro.nn import PyroModule
from torch import Tensor

from pvi.engine.traces import Program, particles, preserved_rng, run, sample_nodes
from pvi.errors import GuideError
from pvi.guides.init import MODE, InitLoc, check_names, resolve
from pvi.guides.layout import Layout
from pvi.guides.mode import find_mode
from pvi.guides.prototype import Latent, latents
from pvi.guides.structure import describe, latent_of, pack, unpack
from pvi.guides.summaries import empirical_quantiles, is_elementwise, normal_quantiles

_NUMBERS = count(1)  # guides in Pyro's global store must not share names, or they share values
NUM_DRAWS = 10_000  # for means and quantiles without a closed form


class _Abstract(type(PyroModule), ABCMeta):  # type: ignore[misc]
    """Pyro's module metaclass with abstract methods."""


class Guide(PyroModule, metaclass=_Abstract):
    """A guide built from the model: a distribution at each of the model's own latent sites.

    Parameters are created by `setup(*args, **kwargs)` with the model's arguments, or at the first
    call, as in `pvi.fit`. A guide of sites in a plate owns one row of parameters for each element
    of the plate.

    Args:
        model: a Pyro program; `pvi.fit` and `Group` give it to a guide that was made without one.
        init_loc_fn: where to start. "median" of the prior; "mode" of the posterior, by a short
            L-BFGS run; "module", for sites named like the parameters of the model's module; a dict
            from site to value; or a function from a site (with "name" and "fn") to its value in
            the model's space, such as Pyro's `init_to_*`.
        init_scale: starting standard deviation in unconstrained space, > 0.
    """

    joint = False  # whether one distribution ties the elements of a plate together
    sitewise = False  # whether each site has a density of its own, given the sites before it

    def __init__(
        self,
        model: Program | None = None,
        init_loc_fn: InitLoc | str | Mapping[str, Any] = "median",
        init_scale: float = 0.1,
    ):
        super().__init__(f"{type(self).__name__}{next(_NUMBERS)}")
        if not init_scale > 0:
            raise GuideError(f"init_scale must be > 0, got {init_scale!r}")
        if model is not None and not callable(model):
            raise GuideError(f"model must be a Pyro program, got {type(model).__name__}")
        self._model = (model,)  # in a tuple, so that a module's parameters stay its own
        self.init_loc_fn, self.init_scale = init_loc_fn, init_scale
        self.latents: dict[str, Latent] = {}
        self.plate_sizes: dict[str, int] = {}
        self._whole = False  # whether subsampled plates are drawn in full

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """A copy with a name of its own in Pyro's store, where it would share its parameters else.

        The model stays the same one.
        """
        memo[id(self.model)] = self.model
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        vars(new).update(copy.deepcopy(self.__dict__, memo))
        context = new._pyro_context
        context.used = False
        new._pyro_set_supermodule(f"{type(self).__name__}{next(_NUMBERS)}", context)
        return new

    @property
    def model(self) -> Program | None:
        return self._model[0]

    def bind(self, model: Program) -> Self:
        """Give the guide its model, where it was made without one."""
        if self.model is None:
            self._model = (model,)
        return self

    def setup(self, *args: Any, **kwargs: Any) -> Self:
        """Create the parameters for these arguments of the model; a second call starts afresh.

        Raises:
            GuideError: there is no model yet, or a site that this family can't represent.
        """
        if self.model is None:
            raise GuideError(
                f"this {type(self).__name__} has no model yet: make it with {type(self).__name__}"
                "(..., model=model), or give it to pvi.fit(model, guide, data)"
            )
        found = latents(self.model, resolve(self.init_loc_fn, self.model), args, kwargs)
        check_names(self.init_loc_fn, [latent.name for latent in found])
        if self.init_loc_fn == MODE:
            start = Layout(found)
            mode = start.split(find_mode(self.model, start, args, kwargs))
            found = [replace(latent, loc=mode[latent.name]) for latent in found]
        self.adopt(found, args, kwargs)
        return self

    def adopt(self, found: Iterable[Latent], args: tuple, kwargs: Mapping) -> None:
        """Create the parameters for these sites of the model at these arguments."""
        self.latents = {latent.name: latent for latent in found}
        if self.joint:
            self._check_whole()
        self.plate_sizes = self._rows()
        self._build()

    def forward(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Sample every latent site of the model."""
        if not self.latents:
            self.setup(*args, **kwargs)
        past = self._begin(args, kwargs)
        plates = self._plates(past)
        values = {}
        for name, latent in self.latents.items():
            with ExitStack() as stack:
                for plate in latent.plates:
                    stack.enter_context(plates[plate.name])
                infer: Any = self._infer(latent)
                values[name] = pyro.sample(name, self._distribution(latent, past), infer=infer)
                self._passed(latent, values[name], past)
        return values

    def sample(self, num_draws: int = 1, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Draws of every latent site, `(num_draws, *site shape)`, without gradients.

        All elements of every plate, also where the model takes some of them a call.

        Args:
            args, kwargs: the model's arguments, where the guide depends on them.
        """
        if not self.latents:
            self.setup(*args, **kwargs)
        self._whole = True
        try:
            with torch.no_grad():
                nodes = sample_nodes(run(particles(self, num_draws, self._nesting), args, kwargs))
        finally:
            self._whole = False
        values = {}
        for name, latent in self.latents.items():
            value = nodes[name]["value"]
            cut = value.dim() - latent.value_dim
            batch = len(latent.batch_shape)
            shape = value.shape[cut - batch :] if batch else value.shape[cut:]
            values[name] = value.detach().reshape(num_draws, *shape)
        return values

    def log_prob(self, values: Mapping[str, Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """Joint log density of draws of all sites, in the model's own space.

        Args:
            values: `(S, *site shape)` for each site, as `sample` gives.

        Returns:
            `(S,)`, nats.
        """
        self._require_setup()
        past, total = self._begin(args, kwargs), torch.zeros(())
        for name, latent in self.latents.items():
            value = self._padded(latent, values[name])
            log_q = self._distribution(latent, past).log_prob(value)
            total = total + log_q.reshape(len(value), -1).sum(1)
            self._passed(latent, value, past)
        return total

    def mean(self, *args: Any, **kwargs: Any) -> dict[str, Tensor]:
        """Mean of every site in the model's space; of 10,000 draws where it has no closed form."""

        def exact(latent: Latent, loc: Tensor, scale: Tensor) -> Tensor | None:
            return loc if latent.is_real else None

        return self._summary(exact, lambda draws: draws.mean(0), args, kwargs)

    def moments(self, *args: Any, **kwargs: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Marginal mean and sd of every site that has them in closed form, in the model's space."""
        self._require_setup()
        with torch.no_grad():
            marginals = self._marginals(self._begin(args, kwargs))
        return {n: m for n, m in marginals.items() if self.latents[n].is_real}

    def quantiles(
        self, probs: float | Sequence[float], *args: Any, **kwargs: Any
    ) -> dict[str, Tensor]:
        """Marginal quantiles of every number of every site, in the model's space.

        Exact where the marginal is a normal through a monotone map of single numbers, else those
        of 10,000 draws.

        Returns:
            `(*shape of probs, *site shape)`.
        """
        p = torch.as_tensor(probs, dtype=torch.get_default_dtype())
        if not bool(((p > 0) & (p < 1)).all()):
            raise GuideError(f"probs must lie between 0 and 1, got {probs!r}")

        def exact(latent: Latent, loc: Tensor, scale: Tensor) -> Tensor | None:
            if not is_elementwise(latent.transform):
                return None
            return normal_quantiles(latent.transform, loc, scale, p)

        return self._summary(exact, lambda draws: empirical_quantiles(draws, p), args, kwargs)

    def _summary(
        self,
        exact: Callable[[Latent, Tensor, Tensor], Tensor | None],
        of_draws: Callable[[Tensor], Tensor],
        args: tuple,
        kwargs: Mapping,
    ) -> dict[str, Tensor]:
        """A number of each marginal: exact where that is possible, else from draws."""
        if not self.latents:
            self.setup(*args, **kwargs)
        with torch.no_grad(), preserved_rng():
            marginals = self._marginals(self._begin(args, kwargs))
            found = {
                name: exact(latent, *marginals[name]) if name in marginals else None
                for name, latent in self.latents.items()
            }
            if any(value is None for value in found.values()):
                torch.manual_seed(0)
                draws = self.sample(NUM_DRAWS, *args, **kwargs)
                found |= {n: of_draws(draws[n]) for n, value in found.items() if value is None}
        # clones: a site's mean may be the parameter itself, which training goes on to change
        return {name: x.detach().clone() for name, x in found.items() if x is not None}

    def _padded(self, latent: Latent, value: Tensor) -> Tensor:
        """Draws `(S, *site shape)` with the particles left of all plates."""
        shape = value.shape[value.dim() - latent.value_dim - len(latent.batch_shape) :]
        missing = self._nesting - len(latent.batch_shape)
        return value.reshape(len(value), *(1,) * missing, *shape)

    @property
    def _nesting(self) -> int:
        return max((len(latent.batch_shape) for latent in self.latents.values()), default=0)

    def _check_whole(self) -> None:
        """Refuse subsamples: one draw of all elements has no part for each of them."""
        for latent in self.latents.values():
            for plate in latent.plates:
                if plate.size < plate.full_size:
                    raise GuideError(
                        f"{type(self).__name__} has one joint distribution over site "
                        f"'{latent.name}' in all {plate.full_size} elements of plate "
                        f"'{plate.name}', but the model takes {plate.size} of them a call. Use "
                        "pvi.guides.Structured or Amortized for it (others for the rest: "
                        "pvi.guides.Group), or no subsample_size."
                    )

    def _require_setup(self) -> None:
        if not self.latents:
            raise GuideError(f"this {type(self).__name__} is not set up: call setup(...) first")

    def _plates(self, past: Any) -> dict[str, pyro.plate]:
        """The plates of all sites: as long as the guide's rows, else as what it was called with."""
        frames = {p.name: p for latent in self.latents.values() for p in latent.plates}
        lengths = self._lengths(past) | self.plate_sizes
        plates = {}
        for name, plate in frames.items():
            part = plate.size < plate.full_size and not self._whole
            subsample_size = plate.size if part else None
            plates[name] = pyro.plate(name, lengths[name], subsample_size, dim=plate.dim)
        return plates

    def _rows(self) -> dict[str, int]:
        """Sizes of the plates whose elements have parameters of their own."""
        return {p.name: p.full_size for lat in self.latents.values() for p in lat.plates}

    @property
    def amortized(self) -> bool:
        """Whether parameters follow the data."""
        return False

    @property
    def coupled_plates(self) -> frozenset[str]:
        """The plates whose elements one distribution ties together."""
        return frozenset(self.plate_sizes) if self.joint else frozenset()

    def _lengths(self, past: Any) -> dict[str, int]:
        """Sizes of the plates that follow the arguments of the call."""
        return {}

    def _begin(self, args: tuple, kwargs: Mapping) -> Any:
        """What the sites of one call share, such as the draws so far."""
        return None

    def _passed(self, latent: Latent, value: Tensor, past: Any) -> None:
        """Take note of a site's draw."""

    def _infer(self, latent: Latent) -> dict[str, Any]:
        """What the engine should know of a site: what the model masks out counts nowhere."""
        return {"follows_mask": True}

    def _marginals(self, past: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Mean and sd in unconstrained space of the sites whose marginals are normal."""
        return {}

    def get_extra_state(self) -> Tensor:
        """The sites, so that `load_state_dict` needs neither data nor model."""
        return pack(self._structure())

    def set_extra_state(self, state: Tensor) -> None:
        """Nothing more: `_load_from_state_dict` has read it, before the parameters."""

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **rest: Any) -> None:
        saved = state_dict.get(f"{prefix}_extra_state")
        structure = {} if saved is None else unpack(saved)
        if structure.get("latents") and structure != self._structure():
            self._restore(structure)
        super()._load_from_state_dict(state_dict, prefix, *args, **rest)

    def _structure(self) -> dict[str, Any]:
        """What `_build` needs to know, as plain data."""
        found = [describe(latent) for latent in self.latents.values()]
        return {"latents": found, "plate_sizes": self.plate_sizes}

    def _restore(self, structure: Mapping[str, Any]) -> None:
        """Create the parameters that a saved state has values for."""
        found = [latent_of(description) for description in structure["latents"]]
        self.latents = {latent.name: latent for latent in found}
        self.plate_sizes = dict(structure["plate_sizes"])
        self._build()

    def _empty(self, *names: str) -> None:
        """Drop what an earlier setup has put into these modules, from Pyro's store too."""
        for name in names:
            module: Any = self._modules[name]
            for key in [*module._pyro_params, *module._modules]:
                delattr(module, key)

    @abstractmethod
    def _build(self) -> None:
        """Create the parameters of all sites."""

    @abstractmethod
    def _distribution(self, latent: Latent, past: Any) -> Any:
        """The distribution of one site, given what came before it."""


def as_guide(guide: Any, model: Program) -> Any:
    """The guide to use with a model: a class of ours is made, and one without a model gets it.

    Raises:
        GuideError: a class that is no guide of ours, or that can't be made without arguments.
    """
    if isinstance(guide, type):
        name = guide.__name__
        if not issubclass(guide, Guide):
            raise GuideError(f"guide is the class {name}; pass an instance: {name}(model)")
        try:
            guide = guide()
        except TypeError as error:
            raise GuideError(f"guide is the class {name}, which needs arguments: {error}") from None
    return guide.bind(model) if isinstance(guide, Guide) else guide
