"""Run a guide and a model together and read what each said at every site.

With `subsampling`, and `enumeration`, `summation` and `backward` for discrete sites, the only code
that touches Pyro's effect handlers and traces.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.replay_messenger import ReplayMessenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.trace_messenger import TraceMessenger
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pvi.engine import local
from pvi.engine.effects import TYPE

PARTICLES = "_pvi_particles"
Program = Callable[..., Any]
Scale = float | Tensor


@dataclass(frozen=True)
class Plate:
    """One `pyro.plate` around a site; `full_size > size` where it is subsampled."""

    name: str
    dim: int | None
    size: int
    full_size: int

    @property
    def scale(self) -> float:
        return self.full_size / self.size


@dataclass(frozen=True)
class Density:
    """What one program says of a site: its distribution, scale and mask."""

    fn: Any
    value: Tensor
    scale: Scale
    mask: Tensor | bool | None

    def log_prob(self) -> Tensor:
        """Log density with masked-out entries zero, without the scale: `(*batch)`."""
        return masked(self.fn.log_prob(self.value), self.mask)


@dataclass(frozen=True)
class Site:
    """A site as the model (`p`) and the guide (`q`) see it; one of them may be absent.

    Args:
        average: mean over the values of enumerated sites; `None` where it depends on none.
        members: the sites whose densities a sum over discrete ones has joined in `p`.
    """

    name: str
    plates: tuple[Plate, ...]
    p: Density | None
    q: Density | None
    observed: bool
    average: Callable[[Tensor], Tensor] | None = None
    members: tuple["Site", ...] = ()

    @property
    def subsample_scale(self) -> float:
        return math.prod(plate.scale for plate in self.plates)


def masked(x: Tensor, mask: Tensor | bool | None) -> Tensor:
    """`x` where the mask holds, 0 elsewhere; `None` means no mask."""
    if mask is None or mask is True:
        return x
    if mask is False:
        return torch.zeros_like(x)
    return torch.where(mask, x, x.new_zeros(()))


class Tracer(TraceMessenger):
    """Pyro's trace and replay in one handler, for it sees each statement of each step.

    Args:
        given: a trace whose values are taken, or `None`.
        params: whether the parameters of guides of pvi must be among what is recorded.
        answers: for which sites of `given` the model may have the distribution, see `local`.
    """

    def __init__(self, given: Any, params: bool, answers: Mapping[str, str] | None = None):
        super().__init__()
        self.params, self._effects, self._requests = params, [], []
        self._given, self._answers = given, answers
        self._replay = None if given is None else ReplayMessenger(trace=given)

    def _process_message(self, msg: Any) -> None:
        if self._replay is not None and msg["type"] == "sample":
            self._replay._pyro_sample(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            self._pyro_post_sample(msg)
        elif msg["type"] == "param":
            self._pyro_post_param(msg)
        elif msg["type"] == TYPE:
            self._effects.append(msg)
        elif msg["type"] == local.TYPE:
            self._requests.append(msg["value"])
            if self._answers and self._given is not None:
                local.answer(msg["value"], self._given.nodes, self._answers)

    def done(self) -> Any:
        """The trace; its `effects` are what `pvi.kl` and `pvi.penalty` said, as messages, and its
        `requests` those of networks for the guide's normals.
        """
        trace: Any = self.trace
        trace.effects, trace.requests = self._effects, self._requests
        return trace


def run(
    fn: Program,
    args: tuple,
    kwargs: Mapping,
    given: Any = None,
    *,
    params: bool = True,
    answers: Mapping[str, str] | None = None,
) -> Any:
    """Trace `fn(*args, **kwargs)`, taking the values of `given` (a trace) where it has them.

    Args:
        params, answers: as of `Tracer`.
    """
    with Tracer(given, params, answers) as tracer:  # Pyro's own would rewrite errors
        fn(*args, **kwargs)
    return tracer.done()


def run_hidden(fn: Program, args: tuple, kwargs: Mapping, given: Any = None) -> Any:
    """`run` for a look at the program's structure: no gradient, no effect on outer handlers or
    seeds.
    """
    with hidden():
        return run(fn, args, kwargs, given)


class _Free(UnconditionMessenger):
    """Draw what is observed, but leave `pyro.deterministic` values as they are computed."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["infer"].get("_deterministic", False):
            super()._pyro_sample(msg)


