"""Where a number that is not finite began: which parameter, site and row of the data."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pyro
import torch
from pyro import poutine
from torch import Tensor

from pvi.engine.data import Batch
from pvi.engine.terms import Term
from pvi.engine.traces import rng_at
from pvi.errors import PviError

Input = tuple[Batch, list[Tensor]]  # a batch, and the random state before it was evaluated
SIGNS = ("Expected parameter", "Expected value argument", "probability tensor contains")


@dataclass(frozen=True)
class Place:
    """Where it began.

    Args:
        text: for a message: "site 'y' has a log density that is nan at row 17 of the data".
        key: the same for faults of one site or parameter, and of one row where that is known.
        row: number of the row in the data, where it is known and few others are bad.
        hidden: whether it is at a row whose number is not known, as with a `DataLoader`.
    """

    text: str
    key: str
    row: int | None = None
    hidden: bool = False


def is_numeric(error: Exception) -> bool:
    """Whether an error only says that some number is bad, as torch's checks of parameters do.

    Args:
        error: what running the programs has raised.
    """
    if isinstance(error, PviError):
        return False
    return isinstance(error, torch.linalg.LinAlgError) or str(error).startswith(SIGNS)


def of_record(record: Mapping[str, float]) -> Place:
    """What the numbers of a step alone can tell.

    Args:
        record: bound, loss, log likelihood, KLs and norm of the gradient of a step.
    """
    for name, value in record.items():
        if name.startswith("kl/") and not math.isfinite(value):
            site = name.removeprefix("kl/")
            return Place(f"site '{site}' has a KL that is {_word(value)}", f"site {site}")
    if not math.isfinite(record.get("log_likelihood", 0.0)):
        value = record["log_likelihood"]
        return Place(f"the log likelihood is {_word(value)}", "likelihood")
    if math.isfinite(record["loss"]):
        return Place("the gradient is not finite", "gradient")
    return Place("the loss is not finite", "loss")


class Search:
    """Runs a step again, with the same noise, and looks at every number on the way.

    Nothing that it runs changes the fit: buffers, baselines, gradients and random states are put
    back.

    Args:
        task: the fit's trainer.
        step: how many steps were done before.
    """

    def __init__(self, task: Any, step: int):
        self._task, self._step = task, step
        plates = getattr(task.batched, "_plates", None)
        self._plates: frozenset[str] = plates or frozenset()

    def place(self, inputs: Sequence[Input]) -> Place | None:
        """Where the step's first bad number is; `None` if all are finite this time.

        Args:
            inputs: the batches of the step.
        """
        bad = first_bad(self._task.params.tensors())
        if bad is not None:
            return replace(bad, text=f"{bad.text} after the last update")
        with self._kept(), pyro.validation_enabled(False):
            for batch, rng in inputs:
                with rng_at(rng):
                    found = self._in_batch(batch)
                if found is not None:
                    return found
        return None

    def _in_batch(self, batch: Batch) -> Place | None:
        start = torch.get_rng_state()
        try:
            value = self._task.evaluate(batch, self._step)
        except (RuntimeError, ValueError) as error:
            torch.set_rng_state(start)
            return self._in_error(batch, error)
        for term in (*value.terms, *value.terms.penalties):
            found = self._in_term(term, batch)
            if found is not None:
                return found
        if not bool(value.loss.isfinite()):
            return Place("the loss is not finite, though each site's part of it is", "loss")
        found = self._in_gradient(value)
        if found is None:
            return None
        torch.set_rng_state(start)
        return self._at_row(found.text, found.key, self._bad_rows(batch), batch)

    def _in_term(self, term: Term, batch: Batch) -> Place | None:
        """A site whose draw or density is bad."""
        for site in term.sites:
            if site.q is not None and site.q.value.is_floating_point():
                bad = site.q.value.detach()
                if not bool(bad.isfinite().all()):
                    text = f"site '{term.name}' is drawn as {_word(_first(bad))}"
                    return Place(text, f"site {term.name}")
        named = {
            "log density": term.log_p,
            "log density in the guide": term.log_q,
            "KL" if term.kind == "latent" else "value": term.kl,
        }
        for what, x in named.items():
            if x is not None and not bool(x.isfinite().all()):
                text = f"site '{term.name}' has a {what} that is {_word(_first(x.detach()))}"
                rows = _rows_of(x, term, self._plates, self._task.data.size)
                return self._at_row(text, f"site {term.name}", rows, batch)
        return None

    def _at_row(self, text: str, key: str, rows: Sequence[int], batch: Batch) -> Place:
        """Add the number of the first bad row, in the whole data where that is known."""
        if not rows:
            return Place(text, key)
        more = f" (and {len(rows) - 1} more)" if len(rows) > 1 else ""
        if self._task.data.loader is not None:
            team = self._task.team
            share = "" if team.alone else f"the share of process {team.rank} of "
            return Place(f"{text} at row {rows[0]} of {share}its batch{more}", key, hidden=True)
        first = rows[0] if batch.indices is None else int(batch.indices[rows[0]])
        text = f"{text} at row {first} of the data{more}"
        size = self._task.data.size if batch.indices is None else len(batch.indices)
        if 2 * len(rows) > size > 1:  # no matter of single rows
            return Place(text, key)
        return Place(text, f"{key} row {first}", first)

    def _in_gradient(self, value: Any) -> Place | None:
        """The parameter with the first bad gradient, and the site that it comes from."""
        named = {n: x for n, x in self._task.params.tensors().items() if x.requires_grad}
        name = _bad_gradient(value.loss, named)
        if name is None:
            return None
        text, key = f"the gradient of parameter '{name}' is not finite", f"parameter {name}"
        for term in value.terms:
            total = term.per_particle().sum()
            if total.requires_grad and _bad_gradient(total, {name: named[name]}):
                return Place(f"{text}, from site '{term.name}'", f"{key} site {term.name}")
        return Place(text, key)

    def _bad_rows(self, batch: Batch) -> list[int]:
        """Rows of the batch through which no finite gradient flows.

        A program that can't be run on data with gradients just does not tell.
        """
        batch, rows = _watched(batch)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                loss = self._task.evaluate(batch, self._step).loss
            grads = torch.autograd.grad(loss, rows, allow_unused=True) if rows else ()
        except (RuntimeError, ValueError, TypeError):
            return []
        for x in (g for g in grads if g is not None):
            bad = ~x.isfinite().reshape(len(x), -1).all(1)
            if bool(bad.any()):
                return bad.nonzero().flatten().tolist()
        return []

    def _in_error(self, batch: Batch, error: Exception) -> Place:
        """The site after which a program raises an error."""
        text = str(error).splitlines()[0].rstrip(".: ")
        given: Any = None
        for role, program in zip(("guide", "model"), reversed(self._task.programs), strict=True):
            tracer = poutine.trace(program if given is None else poutine.replay(program, given))
            try:
                given = tracer.get_trace(*batch.args, **batch.kwargs)
            except (RuntimeError, ValueError):
                last = [n for n, x in tracer.trace.nodes.items() if x["type"] == "sample"]
                where = f"after its site '{last[-1]}'" if last else "before its first site"
                return Place(f"the {role} fails {where} ({text})", f"{role} {last[-1:]}")
        return Place(f"the objective fails ({text})", "objective")

    @contextmanager
    def _kept(self) -> Iterator[None]:
        params, baseline = self._task.params, self._task.baseline()
        tensors = params.tensors().values()
        buffers = [(x, x.detach().clone()) for x in tensors if not x.requires_grad]
        means = dict(baseline.means)
        try:
            yield
        finally:
            baseline.means = means
            with torch.no_grad():
                for x, kept in buffers:
                    x.copy_(kept)


def first_bad(tensors: Mapping[str, Tensor]) -> Place | None:
    """The first parameter that is not finite; buffers follow what runs through them.

    Args:
        tensors: parameters and buffers by name.
    """
    for name, x in tensors.items():
        if x.requires_grad and not bool(x.isfinite().all()):
            text = f"parameter '{name}' is {_word(_first(x.detach()))}"
            return Place(text, f"parameter {name}")
    return None


def _rows_of(x: Tensor, term: Term, plates: frozenset[str], size: int) -> list[int]:
    """The bad elements of the plate of the data, by their places in the batch."""
    for plate in term.plates:
        dim = plate.dim
        own = plate.name in plates if plates else size > 0 and plate.size == size
        if own and dim is not None and x.dim() >= -dim and x.shape[dim] > 1:
            bad = (~x.detach().isfinite()).movedim(dim, 0).reshape(x.shape[dim], -1).any(1)
            return bad.nonzero().flatten().tolist()
    return []


def _watched(batch: Batch) -> tuple[Batch, list[Tensor]]:
    """The batch with rows whose gradients are kept, to tell which of them has a bad one."""
    rows: list[Tensor] = []

    def watch(x: Any) -> Any:
        if isinstance(x, Tensor) and x.dim() > 0 and x.is_floating_point():
            rows.append(x.detach().clone().requires_grad_())
            return rows[-1]
        return x

    args = tuple(watch(x) for x in batch.args)
    kwargs = {key: watch(x) for key, x in batch.kwargs.items()}
    return replace(batch, args=args, kwargs=kwargs), rows


def _bad_gradient(loss: Tensor, named: Mapping[str, Tensor]) -> str | None:
    """The first parameter whose gradient is not finite."""
    leaves = list(named.values())
    grads = torch.autograd.grad(loss, leaves, retain_graph=True, allow_unused=True)
    for name, grad in zip(named, grads, strict=True):
        if grad is not None and not bool(grad.isfinite().all()):
            return name
    return None


def _first(x: Tensor) -> float:
    """The first number that is not finite."""
    return float(x[~x.isfinite()].flatten()[0])


def _word(value: float) -> str:
    return "NaN" if math.isnan(value) else "infinite" if value > 0 else "minus infinite"
