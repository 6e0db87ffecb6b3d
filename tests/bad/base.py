"""One bad input: the call, what it deserves, and what makes it right."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pyro
import pyro.distributions as dist
from torch import Tensor

import pvi
from tests.scenarios import param, positive, randn

SIZE = 20


@dataclass(frozen=True)
class BadInput:
    """A call that deserves an error, or that looks odd but is taken.

    Args:
        call: arguments of `pvi.fit`.
        error: what it must raise; `None` if it is accepted, `how` then says how it is taken.
        culprit: the word that the message must hold: the site or the argument at fault.
        names: regular expressions that it must contain as well: what came, and the way out.
        mend: arguments that make the same call right; `use` is then what is done with the fit.
        use: what is done with the fit, where the mistake lies there.
        pyro: whether plain Pyro can be given the same programs and data.
    """

    call: dict[str, Any]
    error: type[Exception] | None = None
    culprit: str = ""
    names: tuple[str, ...] = ()
    mend: dict[str, Any] = field(default_factory=dict)
    use: Callable[[pvi.Fit], Any] | None = None
    how: str = ""
    pyro: bool = True

    def fit(self, **changes: Any) -> pvi.Fit:
        """Three steps of `pvi.fit`, on data that are right where the call has none."""
        call = {"model": model, "steps": 3, "seed": 0, **self.call, **changes}
        call.setdefault("data", data())
        return pvi.fit(**call)

    def run(self) -> Any:
        """The bad call, and the use of its fit."""
        fitted = self.fit()
        return fitted if self.use is None else self.use(fitted)

    def mended(self) -> pvi.Fit:
        """The same call, put right."""
        return self.fit(**self.mend)


def model(x: Tensor, y: Tensor | None = None) -> None:
    w = pyro.sample("w", dist.Normal(0.0, 1.0))
    with pyro.plate("data", len(x)):
        pyro.sample("y", dist.Normal(w * x, 1.0), obs=y)


def guide(x: Tensor, y: Tensor | None = None) -> None:
    pyro.sample("w", dist.Normal(param("w_loc", 0.1), positive("w_scale", 0.3)))


def data() -> tuple[Tensor, Tensor]:
    return randn(SIZE), randn(SIZE, seed=1)


def changed(position: int, index: int, value: float) -> tuple[Tensor, Tensor]:
    """The data with one other number."""
    rows = data()
    rows[position][index] = value
    return rows


TABLE: dict[str, dict[str, Callable[[], BadInput]]] = {}


def row(group: str, name: str) -> Callable[[Callable[[], BadInput]], Callable[[], BadInput]]:
    """Enter a function that makes a `BadInput` in the table."""

    def enter(make: Callable[[], BadInput]) -> Callable[[], BadInput]:
        rows = TABLE.setdefault(group, {})
        if name in rows:
            raise ValueError(f"two rows named {name!r}")
        rows[name] = make
        return make

    return enter
