"""The deterministic route: the optimum of the bound over fixed draws, found by L-BFGS."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pvi.errors import FitError
from pvi.guides import FullRank, LowRank, MeanField, Structured
from pvi.guides.mean_field import NormalGuide
from pvi.guides.mode import LogJoint
from pvi.optim.draws import matched_normals
from pvi.optim.lbfgs import Point, Search
from pvi.optim.mode import maximize

SHARE = 0.03  # Monte Carlo error of the solution, in posterior sds, that is small enough
FIRST, MOST, LARGEST = 64, 4096, 2e7  # draws at first and at most; numbers in one evaluation
OFF, WORK = 0.5, 2e9  # sds that a mean may be off; numbers to differentiate, for linear response
FLAT = 0.01  # share of a variance along directions without a maximum that goes for none
SINGLY = 256  # draws at most of a model that is run for each on its own
KEPT = 5.0  # numbers that a run of a simple model keeps for its gradient, for each that it makes
FAMILIES = (MeanField, LowRank, FullRank, Structured)  # what `transport` and `entropy` tell all of
WIDEST = 500  # latents: the curvature takes so many backward passes, the coordinates its square
LEVEL = 1e-3  # nats a posterior sd: the largest slope at a solution
PROBES = 16  # draws over which the curvature is averaged
ROUND, ROUNDS = 25, 20  # iterations between two looks at the curvature, and how many such rounds
LATE = "L-BFGS has not ended"
Report = Callable[[float, float, int], None]  # bound, gradient norm, draws


@dataclass(frozen=True)
class Moments:
    """Means and sds of all latents in unconstrained space, `(D)` each."""

    mean: Tensor
    sd: Tensor

    def distance(self, other: "Moments") -> float:
        """The largest difference of a mean, or relative difference of an sd, in sds."""
        means = ((self.mean - other.mean) / self.sd).abs().max()
        sds = (self.sd / other.sd).log().abs().max()
        return float(torch.maximum(means, sds))


class FixedDraws:
    """Maximise a normal guide's bound over draws that stay the same.

    $$\\max_\\phi \\frac1K \\sum_k \\log p(x, u_\\phi(\\epsilon_k)) + H(q_\\phi)$$

    is an ordinary smooth function. The search starts from Laplace's approximation where the
    posterior has a mode and that is the better start, in coordinates in which the average curvature
    of the log density under the guide is 1. Then come twice as many, other draws, until two
    solutions in a row agree: K and 2K draws differ by $\\sqrt3$ times the Monte Carlo error of the
    latter.

    Args:
        guide: set up; its parameters are all there is to train.
        density: the model's log density in unconstrained space.
        report: called after each iteration.

    Reference:
        Giordano, Ingram, Broderick 2024 (DADVI); Kucukelbir et al. 2017 (ADVI).
    """

    def __init__(self, guide: NormalGuide, density: LogJoint, report: Report = lambda *_: None):
        self.guide, self.density, self.report = guide, density, report
        self._size = max(density.numbers, density.kept / KEPT)  # of a run, which limits the draws
        self.most = int(min(MOST if density.together else SINGLY, LARGEST / self._size))
        keys = [f"{latent.key}_unconstrained" for latent in guide.layout.latents.values()]
        self._locs = [getattr(guide.loc, key) for key in keys]
        own = {id(p) for p in self._locs}
        self._others = [p for p in guide.parameters() if id(p) not in own]
        self._num, self._noise = 0, torch.zeros(())

    @property
    def first(self) -> int:
        """Draws to start with: enough to know all covariances of the noise."""
        return max(FIRST, 2 ** math.ceil(math.log2(4 * self.guide.noise_size)))

    def run(self, mode: Tensor | None = None, curvature: Tensor | None = None) -> str:
        """Move the guide to the optimum; return why it is not there, or "".

        Args:
            mode, curvature: start from Laplace's approximation at this mode.
        """
        self._draw(self.first)
        if mode is None or curvature is None:
            self._start()
        else:
            self.guide.place(mode, curvature)
            self._root = torch.linalg.inv(torch.linalg.cholesky(curvature)).mT
        before: Moments | None = None
        while True:
            stuck = self._solve()
            for _ in range(ROUNDS):
                if stuck != LATE:
                    break
                self._precondition()
                stuck = self._solve()
            now = self.moments()
            error = now.distance(before) / math.sqrt(3.0) if before else math.inf
            if stuck:
                return stuck
            if error <= SHARE:
                return ""
            if 2 * self._num > self.most:
                return (
                    f"with {self._num} fixed draws the Monte Carlo error of the solution is still "
                    f"about {error:.2g} posterior sds; give steps= to train on fresh draws"
                )
            before = now
            self._draw(2 * self._num)
            self._precondition()

    def response(self, num_draws: int, values: Callable[[Tensor], Tensor]) -> Tensor:
        """How the optimal means of values g answer to a pull at each: a covariance, `(D, D)`.

        $$\\mathrm{Cov}(g) = \\frac{d\\,E_{q^*}[g]}{d\\,t} \\Big|_{t=0}
        = G \\left(-\\nabla^2_\\phi L\\right)^{-1} G^\\top, \\qquad
        G = \\nabla_\\phi E_q[g]$$

        where $q^*$ maximises the bound $L$ of the density tilted by $t^\\top g(u)$.

        Args:
            values: g, from the vectors of all latents `(K, D)` to `(K, D)`.

        Raises:
            FitError: the bound has no maximum there, or the guide is not at it.
        """
        leaves = (*self._locs, *self._others)
        passes = sum(p.numel() for p in leaves)
        most = max(FIRST, min(self.most, int(WORK / (passes * self._size))))
        self._draw(min(num_draws, most))
        with torch.enable_grad():
            slopes = torch.autograd.grad(-self._bound(), leaves, create_graph=True)
            entries = torch.cat([g.reshape(-1) for g in slopes])
            rows = [torch.autograd.grad(g, leaves, retain_graph=True) for g in entries]
            means = values(self.guide.transport(self._noise)).mean(0)
            pulls = [torch.autograd.grad(m, leaves, retain_graph=True) for m in means]
        hessian, jacobian = (
            torch.stack([torch.cat([x.reshape(-1) for x in row]) for row in part]).detach()
            for part in (rows, pulls)
        )
        sd = self.moments().sd
        units = torch.cat([sd, torch.ones(len(hessian) - len(sd)).to(sd)])  # one size for all
        hessian = units.unsqueeze(-1) * hessian * units
        curvatures, vectors = torch.linalg.eigh(0.5 * (hessian + hessian.mT))
        floor = 1e-9 * curvatures[-1]
        kept = curvatures > floor  # turning a factor changes nothing
        pulled = (jacobian * units) @ vectors
        answers = pulled[:, kept] / curvatures[kept].sqrt()
        response = answers @ answers.mT
        lost = pulled[:, ~kept].square() / torch.maximum(curvatures[~kept].abs(), floor)
        if not bool((lost.sum(1) <= FLAT * response.diagonal()).all()):
            raise FitError(
                "linear response needs a maximum of the bound, which is flat or curves upwards "
                "here along some direction; train until Fit.converged"
            )
        left = answers @ ((entries.detach() * units) @ vectors[:, kept] / curvatures[kept].sqrt())
        off = float((left / response.diagonal().sqrt()).abs().max())
        if off > OFF:
            raise FitError(
                f"linear response needs the maximum of the bound, but a mean is about {off:.2g} "
                "posterior sds from it; train until Fit.converged"
            )
        return response

    def _draw(self, num: int) -> None:
        self._num, self._noise = num, self._normals(num, seed=num)

    def _normals(self, num: int, seed: int) -> Tensor:
        return matched_normals(num, self.guide.noise_size, seed).to(self._locs[0])

    def _start(self) -> None:
        """Choose between the guide's own start and Laplace's approximation, by their bounds."""
        scale = self.moments().sd
        mode = maximize(self.density, self.density.start)
        gradient, curvature = self.density.derivatives(mode)
        root, failed = torch.linalg.cholesky_ex(curvature)
        self._root = scale.diag()
        if not int(failed) and bool(root.isfinite().all()):
            step = torch.cholesky_solve(gradient.unsqueeze(-1), root).squeeze(-1)
            if self._improved(mode + step, curvature):
                self._root = torch.linalg.inv(root).mT
                return
        self._precondition()

    def _precondition(self) -> None:
        """Coordinates in which the average curvature under the guide is about 1.

        At a normal optimum the precision is that curvature (Opper and Archambeau 2009), so it is
        also a place to try.
        """
        with torch.no_grad():
            points = self.guide.transport(self._normals(PROBES, seed=0))
        _, curvature = self.density.mean_derivatives(points)
        whitened = self._root.mT @ curvature @ self._root
        if not bool(whitened.isfinite().all()):
            return
        values, vectors = torch.linalg.eigh(whitened)
        self._root = self._root @ vectors / values.abs().clamp(1e-2, 1e4).sqrt()
        half = torch.linalg.inv(self._root)
        self._improved(self.moments().mean, half.mT @ half)

    def _improved(self, mean: Tensor, precision: Tensor) -> bool:
        """Move the guide to a normal if the bound is higher there."""
        own, value = [p.detach().clone() for p in self.guide.parameters()], self._value()
        self.guide.place(mean, precision)
        if self._value() > value or not math.isfinite(value):
            return True
        with torch.no_grad():
            for p, x in zip(self.guide.parameters(), own, strict=True):
                p.copy_(x)
        return False

    def _solve(self) -> str:
        """Search on the present draws; return why it did not end at an optimum, or ""."""
        base = [p.detach().clone() for p in (*self._locs, *self._others)]
        width = sum(p.numel() for p in self._locs)

        def put(x: Tensor) -> None:
            moved = torch.cat([self._root @ x[:width], x[width:]])
            parts = moved.split([p.numel() for p in base])
            with torch.no_grad():
                for p, b, d in zip((*self._locs, *self._others), base, parts, strict=True):
                    p.copy_(b + d.reshape(b.shape))

        def loss(x: Tensor) -> tuple[float, Tensor]:
            put(x)
            with torch.enable_grad():
                value = -self._bound()
                found = torch.autograd.grad(value, (*self._locs, *self._others), allow_unused=True)
            flat = [
                torch.zeros_like(b).reshape(-1) if g is None else g.reshape(-1)
                for g, b in zip(found, base, strict=True)
            ]
            gradient = torch.cat(flat)
            return float(value.detach()), torch.cat(
                [self._root.mT @ gradient[:width], gradient[width:]]
            )

        iterations = 0

        def after(point: Point) -> None:
            nonlocal iterations
            iterations += 1
            self.report(-point.value, float(point.gradient.norm()), self._num)

        search = Search(loss, self._root.new_zeros(sum(p.numel() for p in base)))
        try:
            self.report(-search.best.value, float(search.best.gradient.norm()), self._num)
            point = search.run(LEVEL, ROUND, after=after)
        finally:
            put(search.best.x)
        if not point.is_finite:
            return "the bound is not finite at the guide's start; lower its init_scale"
        if point.steepness > LEVEL and iterations == ROUND:
            return LATE
        if point.steepness > 100 * LEVEL:
            return (
                f"L-BFGS ended where the bound still rises by {point.steepness:.2g} nats an sd: it "
                "may have no maximum, as with flat priors and separable data"
            )
        return ""

    def _bound(self) -> Tensor:
        points = self.guide.transport(self._noise)
        try:
            density = self.density.many(points)
        except (RuntimeError, ValueError):  # of the model, at a step too far
            density = torch.nan * points.sum(1)
        return density.mean() + self.guide.entropy()

    def _value(self) -> float:
        with torch.no_grad():
            return float(self._bound())

    def moments(self) -> Moments:
        """Of the guide as it is."""
        with torch.no_grad():
            centre = self.guide.transport(torch.zeros_like(self._noise[:1]))[0]
            spread = self.guide.transport(self._noise) - centre
        return Moments(centre.clone(), spread.square().mean(0).sqrt())
