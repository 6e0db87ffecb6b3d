"""`pvi.check`: everything that a fit looks at before its first step, without the fit."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from pvi.engine import Objective
from pvi.engine.checks import Look, examine, raise_first, value_problems
from pvi.engine.data import Batch, is_rows
from pvi.engine.describe import COLUMNS, param_rows, site_rows
from pvi.engine.explain import Explanation
from pvi.engine.params import Params
from pvi.engine.traces import Program, hidden
from pvi.errors import GuideError, PviError
from pvi.fit.arguments import check_options, known_arguments
from pvi.fit.guard import Outline, guarded
from pvi.fit.hints import hints
from pvi.fit.programs import prepare
from pvi.fit.random import kept_random
from pvi.fit.schedule import NOTHING_TO_FIT
from pvi.fit.trainer import Trainer
from pvi.guides import Laplace
from pvi.text import table

MAX_PARAMS = 8  # of each program, in the table


@dataclass(frozen=True, repr=False)
class Check:
    """What `pvi.check` found; printing it shows the table of sites.

    Args:
        problems: the errors that `pvi.fit` would raise, as far as they show before the first step.
        hints: what is no error, but worth a look.
        sites: rows of (site, kind, distribution, batch, event, plates, support, guide, KL).
        notes: objective, data and parameters in a line each.
    """

    problems: tuple[PviError, ...] = ()
    hints: tuple[str, ...] = ()
    sites: tuple[tuple[str, ...], ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether there are no problems."""
        return not self.problems

    def raise_problems(self) -> None:
        """Raise the first problem, if there is one, with the others as notes."""
        raise_first(self.problems)

    def __repr__(self) -> str:
        count = len(self.problems)
        lines = [f"pvi.check: {count or 'no'} problem{'s' * (count != 1)}"]
        for i, problem in enumerate(self.problems, 1):
            lines.append(f"{i}. {type(problem).__name__}: {problem}")
        if self.sites:
            lines += ["", table(COLUMNS, self.sites), ""]
        lines += self.notes
        lines += [f"hint: {hint}" for hint in self.hints]
        return "\n".join(lines).strip()


@dataclass
class _Findings:
    problems: list[PviError] = field(default_factory=list)
    hints: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    look: Look | None = None
    kinds: dict[str, str] = field(default_factory=dict)
    how: dict[str, str] = field(default_factory=dict)
    programs: tuple[Any, Any] = (None, None)

    def result(self) -> Check:
        sites = tuple(self._rows())
        return Check(tuple(self.problems), tuple(self.hints), sites, tuple(self.notes))

    def _rows(self) -> Iterator[tuple[str, ...]]:
        if self.look is None:
            return
        traces = (self.look.model_trace, self.look.guide_trace)
        yield from site_rows(*traces, self.kinds, self.how)
        for program, trace in zip(self.programs, traces, strict=True):
            params = [] if isinstance(program, torch.nn.Module) else list(param_rows(trace))
            yield from params[:MAX_PARAMS]


@known_arguments
def check(
    model: Program,
    guide: Program | None = None,
    data: Any = (),
    *,
    args: tuple = (),
    kwargs: Mapping[str, Any] | None = None,
    objective: Objective | None = None,
    batch_size: int | None = None,
    num_data: int | None = None,
    plate: str | Sequence[str] | None = None,
    reparam: Any = None,
    device: Any = None,
) -> Check:
    """Look at a model, a guide and data as `pvi.fit` does before its first step, and fit nothing.

    All problems that can be seen together are listed together. Nothing is left behind: parameters,
    guides and random states are as they were. The arguments are those of `pvi.fit`. Of data that
    are not in memory, the first rows and one batch are read.

    Returns:
        A `Check`: print it for a table of the sites, with distributions, shapes, plates and
        supports, how each KL is taken and how particles are run; `ok` says whether a fit may start.

    Raises:
        Exception: an error of the programs' own, with a note on where it was raised.

    >>> import pyro, torch, pyro.distributions as dist
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0., 10.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.), obs=y)
    >>> check(model, data=torch.tensor([1., 2., 3.]))
    pvi.check: no problems
    <BLANKLINE>
    site  kind      distribution  batch  event  plates    support  guide   KL
    mu    latent    Normal        ()     ()     -         real     Normal  exact
    y     observed  Normal        (3,)   ()     data (3)  real     -       -
    <BLANKLINE>
    bound: ELBO, 8 particle(s)
    particles: batched
    data: y (3,); all rows in each step
    parameters: 2 numbers in 2 tensors, none of them a network's
    """
    found, outline = _Findings(), Outline(model, guide)
    try:
        found.problems += check_options(
            model, guide, objective, device=device, plate=plate, batch_size=batch_size
        )
        if not found.problems:
            with ExitStack() as stack:
                stack.enter_context(kept_random(data if isinstance(data, DataLoader) else None))
                torch.manual_seed(0)
                stack.enter_context(torch.device(device) if device is not None else nullcontext())
                stage = stack.enter_context(guarded(model, guide))
                given = (model, guide, data, args, kwargs, reparam, device)
                programs = prepare(*given, batch_size, num_data)
                stage.data = programs[2]
                _examine(found, *programs)
                if not found.problems:
                    _try(found, Trainer(*programs, objective, batch_size, plate, [], None))
    except PviError as error:
        found.problems.append(error)
    finally:
        outline.restore()
    return found.result()


