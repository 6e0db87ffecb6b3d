"""Run a guide and a model together and read what each said at every site.

With `subsampling`, and `enumeration`, `summation` and `backward` for discrete sites, the only code
that touches Pyro's effect handlers and traces.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.uncondition_messenger import UnconditionMessenger
from torch import Tensor

from pvi.engine.effects import TYPE, Collector
from pvi.engine.masks import mask_for_guide
from pvi.errors import GuideError, ModelError

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


def run(fn: Program, args: tuple, kwargs: Mapping, given: Any = None) -> Any:
    """Trace `fn(*args, **kwargs)`, taking the values of `given` (a trace) where it has them.

    What `pvi.kl` and `pvi.penalty` said on the way is the trace's attribute `effects`.
    """
    if given is not None:
        fn = poutine.replay(fn, trace=given)
    with Collector() as collector:
        trace: Any = poutine.trace(fn).get_trace(*args, **kwargs)
    trace.effects = collector.messages
    return trace


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


def pass_by(device: Any = None) -> None:
    """Go on to another random state; the CPU keeps half of the normals that it makes for later."""
    for draw in (torch.rand, torch.randn):
        draw((), device=device)


@contextmanager
def rng_at(state: list[Tensor]) -> Iterator[None]:
    """Draw again from an earlier random state; afterwards go on as if nothing had happened."""
    with preserved_rng():
        torch.set_rng_state(state[0])
        if len(state) > 1:
            torch.cuda.set_rng_state_all(state[1:])
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


def pair(guide_trace: poutine.Trace, model_trace: poutine.Trace) -> list[Site]:
    """Join both traces site by site, in the model's order, then the guide's auxiliary sites.

    Raises:
        GuideError: a latent of the model is missing from the guide, or the guide has a site that
            the
            model lacks and that is not marked `infer={"is_auxiliary": True}`.
    """
    q_nodes, p_nodes = sample_nodes(guide_trace), sample_nodes(model_trace)
    sites = []
    for name, node in p_nodes.items():
        observed = bool(node["is_observed"])
        guide_node = q_nodes.pop(name, None)
        if "_enumerate_dim" not in node["infer"]:  # else it is summed out
            _check_partner(name, observed, guide_node, q_nodes)
        if guide_node is not None:
            _check_plates(name, node, guide_node)
        sites.append(_site(name, node, guide_node, observed))
    for name, node in q_nodes.items():
        if not (node["infer"].get("is_auxiliary", False) or node["is_observed"]):
            raise GuideError(
                f"site '{name}' is sampled in the guide but not in the model. Remove or rename it, "
                'or mark it infer={"is_auxiliary": True} if the guide only needs it to build other '
                f"sites. The model's sites are {sorted(p_nodes)}."
            )
        sites.append(_site(name, None, node, False))
    return sites


def _check_partner(name: str, observed: bool, guide_node: dict | None, rest: Mapping) -> None:
    if observed and guide_node is not None:
        raise GuideError(
            f"site '{name}' is observed in the model, but the guide samples it too. "
            "Sample in the guide only what the model leaves latent."
        )
    if not observed and guide_node is None:
        raise GuideError(
            f"site '{name}' is latent in the model, but the guide does not sample it. Add "
            f"pyro.sample('{name}', ...) to the guide, or pass obs= in the model if it is data; if "
            'it is discrete, infer={"enumerate": "parallel"} in the model sums it out. '
            f"Sites in the guide only: {sorted(rest) or 'none'}."
        )


def _check_plates(name: str, p_node: Mapping, q_node: Mapping) -> None:
    """A site must have the same events and plates in both programs, of the same sizes."""
    p_event, q_event = p_node["fn"].event_shape, q_node["fn"].event_shape
    if p_event != q_event:
        raise GuideError(
            f"site '{name}' has event shape {tuple(p_event)} in the model but {tuple(q_event)} in "
            "the guide. Make them equal, with .to_event(...)."
        )
    p_plates, q_plates = (
        {plate.name: plate.full_size for plate in plates_of(node) if plate.dim is not None}
        for node in (p_node, q_node)
    )
    if p_plates.keys() != q_plates.keys():
        raise GuideError(
            f"site '{name}' is in the plates {p_plates or 'none'} in the model but "
            f"{q_plates or 'none'} in the guide. Put it in the same plates in both."
        )
    for plate, size in p_plates.items():
        if q_plates[plate] != size:
            raise GuideError(
                f"plate '{plate}' around site '{name}' has {size} elements in the model and "
                f"{q_plates[plate]} in the guide, whose rows belong to other data. Make them "
                "equal, or set up the guide again for these data."
            )


def _check_shape(name: str, role: str, node: Mapping) -> None:
    """Every batch dimension must be a plate's: others are not independent elements."""
    plates = {f.dim: f for f in node["cond_indep_stack"] if f.dim is not None}
    shape, enumerated = node["fn"].batch_shape, node["infer"].get("_dim_to_id", ())
    for dim in range(-len(shape), 0):
        expected = plates[dim].size if dim in plates else 1
        if shape[dim] != expected and dim not in enumerated:
            known = {f.name: f.size for f in plates.values() if f.name != PARTICLES}
            error = ModelError if role == "model" else GuideError
            raise error(
                f"site '{name}' has batch shape {tuple(shape)} in the {role}, but its plates are "
                f"{known or 'none'}: dimension {dim} belongs to no plate of size {shape[dim]}. A "
                "column (N, 1) needs .squeeze(-1); dimensions of one event need .to_event(...); "
                "independent elements need their own plate."
            )


def _site(name: str, p_node: dict | None, q_node: dict | None, observed: bool) -> Site:
    for role, side in (("model", p_node), ("guide", q_node)):
        if side is not None:
            _check_shape(name, role, side)
    p = None if p_node is None else density(p_node)
    q = None if q_node is None else density(q_node)
    if p is not None and q is not None and q_node is not None and q.mask is None:
        follows = q_node["infer"].get("follows_mask")
        q = replace(q, mask=mask_for_guide(name, p.fn, p.mask, follows))
    node = p_node if p_node is not None else q_node
    if node is None:
        raise ModelError(f"site '{name}' is in neither program")
    return Site(name, plates_of(node), p, q, observed)


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
    masked_data = node["is_observed"] and isinstance(mask, Tensor) and value.is_floating_point()
    if not masked_data or not bool(value.isnan().any()):
        return value
    with preserved_rng(), torch.no_grad():
        valid = fn.sample().expand(fn.shape())
    return torch.where(mask.reshape(mask.shape + (1,) * fn.event_dim), value, valid)


def prior(model: Program) -> Program:
    """The model's latents drawn from the model itself, as a guide; what it sums out is left out."""

    def hide(msg: Mapping) -> bool:
        infer = msg.get("infer") or {}
        drawn = not (msg.get("is_observed") or infer.get("enumerate"))
        return msg["type"] == TYPE or (msg["type"] == "sample" and not drawn)

    return poutine.block(model, hide_fn=hide)
