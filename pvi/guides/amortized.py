"""Local latents whose distribution a network reads off the data."""

import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints
from torch.nn.functional import softplus

from pvi.engine.traces import Program, preserved_rng
from pvi.errors import GuideError
from pvi.guides.flow import FlowDistribution, make_flow
from pvi.guides.guide import Guide
from pvi.guides.mean_field import independent, onto
from pvi.guides.normals import CholeskyNormal
from pvi.guides.prototype import Latent

Row = Tensor | tuple[Tensor, ...]


class Amortized(Guide):
    """$q(z_i \\mid x_i)$ for the elements of a plate, from an encoder (Kingma and Welling 2014).

    The encoder maps data to one row for each element. A row is either one tensor `(*rows, width)`
    of raw numbers, mapped to the parameters here, or a tuple of the parameters themselves. For an
    event of d numbers:

    - "normal" and "logistic_normal": 2d numbers, loc and raw scale (softplus); or (loc, scale)
    - "full": d + d(d+1)/2, loc and raw Cholesky factor, row by row; or (loc, scale_tril)
    - "dirichlet": d, raw concentration (softplus)
    - "flow": any number, the context of a conditional flow

    Normals live in unconstrained space; "logistic_normal" says that the support is the simplex. As
    parameters follow the data, the guide works on any number of rows.

    Args:
        encoder: any `nn.Module`.
        model: a Pyro program; `pvi.fit` and `Group` give it.
        sites: names of the sites, or a dict from site to family; by default all sites that the
            guide is for. For several sites the encoder returns a dict from site to its row.
        family: the family of sites that `sites` does not give one.
        inputs: names of the model's arguments that the encoder takes; by default the first ones, as
            many as it needs.
        kind, options: of the flow, as in `Flow`.

    Raises:
        GuideError: a site is in no plate, or the encoder's output does not fit it.
    """

    def __init__(
        self,
        encoder: nn.Module,
        model: Program | None = None,
        *,
        sites: Sequence[str] | Mapping[str, str] | None = None,
        family: str = "normal",
        inputs: Sequence[str] | None = None,
        kind: Any = "NSF",
        **options: Any,
    ):
        super().__init__(model)
        if not isinstance(encoder, nn.Module):
            raise GuideError(f"encoder must be an nn.Module, got {type(encoder).__name__}")
        self.encoder = encoder
        names = [sites] if isinstance(sites, str) else sites
        self.families = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names or ())
        self.family, self.inputs, self.kind, self.options = family, inputs, kind, options
        for given in (family, *self.families.values()):
            if given is not None and given not in FAMILIES:
                raise GuideError(f"family must be one of {sorted(FAMILIES)}, got {given!r}")
        self.widths: dict[str, int] = {}
        self.flows = PyroModule()

    @property
    def amortized(self) -> bool:
        return True

    def _rows(self) -> dict[str, int]:
        return {}

    def adopt(self, found: Iterable[Latent], args: tuple, kwargs: Mapping) -> None:
        self.latents = {latent.name: latent for latent in found}
        for name, latent in self.latents.items():
            if self.families and name not in self.families:
                raise GuideError(
                    f"site '{name}' is none of Amortized's sites {sorted(self.families)}. Give it "
                    "a guide of its own: pvi.guides.Group({'z': Amortized(...), ...: MeanField})."
                )
            if not latent.plates:
                raise GuideError(
                    f"site '{name}' is in no plate, so it has no rows that an encoder could give. "
                    "Use another guide for it: Group({...})."
                )
            if latent.bounds_differ:
                raise GuideError(
                    f"the support of site '{name}' has another bound in each row, which Amortized "
                    "can't follow to other rows. Sample a fraction on a fixed support and make the "
                    "site from it with pyro.deterministic."
                )
        with torch.no_grad(), preserved_rng():
            rows = self._begin(args, kwargs)
            first = {name: row[0] if isinstance(row, tuple) else row for name, row in rows.items()}
            flows = [name for name in self.latents if self._family(name) == "flow"]
            self.widths = {name: first[name].shape[-1] for name in flows}
            super().adopt(self.latents.values(), args, kwargs)
            for latent in self.latents.values():
                self._check(latent, rows)

    def _build(self) -> None:
        """The conditional flows; all other parameters are the encoder's."""
        self._empty("flows")
        for name, width in self.widths.items():
            latent = self.latents[name]
            flow = make_flow(self.kind, latent.event_shape.numel(), width, self.options)
            setattr(self.flows, latent.key, flow.to(latent.loc))

    def _structure(self) -> dict[str, Any]:
        return super()._structure() | {"widths": self.widths}

    def _restore(self, structure: Mapping[str, Any]) -> None:
        self.widths = dict(structure["widths"])
        super()._restore(structure)

    def _check(self, latent: Latent, rows: dict[str, Row]) -> None:
        """Say what is wrong with an encoder's output while it can still be told apart."""
        frames, advice = (
            _frames(latent),
            "Scale its inputs, or start its last layer with small weights.",
        )
        try:
            fn = self._distribution(latent, rows)
        except ValueError as error:
            raise GuideError(
                f"the encoder's first output for site '{latent.name}' is no valid parameter "
                f"({str(error).splitlines()[0]}). {advice}"
            ) from error
        if len(fn.batch_shape) != len(latent.batch_shape) or fn.batch_shape.numel() == 0:
            raise GuideError(
                f"the encoder gives site '{latent.name}' rows of shape {tuple(fn.batch_shape)}, "
                f"but its plates are {frames}: return one row for each element"
            )
        for dim, plate in frames.items():
            if fn.batch_shape[dim] not in (plate.size, plate.full_size):
                raise GuideError(
                    f"the encoder gives site '{latent.name}' {fn.batch_shape[dim]} rows, but plate "
                    f"'{plate.name}' has {plate.full_size} elements"
                )
        if not bool(fn.log_prob(fn.sample()).isfinite().all()):
            raise GuideError(
                f"the encoder's first output for site '{latent.name}' gives a density that is not "
                f"finite. {advice}"
            )

    def _family(self, name: str) -> str:
        return self.families.get(name) or self.family

    def _begin(self, args: tuple, kwargs: Mapping) -> dict[str, Row]:
        """The encoder's rows for each site."""
        out: Any = self.encoder(*self._inputs(args, kwargs))
        if not isinstance(out, Mapping):
            if len(self.latents) > 1:
                raise GuideError(
                    f"the encoder serves the sites {sorted(self.latents)}, so it must return a "
                    "dict from site to its row"
                )
            out = dict.fromkeys(self.latents, out)
        missing = self.latents.keys() - out.keys()
        if missing:
            raise GuideError(
                f"the encoder gives nothing for site '{min(missing)}': it returned {sorted(out)}"
            )
        return {name: out[name] for name in self.latents}

    def _inputs(self, args: tuple, kwargs: Mapping) -> list[Any]:
        """Those of the model's arguments that the encoder takes."""
        program = self.model
        forward = program.forward if isinstance(program, nn.Module) else program
        try:
            bound = inspect.signature(forward).bind(*args, **kwargs)  # type: ignore[arg-type]
            bound.apply_defaults()
            named = bound.arguments
        except (TypeError, ValueError):
            named = dict(enumerate(args)) | dict(kwargs)
        if self.inputs is not None:
            unknown = [name for name in self.inputs if name not in named]
            if unknown:
                raise GuideError(
                    f"inputs names '{unknown[0]}', which is no argument of the model; they are "
                    f"{sorted(map(str, named))}"
                )
            return [named[name] for name in self.inputs]
        return list(named.values())[: _required(self.encoder)]

    def _lengths(self, past: dict[str, Row]) -> dict[str, int]:
        lengths = {}
        for name, latent in self.latents.items():
            row = past[name]
            shape = (row[0] if isinstance(row, tuple) else row).shape
            frames = _frames(latent).values()
            lengths |= {p.name: size for p, size in zip(frames, shape, strict=False)}
        return lengths

    def _distribution(self, latent: Latent, past: dict[str, Row]) -> Any:
        family, row = self._family(latent.name), past[latent.name]
        parts = [_vectors(latent, x) for x in (row if isinstance(row, tuple) else (row,))]
        if family == "flow":
            flow = getattr(self.flows, latent.key)
            return _flow(latent, flow, parts)
        return FAMILIES[family](latent, parts)

    def _marginals(self, past: dict[str, Row]) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name, latent in self.latents.items():
            if self._family(name) not in ("dirichlet", "flow"):
                fn = self._distribution(latent, past)
                fn = fn if latent.is_real else fn.base_dist
                found[name] = fn.mean, fn.stddev
        return found


