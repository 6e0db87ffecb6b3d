"""How guides of the tests draw: at random, or from a table that fixes every particle's noise."""

import math
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

ROWS = 32  # of a table: more than one evaluation needs


def at_random(name: str, fn: Any, event: int = 0, table: Any = None, **options: Any) -> Tensor:
    return pyro.sample(name, fn.to_event(event), **options)


class Recorder:
    """Draw normals at random, and keep the noise of each one's last draws."""

    def __init__(self) -> None:
        self.draws: dict[str, Tensor] = {}

    def __call__(self, name: str, fn: Any, event: int = 0, **options: Any) -> Tensor:
        value = at_random(name, fn, event, **options)
        self.draws[name] = ((value - fn.loc) / fn.scale).detach()
        return value

    def noise(self) -> Tensor:
        """First and second powers less their means, averaged over particles: of mean 0."""
        powers = [p for e in self.draws.values() for p in (e, e**2 - 1)]
        return torch.cat([p.reshape(-1, p.shape[-1] if p.dim() else 1).mean(0) for p in powers])


class Taped(dist.Normal):
    """A normal with its noise from a function of the shape."""

    def __init__(self, loc: Tensor, scale: Tensor, noise: Callable[[torch.Size], Tensor]):
        self.noise = noise
        super().__init__(loc, scale, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "Taped":
        return Taped(self.loc.expand(batch_shape), self.scale.expand(batch_shape), self.noise)

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + self.scale * self.noise(self.batch_shape)


class TapedCoin(dist.Bernoulli):
    """A Bernoulli that compares its probability with the noise's rank."""

    def __init__(self, logits: Tensor, noise: Callable[[torch.Size], Tensor]):
        self.noise = noise
        super().__init__(logits=logits, validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> "TapedCoin":
        return TapedCoin(self.logits.expand(batch_shape), self.noise)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return (self.probs > torch.special.ndtr(self.noise(self.batch_shape))).to(self.probs)


class Tape:
    """The same draws for particles in a batch as for particles one by one.

    A run of the guide is known by the random state in which it starts: a second run from the same
    state (as `path` makes) is the same particle. The n-th new run gets row n of every site's table,
    a batched run as many rows as it has particles.
    """

    def __init__(self, nesting: int):
        self.nesting, self.runs, self.row = nesting, {}, 0

    def start(self) -> None:
        self.row = self.runs.setdefault(float(torch.rand(())), len(self.runs))

    def rewind(self) -> None:
        self.runs.clear()

    def sample(
        self, name: str, fn: Any, event: int = 0, table: Tensor | None = None, **options: Any
    ) -> Tensor:
        """`table` `(rows, *batch, *event)` in place of numbers that depend on the name only."""
        noise = partial(self._noise, name, event, table)
        taped = Taped(fn.loc, fn.scale, noise) if fn.has_rsample else TapedCoin(fn.logits, noise)
        return pyro.sample(name, taped.to_event(event), **options)

    def _noise(self, name: str, event: int, table: Tensor | None, shape: torch.Size) -> Tensor:
        batched = len(shape) - event > self.nesting
        if table is None:
            generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
            numel = math.prod(shape[1:] if batched else shape)
            table = torch.randn(ROWS, numel, generator=generator)
        rows = table[self.row : self.row + shape[0]] if batched else table[self.row]
        return rows.reshape(shape)
