"""Latents that belong to single rows: whether the guide fits each row's posterior.

Where the model and the guide factorise over plates, given the latents outside, every element has
weights of its own. They stay meaningful where the joint ones, their product, degenerate.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pvi.diagnostics.evidence import MAX_BAD, prepared_posterior
from pvi.diagnostics.table import MAX_DIM, Row, rows_of, spelled
from pvi.diagnostics.weights import Target
from pvi.errors import DataError, ModelError, ObjectiveError
from pvi.posterior.psis import khat_threshold, psis
from pvi.progress import progress

WORK, MEMORY = 2 * 10**9, 10**8  # numbers that all draws make in all, and that are kept
FEWEST = 200  # draws: with fewer a tail index says too little
MAX_ELEMENTS = 500  # evenly spaced, whose tails are looked at
GIVEN, INNER = 3, 2000  # draws of the latents outside, and of those inside for each
MOVES = 0.1  # sds, and relative change of an sd


@dataclass(frozen=True)
class Element:
    """One element of the plates under its own weights; shift and sd_ratio of its worst scalar.

    Attributes:
        name: Such as "data[3]".
        khat: Tail index of its weights; given latents outside the plates the median over 3 draws.
        ess: Relative effective sample size, likewise.
        shift: (psis_mean - mean) / sd; NaN given latents outside.
        sd_ratio: psis_sd / sd; NaN given latents outside.
    """

    name: str
    khat: float
    ess: float
    shift: float = math.nan
    sd_ratio: float = math.nan


@dataclass(frozen=True)
class Elements:
    """What the weights of single elements say.

    Args:
        nested: whether there are latents outside the plates, which were held at a few draws.
        total: elements that there are, of which `items` are looked at.
        rows: scalars of these, at most 1,000; none if nested.
        numbers: bound, bound_se, evidence, sd_log_ratio of all data, nats; none if nested.
    """

    plate: str
    nested: bool
    total: int
    num_draws: int
    items: tuple[Element, ...]
    rows: tuple[Row, ...] = ()
    numbers: dict[str, float] | None = None

    @property
    def failing(self) -> list[Element]:
        """Those whose weights can't correct the draws, the worst first."""
        limit = khat_threshold(self.num_draws)
        bad = [e for e in self.items if not (e.khat < limit and e.ess >= 0.1)]
        return sorted(bad, key=lambda e: (e.ess, -e.khat))

    @property
    def moved(self) -> list[Element]:
        """Those whose draws the weights move, the worst first."""
        size = {e.name: max(abs(e.shift), abs(e.sd_ratio - 1)) for e in self.items}
        return sorted((e for e in self.items if size[e.name] >= MOVES), key=lambda e: -size[e.name])

    def many(self, found: list[Element]) -> bool:
        return len(found) > MAX_BAD * len(self.items)

    def share(self, found: list[Element]) -> str:
        """Such as "2 of 200 elements of 'data' (worst: data[7], data[1])"."""
        worst = ", ".join(e.name for e in found[:3])
        of = f" ({self.total:,} in all)" if self.total > len(self.items) else ""
        named = f" (worst: {worst})" if worst else ""
        return f"{len(found):,} of {len(self.items):,} elements of '{self.plate}'{of}{named}"