def _frames(latent: Latent) -> dict[int, Any]:
    """The plates of a site by their dimension, outermost first."""
    return {dim: p for dim, p in sorted((p.dim, p) for p in latent.plates if p.dim is not None)}


def _vectors(latent: Latent, x: Tensor) -> Tensor:
    """The numbers of each row as one vector, in the plates' dimensions: `(*batch, width)`.

    Inside a plate of which the model takes some elements, those elements' rows.
    """
    frames = _frames(latent)
    if x.dim() < len(frames):
        raise GuideError(
            f"the encoder gives site '{latent.name}' a tensor of shape {tuple(x.shape)}, which has "
            f"no dimension for each of its plates {[p.name for p in frames.values()]}"
        )
    batch = [1] * len(latent.batch_shape)
    for dim, size in zip(frames, x.shape, strict=False):
        batch[dim] = size
    return pyro.subsample(x.reshape((*batch, -1)), event_dim=1)


def _split(latent: Latent, parts: list[Tensor], *widths: int) -> tuple[list[Tensor], bool]:
    """The parameters by their widths, and whether they are raw numbers of one tensor."""
    found = [x.shape[-1] for x in parts]
    if found == list(widths) and len(widths) > 1:
        return parts, False
    if found == [sum(widths)]:
        return list(parts[0].split(widths, -1)), True
    raise GuideError(
        f"the encoder gives site '{latent.name}' rows of {found} numbers; it needs one tensor with "
        f"{sum(widths)} for each row, or a tuple of {list(widths)}"
    )


