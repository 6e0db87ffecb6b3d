"""Importance weights of draws from a guide, made in chunks and averaged as they come."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pvi.engine.bounds import Scope, split
from pvi.engine.joint import terms_of
from pvi.engine.plan import Plan, make_plan
from pvi.engine.terms import Term, Terms
from pvi.engine.traces import Program, hidden, prior, run, sample_nodes, subset
from pvi.errors import ModelError, ObjectiveError
from pvi.posterior.draws import CHUNK, numbers_in, with_draws
from pvi.posterior.psis import smooth_tail, tail_size

Bar = Callable[[Sequence], Iterable]  # goes through items with a progress bar


@dataclass(frozen=True)
class Target:
    """A model and a guide with their arguments, whose weights $p(x, z) / q(z)$ mean something.

    Args:
        plan: whether draws can be a batch dimension, and what is weighted together.
        size: numbers in the traces of a single draw.
        single: the terms of a single draw.
        guide_trace: of that draw.
    """

    model: Program
    guide: Program
    args: tuple
    kwargs: Mapping
    plan: Plan
    size: int
    single: Terms
    guide_trace: Any

    @property
    def latents(self) -> list[Term]:
        """Terms of the guide's sites."""
        return [t for t in self.single if t.kind in ("latent", "auxiliary")]

    @property
    def nested(self) -> bool:
        """Whether some latents stand outside the plates over which the others factorise."""
        return any(t.name in self.plan.scope.outer for t in self.latents)

    def traces(self, num: int, given: Any = None) -> tuple[Any, Any]:
        """Runs of guide and model for `num` draws, the guide's values taken from `given`."""
        data, plan = (self.args, self.kwargs), self.plan
        guide_trace = run(plan.enumeration.guide(self.guide, num), *data, given)
        return guide_trace, plan.run_model(self.model, *data, guide_trace, num)

    def terms(self, num: int, given: Any = None) -> Terms:
        """The terms of `num` draws."""
        plan, traces = self.plan, self.traces(num, given)
        return terms_of(*traces, num, plan.depth(num), enumeration=plan.enumeration)

    def weights(self, num: int, given: Any = None) -> tuple[Tensor, Tensor]:
        """What stands outside the weights, a scalar, and log weights `(num, *plates)`, nats."""
        return self.weighted(num, given)[1:]

    def weighted(self, num: int, given: Any = None) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """The same after the guide's draws of the latents, `(num, *site shape)` by name.

        Raises:
            ModelError: a weight is NaN or infinite.
        """
        guide_trace, model_trace = self.traces(num, given)
        depth = self.plan.depth(num)
        terms = terms_of(guide_trace, model_trace, num, depth, enumeration=self.plan.enumeration)
        outer, log_w = weights_of(terms, self.plan.scope)
        if bool((log_w.isnan() | log_w.isposinf()).any()) or bool(outer.isnan()):
            raise ModelError(
                "log p - log q is NaN or infinite at draws from the guide: look for an overflow, a "
                "log of 0 or a division by 0 in the model or the guide."
            )
        nodes = self.guide_trace.nodes
        values = {
            t.name: with_draws(
                guide_trace.nodes[t.name]["value"], num, nodes[t.name]["value"].shape
            )
            for t in self.latents
            if t.kind == "latent" and t.name in nodes
        }
        return values, outer.double(), log_w.double()

    @property
    def offset(self) -> Tensor:
        """What observations outside the plates add to every log weight, a scalar, nats."""
        return weights_of(self.single, self.plan.scope)[0] * (not self.nested)

    def joined(self) -> "Target":
        """The same with one weight for all latents, if some stand outside the plates."""
        return replace(self, plan=replace(self.plan, scope=Scope())) if self.nested else self

    def outer_draw(self) -> Any:
        """A trace of the guide's latents outside the plates."""
        trace = run(self.plan.enumeration.guide(self.guide), self.args, self.kwargs)
        return subset(trace, self.plan.scope.outer)

    def chunks(self, num: int, share: int = 1) -> list[int]:
        """Sizes of runs that make exactly `num` draws in bounded memory, or in 1 / share of it."""
        chunk = max(1, CHUNK // share // max(self.size, 1)) if self.plan.vectorized else 1
        return [min(chunk, num - start) for start in range(0, num, chunk)]


def weights_of(terms: Terms, scope: Scope) -> tuple[Tensor, Tensor]:
    """Terms as the part outside the weights, a scalar, and log weights `(K, *plates)`; nats."""
    outer, inner = split(terms, lambda term: 1.0, scope)
    if inner is None:
        raise ObjectiveError("the model has neither a latent nor an observed site")
    return outer, inner.log_w


def make_target(
    model: Program, guide: Program | None, args: tuple, kwargs: Mapping, plan: Plan | None = None
) -> Target:
    """Look at both programs once and refuse those whose weights mean nothing.

    Args:
        guide: `None` for the prior.
        plan: of the same programs with other data of the same shape.

    Raises:
        ObjectiveError: a point (Delta), a subsampled plate, `poutine.scale`, a `pvi.kl`, or an
            auxiliary site without a Delta that restates it.
    """
    guide = prior(model) if guide is None else guide
    plan = plan or make_plan(model, guide, args, kwargs, "auto", average=False)
    with hidden():
        guide_trace = run(plan.enumeration.guide(guide), args, kwargs)
        model_trace = run(plan.enumeration.model(model), args, kwargs, guide_trace)
        terms = terms_of(guide_trace, model_trace, enumeration=plan.enumeration)
    _check(terms, plan.points)
    weights_of(terms, plan.scope)
    size = sum(numbers_in(sample_nodes(trace)) for trace in (guide_trace, model_trace))
    return Target(model, guide, args, kwargs, plan, size, terms, guide_trace)


def _check(terms: Terms, points: frozenset[str]) -> None:
    """Refuse terms whose weights mean nothing, given the guide's sites that are always the same."""
    restated = any(term.point for term in terms)
    for term in terms:
        name = term.name
        if name in points:
            raise ObjectiveError(
                f"the guide is a point (Delta) at site '{name}': it has no density to weight by. "
                "Use a guide with a spread, such as pvi.guides.MeanField."
            )
        if term.certain:
            raise ObjectiveError(
                f"the guide has one value at discrete site '{name}' and no others, so its weights "
                "are all the same: their mean is the bound, and far from the evidence. Report the "
                "bound, pvi.ELBO().bound(model, guide, ...)."
            )
        if term.kind == "auxiliary" and not restated:
            raise ObjectiveError(
                f"the guide's auxiliary site '{name}' determines no latent by a Delta, so log q of "
                "the latents alone is unknown. Sum or integrate it out of the guide."
            )
        for role, scale in (("model", term.scale_p), ("guide", term.scale_q)):
            if isinstance(scale, Tensor) or scale != 1.0:
                raise ObjectiveError(
                    f"poutine.scale is {scale} at site '{name}' in the {role}: a scaled density "
                    "has no evidence. Remove the scale."
                )
        for plate in term.plates:
            if plate.scale != 1.0:
                raise ObjectiveError(
                    f"plate '{plate.name}' is subsampled ({plate.size} of {plate.full_size}) at "
                    f"site '{name}': evidence needs all the data. Run it without subsample_size."
                )


class Tally:
    """Running mean of weights per datum, and what it is worth, in memory for their tails only.

    Args:
        num: how many log weights will be added, K.
    """

    def __init__(self, num: int):
        self.num = num
        self._sums = [torch.tensor(-math.inf)] * 2  # logs of sum w and sum w^2
        self._tail: list[Tensor] = []
        self._size = tail_size(num) + 1

    def add(self, log_w: Tensor) -> None:
        """Add log weights `(k, *plates)`."""
        sums = [torch.logsumexp(power * log_w, 0) for power in (1, 2)]
        self._sums = [torch.logaddexp(a.to(b), b) for a, b in zip(self._sums, sums, strict=True)]
        self._tail.append(log_w)
        if sum(map(len, self._tail)) > 2 * self._size:
            self._tail = [self._largest()]

    def _largest(self) -> Tensor:
        rows = torch.cat(self._tail)
        return rows.topk(min(self._size, len(rows)), 0).values

    def log_mean(self) -> Tensor:
        """Log of the mean weight, `(*plates)`, nats."""
        return self._sums[0] - math.log(self.num)

    def ess(self) -> Tensor:
        """Effective sample size $(\\sum w)^2 / \\sum w^2$, `(*plates)`; 0 if all are 0."""
        return torch.exp(2 * self._sums[0] - self._sums[1]).nan_to_num(0.0)

    def se(self) -> Tensor:
        """Standard error of the log mean by the delta method, `(*plates)`, nats; inf if K = 1."""
        if self.num == 1:
            return torch.full_like(self._sums[0], math.inf)
        return ((self.num / self.ess() - 1) / (self.num - 1)).clamp(min=0).sqrt()

    def khat(self) -> Tensor:
        """Tail index of the weights, `(*plates)`; inf where it cannot be known."""
        top = self._largest().flip(0)
        rows = (top - top[-1]).reshape(len(top), -1).T.cpu()
        found = [smooth_tail(row)[1] if row[-1] == 0 else math.inf for row in rows]
        return torch.tensor(found, dtype=torch.float64).reshape(top.shape[1:])


def guide_weights(target: Target, num_samples: int, num_outer: int, bar: Bar) -> Iterator[Tensor]:
    r"""Chunks `(k, *plates)` of log weights of draws from the guide, nats.

    With latents outside the plates as well, a weight is
    $\frac{p(\theta)}{q(\theta)} \prod_i \frac1K \sum_k w_{ik}$ for a draw of $\theta$.
    """
    chunks = target.chunks(num_samples)
    if not target.nested:
        for num in bar(chunks):
            yield target.weights(num)[1]
        return
    for _ in bar(range(num_outer)):
        yield nested_weight(target, target.outer_draw(), chunks, [])


def nested_weight(
    target: Target, given: Any, chunks: list[int], known: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Log weight `(1,)` of one draw of the latents outside the plates.

    Args:
        given: a trace of that draw.
        chunks: how many inner draws to make, run by run.
        known: what `Target.weights` said of draws that are to be averaged with these.
    """
    runs = known + [target.weights(num, given) for num in chunks]
    log_sum = torch.logsumexp(torch.stack([torch.logsumexp(log_w, 0) for _, log_w in runs]), 0)
    count = sum(len(log_w) for _, log_w in runs)
    return (runs[0][0] + (log_sum - math.log(count)).sum()).reshape(1)
