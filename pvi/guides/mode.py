"""A posterior's density as a function of one vector in unconstrained space, and its mode."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import cached_property
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from pvi.engine.joint import terms_of
from pvi.engine.look import agree, look
from pvi.engine.masks import mask_for_guide
from pvi.engine.traces import Program, hidden, run, sample_nodes
from pvi.errors import GuideError
from pvi.guides.layout import Layout
from pvi.optim.mode import maximize


class LogJoint:
    """$u \\mapsto \\log p(x, t(u)) + \\log |\\det dt/du|$, nats; discrete sites are summed out.

    Args:
        dtype: of the points, where it is not that of the layout.

    Raises:
        GuideError: the model subsamples, so that no single number is its density.
    """

    def __init__(
        self,
        model: Program,
        layout: Layout,
        args: tuple,
        kwargs: Mapping,
        dtype: torch.dtype | None = None,
    ):
        for latent in layout.latents.values():
            for plate in latent.plates:
                if plate.size < plate.full_size:
                    raise GuideError(
                        f"site '{latent.name}' is in plate '{plate.name}', of which the model "
                        f"takes {plate.size} of {plate.full_size} elements a call; a mode needs "
                        "them all. Start at the prior's median, or use all rows."
                    )
        self._model, self._layout, self._args, self._kwargs = model, layout, args, kwargs
        self.start = layout.start().to(dtype)
        self._enumeration, _, trace = look(model, self._guide(self.start), args, kwargs)
        self.numbers = sum(node["value"].numel() for node in sample_nodes(trace).values())
        nodes = [trace.nodes[name] for name in layout.latents]
        masks = [mask_for_guide(x["name"], x["fn"], x["mask"], True) for x in nodes]
        self._masked = not all(x is None or bool(torch.as_tensor(x).all()) for x in masks)
        self._penalised = any(message["kind"] == "penalty" for message in trace.effects)

    def __call__(self, u: Tensor) -> Tensor:
        programs = (self._enumeration.guide(self._guide(u)), self._enumeration.model(self._model))
        # a step too far is a density that is not finite, not an error of some distribution
        with hidden(), torch.enable_grad(), pyro.validation_enabled(False):
            guide_trace = run(programs[0], self._args, self._kwargs)
            model_trace = run(programs[1], self._args, self._kwargs, guide_trace)
            terms = terms_of(guide_trace, model_trace, enumeration=self._enumeration)
            return terms.log_weights().sum()

    @property
    def left_out(self) -> str:
        """What an objective holds that a normal over all latents can't take from here."""
        if self._penalised:
            return "the model has a pvi.penalty"
        return "the model masks elements of its latents out" if self._masked else ""

    @cached_property
    def kept(self) -> int:
        """How many numbers one run keeps for its gradient, for each point anew."""
        count = 0

        def pack(x: Tensor) -> Tensor:
            nonlocal count
            count += x.numel() * x.requires_grad
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            self(self.start.clone().requires_grad_())
        return count

    @cached_property
    def together(self) -> bool:
        """Whether the model can be run once for many points."""
        start = self.start
        points = start + 0.1 * torch.linspace(-1.0, 1.0, 3 * len(start)).to(start).reshape(3, -1)
        with torch.no_grad():
            try:
                return agree(torch.func.vmap(self)(points), self._singly(points))
            except Exception:  # whatever a program raises on tensors that are many at once
                return False

    def _singly(self, points: Tensor) -> Tensor:
        return torch.stack([self(u) for u in points])

    @cached_property
    def many(self) -> Callable[[Tensor], Tensor]:
        """The density at many points, `(K, D)` to `(K)`: together where the model can, else singly.

        A model need not know of particles for that: `torch.func.vmap` runs it once for all.
        """
        return torch.func.vmap(self) if self.together else self._singly

    def derivatives(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Gradient `(D)` and negative Hessian `(D, D)` at a point."""
        gradient, curvature = self.mean_derivatives(u.unsqueeze(0), lambda u: self(u[0]))
        return gradient, curvature

    def mean_derivatives(
        self, points: Tensor, density: Callable[[Tensor], Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Average gradient `(D)` and negative Hessian `(D, D)` at points `(K, D)`."""
        with torch.enable_grad():
            u = points.detach().requires_grad_()
            total = (density or self.many)(u).sum()
            (gradient,) = torch.autograd.grad(total, u, create_graph=True)
            sums = gradient.sum(0)
            rows = [
                torch.autograd.grad(g, u, retain_graph=True, allow_unused=True)[0] for g in sums
            ]
        hessian = torch.stack([torch.zeros_like(u) if r is None else r for r in rows]).mean(1)
        return gradient.detach().mean(0), -0.5 * (hessian + hessian.mT).detach()

    def _guide(self, u: Tensor) -> Program:
        """A guide that stays at `u`, its density the map's Jacobian."""

        def guide(*args: Any, **kwargs: Any) -> None:
            plates: dict[str, Any] = {}
            for name, value in self._layout.split(u).items():
                latent = self._layout.latents[name]
                with ExitStack() as stack:
                    for p in latent.plates:
                        if p.name not in plates:
                            plates[p.name] = pyro.plate(p.name, p.full_size, dim=p.dim)
                        stack.enter_context(plates[p.name])
                    infer: Any = {"follows_mask": True}
                    pyro.sample(name, pushed(latent, value), infer=infer)

        return guide


def pushed(latent: Any, u: Tensor) -> dist.Delta:
    """A point mass at $t(u)$ with density $1 / |\\det dt/du|$: a draw of u, told at its site."""
    value, batch_dim = latent.transform(u), u.dim() - latent.event_dim
    log_det = latent.transform.log_abs_det_jacobian(u, value)
    log_det = log_det.reshape((*log_det.shape[:batch_dim], -1)).sum(-1)
    return dist.Delta(value, -log_det, latent.value_dim)


def find_mode(model: Program, layout: Layout, args: tuple, kwargs: Mapping) -> Tensor:
    """The mode of the posterior in unconstrained space, or the best point of a short search."""
    return maximize(LogJoint(model, layout, args, kwargs), layout.start())
