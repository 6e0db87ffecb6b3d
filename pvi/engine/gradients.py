"""How the gradient of a bound reaches the guide.

`reparam` differentiates the draws. `path` also drops the part of log q whose mean is zero: sticking
the landing (Roeder, Wu, Duvenaud 2017) at alpha = 1, doubly reparameterised gradients (Tucker,
Lawson, Gu, Maddison 2019) at alpha = 0. `score` weights the log density of draws that can't be
differentiated: REINFORCE with a leave-one-out baseline, VIMCO (Mnih and Rezende 2016) for
alpha != 1.
"""

import warnings
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from pvi.engine.bounds import Inner, Mean, Order, Scope, fold, renyi_mean
from pvi.engine.terms import Term, Terms, Weight
from pvi.engine.traces import Scale, masked
from pvi.errors import ObjectiveError

Gradient = Literal["auto", "reparam", "path", "score"]


class Tap:
    """Views of drawn values whose gradient is multiplied by a ratio that is known only later.

    The ratio is `(K, *plates)` for values of a batch of particles, else `(*plates)`.
    """

    def __init__(self, batched: bool) -> None:
        self.batched = batched
        self.ratio: Tensor | None = None
        self.scaled = False

    def view(self, value: Tensor, event_dim: int, scale: Scale, mask: Callable[[], Any]) -> Tensor:
        """The same value; its gradient will be scaled by `ratio`, which broadcasts over plates.

        Args:
            scale, mask: what log q is multiplied by in the log weight: where that is s, the score
                part that `ratio` stands for is s of a whole one. The mask is asked for when the
                gradient comes: it may be the model's, which runs later.
        """
        if not value.requires_grad:
            return value
        view = value.view_as(value)

        def hook(gradient: Tensor) -> Tensor:
            if self.ratio is None:
                return gradient
            ratio = self.ratio
            if self.batched:  # particles are leftmost, plates rightmost, others in between
                between = gradient.dim() - event_dim - ratio.dim()
                ratio = ratio.reshape(len(ratio), *[1] * between, *ratio.shape[1:])
            if self.scaled:
                ratio = 1.0 - scale * (1.0 - ratio)
            ratio = 1.0 - masked(1.0 - ratio, mask())
            ratio = ratio.reshape(ratio.shape + (1,) * event_dim)
            return gradient * ratio.to(gradient.dtype)

        view.register_hook(hook)
        return view


def path_ratio(log_w: Tensor, order: Order, beta: float = 1.0) -> Tensor:
    """Factor on each draw's pathwise gradient: $1 - \\beta(1-\\alpha)(1-v_k)$, shaped as `log_w`.

    $v = \\mathrm{softmax}_k((1-\\alpha)\\log w)$; 1 for the ELBO, $v_k$ for IWAE at beta = 1. For a
    mean f of the user's own it is $1 - \\beta f''_{kk} / f'_k$, of which that is a case.
    """
    if callable(order):
        slope, curvature = derivatives(log_w, order)
        return 1.0 - beta * torch.where(slope == 0, curvature, curvature / slope)
    v = torch.softmax((1.0 - order) * log_w.detach(), 0)
    return 1.0 - beta * (1.0 - order) * (1.0 - v)


def derivatives(log_w: Tensor, mean: Mean) -> tuple[Tensor, Tensor]:
    """First and own second derivatives of a mean by each log weight, `(K, *plates)` both."""
    with torch.enable_grad():
        w = log_w.detach().requires_grad_()
        (slope,) = torch.autograd.grad(mean(w).sum(), w, create_graph=True)
        if not slope.requires_grad:
            return slope, torch.zeros_like(slope)
        rows = [torch.autograd.grad(row.sum(), w, retain_graph=True)[0] for row in slope]
    return slope.detach(), torch.stack([row[k] for k, row in enumerate(rows)])


class Values(Messenger):
    """Let a program sample, then put these values in place: the random stream stays the same."""

    def __init__(self, values: Mapping[str, Tensor]):
        super().__init__()
        self.values = values

    def _pyro_post_sample(self, msg: dict) -> None:
        if msg["name"] in self.values and not msg["is_observed"]:
            msg["value"] = self.values[msg["name"]]


class Detached(Messenger):
    """Cut every draw from its parameters, so that only its log density carries a gradient.

    Args:
        points: sites that are no draws.
    """

    def __init__(self, points: Container[str] = ()):
        super().__init__()
        self.points = points

    def _pyro_post_sample(self, msg: dict) -> None:
        drawn = not msg["is_observed"] and msg["name"] not in self.points
        if drawn and isinstance(msg["value"], Tensor):
            msg["value"] = msg["value"].detach()


@contextmanager
def frozen(leaves: Iterable[Tensor]) -> Iterator[None]:
    """Build the graph inside without these leaves."""
    held = [leaf for leaf in leaves if leaf.requires_grad]
    try:
        for leaf in held:
            leaf.requires_grad_(False)
        with warnings.catch_warnings():  # Pyro's, of modules with such parameters
            warnings.filterwarnings("ignore", ".*was not registered in the param store")
            yield
    finally:
        for leaf in held:
            leaf.requires_grad_(True)