def _normal(latent: Latent, parts: list[Tensor]) -> Any:
    size = latent.event_shape.numel()
    (loc, scale), raw = _split(latent, parts, size, size)
    shape = (*loc.shape[:-1], *latent.event_shape)
    scale = softplus(scale) if raw else scale
    return independent(latent, loc.reshape(shape), scale.reshape(shape), validate_args=None)


def _full(latent: Latent, parts: list[Tensor]) -> Any:
    size = latent.event_shape.numel()
    if len(parts) == 2:
        (loc, tril), _ = _split(latent, parts, size, size * size)
        tril = tril.reshape((*tril.shape[:-1], size, size))
    else:
        (loc, raw), _ = _split(latent, parts, size, size * (size + 1) // 2)
        rows, columns = torch.tril_indices(size, size, device=raw.device)
        tril = raw.new_zeros(*raw.shape[:-1], size, size)
        tril[..., rows, columns] = raw
        tril = tril.tril(-1) + softplus(tril.diagonal(dim1=-2, dim2=-1)).diag_embed()
    loc = loc.reshape((*loc.shape[:-1], *latent.event_shape))
    return onto(latent, CholeskyNormal(loc, tril, latent.event_dim, latent.event_dim))


def _dirichlet(latent: Latent, parts: list[Tensor]) -> Any:
    _check_simplex(latent, "dirichlet")
    (raw,), _ = _split(latent, parts, latent.event_shape.numel() + 1)
    return dist.Dirichlet(softplus(raw) + 1e-3)  # far below it, draws underflow to the edge


def _logistic_normal(latent: Latent, parts: list[Tensor]) -> Any:
    _check_simplex(latent, "logistic_normal")
    return _normal(latent, parts)


def _flow(latent: Latent, flow: Any, parts: list[Tensor]) -> Any:
    if len(parts) != 1 or latent.event_dim != 1:
        raise GuideError(
            f"site '{latent.name}': a conditional flow needs one tensor of contexts, and vectors "
            "as events (.to_event(1))"
        )
    zero = parts[0].new_zeros(*parts[0].shape[:-1], *latent.event_shape)
    return onto(latent, FlowDistribution(flow(parts[0]).transform, zero, zero + 1.0))


def _check_simplex(latent: Latent, family: str) -> None:
    if latent.support is not constraints.simplex:
        raise GuideError(
            f"family '{family}' needs a site on the simplex, such as a Dirichlet; site "
            f"'{latent.name}' has support {latent.support}"
        )


FAMILIES = {
    "normal": _normal,
    "full": _full,
    "dirichlet": _dirichlet,
    "logistic_normal": _logistic_normal,
    "flow": _flow,
}


def _required(encoder: nn.Module) -> int:
    """How many arguments a network needs."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(encoder.forward).parameters.values()
    needed = [p for p in parameters if p.kind in kinds and p.default is inspect.Parameter.empty]
    return max(1, len(needed))