def free(model: Program) -> Program:
    """The model with its observations drawn like latents."""
    return _Free()(model)


def conditioned(model: Program, values: Mapping[str, Tensor]) -> Program:
    """The model with these sites observed."""
    return poutine.condition(model, data=dict(values)) if values else model


@contextmanager
def hidden() -> Iterator[None]:
    """Run programs without gradients, unseen by outer handlers, the random state kept."""
    with poutine.block(), preserved_rng(), torch.no_grad():
        yield


def preserved_rng() -> AbstractContextManager:
    """Leave the random state as it was found, on the CPU and on every CUDA device in use."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    return torch.random.fork_rng(devices=list(devices))


def rng_state() -> list[Tensor]:
    """The random state of the CPU and of every CUDA device in use."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return [torch.get_rng_state(), *cuda]


def set_rng_state(state: list[Tensor]) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(state[0])
    if len(state) > 1:
        torch.cuda.set_rng_state_all(state[1:])


@contextmanager
def preserved_on_error() -> Iterator[None]:
    """Leave the random state as it was found if there is an error inside."""
    state = rng_state()
    try:
        yield
    except BaseException:
        set_rng_state(state)
        raise


def pass_by(device: Any = None) -> None:
    """Go on to another random state; the CPU keeps half of the normals that it makes for later."""
    for draw in (torch.rand, torch.randn):
        draw((), device=device)


@contextmanager
def rng_at(state: list[Tensor]) -> Iterator[None]:
    """Draw again from an earlier random state; afterwards go on as if nothing had happened."""
    with preserved_rng():
        set_rng_state(state)
        yield


def particles(fn: Program, num_particles: int, nesting: int) -> Program:
    """`fn` under an outermost plate of `num_particles`, left of its own `nesting` plates."""
    if num_particles == 1:
        return fn
    return pyro.plate(PARTICLES, num_particles, dim=-1 - nesting)(fn)


def is_subsample(node: Mapping) -> bool:
    return type(node["fn"]) is _Subsample


def is_delta(fn: Any) -> bool:
    """Whether a distribution is a point mass, whatever wraps it."""
    return type(_unwrapped(fn)).__name__ == "Delta"


def is_certain(fn: Any) -> bool:
    """Whether a guide's distribution over discrete values has but one, by straight-through.

    It says so by an attribute `certain`. Its log density is 0 under the counting measure, so the
    bound is one; but no other value is ever drawn, and its gradient is biased.
    """
    return bool(getattr(_unwrapped(fn), "certain", False))


def requires_grad(fn: Any) -> bool:
    """Whether a Delta's place or density carries a gradient."""
    delta = _unwrapped(fn)
    return any(isinstance(x, Tensor) and x.requires_grad for x in (delta.v, delta.log_density))


def _unwrapped(fn: Any) -> Any:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn


def flat_events(fn: Any) -> Any:
    """The distribution of the scalars of an event, or `None` where they are not independent."""
    while isinstance(fn, torch.distributions.Independent):
        fn = fn.base_dist
    return None if fn.event_shape else fn


def sample_nodes(trace: poutine.Trace) -> dict[str, Any]:
    """The sample statements of a trace in program order, without plates and deterministic ones."""
    return {
        name: node
        for name, node in _samples(trace).items()
        if not is_subsample(node) and not node["infer"].get("_deterministic", False)
    }


