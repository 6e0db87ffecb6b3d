"""`objective(model, guide)` modules for loops of one's own, run by a captured graph."""

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import torch
from pyro.infer.elbo import ELBOModule
from torch import Tensor

from pvi.compiled.backend import make_function
from pvi.compiled.errors import NotCompilable
from pvi.compiled.python_state import moved, numbers
from pvi.compiled.unit import Source, Unit, buffers, check, live, make_unit, signature
from pvi.engine.data import Batch
from pvi.engine.objective import Evaluation
from pvi.engine.params import Params
from pvi.errors import ObjectiveError

Run = Callable[[Batch, Sequence[Tensor]], Sequence[Tensor]]
FIRST = 2  # calls that run the programs
BACKENDS = ("inductor", "graph")


def compile(module: ELBOModule, backend: str = "inductor") -> "CompiledLoss":
    """A loss for training loops of one's own, with its gradients from a graph of the programs.

    The first two calls run the programs; then a step is captured, compared with them, and used for
    arguments of the same shapes. The random stream is that of the programs. What can't be captured
    is run as it is, and `reason` says why.

    Args:
        module: `objective(model, guide)`, with any `pvi` objective without KL schedules.
        backend: "inductor" compiles to machine code, "graph" runs the operations one by one.

    Returns:
        A module that gives the loss (nats), to be differentiated once, by the parameters.

    Raises:
        ObjectiveError: it is no such module, or of another package's objective.

    >>> import pyro, torch, pyro.distributions as dist, pvi
    >>> def model(y):
    ...     mu = pyro.sample("mu", dist.Normal(0., 10.))
    ...     with pyro.plate("data", len(y)):
    ...         pyro.sample("y", dist.Normal(mu, 1.), obs=y)
    >>> y = torch.tensor([1., 2., 3.])
    >>> guide = pvi.guides.MeanField(model).setup(y)
    >>> loss = pvi.compile(pvi.ELBO()(model, guide), backend="graph")
    >>> for _ in range(4):
    ...     loss(y).backward()
    >>> loss(y).ndim
    0
    """
    if not isinstance(module, ELBOModule) or not hasattr(module.elbo, "evaluate"):
        raise ObjectiveError(
            f"compile takes objective(model, guide) of a pvi objective, got {type(module).__name__}"
        )
    if backend not in BACKENDS:
        raise ObjectiveError(f"backend must be one of {BACKENDS}, got {backend!r}")
    return CompiledLoss(module, backend)


class CompiledLoss(ELBOModule):
    """See `compile`.

    Args:
        module: whose loss it is.
        backend: how graphs are run.
    """

    def __init__(self, module: ELBOModule, backend: str):
        super().__init__(module.model, module.guide, module.elbo)
        self._backend, self._calls, self.reason = backend, 0, ""
        self._seen: dict[str, Batch] = {}
        self._made: dict[str, tuple[Unit, Run]] = {}
        self._numbers: dict[str, dict[str, Any]] = {}  # that the programs reach

    def __getstate__(self) -> dict[str, Any]:
        """Copies capture anew, for they have parameters of their own."""
        return {**super().__getstate__(), "_calls": 0, "_seen": {}, "_made": {}, "_numbers": {}}

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The loss of the objective, nats."""
        batch = Batch(args, kwargs, None, 0)
        found = self._ready(batch) if torch.is_grad_enabled() and not self.reason else None
        if found is None:
            return super().forward(*args, **kwargs)
        unit, function = found
        return _Loss.apply(unit, function, batch, *live(unit))  # type: ignore[return-value]

    def _ready(self, batch: Batch) -> tuple[Unit, Run] | None:
        """The captured step for a batch of this shape, once there is one."""
        self._calls += 1
        tensors = (*self.parameters(), *pyro.get_param_store()._params.values())
        own = [(id(x), x.requires_grad) for x in tensors]  # replaced and frozen ones are others
        shape = (signature(batch), [module.training for module in self.modules()], own)
        key = repr(shape)
        other = self._seen.setdefault(key, batch)
        if self._calls <= FIRST or other is batch:
            return None
        try:
            now = numbers(self.model, self.guide)
            changed = moved(self._numbers.setdefault(key, now), now)
            if changed:
                raise NotCompilable(f"'{changed}' in the programs changes from step to step")
            if key not in self._made:
                self._made[key] = self._make(other, batch)
            elif self._calls & (self._calls - 1) == 0:
                check(*self._made[key], (batch, []))
        except NotCompilable as error:
            self.reason = str(error)
            return None
        return self._made[key]

    def _make(self, other: Batch, batch: Batch) -> tuple[Unit, Run]:
        """Capture, compile and check."""
        store: Any = pyro.get_param_store().get_state()
        params = Params(self.model, self.guide, state=store)
        leaves = params.named()
        known = {id(x) for x in leaves.values()}
        rest = [x for x in params.tensors().values() if id(x) not in known]
        objective: Any = self.elbo

        def evaluate(batch: Batch, weights: Sequence[Tensor]) -> Evaluation:
            return objective.evaluate(self.model, self.guide, batch.args, batch.kwargs)

        source = Source(evaluate, leaves, rest, (self.model, self.guide), fixed=False)
        unit = make_unit(source, [(other, []), (batch, [])])
        function = make_function(unit.graph, self._backend)

        def run(batch: Batch, weights: Sequence[Tensor]) -> Sequence[Tensor]:
            return function(*[x.detach() for x in unit.inputs(batch, weights)])

        check(unit, run, (batch, []))
        return unit, run


class _Loss(torch.autograd.Function):
    """The loss of a captured step, whose gradients are known beforehand."""

    @staticmethod
    def forward(ctx: Any, unit: Unit, run: Run, batch: Batch, *leaves: Tensor) -> Tensor:
        record, *rest = run(batch, [])
        ctx.gradients = [x.clone() for x in rest[: len(leaves)]]
        for buffer, value in zip(buffers(unit), rest[len(leaves) :], strict=True):
            buffer.copy_(value)
        return record[unit.names.index("loss")].clone()

    @staticmethod
    def backward(ctx: Any, *given: Tensor) -> Any:
        return None, None, None, *(given[0] * x for x in ctx.gradients)
