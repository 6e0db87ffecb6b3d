"""What was recorded at each step of a fit."""

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

ALWAYS = ("bound", "loss", "lr", "grad_norm")
WINDOW = 100  # steps in a smoothed value
DERIVED = "bound_se"


class Row:
    """The numbers of one step, still on their device until someone asks for them.

    Args:
        names: of the entries of `tensor`.
        tensor: numbers `(len(names),)`.
        more: numbers that are known already; the step may add to it until it ends.
    """

    __slots__ = ("more", "names", "numbers", "tensor")

    def __init__(self, names: tuple[str, ...], tensor: Tensor, more: dict[str, float]):
        self.names, self.tensor, self.more = names, tensor, more
        self.numbers: dict[str, float] | None = None

    def values(self) -> dict[str, float]:
        """All numbers by name; a row that was not read yet is transferred alone."""
        read([self])
        return {**(self.numbers or {}), **self.more}


def read(rows: Sequence[Row]) -> None:
    """Transfer rows from their device, those of equal entries in one go."""
    waiting = [row for row in rows if row.numbers is None]
    while waiting:
        names = waiting[0].names
        same = [row for row in waiting if row.names == names]
        waiting = [row for row in waiting if row.names != names]
        numbers = (
            [same[0].tensor.tolist()]
            if len(same) == 1
            else torch.stack([row.tensor for row in same]).tolist()
        )
        for row, values in zip(same, numbers, strict=True):
            row.numbers = dict(zip(names, values, strict=True))