def total_log_prob(nodes: Mapping[str, Mapping]) -> Tensor:
    """Sum of the scaled log densities of sample nodes, nats."""
    sums = [(node["scale"] * density(node).log_prob()).sum() for node in nodes.values()]
    return torch.stack(sums).sum() if sums else torch.zeros(())


def deterministic_nodes(trace: poutine.Trace) -> dict[str, Any]:
    """The `pyro.deterministic` statements of a trace."""
    return {
        name: node
        for name, node in _samples(trace).items()
        if node["infer"].get("_deterministic", False)
    }


def _samples(trace: poutine.Trace) -> dict[str, Any]:
    nodes: dict[str, Any] = dict(trace.nodes)
    return {name: node for name, node in nodes.items() if node["type"] == "sample"}


def replaced(trace: poutine.Trace, values: Mapping[str, Tensor]) -> poutine.Trace:
    """A trace to replay against: this one with other values at some sites."""
    copy = poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample":
            copy.add_node(name, **{**node, "value": values.get(name, node["value"])})
    return copy


def subset(trace: poutine.Trace, names: Iterable[str], *, indices: bool = True) -> poutine.Trace:
    """A trace to replay against that holds `names` and, with `indices`, those of every plate."""
    keep, part = set(names), poutine.Trace()
    for name, node in trace.nodes.items():
        if node["type"] == "sample" and (name in keep or (indices and is_subsample(node))):
            part.add_node(name, **node)
    return part


def plates_of(node: Mapping) -> tuple[Plate, ...]:
    """The plates of a node, outermost last, without the particle plate."""
    if not node["cond_indep_stack"]:
        return ()
    return tuple(
        Plate(f.name, f.dim, f.size, f.size if f.full_size is None else f.full_size)
        for f in node["cond_indep_stack"]
        if f.name != PARTICLES
    )


def nesting_of(*traces: poutine.Trace) -> int:
    """How many batch dimensions the plates of these traces occupy."""
    dims = [
        -plate.dim
        for trace in traces
        for node in sample_nodes(trace).values()
        for plate in plates_of(node)
        if plate.dim is not None
    ]
    return max(dims, default=0)


def density(node: Mapping) -> Density:
    """What a program says at a sample statement."""
    subsample = math.prod(plate.scale for plate in plates_of(node))
    scale = node["scale"] / subsample
    if not isinstance(scale, Tensor) and math.isclose(scale, 1.0, rel_tol=1e-12):
        scale = 1.0
    return Density(node["fn"], _filled(node), scale, node["mask"])


def _filled(node: Mapping) -> Tensor:
    """The value, with something valid where a masked-out observation is NaN.

    Its log density is dropped, but NaN would still reach the gradient of the parameters.
    """
    value, mask, fn = node["value"], node["mask"], node["fn"]
    if not value.is_floating_point():
        return _numbers(value, fn)
    masked_data = node["is_observed"] and isinstance(mask, Tensor)
    if not masked_data or not bool(value.isnan().any()):
        return value
    with preserved_rng(), torch.no_grad():
        valid = fn.sample().expand(fn.shape())
    return torch.where(mask.reshape(mask.shape + (1,) * fn.event_dim), value, valid)


def _numbers(value: Tensor, fn: Any) -> Tensor:
    """Truth values and whole numbers as the floats that a Bernoulli computes with."""
    coin = _unwrapped(fn)
    if not isinstance(coin, torch.distributions.Bernoulli):
        return value
    return value.to(coin._param.dtype)  # type: ignore[union-attr]


def prior(model: Program) -> Program:
    """The model's latents drawn from the model itself, as a guide; what it sums out is left out."""

    def hide(msg: Mapping) -> bool:
        infer = msg.get("infer") or {}
        drawn = not (msg.get("is_observed") or infer.get("enumerate"))
        return msg["type"] == TYPE or (msg["type"] == "sample" and not drawn)

    return poutine.block(model, hide_fn=hide)
