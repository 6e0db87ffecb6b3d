r"""Annealed importance sampling: chains that carry the guide's draws to the posterior.

Along the geometric path from the guide (beta = 0) to the joint density (beta = 1),

$$f_\beta(z) = q(z)^{1-\beta} p(x, z)^\beta, \qquad
\log w = \sum_{t=1}^T (\beta_t - \beta_{t-1}) \log \frac{p(x, z_{t-1})}{q(z_{t-1})}$$

where $z_0 \sim q$ and $z_t$ comes from $z_{t-1}$ by a Hamiltonian move that leaves $f_{\beta_t}$
invariant. Then E[w] = p(x) for any number of distributions T and any moves. A chain run backwards
from an exact posterior draw has E[1/w] = 1/p(x).

Neal (2001), Annealed Importance Sampling; Wu, Burda, Salakhutdinov, Grosse (2017), On the
Quantitative Analysis of Decoder-Based Generative Models.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from torch import Tensor
from torch.distributions import biject_to

from pvi.diagnostics.weights import Bar, Target, weights_of
from pvi.engine.bounds import fold
from pvi.engine.terms import Term
from pvi.engine.traces import masked, replaced, sample_nodes, subset
from pvi.errors import ObjectiveError

LEAPFROG = 5  # steps of a move
FIRST_STEP = 0.5  # in sds of the guide
ACCEPTANCE, RATE = 0.65, 0.2  # aim of the step sizes, and how fast they go there
SHARPNESS = 4.0  # of the sigmoid schedule: small steps at both ends
NUM_SCALE = 32  # draws from the guide that tell its sds
SHARE = 8  # of the usual memory: gradients hold more than the traces

Positions = dict[str, Tensor]


@dataclass(frozen=True)
class Chart:
    """A guide site's value as transform(u), with u unconstrained.

    Args:
        event_dim: dimensions of u that are no plates.
        scale: sd of u under the guide.
    """

    name: str
    term: Term
    transform: Any
    event_dim: int
    scale: Tensor | float = 1.0

    def per_element(self, x: Tensor, num: int) -> Tensor:
        """Sum over the events of u: `(num, *batch)`."""
        batch = x.shape[: x.dim() - self.event_dim]
        x = x.reshape(*batch, -1).sum(-1)
        return x if num > 1 else x.unsqueeze(0)

    def onto(self, x: Tensor, u: Tensor) -> Tensor:
        """One number for each chain and datum `(num, *plates)`, in a shape that multiplies u."""
        plates, events = x.shape[1:], (1,) * self.event_dim
        if len(x) == 1:
            return x.reshape((*plates, *events))
        between = (1,) * (u.dim() - self.event_dim - x.dim())
        return x.reshape(len(x), *between, *plates, *events)

    def log_jacobian(self, u: Tensor, value: Tensor) -> Tensor:
        """log |dz/du|, without what the guide masks out, in the batch shape of u."""
        jacobian = self.transform.log_abs_det_jacobian(u, value)
        batch = jacobian.shape[: u.dim() - self.event_dim]
        jacobian = jacobian.reshape(*batch, -1).sum(-1)
        density = self.term.sites[0].q
        return masked(jacobian, None if density is None else density.mask)


class Annealing:
    """Chains between a guide and a posterior, one bunch for each datum where these factorise.

    The moves' step sizes are adapted, for each distribution and datum, in a first run that is then
    forgotten, so that in later ones they are constants and E[w] = p(x) holds.

    Args:
        target: the model and the guide.
        num_steps: distributions T on the way.
        num_chains: chains of the first run.
        bar: makes a progress bar of a name.

    Raises:
        ObjectiveError: a discrete site in the guide, a guide that is random given its sites, or a
            support that differs between model and guide or depends on other sites.
    """

    def __init__(self, target: Target, num_steps: int, num_chains: int, bar: Callable[[str], Bar]):
        self.target = target.joined()  # what stands outside moves too, so nothing factorises
        self.acceptance: Tensor | None = None
        self._bar, self._scope = bar, self.target.plan.scope
        self._charts = {chart.name: chart for chart in _charts(self.target)}
        self._given = subset(self.target.guide_trace, self._charts)
        slope = torch.linspace(-SHARPNESS, SHARPNESS, num_steps + 1, dtype=torch.float64).sigmoid()
        betas = (slope - slope[0]) / (slope[-1] - slope[0])
        self._betas: list[float] = betas.tolist()
        self._check_fixed()
        self._steps: list[Tensor] = []
        self._forward(self._chunks(num_chains)[0], "adapt")

    def weights(self, num_chains: int) -> Iterator[Tensor]:
        """Chunks `(k, *plates)` of log weights of chains from the guide, nats."""
        for num in self._chunks(num_chains):
            yield self._forward(num, "anneal")

    def reverse(self, values: Mapping[str, Tensor]) -> Tensor:
        """Log weight `(1, *plates)` of a chain from a posterior draw to the guide, nats.

        The steps of `weights` in the opposite order, which is its time reversal, because each move
        is reversible.
        """
        u = {name: chart.transform.inv(values[name]) for name, chart in self._charts.items()}
        return self._run(u, 1, self._betas[::-1], self._steps[::-1], "reverse")

    def _chunks(self, num_chains: int) -> list[int]:
        return self.target.chunks(num_chains, SHARE)

    def _forward(self, num: int, what: str) -> Tensor:
        nodes = sample_nodes(self.target.traces(num)[0])
        u = {n: chart.transform.inv(nodes[n]["value"]) for n, chart in self._charts.items()}
        return self._run(u, num, self._betas, self._steps, what)

    def _run(
        self, u: Positions, num: int, betas: list[float], steps: list[Tensor], what: str
    ) -> Tensor:
        """Log weights `(num, *plates)` of chains from u; step sizes that lack are adapted."""
        with pyro.validation_enabled(False):  # a move may leave every support, and is refused
            base, log_w = self._densities(u, num)
            total, adapt = torch.zeros_like(log_w, dtype=torch.float64), not steps
            accepted, step = [], torch.full_like(log_w[0], FIRST_STEP)
            for i in self._bar(what)(range(len(betas) - 1)):
                total = total + abs(betas[i + 1] - betas[i]) * log_w.double()
                if i == len(betas) - 2:
                    break
                if adapt:
                    steps.append(step)
                u, base, log_w, rate = self._move(u, base, log_w, betas[i + 1], steps[i])
                step = step * (RATE * (rate.mean(0) - ACCEPTANCE)).exp()
                accepted.append(rate.mean(0))
        if accepted:
            self.acceptance = torch.stack(accepted).mean(0)
        return total

    def _move(
        self, u: Positions, base: Tensor, log_w: Tensor, beta: float, step: Tensor
    ) -> tuple[Positions, Tensor, Tensor, Tensor]:
        """One Hamiltonian move at beta; also how probably each chain and datum accepts it."""
        num, charts = len(log_w), self._charts
        jitter = step * (0.8 + 0.4 * torch.rand_like(log_w))  # against periodic orbits
        size = {n: chart.onto(jitter, u[n]) * chart.scale for n, chart in charts.items()}
        p = {n: torch.randn_like(x) for n, x in u.items()}
        before = base + beta * log_w - self._kinetic(p, num)
        new, p, new_base, new_log_w = self._leapfrog(u, p, size, num, beta)
        after = new_base + beta * new_log_w - self._kinetic(p, num)
        rate = (after - before).clamp(max=0.0).exp().nan_to_num(0.0)
        accept = torch.rand_like(rate) < rate
        u = {n: torch.where(charts[n].onto(accept, x), new[n], x) for n, x in u.items()}
        base, log_w = torch.where(accept, new_base, base), torch.where(accept, new_log_w, log_w)
        return u, base, log_w, rate

    def _leapfrog(
        self, u: Positions, p: Positions, size: Positions, num: int, beta: float
    ) -> tuple[Positions, Positions, Tensor, Tensor]:
        """Where positions and momenta end up, and the densities there."""
        slope, base, log_w = self._gradient(u, num, beta)
        for _ in range(LEAPFROG):
            p = {n: p[n] + 0.5 * size[n] * slope[n] for n in p}
            u = {n: u[n] + size[n] * p[n] for n in u}
            slope, base, log_w = self._gradient(u, num, beta)
            p = {n: p[n] + 0.5 * size[n] * slope[n] for n in p}
        return u, p, base, log_w

    def _kinetic(self, p: Positions, num: int) -> Tensor:
        """Energy of the momenta, `(num, *plates)`."""
        return self._summed(
            {n: 0.5 * c.per_element(p[n] ** 2, num) for n, c in self._charts.items()}
        )

    def _summed(self, parts: Mapping[str, Tensor]) -> Tensor:
        folded = [fold(x, self._charts[n].term, self._scope) for n, x in parts.items()]
        return torch.stack(torch.broadcast_tensors(*folded)).sum(0)

    def _gradient(self, u: Positions, num: int, beta: float) -> tuple[Positions, Tensor, Tensor]:
        """Gradient of log f_beta, and `_densities`."""
        with torch.enable_grad():
            u = {name: x.detach().requires_grad_() for name, x in u.items()}
            base, log_w = self._densities(u, num)
            slopes = torch.autograd.grad((base + beta * log_w).sum(), list(u.values()))
        return dict(zip(u, slopes, strict=True)), base.detach(), log_w.detach()

    def _densities(self, u: Positions, num: int) -> tuple[Tensor, Tensor]:
        """Log density of u under the guide, and log weights; each `(num, *plates)`.

        A Delta site that restates others adds its Jacobian to the weights, as part of the joint.
        """
        charts = self._charts
        values = {name: chart.transform(u[name]) for name, chart in charts.items()}
        terms = self.target.terms(num, replaced(self._given, values))
        base = {}
        for name, chart in charts.items():
            log_q = terms[name].guide_density()
            jacobian = chart.log_jacobian(u[name], values[name])
            base[name] = log_q + jacobian.reshape(log_q.shape)
        return self._summed(base), weights_of(terms, self._scope)[1]

    def _check_fixed(self) -> None:
        one, two = (self.target.terms(1, self._given).log_weights() for _ in range(2))
        if not torch.allclose(one, two, equal_nan=True):
            raise ObjectiveError(
                "the densities differ between two runs at the same values: model or guide draw "
                "random numbers outside of pyro.sample. AIS needs fixed densities; use method='is'."
            )


def _charts(target: Target) -> Iterator[Chart]:
    """A chart for each site that the guide draws."""
    pairs = [target.traces(1) for _ in range(2)]
    drawn = [(num, sample_nodes(target.traces(num)[0])) for num in target.chunks(NUM_SCALE)]
    for term in target.latents:
        if term.point:  # restates other sites
            continue
        name = term.name
        node: Any = target.guide_trace.nodes[name]
        fn = node["fn"]
        if fn.support.is_discrete:
            raise ObjectiveError(
                f"site '{name}' is discrete ({type(fn).__name__}), but AIS moves along gradients. "
                "Use method='is', or mark it infer={'enumerate': 'parallel'} in the model and "
                "leave it out of the guide."
            )
        transform = biject_to(fn.support)
        u = transform.inv(node["value"])
        _check_support(name, [t.nodes[name] for pair in pairs for t in pair if name in t], u)
        event_dim = fn.event_dim + transform.domain.event_dim - transform.codomain.event_dim
        values = [
            transform.inv(nodes[name]["value"]).reshape(num, *u.shape) for num, nodes in drawn
        ]
        sd = torch.cat(values).std(0)
        scale = torch.where(sd.isfinite() & (sd > 0), sd, torch.ones_like(sd))
        yield Chart(name, term, transform, event_dim, scale)


def _check_support(name: str, nodes: list[Any], u: Tensor) -> None:
    """All runs of both programs must map the same unconstrained numbers to the same values."""
    first = biject_to(nodes[0]["fn"].support)(u)
    for node in nodes[1:]:
        other = biject_to(node["fn"].support)(u)
        if other.shape != first.shape or not torch.allclose(other, first):
            raise ObjectiveError(
                f"site '{name}' has a support that differs between model and guide, or depends on "
                "other sites, so no path leads from one to the other. Use method='is', or sample "
                "a variable of fixed support and transform it."
            )