def leaves_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """All leaves that the graphs of these tensors reach, however the program holds them."""
    tensors = list(tensors)
    found = {id(t): t for t in tensors if t.is_leaf and t.requires_grad}
    stack: list[Any] = [t.grad_fn for t in tensors if t.grad_fn is not None]
    seen = set(stack)
    while stack:
        node = stack.pop()
        if hasattr(node, "variable"):  # where a leaf's gradient accumulates
            found[id(node.variable)] = node.variable
        parents = {parent for parent, _ in node.next_functions if parent is not None} - seen
        seen |= parents
        stack += parents
    return list(found.values())


def leave_one_out(log_w: Tensor, order: Order) -> Tensor:
    """$L - L_{-k}$: the bound minus the bound with draw k's log weight replaced by the others'
    mean.

    Args:
        log_w: `(K, *plates)` with K >= 2, without gradient.

    Returns:
        The signal for each draw, `(K, *plates)`; at alpha = 1 it is (log w_k - mean of others) / K.
    """
    count = len(log_w)
    others = (log_w.sum(0) - log_w) / (count - 1)
    if order == 1.0:
        return (log_w - others) / count
    eye = torch.eye(count, dtype=torch.bool, device=log_w.device)
    eye = eye.reshape(count, count, *[1] * (log_w.dim() - 1))
    replaced = torch.where(eye, others.unsqueeze(0), log_w.unsqueeze(1))  # (K, k left out, ...)
    return renyi_mean(log_w, order) - renyi_mean(replaced, order)


def needs_score(terms: Terms, everywhere: bool = False) -> list[Term]:
    """Guide sites with parameters whose draws carry no gradient; with `everywhere` all of them."""
    return [
        t
        for t in terms
        if t.log_q is not None and t.log_q.requires_grad and (everywhere or not t.reparameterized)
    ]


def check_reparameterized(sites: list[str], gradient: Gradient) -> None:
    """Refuse a pathwise gradient where there are sites that need a score gradient.

    Raises:
        ObjectiveError: naming the first of them.
    """
    if sites:
        raise ObjectiveError(
            f"guide site '{sites[0]}' has parameters but no reparameterised sampler, so gradient="
            f"'{gradient}' would silently miss them. Use gradient='auto', which takes score "
            "gradients there, or a reparameterised distribution."
        )


class Baseline:
    """A moving average of a site's signal, for where no other draw can serve as its baseline."""

    def __init__(self, decay: float = 0.9):
        self._decay = decay
        self.means: dict[str, Tensor] = {}

    def centred(self, name: str, signal: Tensor) -> Tensor:
        """The signal minus the average of the steps before."""
        mean = signal.mean()
        before = self.means.get(name, torch.zeros_like(mean))
        self.means[name] = (
            self._decay * before + (1 - self._decay) * mean if name in self.means else mean
        )
        return signal - before


def elbo_score(
    term: Term, costs: Iterable[Term], weight: Weight, baseline: Baseline, plates: frozenset[str]
) -> Tensor:
    """Zero-valued surrogate for one site of a sum: signals times its log density, a scalar.

    The signal of an element of the site's plates is what the bound owes to that element, so the
    rest of the plate adds no noise.

    Args:
        costs: the terms that add up to the bound, penalties among them.
        plates: those whose elements are known not to depend on each other's draws.
    """
    own = [p for p in term.plates if p.dim is not None and p.name in plates]
    scope = Scope(frozenset(p.name for p in own))
    depth = -min((p.dim for p in own if p.dim is not None), default=0)
    cost: Tensor | float = 0.0
    for other in costs:
        part = other.log_ratio(weight(other)).detach() * other.subsample_scale
        cost = cost + fold(part, other, scope, depth)
    log_q = fold(density(term), term, scope)
    cost = torch.as_tensor(cost).expand(len(log_q), *log_q.shape[1:])
    single = len(log_q) == 1
    signal = baseline.centred(term.name, cost) if single else leave_one_out(cost, 1.0)
    return zero((signal * log_q).sum())


def inner_score(term: Term, inner: Inner, scope: Scope, order: Order) -> Tensor:
    """Zero-valued surrogate for a site inside an order-alpha bound (VIMCO), a scalar."""
    signal = inner.size * leave_one_out(inner.log_w.detach(), order)
    return zero((signal * fold(density(term), term, scope)).sum())


def outer_score(term: Term, value: Tensor, others: list[Tensor], baseline: Baseline) -> Tensor:
    """Zero-valued surrogate for a site drawn once per bound: the whole bound is its signal."""
    signal = value.detach()
    if others:
        signal = signal - torch.stack(others).detach().mean()
    else:
        signal = baseline.centred(term.name, signal)
    log_q = density(term)
    return zero(signal * log_q.reshape(len(log_q), -1).sum(1).mean())


def control(terms: Terms, scope: Scope, factor: float) -> Tensor:
    """Zero-valued mean over draws of the inner log q, at fixed draws, through the outer ones."""
    total = sum((fold(density(t), t, scope).mean(0).sum() for t in terms), start=torch.zeros(()))
    return zero(factor * total)


def density(term: Term) -> Tensor:
    """The density that draws follow: never scaled, never masked."""
    known = term.guide_density()
    sides = [site.q for site in term.sites if site.q is not None]
    if all(side.mask is None or side.mask is True for side in sides):
        return known
    parts = [side.fn.log_prob(side.value) for side in sides]
    log_q = parts[0] if len(parts) == 1 else torch.stack(parts)
    return log_q.expand(known.shape)


def zero(x: Tensor) -> Tensor:
    """A term of value 0 that keeps the gradient."""
    return x - x.detach()