def _examine(found: _Findings, model: Program, guide: Program, data: Any) -> None:
    """Values, sites and supports."""
    found.programs = model, guide
    named = data.named()
    found.problems += value_problems(named)
    params, (args, kwargs) = Params(model, guide), data.probe()
    with params.scope(), params.evaluation():
        try:
            found.look = look = examine(model, guide, args, kwargs, named)
        except Exception:
            if found.problems:  # of the data, which explain it
                return
            raise
        found.problems += look.problems
        with hidden():
            found.hints += [] if look.problems else hints(named, look.nodes)
    if not params.named() and not isinstance(guide, Laplace):
        found.problems.append(GuideError(NOTHING_TO_FIT))


def _try(found: _Findings, trainer: Trainer) -> None:
    """One evaluation of the objective on a batch, as in the first step."""
    with trainer.params.scope(), trainer.params.evaluation():
        batch = next(trainer.batches())
        value = trainer.evaluate(batch, 0)
        explanation = _explanation(trainer, batch)
        named = trainer.params.named()
        found.hints += _unmoved(value.loss, named)
        networks = sum(x.numel() for n, x in named.items() if trainer.params.is_network(n))
    found.kinds = {row[0]: row[1] for row in explanation.rows if row[1] == "summed out"}
    found.how = {row[0]: row[3] for row in explanation.rows if row[3] != "-"}
    found.notes += [*explanation.notes, _data(trainer, value), _parameters(named, networks)]


def _unmoved(loss: Tensor, named: Mapping[str, Tensor]) -> Iterator[str]:
    """Parameters that the loss does not depend on."""
    if not named:
        return
    if not loss.requires_grad:
        raise GuideError("the loss depends on no parameter, so there is nothing to fit")
    slopes = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    for name, slope in zip(named, slopes, strict=True):
        if slope is None:
            yield f"parameter '{name}' does not reach the loss, so it will stay where it is"


def _explanation(trainer: Trainer, batch: Batch) -> Explanation:
    """What the objective does at each site, on the batch that was evaluated last."""
    try:
        return trainer.now(0).explain(*trainer.programs, *batch.args, **batch.kwargs)
    finally:
        if trainer.batched:
            trainer.batched.select(None)


def _data(trainer: Trainer, value: Any) -> str:
    data = trainer.data
    tensors = {n: tuple(x.shape) for n, x in data.named().items() if isinstance(x, Tensor)}
    if data.partial:  # of which only a probe is there
        rows = {data.names[k] for k, x in data.entries.items() if is_rows(x)}
        tensors |= {n: (data.size, *tensors[n][1:]) for n in rows}
    shapes = ", ".join(f"{n} {shape}" for n, shape in tensors.items())
    if trainer.batch_size is None:
        return f"data: {shapes or 'none'}; all rows in each step"
    plates = {p.name for term in value.terms for p in term.plates if p.scale != 1.0}
    names = ", ".join(f"'{name}'" for name in sorted(plates))
    return (
        f"data: {shapes}; batches of {trainer.batch_size} of {data.size} rows, which plate "
        f"{names} follows"
    )


def _parameters(named: Mapping[str, Tensor], networks: int) -> str:
    count = sum(x.numel() for x in named.values())
    share = f"{networks:,} of them a network's" if networks else "none of them a network's"
    return f"parameters: {count:,} numbers in {len(named):,} tensors, {share}"