class History:
    """One entry a step, as arrays by name: `history["bound"]`.

    - `bound`: that of the objective at weight 1 for every KL and without penalties, whatever was
      minimised as `loss`; `log_likelihood` and `kl/SITE` are its parts and `penalty` the sum of all
      `pvi.penalty`; all in nats, for the whole data. They are Monte Carlo values of one step (the
      mean over the batches of an accumulated one).
    - `bound_se`: the standard error of the mean of `bound` over the 100 steps around a step, nats:
      of the noise of draws and batches together. See `smoothed`.
    - `validation_bound`: of all validation data, nats; NaN at steps where it was not evaluated.
    - `adversary/NAME/loss`, `/term` and `/weight` of each `pvi.Adversary`.
    - `lr`: the rate of the first group of parameters; `grad_norm`: the norm of the whole gradient,
      before it was clipped; `seconds`: how long the step took, with its data, without callbacks,
      validation and checkpoints (on a GPU some steps carry the waiting of others: average them).

    A step whose loss or gradient was not finite has these values here and changed nothing.
    """

    def __init__(self) -> None:
        self._values: dict[str, list[float]] = {name: [] for name in ALWAYS}
        self._length = 0
        self._pending: list[Row] = []

    @classmethod
    def of(cls, columns: Mapping[str, Tensor]) -> "History":
        """The inverse of `tensors`.

        Args:
            columns: arrays of one length by name.
        """
        history = cls()
        history._values = {name: column.tolist() for name, column in columns.items()}
        history._length = len(history._values["loss"])
        return history

    def tensors(self) -> dict[str, Tensor]:
        """The recorded columns in double precision, for saving."""
        self.settle()
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in self._values.items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Append one step; a name that is new or missing is NaN where it was not recorded.

        Args:
            values: numbers by name.
        """
        self.settle()
        self._append(values)

    def append(self, row: Row) -> None:
        """Append one step that is read from its device later.

        Args:
            row: its numbers.
        """
        self._pending.append(row)

    def extend(self, columns: Mapping[str, Sequence[float]]) -> None:
        """Append several steps.

        Args:
            columns: numbers by name, as many in each as there are steps.
        """
        self.settle()
        count = len(next(iter(columns.values())))
        for name in columns.keys() - self._values.keys():
            self._values[name] = [math.nan] * self._length
        for name, values in self._values.items():
            values.extend(columns.get(name) or [math.nan] * count)
        self._length += count

    def amend(self, values: Mapping[str, float]) -> None:
        """Add numbers to the last step.

        Args:
            values: numbers by name.
        """
        self.settle()
        for name, value in values.items():
            self._values.setdefault(name, [math.nan] * self._length)[-1] = value

    def settle(self) -> None:
        """Read all steps that wait on a device."""
        if self._pending:
            rows, self._pending = self._pending, []
            read(rows)
            for row in rows:
                self._append(row.values())

    def value(self, name: str, index: int) -> float:
        """One number.

        Args:
            name: of a column; NaN where it was never recorded.
            index: of the step, from 0.
        """
        self.settle()
        return self._values[name][index] if name in self._values else math.nan

    def smoothed(self, name: str = "bound", window: int = WINDOW) -> tuple[np.ndarray, np.ndarray]:
        """Means of a column over the steps around each step, and their standard errors.

        $$\\bar x_t = \\frac1n \\sum_{|i - t| \\le w/2} x_i, \\qquad
        se_t^2 = \\frac1n \\cdot \\frac{1}{2(n-1)} \\sum (x_{i+1} - x_i)^2$$

        From differences of neighbours, so that the rise of the bound itself does not count as its
        noise. Works for any objective and number of particles, and holds the noise of batches too.

        Args:
            name: of a column.
            window: steps in a mean, fewer at the ends; values that are not finite are left out.

        Returns:
            Arrays `(steps,)` in the column's unit (nats for the bound); NaN where there is nothing
            to average, or only one value.

        Reference:
            von Neumann, Kent, Bellinson, Hart 1941.

        >>> history = History()
        >>> for bound in (1.0, 2.0, 3.0):
        ...     history.add({"bound": bound})
        >>> mean, se = history.smoothed("bound", 3)
        >>> float(mean[1]), round(float(se[1]), 3)
        (2.0, 0.408)
        """
        return smoothed(self[name], window)

    def clear(self) -> None:
        """Forget all steps."""
        self._values, self._length, self._pending = {name: [] for name in ALWAYS}, 0, []

    @property
    def losses(self) -> list[float]:
        """The loss at every step."""
        self.settle()
        return self._values["loss"]

    def __getitem__(self, name: str) -> np.ndarray:
        self.settle()
        if name == DERIVED:
            return self.smoothed("bound")[1]
        if name not in self._values:
            raise KeyError(f"'{name}' was not recorded; there are {', '.join(self.keys())}")
        return np.asarray(self._values[name])

    def __len__(self) -> int:
        return self._length + len(self._pending)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> tuple[str, ...]:
        """The names of the columns."""
        self.settle()
        return (*self._values, DERIVED)

    def kl(self) -> dict[str, np.ndarray]:
        """The KL of each latent site at every step, nats."""
        return {n.removeprefix("kl/"): self[n] for n in self.keys() if n.startswith("kl/")}

    def _append(self, values: Mapping[str, float]) -> None:
        for name in values:
            if name not in self._values:
                self._values[name] = [math.nan] * self._length
        for name, column in self._values.items():
            column.append(values.get(name, math.nan))
        self._length += 1


def smoothed(values: np.ndarray, window: int) -> tuple[np.ndarray, np.ndarray]:
    """See `History.smoothed`.

    Args:
        values: one a step.
        window: steps in a mean.
    """
    at, known = np.arange(len(values)), np.isfinite(values)
    low = np.maximum(at - window // 2, 0)
    high = np.minimum(at + (window + 1) // 2, len(values))
    center = float(np.median(values[known])) if known.any() else 0.0
    mean, count = _means(np.where(known, values - center, 0.0), known, low, high)
    both = known[1:] & known[:-1]
    steps = np.where(both, np.diff(np.where(known, values, 0.0)), 0.0)
    square, pairs = _means(steps**2, both, low, np.maximum(high - 1, low))
    with np.errstate(invalid="ignore", divide="ignore"):
        se = np.sqrt(0.5 * np.maximum(square, 0.0) / count)
    return mean + center, np.where(pairs > 0, se, np.nan)


def _means(
    values: np.ndarray, known: np.ndarray, low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Means of the known values at `low <= i < high`, and how many there are."""
    sums, counts = (np.concatenate([[0.0], np.cumsum(x)]) for x in (values, known))
    count = counts[high] - counts[low]
    with np.errstate(invalid="ignore", divide="ignore"):
        return (sums[high] - sums[low]) / count, count
