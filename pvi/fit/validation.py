"""The bound of data that are not trained on, and the parameters at which it was best."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pvi.engine.checks import check, check_values
from pvi.engine.data import Batch, Data, as_data
from pvi.engine.items import ItemData
from pvi.errors import DataError, FitError, GuideError, ModelError
from pvi.fit.locate import is_numeric
from pvi.fit.random import kept_random
from pvi.fit.storage import Tree

SEED = 0  # the same draws each time, so that two validations differ by the parameters alone
LEAST = 50  # steps between two validations, unless a number was given


class Validation:
    """Evaluates the objective on the validation data as they stand, and remembers the best.

    $$\\text{validation bound} = \\sum_b \\frac{n_b}{N} L_b,$$
    where $L_b$ is the bound of a part of $n_b$ rows scaled to all $N$ of the validation data: the
    log likelihood and local KLs of every row once, and global KLs once. Without gradients, in
    evaluation mode, with the same random draws each time and outside of the fit's random stream.
    Several processes take a share of each part.

    Args:
        task: the fit's trainer.
        data: the validation data.
        every: steps between two validations; `None` for once an epoch, but not more often than
            every 50 steps.
        patience: validations without a better bound that end the fit; `None` for no end, and then
            the parameters of the last step are kept.

    Raises:
        DataError, ModelError, GuideError: model or guide can't be evaluated on these data.
    """

    def __init__(self, task: Any, data: Data, every: int | None, patience: int | None):
        self._task, self._patience = task, patience
        self._data = replace(data, own_loader=None) if isinstance(data, ItemData) else data
        self.every = every or max(task.steps_per_epoch, LEAST)
        self.step, self.bound, self.waited = 0, -math.inf, 0  # of the best; validations since
        self.values: dict[str, Tensor] = {}
        self._check()

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self._patience is not None and self.waited >= self._patience

    @property
    def keeps_best(self) -> bool:
        """Whether the best parameters are kept, to be restored."""
        return self._patience is not None

    def evaluate(self, step: int) -> float:
        """The bound of all validation data at the present parameters, nats.

        Args:
            step: how many steps were done, for schedules.
        """
        task = self._task
        tensors = task.params.tensors().values()
        task.team.broadcast(x for x in tensors if not x.requires_grad)
        with kept_random(self._data.loader), torch.no_grad(), task.params.evaluation():
            torch.manual_seed(SEED)
            try:
                total = self._sum(step)
            except (RuntimeError, ValueError) as error:
                if not is_numeric(error):
                    raise
                total = math.nan
        return task.team.mean(total)

    def _sum(self, step: int) -> float:
        """Over the parts, of this process's share in them."""
        total = torch.zeros(())
        for batch, share in self._parts():
            total = total + share * batch.weight * self._task.evaluate(batch, step).bound
        return float(total)

    def update(self, step: int) -> float:
        """Evaluate, and keep the parameters if the bound is the best so far.

        Args:
            step: how many steps were done.

        Returns:
            The bound, nats.
        """
        bound = self.evaluate(step)
        if bound > self.bound:
            self.step, self.bound, self.waited = step, bound, 0
            if self.keeps_best:
                tensors = self._task.params.tensors()
                self.values = {name: x.detach().clone() for name, x in tensors.items()}
        else:
            self.waited += 1
        return bound

    def restore_best(self, step: int) -> str:
        """Put the best parameters and buffers in place; what was done, or "".

        Args:
            step: how many steps were done.
        """
        if not self.values or self.step == step:
            return ""
        with torch.no_grad():
            for name, x in self._task.params.tensors().items():
                if name in self.values:
                    x.copy_(self.values[name])
        return (
            f"the parameters are those of step {self.step}, where the validation bound was best "
            f"({self.bound:.6g} nats)"
        )

    def reason(self) -> str:
        """Why training ended, once patience has."""
        return (
            f"stopped early: {self.waited} validations in a row were not above the validation "
            f"bound of step {self.step} ({self.bound:.6g} nats), whose parameters were restored"
        )

    def state(self) -> Tree:
        """What changes in training, as plain data."""
        counts = {"step": self.step, "bound": self.bound, "waited": self.waited}
        return {**counts, "values": dict(self.values)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from an earlier `state`.

        Args:
            state: from `state`.
        """
        self.step, self.bound, self.waited = state["step"], state["bound"], state["waited"]
        here = self._task.params.tensors()
        self.values = {n: x.to(here[n]) if n in here else x for n, x in state["values"].items()}

    def described(self) -> dict[str, Any]:
        """What decides its part in a fit, as plain data."""
        marks = self._data.fingerprint()
        return {f"validation_data '{name}'": mark for name, mark in marks.items()}

    def _parts(self) -> Iterator[tuple[Batch, float]]:
        """The rows in order in parts of about the batch size, each with its share of all."""
        data, size, team = self._data, self._data.size, self._task.team
        if self._task.batched is None:
            yield Batch(*data.whole(), None, size), 1.0
            return
        yield from data.parts(self._task.batch_size or size, team.part)

    def _check(self) -> None:
        """Run both programs on some of the rows, another number than there are training data."""
        task, data = self._task, self._data
        if data.size == 0:
            raise DataError("validation_data has no rows. Give it in the form of data=.")
        if task.batched is not None and not task.batched._plates:
            raise ModelError(
                "the model subsamples by itself, from a plate of fixed size, so it can't be "
                "evaluated on validation_data. Use plates of the length of the arguments, and "
                "batch_size."
            )
        if task.batched is None and not data.fits:
            raise DataError(
                "validation_data are read in pieces, but the fit takes all rows at once: give "
                "batch_size=, or validation_data as tensors."
            )
        task.team.check_same(data, task.batch_size)
        check_values(data.named())
        rows = data.shown - (data.shown == task.data.size and data.shown > 1)
        part = torch.arange(rows, device=data.device)
        args, kwargs = data.rows(part)
        try:
            with task.params.scope(), task.params.evaluation():
                check(task.model, task.guide, args, kwargs, data.named())
        except DataError as error:
            raise DataError(f"validation_data: {error}") from error
        except (GuideError, RuntimeError, IndexError) as error:
            raise GuideError(
                f"model and guide can't be evaluated on {rows} rows of validation_data: "
                f"{str(error).splitlines()[0]} A guide with parameters for each row of the "
                "training data has none for other rows: use pvi.guides.Amortized for such latents, "
                "or fit without validation_data."
            ) from error


def read_held(
    data: Any,
    args: tuple,
    kwargs: Mapping[str, Any] | None,
    model: Any,
    device: Any,
    batch_size: int | None,
) -> Data:
    """Read `validation_data=` outside of the fit's random stream, see `as_data`.

    Raises:
        DataError: as there.
    """
    try:
        with kept_random(data if isinstance(data, DataLoader) else None):
            return as_data(data, args, kwargs, model, device, batch_size=batch_size)
    except DataError as error:
        raise DataError(f"validation_data: {error}") from error


def make_validation(task: Any, data: Data | None, options: Any) -> Validation | None:
    """The validation of a fit, or `None` without data.

    Args:
        task: the fit's trainer.
        data: the validation data.
        options: the `Options` of the fit.

    Raises:
        FitError: options that need validation data, without them.
    """
    if data is not None:
        return Validation(task, data, options.validate_every, options.patience)
    for name in ("validate_every", "patience"):
        if getattr(options, name) is not None:
            raise FitError(f"{name}= is about the validation bound: give validation_data=")
    return None