def elements(posterior: Any, num_draws: int, seed: int) -> Elements | None:
    """The weights of the elements of plates; `None` if the latents do not factorise over any."""
    if getattr(posterior, "guide", None) is None:  # draws alone
        return None
    try:
        with prepared_posterior(posterior, seed) as target:
            if not target.plan.scope.plates:
                return None
            count = min(num_draws, WORK // max(target.size, 1), MEMORY // _inside(target))
            if target.nested:
                return _given(target, min(INNER, count)) if count >= FEWEST else None
            return _alone(target, count) if count >= FEWEST else None
    except (ObjectiveError, ModelError, DataError):  # the joint weights say why
        return None


def _inside(target: Target) -> int:
    """Numbers that are kept of a draw."""
    sizes = [t.tensor.numel() for t in target.latents]
    values = [target.guide_trace.nodes[t.name]["value"].numel() for t in target.latents]
    return max(1, sum(sizes) + sum(values))


def _alone(target: Target, num: int) -> Elements:
    """Without latents outside: every element's posterior by itself."""
    runs = [target.weighted(k) for k in progress(target.chunks(num), "weights")]
    log_w = torch.cat([log_w for *_, log_w in runs]).cpu()
    shape, flat = log_w.shape[1:], log_w.reshape(num, -1)
    picked = _picked(flat.shape[1])
    found = [psis(flat[:, i]) for i in progress(picked.tolist(), "tails")]
    weights = torch.stack([f.log_weights for f in found], 1).exp()
    names, owner, x = _columns(target, [values for values, *_ in runs], shape, picked)
    rows = rows_of(names, x, weights[:, owner]) if names else ()
    worst = _worst(rows, owner, len(found))
    labels = _labels(target, shape, picked)
    items = tuple(
        Element(name, f.khat, f.ess / num, *extreme)
        for name, f, extreme in zip(labels, found, worst, strict=True)
    )
    inside = bool(flat.isfinite().all())  # the model's support
    sd = flat.var(0).sum().sqrt().item() if inside else math.inf
    log_mean = torch.logsumexp(flat, 0).sum().item() - flat.shape[1] * math.log(num)
    numbers = {
        "bound": flat.mean(0).sum().item() + float(target.offset),
        "bound_se": sd / math.sqrt(num),
        "evidence": log_mean + float(target.offset),
        "sd_log_ratio": sd,
    }
    total = flat.shape[1]
    return Elements(_plate(target), False, total, num, items, rows[:MAX_DIM], numbers)


def _given(target: Target, num: int) -> Elements:
    """With latents outside: the elements' posteriors given a few draws of these."""
    khats, sizes = [], []
    shape = target.weights(1)[1].shape[1:]
    picked = _picked(shape.numel())
    for _ in progress(range(GIVEN), "weights given the other latents"):
        outside = target.outer_draw()
        log_w = torch.cat([target.weights(k, outside)[1] for k in target.chunks(num)]).cpu()
        flat = log_w.reshape(num, -1)
        found = [psis(flat[:, i]) for i in picked.tolist()]
        khats.append([f.khat for f in found])
        sizes.append([f.ess / num for f in found])
    khat, ess = (torch.tensor(x).median(0).values.tolist() for x in (khats, sizes))
    names = _labels(target, shape, picked)
    items = tuple(map(Element, names, khat, ess))
    return Elements(_plate(target), True, shape.numel(), num, items)


def _picked(total: int) -> Tensor:
    """Indices of at most 500 elements, evenly spaced."""
    return torch.linspace(0, total - 1, min(total, MAX_ELEMENTS)).round().long()


def _plate(target: Target) -> str:
    return ", ".join(sorted(target.plan.scope.plates))


def _labels(target: Target, shape: torch.Size, picked: Tensor) -> list[str]:
    places = torch.stack(torch.unravel_index(picked, shape), 1).tolist()
    long = [d for d, size in enumerate(shape) if size > 1] or [len(shape) - 1]
    return [f"{_plate(target)}{[place[d] for d in long]}" for place in places]


def _columns(
    target: Target, values: list[dict[str, Tensor]], shape: torch.Size, picked: Tensor
) -> tuple[list[str], Tensor, Tensor]:
    """Names, position of their element among those picked, and draws `(S, D)` of the scalars of
    these elements.
    """
    position = torch.full((shape.numel(),), -1)
    position[picked] = torch.arange(len(picked))
    names: list[str] = []
    owners, columns = [], []
    for name in values[0]:
        draws = torch.cat([v[name] for v in values])
        event = target.guide_trace.nodes[name]["fn"].event_dim
        batch = draws.shape[1 : draws.dim() - event]
        owner = position.reshape(shape).expand(torch.broadcast_shapes(shape, batch))
        owner = owner.reshape(*owner.shape, *[1] * event).expand(
            *owner.shape, *draws.shape[draws.dim() - event :]
        )
        kept = (owner.reshape(-1) >= 0).nonzero()[:, 0]
        names += spelled(name, draws.shape[1:], kept)
        owners.append(owner.reshape(-1)[kept])
        columns.append(draws.reshape(len(draws), -1)[:, kept.to(draws.device)].cpu().double())
    return names, torch.cat(owners), torch.cat(columns, 1)


def _worst(rows: tuple[Row, ...], owner: Tensor, count: int) -> Iterator[tuple[float, float]]:
    """Largest shift and change of sd of each element."""
    shift, ratio = [0.0] * count, [1.0] * count
    for row, i in zip(rows, owner.tolist(), strict=True):
        shift[i] = max(shift[i], row.shift, key=abs)
        ratio[i] = max(ratio[i], row.sd_ratio, key=lambda r: abs(r - 1))
    return zip(shift, ratio, strict=True)
